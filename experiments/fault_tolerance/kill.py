"""Kills a training run with SIGKILL again and again, and compares what it ends with to an unbroken run's.

python experiments/fault_tolerance/kill.py --kills=25 --seed=0

A kill falls on a random step ('step'), in the middle of a save ('saving': a half-written folder is seen) or before the
first step ('starting': imports, restoring, compiling). After each, every checkpoint is read and verified. The states of
both runs must be the same, bit for bit, and so must all their losses.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion_jax.experiment import make_experiment, read_record
from diffusion_jax.training.checkpoints import UNFINISHED, Checkpoints, abstract
from diffusion_jax.training.digests import differing, digests
from diffusion_jax.training.metrics import read_metrics
from diffusion_jax.training.optimizer import make_optimizer
from diffusion_jax.training.sharding import make_mesh, replicated
from diffusion_jax.training.step import TrainState, init_state

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MOMENTS = {'step': 0.4, 'saving': 0.45, 'starting': 0.15}


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill and what it left. Steps are counted from the run's beginning; `seconds` from the process's."""

    moment: str
    seconds: float
    resumed: int | None  # None: killed before it had resumed
    reached: int
    saving: int | None  # the step that was half-written
    newest: int  # complete checkpoint; 0: none
    lost: int  # steps to do again


class Run:
    """`python main.py` in a workdir, its output in `workdir.log`."""

    def __init__(self, workdir: Path, cache: Path, arguments: list[str]):
        self.workdir, self.log, self.started = workdir, workdir.with_suffix('.log'), time.time()
        environment = {
            'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': '--xla_force_host_platform_device_count=1',
            'JAX_COMPILATION_CACHE_DIR': str(cache),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.05',
        }
        with self.log.open('wb') as file:
            self.process = subprocess.Popen(
                [sys.executable, 'main.py', f'--config={HERE / "config.py"}', f'--workdir={workdir}', *arguments],
                cwd=ROOT,
                env=os.environ | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.began = time.monotonic()

    def output(self) -> str:
        return self.log.read_text(errors='replace')

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def wait_until(self, condition, patience: float = 300.0) -> None:
        while not condition():
            assert self.process.poll() is None, f'the run ended before it was killed:\n{self.output()[-3000:]}'
            assert self.seconds() < patience, f'the run does not get on:\n{self.output()[-3000:]}'
            time.sleep(0.002)

    def training(self) -> bool:
        return 'training:' in self.output()

    def resumed(self) -> int | None:
        found = re.search(r'resumed at step (\d+)|a new run', self.output())
        return found and int(found[1] or 0)

    def finish(self) -> None:
        status = self.process.wait(timeout=600)
        assert status == 0, f'exit status {status}:\n{self.output()[-3000:]}'


def losses_of(workdir: Path) -> list[tuple[int, float]]:
    """(step, loss) as written down."""
    return [(row['step'], row['loss']) for row in read_metrics(workdir) if 'loss' in row]


def reached(workdir: Path) -> int:
    """The last step whose loss is written down."""
    return max((step for step, _ in losses_of(workdir)), default=0)


def unfinished(workdir: Path, since: float) -> set[int]:
    """The steps of checkpoints that are half-written, by a process started at that time (of `time.time`)."""
    found = set()
    for path in (workdir / 'checkpoints').glob(f'*{UNFINISHED}*'):
        with contextlib.suppress(FileNotFoundError):  # complete by now
            if path.stat().st_mtime > since and not path.name.endswith('deleted'):
                found.add(int(path.name.split('.')[0]))
    return found


def abstract_state(workdir: Path) -> TrainState:
    record, info = read_record(workdir)
    config = ConfigDict(record)
    experiment = make_experiment(config, info)
    optimizer, _ = make_optimizer(**config.optimizer, num_steps=config.train.num_steps)
    shapes = jax.eval_shape(lambda: init_state(experiment.init, optimizer, config.seed, experiment.loss_history))
    return abstract(shapes, replicated(make_mesh()))


def check_all(workdir: Path) -> int:
    """Reads and verifies every checkpoint; returns the newest's step, or 0."""
    checkpoints = Checkpoints(workdir)
    if not checkpoints.steps():
        return 0
    damaged = checkpoints.damaged(abstract_state(workdir))
    assert not damaged, f'a killed run left damaged checkpoints: {damaged}'
    return checkpoints.steps()[-1]


def kill_once(run: Run, moment: str, advance: int, startup: float, rng: np.random.Generator) -> Kill:
    """Kills the run at that moment, `advance` steps or more after it resumed, and looks at what is left."""
    workdir = run.workdir
    if moment == 'starting':
        time.sleep(rng.uniform(0, startup))
    else:
        run.wait_until(run.training)  # from here on the metrics are those of this process
        aim = run.resumed() + advance
        run.wait_until(lambda: reached(workdir) >= aim)
        if moment == 'saving':
            before = unfinished(workdir, run.started)
            run.wait_until(lambda: unfinished(workdir, run.started) - before)
            time.sleep(rng.uniform(0, 0.05))
    seconds = run.seconds()
    run.process.send_signal(signal.SIGKILL)
    status = run.process.wait()
    assert status == -signal.SIGKILL, f'the run ended by itself ({status}):\n{run.output()[-3000:]}'
    newest = check_all(workdir)
    # A row may be in the file's buffer while its step is saved already.
    got_to = max(reached(workdir), newest)
    half = max((step for step in unfinished(workdir, run.started) if step > newest), default=None)
    return Kill(moment, round(seconds, 2), run.resumed(), got_to, half, newest, got_to - newest)


def kill_and_resume(
    workdir: str | Path, kills: int = 25, seed: int = 0, num_steps: int | None = None, progress: bool = True
) -> list[Kill]:
    """Trains twice below `workdir`, one run unbroken and one killed `kills` times, and returns a row for each kill.

    Args:
      num_steps: of each run, instead of the config's; must leave a few saves (one in five steps) for each kill.

    Raises:
      AssertionError: a checkpoint is damaged, a run resumed from other than its newest one, more was lost than since
        the last save that could be complete, or the two runs ended differently.
    """
    workdir, rng = Path(workdir), np.random.default_rng(seed)
    workdir.mkdir(parents=True, exist_ok=True)
    arguments = (
        [] if num_steps is None else [f'--config.train.{key}={num_steps}' for key in ('num_steps', 'sample_every')]
    )
    cache, whole, broken = workdir / 'cache', workdir / 'unbroken', workdir / 'broken'
    bar = tqdm(total=kills + 2, desc='unbroken run', disable=not progress, dynamic_ncols=True)

    Run(whole, cache, arguments).finish()
    bar.update()
    settings = read_record(whole)[0]['train']
    every, total = settings['checkpoint_every'], settings['num_steps']

    rows: list[Kill] = []
    startup = 0.0
    for i in range(kills):
        moment = 'step' if startup == 0 else str(rng.choice(list(MOMENTS), p=list(MOMENTS.values())))
        bar.set_description(f'kill {i + 1}, {moment}')
        newest = rows[-1].newest if rows else 0
        # The rest of the run is shared out among the kills to come; a save that is waited for takes steps, too.
        share = max((total - newest) / (kills - i + 1) - every, 1)
        run = Run(broken, cache, arguments)
        if startup == 0:
            run.wait_until(run.training)
            startup = run.seconds()
        rows.append(kill_once(run, moment, int(rng.integers(1, max(2, int(1.5 * share)))), startup, rng))
        check_resumed(rows[-1].resumed, newest)
        # A save waits for the one before, so the last but one is complete; the next is about to wait.
        assert rows[-1].lost <= 2 * every, f'{rows[-1].lost} steps lost, saved every {every}'
        bar.update()

    bar.set_description('last run')
    run = Run(broken, cache, arguments)
    run.finish()
    check_resumed(run.resumed(), rows[-1].newest if rows else 0)
    bar.update()
    bar.close()

    assert check_all(broken) == check_all(whole) == total
    a, b = (Checkpoints(folder).restore(abstract_state(folder)).state for folder in (whole, broken))
    assert not (changed := differing(digests(a), digests(b))), f'not as in the unbroken run: {changed}'
    for x, y in zip(jax.tree.leaves((a.params, a.ema)), jax.tree.leaves((b.params, b.ema)), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    losses = losses_of(whole)
    assert losses == losses_of(broken)
    assert [step for step, _ in losses] == list(range(1, total + 1))
    return rows


def check_resumed(resumed: int | None, newest: int) -> None:
    assert resumed in (None, newest), f'resumed at step {resumed}, but the newest checkpoint was of step {newest}'


def table(rows: list[Kill]) -> str:
    """The kills as Markdown."""
    header = '| kill | moment | after, s | resumed at | reached | half-written | newest complete | steps lost |'
    lines = [header, '| --- ' * 8 + '|']
    for i, row in enumerate(rows, 1):
        resumed, half = ('-' if value is None else value for value in (row.resumed, row.saving))
        cells = (i, row.moment, f'{row.seconds:.2f}', resumed, row.reached, half, row.newest, row.lost)
        lines.append(f'| {" | ".join(map(str, cells))} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=25)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, default=HERE / 'kills.json')
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = kill_and_resume(folder, arguments.kills, arguments.seed)
    arguments.out.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + '\n')
    print(table(rows))
    lost = [row.lost for row in rows]
    print(
        f'{len(rows)} kills, {sum(row.saving is not None for row in rows)} of them with a save half-written: every '
        'checkpoint is whole, and the last state and all losses are those of the unbroken run, bit for bit. Steps lost '
        f'per kill: {np.mean(lost):.1f} on average, {max(lost)} at most. {time.monotonic() - began:.0f} s.'
    )


if __name__ == '__main__':
    main()
