"""Resident memory of a training run against its steps: it should not grow once all is compiled.

python experiments/benchmarks/host_memory.py --steps=1000
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from diffusion_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]


def resident_mib(process: int) -> float:
    status = Path(f'/proc/{process}/status').read_text()
    return int(re.search(r'VmRSS:\s+(\d+) kB', status)[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=1000)
    parser.add_argument('--config', default='configs/digits.py')
    parser.add_argument('overrides', nargs='*', help='such as --config.data.placement=host, after --')
    arguments = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, 'main.py', f'--config={arguments.config}', f'--workdir={workdir}']
        settings = {'num_steps': arguments.steps, 'log_every': 10, 'checkpoint_every': 100, 'sample_every': 10**6}
        command += [f'--config.train.{name}={value}' for name, value in settings.items()]
        command += ['--config.evaluate.after_training=False', *arguments.overrides]
        with (Path(workdir) / 'log').open('wb') as log:
            process = subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=log, stderr=log)
            while process.poll() is None:
                time.sleep(0.2)
                if (Path(workdir) / 'metrics.jsonl').exists():
                    step = max((row['step'] for row in read_metrics(workdir)), default=0)
                    try:
                        rows[step] = resident_mib(process.pid)
                    except (FileNotFoundError, TypeError):  # it has ended
                        break
        if process.wait():
            sys.exit((Path(workdir) / 'log').read_text()[-3000:])
    print('| step | resident, MiB |\n| --- | --- |')
    for aim in np.linspace(0, arguments.steps, 11)[1:]:
        step = max((step for step in rows if step <= aim), default=None)
        if step:
            print(f'| {step} | {rows[step]:.0f} |')
    later = np.array([(step, mib) for step, mib in rows.items() if step >= arguments.steps // 5])
    slope = np.polyfit(later[:, 0], later[:, 1], 1)[0]
    print(f'\nAfter the first fifth: {1000 * slope:+.1f} MiB per 1000 steps.')


if __name__ == '__main__':
    main()
