"""Arrays as what a page shows: PNG in a data URI, animated GIF, captions, messages. Nothing is written to a disk."""

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from diffusion_jax.images import grid, to_uint8

SIDE = 168  # pixels of a picture on the page
MAX_GIF_FRAMES = 60


class Picture(NamedTuple):
    """A picture and what is said of it.

    Attributes:
      name: of its file, and of its element on the page; letters, digits and _.
      pixels: uint8 [H, W, C] with one or three channels, shown and downloaded as they are.
      title: above it.
      caption: below it.
    """

    name: str
    pixels: UInt8[np.ndarray, 'H W C']
    title: str
    caption: str = ''


def shown(image: Float[np.ndarray, 'H W C']) -> UInt8[np.ndarray, 'H W C']:
    """x_t or x0 as it is seen: clipped to [-1, 1]; of two or more than three channels, their mean."""
    image = np.asarray(image)
    if image.shape[-1] not in (1, 3):
        image = image.mean(axis=-1, keepdims=True)
    return np.asarray(to_uint8(image))


def signed(values: Float[np.ndarray, 'H W C'], limit: float) -> UInt8[np.ndarray, 'H W 3']:
    """Numbers of either sign: white is 0, red positive, blue negative, in full at +-limit; channels by their mean."""
    share = np.clip(np.asarray(values, np.float64).mean(axis=-1) / limit, -1.0, 1.0)
    red, blue = np.array([178, 24, 43]), np.array([33, 102, 172])
    colour = np.where(share[..., None] > 0, red, blue)
    return np.round(255 + np.abs(share)[..., None] * (colour - 255)).astype(np.uint8)


def channels(values: Float[np.ndarray, 'H W C'], limit: float, most: int = 16) -> UInt8[np.ndarray, 'h w 3']:
    """The first channels side by side, each as `signed` has it."""
    values = np.asarray(values)[..., :most]
    return grid(np.stack([signed(values[..., k : k + 1], limit) for k in range(values.shape[-1])]))


def png(pixels: UInt8[np.ndarray, 'H W C']) -> str:
    """A data URI."""
    buffer = io.BytesIO()
    _pillow(pixels).save(buffer, 'PNG')
    return f'data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'


def gif(frames: Sequence[UInt8[np.ndarray, 'H W C']], milliseconds: int = 120, side: int = 224) -> str:
    """An animated GIF as a data URI, enlarged to whole pixels; the last frame stays for a second.

    Of more than MAX_GIF_FRAMES frames as many are taken, evenly, with the first and the last.
    """
    from PIL import Image

    picked = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), MAX_GIF_FRAMES)).round().astype(int))
    factor = max(1, side // max(frames[0].shape[:2]))
    pictures = [_pillow(np.repeat(np.repeat(frames[k], factor, axis=0), factor, axis=1)) for k in picked]
    pictures = [picture.convert('RGB').convert('P', palette=Image.Palette.ADAPTIVE) for picture in pictures]
    times = [milliseconds] * (len(pictures) - 1) + [1000]
    buffer = io.BytesIO()
    pictures[0].save(buffer, 'GIF', save_all=True, append_images=pictures[1:], duration=times, loop=0)
    return f'data:image/gif;base64,{base64.b64encode(buffer.getvalue()).decode()}'


def _pillow(pixels: np.ndarray):
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def figure(picture: Picture, side: int = SIDE) -> str:
    """One picture with its title, its caption and a link to its PNG; enlarged without smoothing."""
    source = png(picture.pixels)
    height, width = picture.pixels.shape[:2]
    across = round(side * width / max(height, width)) if height > width else side
    caption = f'<p>{picture.caption}</p>' if picture.caption else ''
    return (
        f'<figure class="dj-figure" id="{picture.name}" style="width:{across}px"><figcaption>'
        f'{html.escape(picture.title)}</figcaption><img src="{source}" alt="{html.escape(picture.title)}" '
        f'style="width:{across}px"><a download="{picture.name}.png" href="{source}">PNG</a>{caption}</figure>'
    )


def row(pictures: Sequence[Picture], side: int = SIDE) -> str:
    return f'<div class="dj-row">{"".join(figure(picture, side) for picture in pictures)}</div>'


def animation(name: str, source: str, title: str) -> str:
    """An animation with its link."""
    kind = source.removeprefix('data:image/').split(';')[0]
    return (
        f'<figure class="dj-figure" id="{name}"><figcaption>{html.escape(title)}</figcaption>'
        f'<img src="{source}" alt="{html.escape(title)}"><a download="{name}.{kind}" href="{source}">'
        f'{kind.upper()}</a></figure>'
    )


def table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Numbers: (id of the element, what it is, its value)."""
    cells = ''.join(f'<tr><th>{html.escape(what)}</th><td id="{name}">{value}</td></tr>' for name, what, value in rows)
    return f'<table class="dj-table">{cells}</table>'


def message(text: str) -> str:
    """What went wrong, in the place of what was asked for."""
    return f'<div class="dj-message" role="alert">{html.escape(text)}</div>'


def note(text: str) -> str:
    return f'<p class="dj-note">{html.escape(text)}</p>'


def formatted(value: float, digits: int = 4) -> str:
    """A number for a reader: 0.7027, -19.8, +inf."""
    if math.isnan(value):
        return 'undefined'
    if math.isinf(value):
        return '&infin;' if value > 0 else '&minus;&infin;'
    return f'{value:.{digits}g}'.replace('-', '&minus;')
