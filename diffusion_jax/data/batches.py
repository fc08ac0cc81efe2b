"""Deterministic batches. Which images make batch number `step` is a pure function of (seed, step)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffusion_jax.data.image_set import ImageSet
from diffusion_jax.errors import UsageError
from diffusion_jax.images import to_float
from diffusion_jax.registry import lookup

MAX_DEVICE_BYTES = 2 * 1024**3
PLACEMENTS = ('auto', 'device', 'host')

Arrays = dict[str, Array]


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


class Batches:
    """Batches of an image set, sharded over the devices, without end.

    A small set lives on every device, and only indices travel: `arrays` is then the set, to be given to the jitted
    step, which cuts the batch out with `cut`. A larger one stays on the host, `arrays` is empty, the images travel.

    Args:
      image_set: the images.
      batch_size: of the whole batch, over all devices.
      seed: of the order.
      replicated: the sharding of `arrays`.
      sharded: the sharding of a batch along its first axis.
      placement: 'device', 'host', or 'auto': on the device up to 2 GiB.
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        seed: int,
        *,
        replicated: NamedSharding,
        sharded: NamedSharding,
        placement: str = 'auto',
    ):
        lookup('placement', dict.fromkeys(PLACEMENTS), placement)
        if batch_size < 1 or batch_size % _num_shards(sharded):
            raise UsageError(
                f'batch_size must be a positive multiple of the {_num_shards(sharded)} parts that it is split in, '
                f'got {batch_size}.'
            )
        self.batch_size = batch_size
        self.seed = seed
        self.size = len(image_set)
        self._sharded = sharded
        self._host = {'image': image_set.images}
        if image_set.labels is not None:
            self._host['label'] = image_set.labels
        self.on_device = placement == 'device' or (placement == 'auto' and image_set.images.nbytes <= MAX_DEVICE_BYTES)
        self.arrays: Arrays = _place(self._host, replicated) if self.on_device else {}

    def __call__(self, step: int, count: int | None = None) -> Arrays:
        """Batch number `step`, for `cut`; with a count, that many from there on, stacked on a new first axis."""
        indices = np.stack([batch_indices(self.seed, step + i, self.batch_size, self.size) for i in range(count or 1)])
        indices, sharding = (indices[0], self._sharded) if count is None else (indices, _stacked(self._sharded))
        if self.on_device:
            return _place({'index': indices}, sharding)

        def rows(array):
            shape = (*indices.shape, *array.shape[1:])
            # Each process reads the rows of its own devices.
            cut_out = lambda index: array[indices[index[: indices.ndim]]]  # noqa: E731
            return jax.make_array_from_callback(shape, sharding, cut_out)

        return {name: rows(array) for name, array in self._host.items()}

    def stream(self, start: int, count: int | None = None) -> 'Stream':
        """Batches start, start + 1, .. without end, or stacks of `count` of them; one is placed ahead."""
        return Stream(self, start, count)


class Stream:
    """Batches in turn, the next one on its way to the devices while one is used."""

    def __init__(self, batches: Batches, start: int, count: int | None):
        self._batches = batches
        self._count = count
        self._step = start
        self._ahead: Arrays | None = None

    def _read(self) -> Arrays:
        batch = self._batches(self._step, self._count)
        self._step += self._count or 1
        return batch

    def __next__(self) -> Arrays:
        batch = self._ahead if self._ahead is not None else self._read()
        self._ahead = self._read()
        return batch

    def __iter__(self) -> 'Stream':
        return self

    def close(self) -> None:
        """Lets go of what was read ahead."""
        self._ahead = None


def _num_shards(sharding: NamedSharding) -> int:
    axes = sharding.spec[0] if len(sharding.spec) else None
    axes = axes if isinstance(axes, tuple) else (axes,) if axes else ()
    return math.prod(sharding.mesh.shape[axis] for axis in axes)


def _stacked(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def _place(arrays: dict[str, np.ndarray], sharding: NamedSharding) -> Arrays:
    """Host arrays, the same in every process, as global arrays."""
    return {
        name: jax.make_array_from_callback(array.shape, sharding, lambda index, array=array: array[index])
        for name, array in arrays.items()
    }


def cut(arrays: Arrays, batch: Arrays) -> Arrays:
    """Inside jit: the batch's images (uint8 [B, H, W, C]) and labels, wherever the set lives."""
    return {name: array[batch['index']] for name, array in arrays.items()} if 'index' in batch else batch


def prepare(images: Array, key: PRNGKeyArray, flip: bool) -> Float[Array, 'B H W C']:
    """Inside jit: uint8 images as float32 in [-1, 1], each mirrored left to right with probability 1/2 if `flip`."""
    x = to_float(images)
    if flip:
        mirrored = jax.random.bernoulli(key, 0.5, x.shape[:1])
        x = jnp.where(mirrored[:, None, None, None], x[:, :, ::-1], x)
    return x
