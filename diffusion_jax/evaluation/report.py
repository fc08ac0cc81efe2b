"""What a run came to: `evaluation.json`, and one page, `report.html`, which needs no other file and no network."""

import base64
import html
import io
import json
import logging
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion_jax.config import flatten, solver_options
from diffusion_jax.distributed import is_writer
from diffusion_jax.errors import SamplingDiverged
from diffusion_jax.experiment import Autoencoder
from diffusion_jax.images import grid, to_uint8
from diffusion_jax.models import count_params
from diffusion_jax.pipelines.images import ImagePipeline
from diffusion_jax.training.metrics import curves_figure, read_metrics

LOGGER = logging.getLogger(__name__)

FRAMES = 12  # of a sample's way from noise to image
WAYS = 6  # samples whose way is shown

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .15rem 1rem .15rem 0; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: .6rem 1rem .6rem 0; display: inline-block; vertical-align: top; max-width: 100%; }
figure.wide { display: block; overflow-x: auto; }
figure img { max-width: 100%; background: white; } figure.wide img { max-width: none; }
figcaption, .quiet { color: GrayText; font-size: .9rem; }
"""


def _png(picture: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, 'PNG', optimize=True)
    return _data('image/png', buffer.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f'data:{kind};base64,{base64.b64encode(content).decode()}'


def _figure(source: str, caption: str, wide: bool = False) -> str:
    text = html.escape(caption)
    kind = ' class="wide"' if wide else ''
    return f'<figure{kind}><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _table(rows: list[tuple[str, Any]], heads: tuple[str, ...] = ()) -> str:
    def cell(value: Any) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        text = f'{value:.4g}' if isinstance(value, float) else str(value)
        return f'<td{" class=number" if number else ""}>{html.escape(text)}</td>'

    head = ''.join(f'<th>{html.escape(name)}</th>' for name in heads)
    body = ''.join(f'<tr>{"".join(map(cell, row))}</tr>' for row in rows)
    return f'<table>{f"<tr>{head}</tr>" if head else ""}{body}</table>'


def _section(title: str, *parts: str) -> str:
    return f'<h2>{html.escape(title)}</h2>\n' + '\n'.join(parts) if any(parts) else ''


def _way(pipeline: ImagePipeline, section: ConfigDict) -> tuple[str, str] | None:
    """(picture, caption) of some samples from noise to image; every process takes part."""
    labels = list(range(min(WAYS, pipeline.num_classes))) or None
    try:
        trajectory = pipeline.trajectory(
            WAYS,
            labels=labels,
            guidance_scale=section.guidance_scale,
            solver=section.solver,
            steps=section.steps,
            spacing=section.spacing,
            final=section.final,
            guidance_rescale=section.guidance_rescale,
            guidance_interval=section.guidance_interval,
            seed=section.seed,
            clip=section.clip,
            **solver_options(section),
        )
    except SamplingDiverged as error:
        LOGGER.warning('no way from noise to image in the report: %s', error)
        return None
    if not is_writer():
        return None
    steps = len(trajectory.x0)
    shown = np.unique(np.linspace(0, steps - 1, min(FRAMES, steps)).round().astype(int))
    rows = []
    for index in range(trajectory.x.shape[1]):
        # Where x is larger than images are (noise, and schedules that explode), each frame is scaled into their range.
        noisy = trajectory.x[shown, index]
        noisy = noisy / np.maximum(1, np.abs(noisy).max(axis=(1, 2, 3), keepdims=True))
        rows += [noisy, trajectory.x[-1:, index], trajectory.x0[shown, index], trajectory.x[-1:, index]]
    picture = grid(np.asarray(to_uint8(np.concatenate(rows))), columns=len(shown) + 1, min_side=56)
    names = f' ({", ".join(pipeline.class_names[label] for label in labels)})' if labels else ''
    return _png(picture), (
        f'{WAYS} samples{names}, two rows each: above x, below the predicted x0, after '
        f'{", ".join(str(step) for step in shown)} of {steps} steps, and last the sample ({section.solver})'
    )


def _scores(report: dict[str, Any]) -> str:
    scores = report['scores']
    beside = '_of_real_images'
    rows = [
        (name.replace('_', ' '), value, scores.get(name + beside, ''))
        for name, value in scores.items()
        if not isinstance(value, dict) and not name.endswith(beside)
    ]
    of_samples = bool(report['sample'])
    tables = [_table(rows, ('', 'samples', 'real images') if of_samples else ('', 'reconstructions', ''))]
    for name, value in scores.items():
        if isinstance(value, dict):
            tables.append(f'<h3>{html.escape(name.replace("_", " "))}</h3>{_table(list(value.items()))}')
    sample = {key: value for key, value in report['sample'].items() if value is not None}
    features = report.get('features')
    what = 'samples' if of_samples else f'images of the {report["reference"]["name"]} split'
    said = [f'{report["num"]} {what} of step {report["step"]}']
    if of_samples:
        said.append(', '.join(f'{key} {value}' for key, value in sample.items() if key not in ('num', 'batch_size')))
    if features:
        said.append(f'features of {features["name"]} ({features["sha256"][:12]})')
    said.append(f'{report["seconds"]} s on {report["devices"]}')
    return ''.join(tables) + f'<p class=quiet>{html.escape("; ".join(said))}</p>'


def _timings(rows: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    speeds = [row for row in rows if 'images_per_second' in row]
    if not speeds:
        return []
    seconds, previous = 0.0, 0
    for row in speeds:
        seconds += (row['step'] - previous) / row['steps_per_second']
        previous = row['step']
    return [
        ('training steps', speeds[-1]['step']),
        ('images per second (median)', float(np.median([row['images_per_second'] for row in speeds]))),
        ('time in training steps (minutes)', seconds / 60),
        ('of which waiting for images', f'{100 * float(np.mean([row["input_wait"] for row in speeds])):.1f}%'),
    ]


def save_evaluation(
    config: ConfigDict,
    workdir: str | Path,
    scores: dict[str, Any],
    *,
    step: int,
    num: int,
    network: Any,
    splits: Any,
    seconds: float,
    mesh: Mesh,
) -> dict[str, Any]:
    """Writes `workdir/evaluation.json`: scores, and what is needed to repeat them; returns it.

    Args:
      num: images that were scored.
      network: of the features; None where none were read.
      seconds: that it took.
    """
    report = {
        'scores': scores,
        'step': step,
        'ema': config.sample.ema,
        'num': num,
        'sample': config.sample.to_dict() if config.task == 'diffusion' else {},
        'features': None if network is None else {'name': network.name, 'sha256': network.sha256},
        'reference': {'name': config.evaluate.reference, 'train': len(splits.train), 'test': len(splits.test)},
        'seconds': round(seconds, 1),
        'devices': f'{mesh.size} x {mesh.devices.flat[0].device_kind}',
        'versions': {'python': platform.python_version()}
        | {name: version(name) for name in ('jax', 'flax', 'numpy', 'scikit-learn')},
        'config': config.to_dict(),
    }
    path = Path(workdir) / 'evaluation.json'
    part = path.with_suffix('.part')
    part.write_text(json.dumps(report, indent=1) + '\n')
    part.replace(path)
    for name, value in scores.items():
        if not isinstance(value, dict):
            LOGGER.info('%s: %s', name, f'{value:.4f}' if isinstance(value, float) else value)
    return report


def write_report(config: ConfigDict, workdir: str | Path, pipeline: ImagePipeline, step: int) -> Path:
    """Writes `workdir/report.html`: curves, scores, samples over training, the way of some, config and timings.

    Every process calls it, as all take part in sampling; one writes.
    """
    way = _way(pipeline, config.sample)
    model = f'schedule {config.schedule.name}, predicts {config.loss.prediction}'
    return _write_page(config, workdir, pipeline.params, pipeline.image_shape, step, model, way)


def write_autoencoder_report(
    config: ConfigDict, workdir: str | Path, autoencoder: Autoencoder, params: Any, step: int
) -> Path:
    """Writes `workdir/report.html` of an autoencoder: curves, scores, reconstructions, config and timings."""
    side = autoencoder.data.image_shape[0] // autoencoder.factor
    model = f'latents of {side}x{side}x{autoencoder.latent_channels}'
    return _write_page(config, workdir, params, autoencoder.data.image_shape, step, model, None)


def _write_page(
    config: ConfigDict,
    workdir: str | Path,
    params: Any,
    image_shape: tuple[int, int, int],
    step: int,
    model: str,
    way: tuple[str, str] | None,
) -> Path:
    workdir = Path(workdir)
    path = workdir / 'report.html'
    if not is_writer():
        return path
    rows = read_metrics(workdir)
    curves = ''
    if rows:
        buffer = io.BytesIO()
        curves_figure(rows).savefig(buffer, format='svg')
        curves = _figure(_data('image/svg+xml', buffer.getvalue()), 'Against the training step')
    scores = pictures = ''
    if (workdir / 'evaluation.json').exists():
        scores = _scores(json.loads((workdir / 'evaluation.json').read_text()))
        pictures = ''.join(
            _figure(_data('image/png', picture.read_bytes()), caption, wide=True)
            for name, caption in (
                ('samples', 'The first of the samples that were scored'),
                ('reconstructions', 'The first of the images that were scored, and below each its reconstruction'),
                ('nearest', 'The samples nearest to training images, and below them those images'),
                ('misread', 'Samples that the classifier reads as another class than was asked for'),
            )
            if (picture := workdir / 'evaluation' / f'{name}.png').exists()
        )
    grids = {
        int(match[1]): picture
        for picture in (workdir / 'samples').glob('training_step*.png')
        if (match := re.fullmatch(r'training_step(\d+)', picture.stem))
    }
    shape = 'x'.join(map(str, image_shape))
    settings = flatten(config.to_dict())
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(workdir.name)}: step {step}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(workdir.name)}</h1>
<p class=quiet>{html.escape(str(config.data.name))}, {shape}; {config.model.name} with {
        count_params(params) / 1e6:.2f} M parameters; {html.escape(model)}; step {step}</p>
{_section('Scores', scores, pictures)}
{_section('Curves', curves)}
{_section('From noise to image', _figure(*way, wide=True) if way else '')}
{
        _section(
            'Samples during training' if config.task == 'diffusion' else 'Reconstructions during training',
            *(_figure(_data('image/png', grids[at].read_bytes()), f'step {at}') for at in sorted(grids, reverse=True)),
        )
    }
{_section('Timings', _table(_timings(rows)) if _timings(rows) else '')}
{_section('Config', '<details><summary>all keys</summary>' + _table(sorted(settings.items())) + '</details>')}
</body></html>
"""
    part = path.with_suffix('.part')
    part.write_text(page)
    part.replace(path)
    LOGGER.info('report: %s', path)
    return path
