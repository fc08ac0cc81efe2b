"""What a run writes down: `metrics.jsonl` for scripts, TensorBoard events for eyes, and the curves as a picture."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax.errors import TrainingDiverged


class RunningMetrics:
    """Metrics of the steps since the last report. They stay on the device: the host must not wait for every step.

    Args:
      max_skipped: how many steps may have been skipped (metric 'skipped') before the run has diverged.
      skipped: how many were, before this start.
    """

    def __init__(self, max_skipped: int = 0, skipped: int = 0):
        self.skipped = skipped
        self._max_skipped = max_skipped
        self._on_device: list[tuple[int, dict[str, jax.Array]]] = []
        self._on_host: list[dict[str, float]] = []

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a dispatch, each of one step or of the [K] steps up to `step`.

        Waits for those of the dispatch before: one ahead is enough to keep the devices busy.
        """
        if self._on_device:
            jax.block_until_ready(self._on_device[-1][1])
        self._on_device.append((step, metrics))

    def check(self) -> None:
        """Waits for the steps so far.

        Raises:
          TrainingDiverged: a metric of one of them is NaN or infinite, or one too many was skipped for that.
        """
        dispatches, self._on_device = jax.device_get(self._on_device), []
        for last, metrics in dispatches:
            columns = {name: np.atleast_1d(values) for name, values in metrics.items()}
            count = len(next(iter(columns.values())))
            for i in range(count):
                self._take(last - count + 1 + i, {name: float(values[i]) for name, values in columns.items()})

    def _take(self, step: int, row: dict[str, float]) -> None:
        was_skipped = row.pop('skipped', 0.0) > 0
        if was_skipped:
            self.skipped += 1
        elif all(math.isfinite(value) for value in row.values()):
            self._on_host.append(row)
            return
        if not was_skipped or self.skipped > self._max_skipped:
            after = f' (after {self._max_skipped} skipped steps)' if was_skipped else ''
            raise TrainingDiverged(
                f'step {step}: ' + ', '.join(f'{name} {value:.4g}' for name, value in row.items()) + after
            )

    def report(self) -> dict[str, float]:
        """The mean of each metric over the steps since the last report that were not skipped, all of them checked."""
        self.check()
        rows, self._on_host = self._on_host, []
        means = {name: float(np.mean([row[name] for row in rows])) for name in (rows[0] if rows else ())}
        return means | ({'skipped_steps': float(self.skipped)} if self._max_skipped else {})


class MetricsWriter:
    """Scalars and images of a run, in its workdir.

    Opened at the step that a run resumes from, it drops what an earlier, killed run wrote after that step: the same
    steps are about to be made again.
    """

    def __init__(self, workdir: str | Path, step: int):
        from tensorboardX import SummaryWriter

        workdir = Path(workdir)
        path = workdir / 'metrics.jsonl'
        kept = [row for row in read_metrics(workdir) if row['step'] <= step]
        part = path.with_suffix('.part')
        part.write_text(''.join(json.dumps(row) + '\n' for row in kept))
        part.replace(path)
        self._file = path.open('a')
        self._board = SummaryWriter(str(workdir / 'tensorboard'), purge_step=step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({'step': step, **values}) + '\n')
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        self._board.add_image(name, picture, step, dataformats='HWC')

    def close(self) -> None:
        self._file.close()
        self._board.close()


class SilentWriter:
    """What the other processes have for a `MetricsWriter`."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        pass

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`, each a dict with its 'step'; a last line cut short by a kill is left out."""
    path = Path(workdir) / 'metrics.jsonl'
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


LOSSES = ('loss', 'held_out_loss')
SCORES = (
    'bits_per_dim',
    'class_agreement',
    'frechet_distance',
    'inception_score',
    'kernel_distance',
    'near_copies',
    'precision',
    'psnr',
    'recall',
)
"""Scores of `evaluate.every` that are drawn."""


def curves_figure(rows: list[dict[str, Any]]) -> Any:
    """A matplotlib figure: losses against the step, on logarithmic axes, and a panel a score (`evaluate.every`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name in SCORES]
    columns = min(2, 1 + len(names))
    panels = -(-(1 + len(names)) // columns)
    figure = Figure(
        figsize=(7 if columns == 1 else 10, 4 * panels if columns == 1 else 3.4 * panels), layout='constrained'
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, columns, squeeze=False).ravel()
    for name, style in zip(LOSSES, ('-', 'o-'), strict=True):
        points = [(row['step'], row[name]) for row in rows if name in row]
        if points:
            axes[0].plot(*zip(*points, strict=True), style, label=name.replace('_', ' '), markersize=4)
    axes[0].set(xlabel='step', ylabel='loss', xscale='log', yscale='log')
    axes[0].legend()
    for panel, name in zip(axes[1:], names, strict=False):
        points = [(row['step'], row[name]) for row in rows if name in row]
        panel.plot(*zip(*points, strict=True), 'o-', markersize=4)
        panel.set(xlabel='step', ylabel=name.replace('_', ' '))
    for panel in axes[: 1 + len(names)]:
        panel.grid(alpha=0.3, which='both')
    for panel in axes[1 + len(names) :]:
        panel.set_axis_off()
    return figure


def plot_curves(workdir: str | Path) -> Path:
    """Writes `curves.png` (`curves_figure`)."""
    path = Path(workdir) / 'curves.png'
    curves_figure(read_metrics(workdir)).savefig(path, dpi=110)
    return path
