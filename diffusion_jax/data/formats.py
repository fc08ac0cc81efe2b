"""Readers of the files that image datasets are published in, and of image files.

A file that is not whole and well formed is a `UsageError` with its name, what was expected and what was found.
"""

import gzip
import io
import math
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from diffusion_jax.errors import UsageError

CIFAR_PIXELS = 3 * 32 * 32
PROGRESS_FROM = 2000


def broken(path: object, expected: str, found: object) -> UsageError:
    """The error for a file that does not hold what it should."""
    return UsageError(
        f'{path}: expected {expected}, found {found}. '
        'Replace it by a whole copy, or name another folder with --config.data.dir=DIR.'
    )


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Reads an IDX file of bytes (the format of MNIST), gzipped if its name ends in .gz.

    Returns:
        uint8, of `ndim` axes, none of them empty.
    """
    data = _read(path)
    header = 4 + 4 * ndim
    if len(data) < header:
        raise broken(path, f'an IDX header of {header} bytes', f'{len(data)} bytes')
    magic = bytes((0, 0, 8, ndim))
    if data[:4] != magic:
        raise broken(path, f'the magic number 0x{magic.hex()}', f'0x{data[:4].hex()}')
    shape = struct.unpack_from(f'>{ndim}I', data, 4)
    size = header + math.prod(shape)
    if len(data) != size:
        raise broken(path, f'{size} bytes for the shape {list(shape)} in its header', f'{len(data)} bytes')
    if 0 in shape:
        raise broken(path, 'at least one item', f'the shape {list(shape)}')
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_cifar_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads one file of CIFAR-10's binary version: records of a label and 3072 bytes.

    Returns:
        images uint8 [N, 32, 32, 3] and labels uint8 [N], N >= 1.
    """
    data, record = _read(path), 1 + CIFAR_PIXELS
    if not data or len(data) % record:
        raise broken(path, f'whole records of {record} bytes, at least one', f'{len(data)} bytes')
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    return _channels_last(records[:, 1:]), records[:, 0]


def read_cifar_python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads one file of CIFAR-10's Python version, a pickle, without letting it run code.

    Returns:
        images uint8 [N, 32, 32, 3] and labels uint8 [N'], N >= 1; the caller compares N and N'.
    """
    stream = io.BytesIO(_read(path))
    try:
        batch = _ArrayUnpickler(stream, encoding='bytes').load()
    # A damaged pickle raises almost anything, from EOFError to TypeError.
    except Exception as error:
        raise broken(path, 'a pickle of plain values and numpy arrays', f'{type(error).__name__}: {error}') from error
    if extra := len(stream.read()):
        raise broken(path, 'the end of the file after the pickle', f'{extra} bytes')
    if not isinstance(batch, dict) or not {b'data', b'labels'} <= batch.keys():
        raise broken(path, "a dictionary with 'data' and 'labels'", _describe(batch))
    data, labels = batch[b'data'], batch[b'labels']
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (CIFAR_PIXELS,) or not len(data):
        raise broken(path, f'data of uint8 [N, {CIFAR_PIXELS}]', _describe(data))
    if not isinstance(labels, list) or not all(isinstance(label, int) and 0 <= label < 256 for label in labels):
        raise broken(path, 'a list of small integers as labels', _describe(labels))
    return _channels_last(data), np.array(labels, np.uint8)


def check_resolution(resolution: object) -> None:
    """Raises a `UsageError` unless `resolution` is a positive integer."""
    if not isinstance(resolution, int) or resolution < 1:
        raise UsageError(f'resolution must be a positive whole number of pixels, not {resolution!r}.')


def check_channels(channels: object) -> None:
    """Raises a `UsageError` unless `channels` is 1 or 3."""
    if channels not in (1, 3):
        raise UsageError(f'channels must be 1 (grey) or 3 (RGB), not {channels!r}.')


def resize(images: np.ndarray, resolution: int | None) -> np.ndarray:
    """uint8 [N, H, W, C] to [N, resolution, resolution, C], C = 1 or 3, antialiased; as it is for None."""
    if resolution is None:
        return images
    check_resolution(resolution)
    from PIL import Image

    size = (resolution, resolution)
    if images.shape[1:3] == size:
        return images
    out = np.empty((len(images), *size, images.shape[3]), np.uint8)
    for i, image in enumerate(images):
        pixels = image[..., 0] if image.shape[2] == 1 else image
        out[i] = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)).reshape(out.shape[1:])
    return out


class _ArrayUnpickler(pickle.Unpickler):
    """Knows only the three names with which Python 2 pickled the arrays, so that a hostile file can call nothing."""

    known: ClassVar[dict[tuple[str, str], Any]] = {
        ('numpy.core.multiarray', '_reconstruct'): np.empty(0).__reduce__()[0],
        ('numpy', 'ndarray'): np.ndarray,
        ('numpy', 'dtype'): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f'a reference to {module}.{name}, which is refused as it could run code')
        return self.known[module, name]


def _read(path: Path) -> bytes:
    """The bytes of a file, inflated if its name ends in .gz."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise broken(path, 'a readable file', error.strerror) from error
    if path.suffix != '.gz':
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise broken(path, 'a whole gzip file', error) from error


def open_image(path: str | Path) -> Any:
    """A PIL image, decoded and upright. Of a damaged file the decoders raise almost anything."""
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        return ImageOps.exif_transpose(file)


def fit(
    image: Any, resolution: int, channels: int, rng: np.random.Generator | None = None, min_scale: float = 1.0
) -> np.ndarray:
    """A PIL image as uint8 [resolution, resolution, channels]: transparency over white, cropped, resized, antialiased.

    The crop is the central square; with `rng` a square anywhere, of a side from `min_scale` to 1 of the short side.
    """
    from PIL import Image

    # Pillow's own conversion clips 16 bits at 255.
    if image.mode.startswith('I;16'):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    image = image.convert('L' if channels == 1 else 'RGB')
    width, height = image.size
    side = min(width, height)
    if rng is None:
        left, top = (width - side) // 2, (height - side) // 2
    else:
        side = max(1, round(side * rng.uniform(min_scale, 1.0)))
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in (width, height))
    box = (left, top, left + side, top + side)
    image = image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image).reshape(resolution, resolution, channels)


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f'{value.dtype} {list(value.shape)}'
    if isinstance(value, dict):
        return f'the keys {list(value)}'
    return type(value).__name__
