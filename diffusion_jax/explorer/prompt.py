"""Tab 7 of a model that takes text: from a text to images, and where each of its words is looked at."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from diffusion_jax.errors import UsageError
from diffusion_jax.explorer import asking, calls, checks, pictures
from diffusion_jax.explorer.pictures import Picture
from diffusion_jax.explorer.reverse import image_of
from diffusion_jax.explorer.subject import Subject
from diffusion_jax.images import to_uint8
from diffusion_jax.models.inspection import average_maps, cross_attention_maps
from diffusion_jax.pipelines.stepwise import walk

TITLE = 'Prompt'
MAX_IMAGES = 4
MAX_PIECES = 20
EVERY = 5  # calls between pictures of a run that goes on


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """Images of a prompt, and what its maps need: the states of the first, on the host."""

    prompt: str
    settings: dict[str, Any]
    num: int
    images: UInt8[np.ndarray, 'N H W C']
    times: Float[np.ndarray, 'T']
    x: Float[np.ndarray, 'T h w c']


def settings_of(
    subject: Subject, asked: dict[str, Any], negative: Any, seed: Any, num: Any, steps: Any
) -> tuple[int, dict[str, Any]]:
    """(number of images, keyword arguments of the pipeline), or a `UsageError`."""
    settings = asking.settings(subject, asked)
    if checks.text('negative prompt', negative):
        settings['negative_prompt'] = negative
    settings['seed'] = checks.whole('seed', seed, 0, checks.MAX_SEED)
    settings['steps'] = checks.whole('steps', steps, 1, checks.MAX_STEPS)
    return checks.whole('images', num, 1, MAX_IMAGES), settings


def draw(subject: Subject, num: int, settings: dict[str, Any]) -> Iterator[tuple[str, Drawn | None]]:
    """HTML on the way, and at last what was drawn."""
    pipeline = subject.pipeline
    times, states, last = [], [], None
    for call in walk(pipeline, num, **settings):
        times.append(call.t)
        states.append(call.x_t[0])
        last = call.x
        if call.index % EVERY == 0:
            said = f'{call.index + 1} of {call.num_calls} calls'
            yield (
                pictures.row([Picture('prompt_on_the_way', image_of(subject, call.x0[0]), 'predicted x\u2080', said)]),
                None,
            )
    images = np.asarray(to_uint8(np.asarray(last if pipeline.latents is None else pipeline.latents.decode(last))))
    yield '', Drawn(settings['prompts'][0], settings, num, images, np.array(times), np.stack(states))


def maps_at(subject: Subject, drawn: Drawn, way: Any) -> tuple[int, list[str], Float[np.ndarray, 'h w S']]:
    """(number of the call, the text's pieces, their maps) at a share of the way from noise to image."""
    pipeline = subject.pipeline
    index = round(checks.number('of the way', way, 0.0, 1.0) * (len(drawn.times) - 1))
    conditioning = pipeline.conditioning(1, prompts=[drawn.prompt])
    timestep = jnp.asarray([pipeline.schedule.timestep(float(drawn.times[index]))], jnp.float32)
    x_t = drawn.x[index][None]
    maps = average_maps(cross_attention_maps(pipeline.apply, pipeline.params, x_t, timestep, **conditioning))
    encoder = pipeline.prompts.encoders[0]
    return index, encoder.tokenizer.pieces(drawn.prompt, encoder.length), np.asarray(maps)[0]


def view(subject: Subject, drawn: Drawn | None, way: Any) -> tuple[str, str]:
    """(HTML, Python)."""
    if drawn is None:
        raise UsageError('nothing is drawn yet: press Draw.')
    shown = [Picture(f'prompt_image_{k}', image, f'image {k}') for k, image in enumerate(drawn.images)]
    html = pictures.row(shown)
    settings = drawn.settings
    lines = [
        f'settings = dict({calls.arguments(settings)})',
        f'images = pipeline({drawn.num}, **settings).images',
    ]
    try:
        index, pieces, maps = maps_at(subject, drawn, way)
    except UsageError as error:  # a network without cross-attention: its pictures are there all the same
        return html + pictures.note(str(error)), calls.python(subject, *lines)
    parts = []
    for k, piece in enumerate(pieces[:MAX_PIECES]):
        most = float(maps[..., k].max()) or 1.0
        pixels = np.asarray(to_uint8(maps[..., k : k + 1] / most * 2.0 - 1.0))
        parts.append(Picture(f'attention_{k}', pixels, piece, f'at most {most:.2g}'))
    html += (
        f'<p class="dj-heading" id="prompt_call">where image 0 looks at each word, in call {index + 1} of '
        f'{len(drawn.times)} (white: most; the mean of all heads and blocks)</p>' + pictures.row(parts, 96)
    )
    lines += [
        'from diffusion_jax.models import inspection',
        f'trajectory = pipeline.trajectory({drawn.num}, **settings)',
        f'conditioning = pipeline.conditioning(1, prompts={[drawn.prompt]!r})',
        f't = np.float32([pipeline.schedule.timestep({float(drawn.times[index])!r})])',
        f'x_t = trajectory.x[{index}, :1]',
        'maps = inspection.cross_attention_maps(pipeline.apply, pipeline.params, x_t, t, **conditioning)',
        'attention = inspection.average_maps(maps)[0]  # [h, w, tokens]',
    ]
    return html, calls.python(subject, *lines)


def show(subject: Subject, asked: dict[str, Any], rest: tuple[Any, ...], way: Any):
    """Yields (HTML, Python, what was drawn)."""
    num, settings = settings_of(subject, asked, *rest)
    checks.number('of the way', way, 0.0, 1.0)
    for html, drawn in draw(subject, num, settings):
        if drawn is None:
            yield html, None, None
        else:
            yield (*view(subject, drawn, way), drawn)


def tab(page) -> None:
    import gradio as gr

    subject = page.subject
    state = gr.State(None, time_to_live=page.seconds_kept)
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            asked = asking.widgets(subject, 'prompt')
            negative = gr.Textbox('', label='negative prompt', max_length=checks.MAX_TEXT, elem_id='prompt-negative')
            seed = gr.Number(0, precision=0, label='seed', elem_id='prompt-seed')
            num = gr.Slider(1, MAX_IMAGES, value=1, step=1, label='images', elem_id='prompt-images')
            steps = gr.Slider(1, checks.MAX_STEPS, value=20, step=1, label='steps', elem_id='prompt-steps')
            with gr.Row():
                go = gr.Button('Draw', variant='primary', size='sm', min_width=60, elem_id='prompt-draw')
                page.stop_button('prompt')
            way = gr.Slider(0.0, 1.0, value=0.5, step=0.01, label='maps: of the way', elem_id='prompt-way')
        with gr.Column(scale=3, min_width=400):
            figure = gr.HTML(elem_id='prompt-figure')
            code = page.code('prompt')

    def drawn(*values):
        *values, way = values
        conditions = dict(zip(asked, values[: len(asked)], strict=True))
        for html, call, made in show(subject, conditions, tuple(values[len(asked) :]), way):
            yield html, gr.skip() if call is None else call, made

    rest = {'negative': negative, 'seed': seed, 'images': num, 'steps': steps, 'way': way}
    page.tab('prompt', {**asked, **rest}, drawn, [], [figure, code, state], drawn=state)
    page.react([go.click, asked['prompt'].submit], 'prompt')
    page.on(way.input, lambda drawn, way: view(subject, drawn, way), [state, way], [figure, code])
