"""The CIFAR-10 U-Net's training step and sampling, beside diffusers and torch.compile and diffusers' last Flax release.

    python experiments/benchmarks/run.py --torch-python=ENV/bin/python --flax-python=ENV2/bin/python

Contenders live in processes of their own and take turns, so that what else the machine does meets all of them; times
are medians over the turns. The others' environments (they are no dependencies of this project):

    python -m venv ENV  && ENV/bin/pip install torch diffusers        # on a GPU: the torch for it
    python -m venv ENV2 && ENV2/bin/pip install 'diffusers==0.35.2' 'transformers<5' flax optax jax

Parts: train (a step: forward, gradient, clipping, Adam, average), sample (DDIM), first_sample (from the start of a
process to its first image, with nothing compiled before and again), scaling (our step against the batch). Writes
results.json and prints the table as Markdown. What is called compiling is with PyTorch the whole first call.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
PARTS = ('train', 'sample', 'first_sample', 'scaling')
# Dense bfloat16 FLOP/s as published; of any other device, what its own matrix product reaches.
PEAK_FLOPS = {'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA H200': 989e12, 'TPU v4': 275e12, 'TPU v5 lite': 197e12}


class Contender:
    """A process that answers requests for timings."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str] | None = None):
        self.name = name
        self.said = tempfile.TemporaryFile('w+')  # noqa: SIM115  (the process writes to it until it ends)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if '--verbose' in sys.argv else self.said,
            text=True,
            env=os.environ | {'TF_CPP_MIN_LOG_LEVEL': '2'} | (environment or {}),
        )

    def ask(self, part: str, **settings) -> dict:
        try:
            self.process.stdin.write(json.dumps({'part': part, **settings}) + '\n')
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ''
        if not line:
            self.said.seek(0)
            raise RuntimeError(f'{self.name} ended during {part} {settings}:\n{self.said.read()[-3000:]}')
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def commands(arguments: argparse.Namespace) -> dict[str, list[str]]:
    folder = HERE / 'contenders'
    found = {'diffusion_jax': [sys.executable, str(folder / 'ours.py')]}
    if arguments.torch_python:
        torch = [arguments.torch_python, str(folder / 'diffusers_torch.py')]
        found['diffusers'] = torch
        if not arguments.no_compile:
            found['diffusers + torch.compile'] = [*torch, '--compile', *['--channels-last'] * arguments.channels_last]
    if arguments.flax_python:
        found['diffusers 0.35 (Flax)'] = [arguments.flax_python, str(folder / 'diffusers_flax.py')]
    return found


def take_turns(arguments: argparse.Namespace, part: str, **settings) -> dict[str, dict]:
    """Each contender's median seconds, what its first call took, and its peak of memory; one turn each to warm up."""
    contenders = {name: Contender(name, command) for name, command in commands(arguments).items()}
    rows = {name: {'seconds': []} for name in contenders}
    try:
        for turn in range(arguments.turns + 1):
            for name, contender in contenders.items():
                answer = contender.ask(part, dtype=arguments.dtype, **settings)
                seconds = answer.pop('seconds')
                rows[name].update(answer)
                if turn:
                    rows[name]['seconds'].append(seconds)
                print(f'  {part} {settings} {name}: {seconds:.3f} s{"" if turn else " (to warm up)"}', file=sys.stderr)
        for name, contender in contenders.items():
            rows[name] |= contender.ask('info', dtype=arguments.dtype) | contender.ask('memory')
            rows[name]['median_s'] = statistics.median(rows[name]['seconds'])
            if part == 'train' and name == 'diffusion_jax':
                kind = rows[name]['device']
                measured = contender.ask('matmul', dtype=arguments.dtype)['flops_per_s']
                peak = PEAK_FLOPS.get(kind) if arguments.dtype == 'bfloat16' else None
                rows[name]['peak_flops'] = peak or measured
    finally:
        for contender in contenders.values():
            contender.close()
    counts = {row['parameters'] for row in rows.values()}
    if max(counts) / min(counts) > 1.001:
        raise RuntimeError(f'not the same network: {sorted(counts)} parameters')
    return rows


def first_samples(arguments: argparse.Namespace) -> dict[str, dict]:
    """Seconds from the start of a process to one image of DDIM-10: with an empty cache of compiled code, and again."""
    rows = {}
    for name, command in commands(arguments).items():
        with tempfile.TemporaryDirectory() as cache:
            places = {'BENCHMARK_CACHE': cache, 'TORCHINDUCTOR_CACHE_DIR': cache, 'JAX_COMPILATION_CACHE_DIR': cache}
            rows[name] = {}
            for kind in ('cold', 'warm'):
                began = time.perf_counter()
                contender = Contender(name, command, places)
                contender.ask('sample', batch=1, steps=10, dtype=arguments.dtype)
                rows[name][kind] = time.perf_counter() - began
                contender.close()
                print(f'  first sample {name}, {kind}: {rows[name][kind]:.1f} s', file=sys.stderr)
    return rows


def scaling(arguments: argparse.Namespace) -> dict[str, dict]:
    rows = {}
    contender = Contender('diffusion_jax', commands(arguments)['diffusion_jax'])
    for batch in arguments.scaling_batches:
        seconds = [contender.ask('train', batch=batch, dtype=arguments.dtype) for _ in range(arguments.turns + 1)]
        rows[str(batch)] = {
            'median_s': statistics.median(answer['seconds'] for answer in seconds[1:]),
            'temporaries_bytes': seconds[0]['temporaries_bytes'],
        }
    contender.close()
    return rows


def table(results: dict) -> str:
    lines = []
    for key, rows in results['parts'].items():
        part, _, settings = key.partition(' ')
        lines.append(f'**{part}** {settings}\n')
        if part == 'first_sample':
            lines += ['| | cold, s | warm, s |', '| --- | --- | --- |']
            lines += [f'| {name} | {row["cold"]:.1f} | {row["warm"]:.1f} |' for name, row in rows.items()]
        elif part == 'scaling':
            lines += ['| batch | s a step | ms an image | temporaries, MiB |', '| --- | --- | --- | --- |']
            for batch, row in rows.items():
                each, memory = 1000 * row['median_s'] / int(batch), row['temporaries_bytes'] / 2**20
                lines.append(f'| {batch} | {row["median_s"]:.2f} | {each:.0f} | {memory:.0f} |')
        else:
            batch, ours = results['settings'][key], rows['diffusion_jax']['median_s']
            lines.append('| | images/s | ours is faster by | compile, s | peak memory, GiB | parameters |')
            lines.append('| --- | --- | --- | --- | --- | --- |')
            for name, row in rows.items():
                memory = (row['device_bytes'] or row['host_bytes']) / 2**30
                lines.append(
                    f'| {name} ({row["version"]}) | {batch / row["median_s"]:.3g} | {row["median_s"] / ours:.2f} x '
                    f'| {row["compile_s"]:.0f} | {memory:.2f} | {row["parameters"]:,} |'
                )
            row = rows['diffusion_jax']
            if 'model_flops' in row:
                rate = row['model_flops'] / row['median_s']
                lines.append(
                    f'\nOurs: {row["model_flops"] / batch / 1e9:.1f} GFLOP an image, {rate / 1e9:.4g} GFLOP/s, '
                    f'{100 * rate / row["peak_flops"]:.0f}% of {row["peak_flops"] / 1e9:.4g}.'
                )
        lines.append('')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--torch-python', help='Python with torch and diffusers; without it they are left out')
    parser.add_argument('--flax-python', help='Python with diffusers 0.35.2 and flax; without it that is left out')
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS)
    parser.add_argument('--train-batches', nargs='+', type=int, default=[8])
    parser.add_argument('--sample-batches', nargs='+', type=int, default=[1, 4])
    parser.add_argument('--scaling-batches', nargs='+', type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument('--steps', type=int, default=50, help='of DDIM')
    parser.add_argument('--turns', type=int, default=3)
    parser.add_argument('--dtype', choices=['float32', 'bfloat16'], default='float32')
    parser.add_argument('--no-compile', action='store_true', help='leave torch.compile out')
    parser.add_argument('--channels-last', action='store_true', help="torch.compile's tensors in NHWC")
    parser.add_argument('--out', type=Path, default=HERE / 'results.json', help='parts that it has already are kept')
    parser.add_argument('--verbose', action='store_true', help='show what the contenders print')
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {'parts': {}, 'settings': {}}

    def keep(key: str, rows: dict, batch: int | None = None) -> None:
        results['parts'][key], results['settings'][key] = rows, batch
        arguments.out.write_text(json.dumps(results, indent=2) + '\n')  # at once: a later part may fail

    if 'train' in arguments.parts:
        for batch in arguments.train_batches:
            keep(f'train batch {batch}, {arguments.dtype}', take_turns(arguments, 'train', batch=batch), batch)
    if 'sample' in arguments.parts:
        for batch in arguments.sample_batches:
            key = f'sample DDIM-{arguments.steps}, batch {batch}, {arguments.dtype}'
            keep(key, take_turns(arguments, 'sample', batch=batch, steps=arguments.steps), batch)
    if 'first_sample' in arguments.parts:
        keep(f'first_sample DDIM-10, batch 1, {arguments.dtype}', first_samples(arguments))
    if 'scaling' in arguments.parts:
        keep(f'scaling of our step, {arguments.dtype}', scaling(arguments))
    print(table(results))


if __name__ == '__main__':
    main()
