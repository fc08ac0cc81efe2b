"""The order of a data set. Which images make batch number `step` is a pure function of (seed, step)."""

import functools

import numpy as np
from jaxtyping import Int


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size)


def batch_indices(seed: int, step: int, batch_size: int, size: int) -> Int[np.ndarray, 'B']:
    """The images of batch number `step`, of `size` in all: each epoch is one permutation, and no image is left out.

    A batch that crosses an epoch's end takes its rest from the next one's permutation.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, places = np.divmod(positions, size)
    out = np.empty(batch_size, np.int32)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        out[chosen] = _permutation(seed, int(epoch), size)[places[chosen]]
    return out


def crop_generator(seed: int, position: int) -> np.random.Generator:
    """What the image at `position` of the stream (step * batch_size + row) draws its crop from.

    Its counter keeps it clear of the permutations, which have the same keys.
    """
    return np.random.Generator(np.random.Philox(key=[seed, position], counter=[0, 0, 0, 1]))
