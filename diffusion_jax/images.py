"""Images at the edges: uint8 arrays and PNG files on one side, float32 in [-1, 1] on the other."""

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from diffusion_jax.schedules import namespace


def to_float(images: UInt8[Array, '...']) -> Float[Array, '...']:
    """uint8 0 .. 255 as float32 -1 .. 1."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: Float[Array, '...']) -> UInt8[Array, '...']:
    """Floats, clipped to [-1, 1], rounded to uint8: the inverse of `to_float`. NumPy arrays stay on the host."""
    xp = namespace(images)
    return xp.round(xp.clip((images + 1.0) * 127.5, 0.0, 255.0)).astype(xp.uint8)


def grid(images: np.ndarray, columns: int | None = None, min_side: int = 48, gap: int = 2) -> np.ndarray:
    """uint8 images [N, H, W, C] as one picture [h, w, 3], row by row; small ones are enlarged smoothly.

    Args:
      columns: ceil(sqrt(N)) by default.
      min_side: images are enlarged (bicubic, by a whole factor) until their longer side has at least this many pixels.
      gap: white pixels between images.
    """
    from PIL import Image

    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    factor = math.ceil(min_side / max(height, width))
    height, width = height * factor, width * factor
    picture = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        y, x = row * (height + gap), column * (width + gap)
        pixels = Image.fromarray(image[:, :, 0] if channels == 1 else image).convert('RGB')
        picture[y : y + height, x : x + width] = pixels.resize((width, height), Image.Resampling.BICUBIC)
    return picture


def save_png(path: str | Path, picture: UInt8[np.ndarray, 'h w 3']) -> None:
    from PIL import Image

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
