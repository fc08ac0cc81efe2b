"""Tab 1: what the forward process makes of an image, in one jump and step by step."""

import functools
import io
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from diffusion_jax.errors import UsageError
from diffusion_jax.explorer import calls, checks, pictures
from diffusion_jax.explorer.pictures import Picture, formatted
from diffusion_jax.explorer.schedule_choice import CHAINS, LENGTHS, OWN, chosen
from diffusion_jax.explorer.subject import Subject
from diffusion_jax.images import to_float, to_uint8
from diffusion_jax.process import q_chain, q_sample
from diffusion_jax.schedules import SCHEDULES, Schedule, levels

TITLE = 'Forward'
MAX_SIDE = 64  # of what is drawn: a chain is T images
KEPT_CHAINS = 8


class View(NamedTuple):
    html: str
    call: str


@functools.partial(jax.jit, static_argnames='schedule')
def _jump(image: UInt8[Any, '1 H W C'], t, key, *, schedule: Schedule):
    """(x_t, eps) of one jump."""
    x0 = to_float(image)
    eps = jax.random.normal(key, x0.shape)
    return to_uint8(q_sample(schedule, x0, t, eps)), eps


@functools.partial(jax.jit, static_argnames=('schedule', 'num_steps'))
def _chain(image: UInt8[Any, '1 H W C'], key, *, schedule: Schedule, num_steps: int):
    return to_uint8(q_chain(schedule, to_float(image), key, num_steps)[:, 0])


@functools.lru_cache(maxsize=KEPT_CHAINS)
def _chain_of(image: bytes, shape: tuple[int, ...], seed: int, schedule: Schedule, num_steps: int):
    """The whole chain, once: dragging t then only looks at another moment of it."""
    pixels = np.frombuffer(image, np.uint8).reshape(1, *shape)
    return np.asarray(_chain(pixels, _key(seed + 1), schedule=schedule, num_steps=num_steps))


@functools.lru_cache(maxsize=64)
def _key(seed: int):
    return jax.random.key(seed)


def read_upload(content: bytes | None, shape: tuple[int, int, int]) -> UInt8[np.ndarray, 'H W C'] | None:
    """An image of the model's shape from a file's bytes; None of none.

    Raises:
      UsageError: it is too large, or no image.
    """
    if content is None:
        return None
    if len(content) > checks.MAX_UPLOAD_BYTES:
        raise UsageError(f'an image of at most {checks.MAX_UPLOAD_BYTES // 2**20} MiB, please.')
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as picture:  # reads the size, not the pixels
            if picture.width * picture.height > checks.MAX_UPLOAD_PIXELS:
                raise UsageError(
                    f'an image of at most {checks.MAX_UPLOAD_PIXELS:,} pixels, please: this one has '
                    f'{picture.width}x{picture.height}.'
                )
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            square = picture.convert('L' if shape[2] == 1 else 'RGB').crop((left, top, left + side, top + side))
            resized = square.resize((shape[1], shape[0]), Image.Resampling.LANCZOS)
    except UsageError:
        raise
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(
            f'this file is no image that can be read ({type(error).__name__}): PNG and JPEG can.'
        ) from None
    return np.asarray(resized).reshape(shape[0], shape[1], -1)


def image_of(subject: Subject, index: Any, uploaded: UInt8[np.ndarray, 'H W C'] | None):
    """(the image, Python that makes `image` [1, H, W, C], whether it needs `images`)."""
    images = subject.images.images
    if uploaded is not None:
        mode = 'L' if uploaded.shape[-1] == 1 else 'RGB'
        call = (
            "from PIL import Image\nimage = np.asarray(Image.open('image.png').convert("
            f"'{mode}')).reshape(1, *{tuple(uploaded.shape)})  # the first picture here"
        )
        return uploaded, call, False
    number = checks.whole('image', index, 0, len(images) - 1)
    return images[number], f'image = images[{number}:{number + 1}]', True


def view(
    subject: Subject,
    image: Any,
    schedule: Any,
    length: Any,
    t: Any,
    seed: Any,
    uploaded: UInt8[np.ndarray, 'H W C'] | None = None,
) -> View:
    """The page's picture of q(x_t | x_0).

    Args:
      image: the number of one of the subject's images.
      schedule: one of SCHEDULES, or OWN.
      length: one of LENGTHS, of schedules that are chains.
      t: in [0, 1]; on a chain its nearest step.
      seed: of the noise.
      uploaded: an image instead.

    Raises:
      UsageError: a setting out of its bounds.
    """
    pixels, image_call, from_images = image_of(subject, image, uploaded)
    name = checks.choice('schedule', schedule, (*SCHEDULES, OWN))
    choice = chosen(subject, name, length)
    t = checks.number('t', t, 0.0, 1.0)
    seed = checks.whole('seed', seed, 0, checks.MAX_SEED)
    step = round(t * choice.num_steps)
    if choice.schedule.num_timesteps is not None:
        t = step / choice.num_steps
    if max(pixels.shape[:2]) > MAX_SIDE:
        stride = -(-max(pixels.shape[:2]) // MAX_SIDE)
        pixels = np.ascontiguousarray(pixels[::stride, ::stride])
        image_call += f'[:, ::{stride}, ::{stride}]'
    x_t, eps = jax.device_get(_jump(pixels[None], jnp.float32(t), _key(seed), schedule=choice.schedule))
    chain = _chain_of(pixels.tobytes(), pixels.shape, seed, choice.schedule, choice.num_steps)
    at = levels(choice.schedule, t)
    shown = (
        Picture('image', pixels, 'x\u2080, the image', subject.images.origin if uploaded is None else 'uploaded'),
        Picture('eps', pictures.signed(eps[0], 3.0), '\u03b5, the noise', 'red +3, white 0, blue \u22123'),
        Picture('jump', x_t[0], 'x\u209c in one jump', '\u03b1 x\u2080 + \u03c3 \u03b5'),
        Picture(
            'chain', chain[step], f'x\u209c after {step} steps', f'of a chain of {choice.num_steps}, noise anew in each'
        ),
    )
    alpha, sigma = formatted(float(at.alpha)), formatted(float(at.sigma))
    numbers = pictures.table(
        [
            ('t', 't', f'{t:.4g}' + (f' (step {step} of {choice.num_steps})' if choice.schedule.num_timesteps else '')),
            ('alpha_bar', 'alpha-bar, \u03b1\u00b2', formatted(float(at.alpha_bar))),
            ('signal', 'signal in x\u209c', _share(at.signal, 'signal')),
            ('noise', 'noise in x\u209c', _share(at.noise, 'noise')),
            ('log_snr', 'log-SNR, ln(\u03b1\u00b2/\u03c3\u00b2)', formatted(float(at.log_snr))),
        ]
    )
    formula = (
        f'<p class="dj-formula" id="formula">x<sub>t</sub> = &alpha; x<sub>0</sub> + &sigma; &epsilon; = '
        f'<b>{alpha}</b> x<sub>0</sub> + <b>{sigma}</b> &epsilon;</p>'
    )
    call = calls.python(
        subject if from_images or name == OWN else None,
        choice.call,
        image_call,
        'x0 = to_float(image)',
        f'eps = jax.random.normal(jax.random.key({seed}), x0.shape)',
        f'x_t = to_uint8(dj.process.q_sample(schedule, x0, {t!r}, eps))',
        f'chain = to_uint8(dj.process.q_chain(schedule, x0, jax.random.key({seed + 1}), {choice.num_steps})[{step}])',
        f'levels = dj.schedules.levels(schedule, {t!r})',
        images=from_images,
    )
    return View(pictures.row(shown) + formula + numbers, call)


def _share(share: float, kind: str) -> str:
    percent = 100 * float(share)
    return f'<span class="dj-bar dj-{kind}"><i style="width:{percent:.2f}%"></i></span> {percent:.3g} %'


def animation(subject: Subject, image: Any, schedule: Any, length: Any, seed: Any, uploaded=None) -> str:
    """The chain from the image to noise, as a GIF in HTML."""
    pixels, _, _ = image_of(subject, image, uploaded)
    choice = chosen(subject, checks.choice('schedule', schedule, (*SCHEDULES, OWN)), length)
    seed = checks.whole('seed', seed, 0, checks.MAX_SEED)
    if max(pixels.shape[:2]) > MAX_SIDE:
        stride = -(-max(pixels.shape[:2]) // MAX_SIDE)
        pixels = np.ascontiguousarray(pixels[::stride, ::stride])
    chain = _chain_of(pixels.tobytes(), pixels.shape, seed, choice.schedule, choice.num_steps)
    return pictures.animation('forward_animation', pictures.gif(chain), 'the chain, from the image to noise')


def tab(page) -> None:
    """The tab's widgets, and what they do."""
    import gradio as gr

    subject = page.subject
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            last = len(subject.images.images) - 1
            image = gr.Slider(0, last, value=0, step=1, label='image', elem_id='forward-image')
            schedule = gr.Dropdown([OWN, *SCHEDULES], value=OWN, label='schedule', elem_id='forward-schedule')
            length = gr.Dropdown(
                list(LENGTHS), value='1000', label='T, steps of the chain', info=f'of {", ".join(CHAINS)}'
            )
            t = gr.Slider(0.0, 1.0, value=0.5, step=0.001, label='t', elem_id='forward-t')
            seed = gr.Number(0, precision=0, label='seed of the noise', elem_id='forward-seed')
            upload = gr.UploadButton('an image of yours', type='binary', file_types=['image'], size='sm')
            play = gr.Button('animation (GIF)', size='sm', elem_id='forward-gif')
        with gr.Column(scale=3, min_width=400):
            figure = gr.HTML(elem_id='forward-figure')
            animated = gr.HTML(elem_id='forward-animation')
            code = page.code('forward')
    uploaded = gr.State(None)

    def show(image, schedule, length, t, seed, uploaded):
        return view(subject, image, schedule, length, t, seed, uploaded)

    controls = {'image': image, 'schedule': schedule, 'T': length, 't': t, 'seed': seed}
    page.tab('forward', controls, show, [uploaded], [figure, code])
    page.react([t.input, schedule.input, length.input, seed.input], 'forward')
    page.on(image.input, lambda: None, [], [uploaded], then='forward')

    def take(content):
        return read_upload(content, subject.pipeline.image_shape), ''

    page.on(upload.upload, take, [upload], [uploaded, animated], then='forward')
    page.on(
        play.click,
        lambda image, schedule, length, seed, uploaded: animation(subject, image, schedule, length, seed, uploaded),
        [image, schedule, length, seed, uploaded],
        [animated],
    )
