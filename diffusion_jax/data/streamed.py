"""Images that are read when a batch needs them: for sets that do not fit in memory."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int, UInt8

from diffusion_jax.data import formats, prepared
from diffusion_jax.data.image_set import ImageSet
from diffusion_jax.errors import UsageError
from diffusion_jax.registry import lookup

CROPS = ('center', 'random')
EXCERPT_IMAGES = 10_000
EXCERPT_BYTES = 256 * 1024**2
THREADS = 8  # more than cores: on a network's disk they mostly wait
CHUNK = 1024


class Stored(Protocol):
    """Random access to images as they are stored. It is sent to worker processes: keep it small."""

    remedy: str
    """What to do about a damaged one."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> Any:
        """A PIL image of any size; it may raise anything."""

    def name(self, index: int) -> str:
        """What errors call it."""


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedSet:
    """As an `ImageSet`, with its images on the disk.

    Attributes:
        stored: the images as they are stored.
        resolution: their side, cropped and resized, antialiased.
        channels: 3 for RGB, 1 for grey.
        labels: int32 [N], or what gives int32 [K] for K indices; None for images without classes.
        class_names, captions: as in `ImageSet`.
        crop: 'center', the central square; or 'random', a square of random place and size, to train on.
        crop_min_scale: the side of a random square is at least this share of the short side.

    Raises:
        UsageError: a value is out of its range, or there are not as many labels or captions as images.
    """

    stored: Stored
    resolution: int
    channels: int = 3
    labels: Any = None
    class_names: tuple[str, ...] = ()
    captions: tuple[str, ...] | None = None
    crop: str = 'center'
    crop_min_scale: float = 0.8
    streamed = True

    def __post_init__(self):
        formats.check_resolution(self.resolution)
        formats.check_channels(self.channels)
        lookup('crop', dict.fromkeys(CROPS), self.crop)
        if not 0 < self.crop_min_scale <= 1:
            raise UsageError(f'crop_min_scale must lie in (0, 1], not {self.crop_min_scale}.')
        if (self.labels is None) != (not self.class_names):
            raise UsageError('labels and class_names must be given together.')
        for kind, values in (('labels', self.labels), ('captions', self.captions)):
            if values is not None and len(values) != len(self.stored):
                raise UsageError(f'{len(self.stored)} images need as many {kind}, not {len(values)}.')

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.resolution, self.resolution, self.channels

    @property
    def num_classes(self) -> int:
        """The number of classes, 0 without labels."""
        return len(self.class_names)

    @property
    def nbytes(self) -> int:
        """What all of its images take in memory."""
        return len(self) * self.resolution**2 * self.channels

    def read(self, index: int, rng: np.random.Generator | None = None) -> UInt8[np.ndarray, 'H W C']:
        """Image `index`. With crop='random' its crop is drawn from `rng`; without one it is the central square.

        Raises:
            UsageError: it cannot be read; the message names it.
        """
        drawn = rng if self.crop == 'random' else None
        # Decoders raise almost anything on a damaged file.
        try:
            return formats.fit(self.stored.open(index), self.resolution, self.channels, drawn, self.crop_min_scale)
        except Exception as error:
            raise UsageError(
                f'{self.stored.name(index)} cannot be read as an image ({type(error).__name__}: {error}). '
                f'{self.stored.remedy}'
            ) from error

    def read_fields(self, index: int, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """As `read`, as batches have it."""
        return {'image': self.read(index, rng)}

    def load(self, rows: Int[np.ndarray, 'K'] | None = None) -> ImageSet:
        """All images, or those of some rows, in memory; with a progress bar where there are many."""
        from tqdm import tqdm

        rows = np.arange(len(self)) if rows is None else np.asarray(rows)
        images = np.empty((len(rows), *self.image_shape), np.uint8)
        bar = tqdm(total=len(rows), desc='reading images', disable=len(rows) <= formats.PROGRESS_FROM)
        with bar, ThreadPoolExecutor(THREADS) as pool:
            # By chunks: all of a large set at once, waiting for their turn, would take more memory than their images.
            for first in range(0, len(rows), CHUNK):
                read = pool.map(self.read, rows[first : first + CHUNK].tolist())
                for i, image in enumerate(read, first):
                    images[i] = image
                    bar.update()
        return ImageSet(
            images,
            None if self.labels is None else np.asarray(self.labels[rows], np.int32),
            self.class_names,
            None if self.captions is None else tuple(self.captions[row] for row in rows),
        )

    def in_memory(self) -> ImageSet:
        """An excerpt for evaluators: 10,000 images at most, 256 MiB at most, spread evenly over the set.

        Evenly, as a folder is in the order of its classes.
        """
        bound = min(EXCERPT_IMAGES, max(1, EXCERPT_BYTES // (self.nbytes // len(self))))
        return self.load(np.linspace(0, len(self) - 1, min(len(self), bound)).round().astype(np.int64))

    def take(self, rows: Int[np.ndarray, 'K'], **changes: Any) -> 'StreamedSet':
        """The set of some rows, with other attributes changed as given."""
        rows = np.asarray(rows)
        parts: dict[str, Any] = {'stored': _SomeStored(self.stored, rows)}
        if self.labels is not None:
            parts['labels'] = (
                self.labels[rows] if isinstance(self.labels, np.ndarray) else _SomeLabels(self.labels, rows)
            )
        if self.captions is not None:
            parts['captions'] = tuple(self.captions[row] for row in rows)
        return dataclasses.replace(self, **parts | changes)


class ImageFiles:
    """Image files, by their names below a folder."""

    remedy = 'Repair or remove it.'

    def __init__(self, root: str, names: Sequence[str]):
        self._root = root
        # One block of bytes: millions of strings would be slow to send, and large.
        encoded = [os.fsencode(name) for name in names]
        self._names = b''.join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return os.path.join(self._root, os.fsdecode(self._names[start : int(self._ends[index])]))

    def open(self, index: int) -> Any:
        return formats.open_image(self.name(index))


class ArrayImages:
    """uint8 [N, H, W, C] of a file, in memory."""

    remedy = 'Replace the file by a whole copy.'

    def __init__(self, path: str, images: UInt8[np.ndarray, 'N H W C']):
        self._path, self._images = path, images

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f'image {index} of {self._path}'

    def open(self, index: int) -> Any:
        return _from_pixels(self._images[index])


class NpzImages:
    """The `images` of a .npz file, uint8 [N, H, W, C], not compressed: mapped into memory, not read."""

    remedy = 'Replace the file by a whole copy.'

    def __init__(self, path: str, shape: tuple[int, ...], offset: int):
        self._path, self._shape, self._offset = path, shape, offset

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != '_mapped'}

    @functools.cached_property
    def _mapped(self) -> np.ndarray:
        return np.memmap(self._path, np.uint8, 'r', self._offset, self._shape)

    def __len__(self) -> int:
        return self._shape[0]

    def name(self, index: int) -> str:
        return f'image {index} of {self._path}'

    def open(self, index: int) -> Any:
        return _from_pixels(self._mapped[index])


class TfdsImages:
    """The images of a split that TFDS prepared in ArrayRecord, opened anew in each process."""

    remedy = 'Prepare the data set again.'

    def __init__(self, directory: str, split: str, feature: str, size: int):
        self._directory, self._split, self._feature, self._size = directory, split, feature, size

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != '_source'}

    @functools.cached_property
    def _source(self) -> Any:
        return prepared.feature_source(self._directory, self._split, self._feature)

    def __len__(self) -> int:
        return self._size

    def name(self, index: int) -> str:
        return f'record {index} of {self._split!r} in {self._directory}'

    def open(self, index: int) -> Any:
        return _from_pixels(self._source[index][self._feature])


class TfdsLabels(TfdsImages):
    """The labels of such a split, each read when it is asked for: to read all of them is to read all records."""

    def __getitem__(self, rows: Int[np.ndarray, 'K']) -> Int[np.ndarray, 'K']:
        records = self._source.__getitems__(np.asarray(rows).tolist())
        return np.array([record[self._feature] for record in records], np.int32)


class _SomeStored:
    def __init__(self, stored: Stored, rows: Int[np.ndarray, 'K']):
        self._stored, self._rows, self.remedy = stored, rows, stored.remedy

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return self._stored.name(int(self._rows[index]))

    def open(self, index: int) -> Any:
        return self._stored.open(int(self._rows[index]))


class _SomeLabels:
    def __init__(self, labels: Any, rows: Int[np.ndarray, 'K']):
        self._labels, self._rows = labels, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Int[np.ndarray, 'J']) -> Int[np.ndarray, 'J']:
        return self._labels[self._rows[rows]]


def _from_pixels(pixels: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else np.ascontiguousarray(pixels))
