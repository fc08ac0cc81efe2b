"""Tab 4: the network's own map, what its blocks give on x_t, and what a skip connection carries."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.denoisers import ModelDenoiser
from diffusion_jax.errors import UsageError
from diffusion_jax.explorer import asking, calls, checks, network_svg, pictures
from diffusion_jax.explorer.forward import image_of
from diffusion_jax.explorer.pictures import Picture, formatted
from diffusion_jax.explorer.reverse import image_of as image_of_x0
from diffusion_jax.explorer.reverse import state_of
from diffusion_jax.explorer.subject import Subject
from diffusion_jax.images import to_float
from diffusion_jax.models.inspection import NetworkBlock, ablated, activations, count_skips, network_map
from diffusion_jax.process import q_sample
from diffusion_jax.schedules import Schedule

TITLE = 'U-Net'
CHANNELS = 32  # of a block that are shown
MAX_CHOICES = 100


@functools.lru_cache(maxsize=8)
def _map(apply, shape: tuple[int, int, int]) -> tuple[NetworkBlock, ...]:
    return tuple(network_map(apply, shape))


def map_of(subject: Subject) -> tuple[NetworkBlock, ...]:
    """The blocks of the subject's network, or a `UsageError` if it is none of this package's."""
    pipeline = subject.pipeline
    return _map(pipeline.apply, pipeline.model_shape)


def has_map(subject: Subject) -> bool:
    try:
        return bool(map_of(subject))
    except UsageError:
        return False


@functools.partial(jax.jit, static_argnames='schedule')
def _noisy(x0, t, key, *, schedule: Schedule):
    return q_sample(schedule, x0, t, jax.random.normal(key, x0.shape))


@functools.partial(jax.jit, static_argnames=('apply', 'schedule', 'prediction', 'learned_variance'))
def _x0(params, x_t, t, conditioning, *, apply, schedule: Schedule, prediction: str, learned_variance: bool):
    return ModelDenoiser(apply, params, schedule, prediction, conditioning, learned_variance)(x_t, t).x0


def predicted(subject: Subject, x_t, t: float, conditioning, skip_scale: list[float] | None) -> np.ndarray:
    """The predicted x0 [h, w, C] with the skips scaled; None: a network that has none. Scales are traced."""
    pipeline = subject.pipeline
    apply, params = pipeline.apply, pipeline.params
    if skip_scale is not None:
        apply, params = ablated(apply, params, skip_scale)
    kind = {'prediction': pipeline.prediction, 'learned_variance': pipeline.learned_variance}
    x0 = _x0(params, x_t, jnp.float32(t), conditioning, apply=apply, schedule=pipeline.schedule, **kind)
    return np.asarray(x0)[0]


def noisy(subject: Subject, pixels: np.ndarray, t: float, seed: int):
    """x_t [1, h, w, C] of an image, as the network sees it."""
    pipeline = subject.pipeline
    x0 = np.asarray(to_float(pixels[None].astype(np.float32)))
    x0 = x0 if pipeline.latents is None else pipeline.latents.encode(x0)
    return _noisy(x0, jnp.float32(t), jax.random.key(seed), schedule=pipeline.schedule)


def of_block(values: np.ndarray) -> tuple[np.ndarray, float]:
    """(picture, limit) of what a block gives: [h, w, C] its channels, [tokens, C] or [C] as a bar."""
    limit = float(np.abs(values).max()) or 1.0
    if values.ndim == 3:
        return pictures.channels(values, limit, CHANNELS), limit
    rows = values[None] if values.ndim == 1 else values
    return pictures.signed(rows[..., None], limit), limit


def view(
    subject: Subject, asked: dict[str, Any], image: Any, t: Any, seed: Any, block: Any, removed: Any
) -> tuple[str, str, str]:
    """(map as SVG, pictures as HTML, Python).

    Args:
      asked: of `asking.settings`, the label or the text.
      image: number of the image that noise is put on.
      t: in [0.001, 1].
      block: the path of the one whose activations are shown.
      removed: 'skip 0', .. that are left out.

    Raises:
      UsageError: a setting out of its bounds.
    """
    pipeline = subject.pipeline
    blocks = map_of(subject)
    chosen = next(b for b in blocks if b.path == checks.choice('block', block, [b.path for b in blocks]))
    pixels, image_call, from_images = image_of(subject, image, None)
    t = checks.number('t', t, 0.001, 1.0)
    seed = checks.whole('seed', seed, 0, checks.MAX_SEED)
    condition = asking.settings(subject, {key: value for key, value in asked.items() if key != 'scale'})
    num_skips = count_skips(pipeline.apply)
    names = [f'skip {k}' for k in range(num_skips)]
    gone = [names.index(name) for name in checks.several('skips', removed, names, num_skips)] if removed else []
    x_t = noisy(subject, pixels, t, seed)
    conditioning = pipeline.conditioning(1, **condition)
    timestep = jnp.asarray([pipeline.schedule.timestep(t)], jnp.float32)
    found = activations(pipeline.apply, pipeline.params, x_t, timestep, **conditioning).blocks
    shown = [Picture('network_x_t', state_of(subject, np.asarray(x_t)[0]), 'x\u209c', f't = {t:g}')]
    ones = [1.0] * num_skips if num_skips else None
    whole = predicted(subject, x_t, t, conditioning, ones)
    shown.append(Picture('network_x0', image_of_x0(subject, whole), 'predicted x\u2080'))
    if gone:
        scale = [0.0 if k in gone else 1.0 for k in range(num_skips)]
        without = predicted(subject, x_t, t, conditioning, scale)
        said = ', '.join(names[k] for k in gone)
        shown.append(Picture('network_x0_without', image_of_x0(subject, without), 'without', said))
        caption = 'what was carried; red +1, blue \u22121'
        shown.append(Picture('network_carried', pictures.signed(whole - without, 1.0), 'difference', caption))
    parts = pictures.row(shown)
    if chosen.path in found:
        values = np.asarray(found[chosen.path], np.float32)[0]
        picture, limit = of_block(values)
        kept = f', the first {CHANNELS} channels' if values.shape[-1] > CHANNELS and values.ndim == 3 else ''
        said = f'{"x".join(map(str, values.shape))}{kept}; red +{limit:.3g}, blue \u2212{limit:.3g}'
        parts += (
            f'<p class="dj-heading" id="network_block">{network_svg.html.escape(network_svg.described(chosen))}</p>'
        )
        parts += pictures.figure(Picture('network_activations', picture, 'what it gives', said), 420)
        parts += pictures.table([('network_mean', 'mean', formatted(float(values.mean())))])
    else:
        parts += pictures.note(f'{chosen.path} gives no picture of its own on this input.')
    call = calls.python(
        subject,
        'from diffusion_jax.models import inspection',
        image_call,
        *_call(subject, condition, t, seed, chosen.path, gone, num_skips),
        images=from_images,
    )
    return network_svg.drawing(blocks, chosen.path, gone), parts, call


def _call(subject: Subject, condition, t: float, seed: int, path: str, gone: list[int], num_skips: int) -> list[str]:
    encode = '' if subject.pipeline.latents is None else 'x0 = pipeline.latents.encode(x0)'
    lines = [
        'schedule = pipeline.schedule',
        'x0 = to_float(image.astype(np.float32))',
        *([encode] if encode else []),
        f'eps = jax.random.normal(jax.random.key({seed}), x0.shape)',
        f'x_t = dj.process.q_sample(schedule, x0, {t!r}, eps)',
        f'conditioning = pipeline.conditioning(1, {calls.arguments(condition)})',
        f't = np.float32([schedule.timestep({t!r})])',
        'found = inspection.activations(pipeline.apply, pipeline.params, x_t, t, **conditioning)',
        f'values = found.blocks.get({path!r})',
    ]
    if gone:
        scale = [0.0 if k in gone else 1.0 for k in range(num_skips)]
        lines += [
            f'apply, params = inspection.ablated(pipeline.apply, pipeline.params, {scale!r})',
            'denoiser = dj.denoisers.ModelDenoiser(',
            '    apply, params, schedule, pipeline.prediction, conditioning, pipeline.learned_variance',
            ')',
            f'x0_without = denoiser(x_t, np.float32({t!r})).x0',
        ]
    return lines


CLICKS = """
element.addEventListener('click', (event) => {
  const block = event.target.closest('[data-block]');
  if (block) trigger('click', {block: block.dataset.block});
});
"""


def tab(page) -> None:
    import gradio as gr

    subject = page.subject
    blocks = map_of(subject)
    first = next((block.path for block in blocks if block.kind in ('res_block', 'dit_block')), blocks[0].path)
    num_skips = count_skips(subject.pipeline.apply)
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            asked = asking.widgets(subject, 'network', guided=False)
            last = len(subject.images.images) - 1
            image = gr.Slider(0, last, value=0, step=1, label='image under the noise', elem_id='network-image')
            t = gr.Slider(0.001, 1.0, value=0.4, step=0.001, label='t', elem_id='network-t')
            seed = gr.Number(0, precision=0, label='seed of the noise', elem_id='network-seed')
            block = gr.Dropdown(
                [(f'{b.path} ({b.kind})', b.path) for b in blocks], value=first, label='block', elem_id='network-block'
            )
            removed = gr.CheckboxGroup(
                [f'skip {k}' for k in range(num_skips)],
                value=[],
                label='leave out',
                elem_id='network-skips',
                visible=bool(num_skips),
            )
        with gr.Column(scale=3, min_width=400):
            drawing = gr.HTML(elem_id='network-map', js_on_load=CLICKS)
            figure = gr.HTML(elem_id='network-figure')
            code = page.code('network')

    def show(*values):
        *conditions, image, t, seed, block, removed = values
        svg, html, call = view(subject, dict(zip(asked, conditions, strict=True)), image, t, seed, block, removed)
        return html, svg, call

    controls = {**asked, 'image': image, 't': t, 'seed': seed, 'block': block, 'without': removed}
    page.tab('network', controls, show, [], [figure, drawing, code])
    changed = [widget.input for widget in (image, t, seed, block, removed)]
    changed += [asked[name].input for name in ('label',) if name in asked]
    changed += [asked[name].submit for name in ('prompt',) if name in asked]
    page.react(changed, 'network')

    def clicked(event: gr.EventData):
        return checks.choice('block', event._data.get('block') if event._data else None, [b.path for b in blocks])

    page.on(drawing.click, clicked, [], [block], then='network')
