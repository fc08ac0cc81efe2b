"""Tab 5: what guidance does, a row of seeds a scale, and what it costs in diversity."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from diffusion_jax.errors import UsageError
from diffusion_jax.evaluation.class_agreement import mean_distance, share_read_as
from diffusion_jax.explorer import asking, calls, checks, pictures
from diffusion_jax.explorer.pictures import Picture, formatted
from diffusion_jax.explorer.plots import COLOURS, panels, points
from diffusion_jax.explorer.subject import Subject
from diffusion_jax.images import to_uint8
from diffusion_jax.pipelines.stepwise import walk
from diffusion_jax.samplers import SOLVERS

TITLE = 'Guidance'
SCALES = (0.0, 1.0, 2.0, 4.0, 8.0, 15.0)
"""Rows that are always there; the dragged scale has one more."""
RANGE = 30.0  # of the interval's ends, in log-SNR: beyond what any schedule has
MAX_WORK = 800  # images times steps of a row: one visitor shall not keep the others waiting for long
KEPT = 40  # rows a session keeps
PANELS = ('read as the label asked for', 'mean distance between features')


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """Images at one scale, and what the classifier finds in them; None where there is none."""

    scale: float
    images: UInt8[np.ndarray, 'N H W C']
    fidelity: float | None
    diversity: float | None


def settings_of(
    subject: Subject,
    asked: dict[str, Any],
    seed: Any,
    num: Any,
    solver: Any,
    steps: Any,
    low: Any,
    high: Any,
    rescale: Any,
) -> tuple[int, dict[str, Any]]:
    """(number of images, keyword arguments of the pipeline but the scale), or a `UsageError`."""
    settings = {name: value for name, value in asking.settings(subject, asked).items() if name != 'guidance_scale'}
    interval = (checks.number('from', low, -RANGE, RANGE), checks.number('to', high, -RANGE, RANGE))
    num = checks.whole('images', num, 1, checks.MAX_IMAGES)
    if num * checks.whole('steps', steps, 1, checks.MAX_STEPS) > MAX_WORK:
        raise UsageError(
            f'images times steps must be at most {MAX_WORK}, got {num} x {steps}: every row draws as many.'
        )
    return num, {
        **settings,
        'seed': checks.whole('seed', seed, 0, checks.MAX_SEED),
        'solver': checks.choice('solver', solver, SOLVERS),
        'steps': int(steps),
        'guidance_interval': interval,
        'guidance_rescale': checks.number('rescale', rescale, 0.0, 1.0),
    }


def draw(subject: Subject, num: int, scale: float, settings: dict[str, Any]) -> Iterator[Row | None]:
    """None after each model call, and then the row."""
    pipeline = subject.pipeline
    x = None
    for call in walk(pipeline, num, guidance_scale=scale, **settings):
        x = call.x
        yield None
    x = x if pipeline.latents is None else pipeline.latents.decode(x)
    images = np.asarray(to_uint8(x))
    fidelity = diversity = None
    if subject.classifier is not None:
        features, logits = subject.classifier(images)
        fidelity = share_read_as(logits, np.resize(settings['labels'], num))
        diversity = mean_distance(features) if num > 1 else None
    yield Row(scale, images, fidelity, diversity)


def html_of(rows: list[Row], scale: float) -> str:
    """The grid: a row a scale, the dragged one marked."""
    made = []
    for row in sorted(rows, key=lambda row: row.scale):
        side_by_side = np.concatenate(list(row.images), axis=1)
        caption = '' if row.fidelity is None else f'read as asked: {100 * row.fidelity:.3g} %'
        caption += '' if row.diversity is None else f', apart: {formatted(row.diversity, 3)}'
        chosen = row.scale == scale
        title = f'scale {row.scale:g}' + (' \u25c0' if chosen else '')
        name = 'chosen_row' if chosen else f'row_{row.scale:g}'.replace('.', '_')
        made.append(pictures.figure(Picture(name, side_by_side, title, caption), min(64 * len(row.images), 760)))
    return f'<div class="dj-column">{"".join(made)}</div>'


def plot(rows: list[Row], scale: float) -> dict[str, Any]:
    """Fidelity and diversity against the scale, as a Plotly dict."""
    traces = []
    ordered = sorted(rows, key=lambda row: row.scale)
    for panel, field in enumerate(('fidelity', 'diversity')):
        known = [row for row in ordered if getattr(row, field) is not None]
        for mark, some in ((False, known), (True, [row for row in known if row.scale == scale])):
            looks = {'marker': {'size': 14, 'symbol': 'circle-open', 'color': COLOURS[1]}} if mark else {}
            looks |= {'mode': 'markers' if mark else 'lines+markers', 'legend': False}
            x, y = [row.scale for row in some], [getattr(row, field) for row in some]
            traces.append(points(panel, x, y, 'this scale' if mark else PANELS[panel], **looks))
    return {'data': traces, 'layout': panels(PANELS, 'guidance scale', height=300)}


def show(
    subject: Subject, asked: dict[str, Any], rest: tuple[Any, ...], kept: dict[Any, Row] | None
) -> Iterator[tuple[str, str, dict[str, Any] | None, str, dict[Any, Row]]]:
    """Yields (message, HTML, plot, Python, rows that are kept) as row after row is drawn.

    Args:
      rest: of `settings_of`, after `asked`.
      kept: rows of before, by their settings: these are not drawn again.
    """
    num, settings = settings_of(subject, asked, *rest)
    scale = checks.number('guidance scale', asked.get('scale'), 0.0, checks.MAX_SCALE)
    base = repr((num, sorted(settings.items())))
    kept = {key: row for key, row in (kept or {}).items() if key[0] == base}
    while len(kept) > KEPT:
        kept.pop(next(iter(kept)))
    told = calls.python(
        subject,
        f'settings = dict({calls.arguments(settings)})',
        f'images = pipeline({num}, guidance_scale={scale!r}, **settings).images',
    )
    has_scores = subject.classifier is not None
    for wanted in (scale, *(other for other in SCALES if other != scale)):
        if (base, wanted) not in kept:
            for made in draw(subject, num, wanted, settings):
                if made is None:
                    yield pictures.note(f'drawing at scale {wanted:g} ..'), None, None, told, kept
                else:
                    kept[base, wanted] = made
        rows = [row for key, row in kept.items() if key[1] in (scale, *SCALES)]
        yield '', html_of(rows, scale), plot(rows, scale) if has_scores else None, told, kept


def tab(page) -> None:
    import gradio as gr

    subject = page.subject
    state = gr.State(None, time_to_live=page.seconds_kept)
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            asked = asking.widgets(subject, 'guidance')
            seed = gr.Number(0, precision=0, label='seed', elem_id='guidance-seed')
            num = gr.Slider(1, checks.MAX_IMAGES, value=8, step=1, label='images', elem_id='guidance-images')
            solver = gr.Dropdown(list(SOLVERS), value='ddim', label='solver')
            steps = gr.Slider(1, checks.MAX_STEPS, value=10, step=1, label='steps', elem_id='guidance-steps')
            low = gr.Slider(-RANGE, RANGE, value=-RANGE, step=0.5, label='guide from log-SNR', elem_id='guidance-low')
            high = gr.Slider(-RANGE, RANGE, value=RANGE, step=0.5, label='to log-SNR', elem_id='guidance-high')
            rescale = gr.Slider(0.0, 1.0, value=0.0, step=0.05, label='rescale', elem_id='guidance-rescale')
            page.stop_button('guidance')
        with gr.Column(scale=3, min_width=400):
            status = gr.HTML(elem_id='guidance-message')
            figure = gr.HTML(elem_id='guidance-figure')
            drawn = gr.Plot(show_label=False, elem_id='guidance-plot', visible=subject.classifier is not None)
            code = page.code('guidance')
    rest = {'seed': seed, 'images': num, 'solver': solver, 'steps': steps, 'low': low, 'high': high, 'rescale': rescale}

    def rows(*values):
        *values, kept = values
        conditions = dict(zip(asked, values[: len(asked)], strict=True))
        for message, html, plotted, call, rows in show(subject, conditions, tuple(values[len(asked) :]), kept):
            unchanged = gr.skip()
            plotted = unchanged if plotted is None else page.plotted(plotted)
            yield message, unchanged if html is None else html, plotted, call, rows

    outputs = [status, figure, drawn, code, state]
    page.tab('guidance', {**asked, **rest}, rows, [state], outputs, drawn=state)
    changed = [widget.release for widget in (asked['scale'], num, steps, low, high, rescale)]
    changed += [seed.submit, seed.blur, solver.input]
    changed += [asked[name].input for name in ('label',) if name in asked]
    changed += [asked[name].submit for name in ('prompt',) if name in asked]
    page.react(changed, 'guidance')
