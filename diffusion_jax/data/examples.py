"""A few real images that are at hand with no data set: to look at, and to try things on."""

from pathlib import Path

import numpy as np

from diffusion_jax.data.image_set import ImageSet
from diffusion_jax.data.sources import FASHION_MNIST_CLASSES, digits
from diffusion_jax.registry import lookup

SHIPPED = Path(__file__).parent.parent / 'shipped'
PER_CLASS = 3


def _fashion_mnist() -> ImageSet:
    """Test images, a row of ten classes three times, that ship as one picture."""
    from PIL import Image

    with Image.open(SHIPPED / 'fashion_mnist_examples.png') as picture:
        pixels = np.asarray(picture)
    images = pixels.reshape(PER_CLASS, 28, 10, 28).transpose(0, 2, 1, 3).reshape(-1, 28, 28, 1)
    return ImageSet(images, np.tile(np.arange(10, dtype=np.int32), PER_CLASS), FASHION_MNIST_CLASSES)


def _digits() -> ImageSet:
    test = digits().test
    rows = [np.flatnonzero(test.labels == label)[:PER_CLASS] for label in range(10)]
    return test.load(np.transpose(rows).ravel())


EXAMPLES = {'digits': _digits, 'fashion_mnist': _fashion_mnist}


def examples(name: str) -> ImageSet:
    """Thirty test images of 'digits' (8x8) or 'fashion_mnist' (28x28): the ten classes in turn.

    Raises:
        UsageError: there are none of that name.
    """
    return lookup('set of examples', EXAMPLES, name)()
