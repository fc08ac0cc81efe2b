"""A set of images in memory, and what every set of images has."""

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np

from diffusion_jax.errors import UsageError


class Images(Protocol):
    """What training and evaluation see of a set: an `ImageSet`, in memory, or a `StreamedSet`, on the disk.

    `labels` has one number an image (None: no classes), `class_names` one name a class, `captions` one text an image
    (None: no texts); all are in the order of the images.
    """

    labels: np.ndarray | None
    class_names: tuple[str, ...]
    captions: tuple[str, ...] | None

    def __len__(self) -> int: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def num_classes(self) -> int: ...

    def in_memory(self) -> 'ImageSet': ...


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size, with a class each or with none.

    Attributes:
        images: uint8 [N, H, W, C] in 0..255, N >= 1.
        labels: int32 [N] in 0..len(class_names) - 1, or None for images without classes.
        class_names: one name a class; empty exactly when `labels` is None.
        captions: a text for each image, or None.

    Raises:
        UsageError: a dtype, a shape or a label is another.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    captions: tuple[str, ...] | None = None
    streamed = False

    def __post_init__(self):
        images, labels, classes = self.images, self.labels, len(self.class_names)
        if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
            raise UsageError(
                f'images must be uint8 [N, H, W, C] with no empty axis, not {images.dtype} {list(images.shape)}.'
            )
        if self.captions is not None and len(self.captions) != len(images):
            raise UsageError(f'{len(images)} images need as many captions, not {len(self.captions)}.')
        if (labels is None) != (classes == 0):
            raise UsageError('labels and class_names must be given together.')
        if labels is None:
            return
        if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
            raise UsageError(f'labels must be int32 [{len(images)}], not {labels.dtype} {list(labels.shape)}.')
        if labels.min() < 0 or labels.max() >= classes:
            raise UsageError(f'labels must lie in 0..{classes - 1}, not {labels.min()}..{labels.max()}.')

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.images.shape[1:]

    @property
    def num_classes(self) -> int:
        """The number of classes, 0 without labels."""
        return len(self.class_names)

    @property
    def nbytes(self) -> int:
        """What the images take in memory."""
        return self.images.nbytes

    def arrays(self) -> dict[str, np.ndarray]:
        """What a batch is cut out of: the images, and their labels, if there are any."""
        return {'image': self.images} if self.labels is None else {'image': self.images, 'label': self.labels}

    def in_memory(self) -> 'ImageSet':
        """Itself."""
        return self

    def load(self, rows: np.ndarray) -> 'ImageSet':
        """Some of the images."""
        return ImageSet(
            self.images[rows],
            None if self.labels is None else self.labels[rows],
            self.class_names,
            None if self.captions is None else tuple(self.captions[row] for row in rows),
        )


class Splits(NamedTuple):
    """The images to train on and those held out."""

    train: Images
    test: Images
