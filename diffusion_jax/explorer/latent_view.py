"""Tab 7 of a model of latents: what its autoencoder makes of an image, and what lies between two."""

from typing import Any

import numpy as np

from diffusion_jax.evaluation.reconstruction import psnr
from diffusion_jax.explorer import calls, checks, pictures
from diffusion_jax.explorer.pictures import Picture
from diffusion_jax.explorer.subject import Subject
from diffusion_jax.images import to_float, to_uint8

TITLE = 'Latents'
FRAMES = 17
MAX_CHANNELS = 16


def encoded(subject: Subject, number: Any, name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """(image, its latents, its number)."""
    images = subject.images.images
    number = checks.whole(name, number, 0, len(images) - 1)
    latents = subject.pipeline.latents.encode(np.asarray(to_float(images[number : number + 1].astype(np.float32))))
    return images[number], np.asarray(latents), number


def view(subject: Subject, first: Any, second: Any, fraction: Any) -> tuple[str, str]:
    """(HTML, Python) of two images, their latents, and what lies at a fraction of the way between them."""
    space = subject.pipeline.latents
    image, latents, a = encoded(subject, first, 'first image')
    other, others, b = encoded(subject, second, 'second image')
    fraction = checks.number('fraction', fraction, 0.0, 1.0)
    back = np.asarray(to_uint8(np.asarray(space.decode(latents))))
    back_other = np.asarray(to_uint8(np.asarray(space.decode(others))))
    between = np.asarray(to_uint8(np.asarray(space.between(latents, others, fraction))))
    ratios = [float(psnr(x[None], y)[0]) for x, y in ((image, back), (other, back_other))]
    shape = 'x'.join(map(str, latents.shape[1:]))
    limit = float(np.abs(np.stack([latents, others])).max())
    caption = f'a picture a channel; red +{limit:.2g}, blue \u2212{limit:.2g}'
    html = pictures.row(
        [
            Picture('latent_image', image, 'first image', subject.images.origin),
            Picture(
                'latent_channels', pictures.channels(latents[0], limit, MAX_CHANNELS), f'latents, {shape}', caption
            ),
            Picture('latent_back', back[0], 'decoded again', f'{ratios[0]:.3g} dB'),
        ]
    )
    html += pictures.row(
        [
            Picture('latent_other', other, 'second image'),
            Picture('latent_other_channels', pictures.channels(others[0], limit, MAX_CHANNELS), f'latents, {shape}'),
            Picture('latent_other_back', back_other[0], 'decoded again', f'{ratios[1]:.3g} dB'),
        ]
    )
    html += pictures.row([Picture('latent_between', between[0], 'between', f'{fraction:g} of the way, decoded')])
    numbers = int(np.prod(image.shape)), int(np.prod(latents.shape[1:]))
    html += pictures.table(
        [
            ('latent_psnr', 'PSNR of the first, dB', f'{ratios[0]:.4g}'),
            ('latent_numbers', 'numbers of an image, of its latents', f'{numbers[0]:,}, {numbers[1]:,}'),
        ]
    )
    call = calls.python(
        subject,
        f'first = pipeline.latents.encode(to_float(images[{a}:{a + 1}].astype(np.float32)))',
        f'second = pipeline.latents.encode(to_float(images[{b}:{b + 1}].astype(np.float32)))',
        'back = to_uint8(pipeline.latents.decode(first))',
        f'between = to_uint8(pipeline.latents.between(first, second, {fraction!r}))',
        images=True,
    )
    return html, call


def animation(subject: Subject, first: Any, second: Any) -> str:
    """From the first to the second and through what lies between, as a GIF in HTML."""
    _, latents, _ = encoded(subject, first, 'first image')
    _, others, _ = encoded(subject, second, 'second image')
    fractions = np.linspace(0.0, 1.0, FRAMES)
    frames = [
        np.asarray(to_uint8(np.asarray(subject.pipeline.latents.between(latents, others, f))))[0] for f in fractions
    ]
    return pictures.animation('latent_animation', pictures.gif(frames), 'from the first to the second')


def tab(page) -> None:
    import gradio as gr

    subject = page.subject
    last = len(subject.images.images) - 1
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            first = gr.Slider(0, last, value=0, step=1, label='first image', elem_id='latents-first')
            second = gr.Slider(0, last, value=min(1, last), step=1, label='second image', elem_id='latents-second')
            fraction = gr.Slider(0.0, 1.0, value=0.5, step=0.01, label='of the way', elem_id='latents-fraction')
            gif = gr.Button('animation (GIF)', size='sm', elem_id='latents-gif')
        with gr.Column(scale=3, min_width=400):
            figure = gr.HTML(elem_id='latents-figure')
            animated = gr.HTML(elem_id='latents-animation')
            code = page.code('latents')

    def show(first, second, fraction):
        return view(subject, first, second, fraction)

    page.tab('latents', {'first': first, 'second': second, 'fraction': fraction}, show, [], [figure, code])
    page.react([widget.input for widget in (first, second, fraction)], 'latents')
    page.on(gif.click, lambda first, second: animation(subject, first, second), [first, second], [animated])
