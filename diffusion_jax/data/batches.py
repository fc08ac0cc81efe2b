"""Deterministic batches. Which images make batch number `step` is a pure function of (seed, step)."""

import contextlib
import dataclasses
import itertools
import math
import queue
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from diffusion_jax.data.image_set import Images
from diffusion_jax.data.latents import LatentSet
from diffusion_jax.data.order import batch_indices
from diffusion_jax.data.reading import StreamedBatches, read_ahead
from diffusion_jax.errors import UsageError
from diffusion_jax.images import to_float
from diffusion_jax.registry import lookup

MAX_DEVICE_BYTES = 2 * 1024**3
PLACEMENTS = ('auto', 'device', 'host', 'stream')

Arrays = dict[str, Array]

FROZEN = 'frozen'


class Batches:
    """Batches of an image set, sharded over the devices, without end.

    A small set lives on every device, and only indices travel: `arrays` is then the set, to be given to the jitted
    step, which cuts the batch out with `cut`. A larger one stays on the host, `arrays` is empty, the images travel. The
    largest, a `StreamedSet`, is read from the disk (its crops are said where it is made: `data.load`). The batches are
    the same wherever the images are, and with several processes each reads and sends the rows of its own devices:

        batches = Batches(splits.train, batch_size, seed, replicated=replicated(mesh), sharded=sharded_batch(mesh),
                          placement=config.data.placement, workers=config.data.workers)
        with batches.stream(start) as stream:
            for step in range(start, num_steps):
                state = train_step(state, batches.arrays, next(stream))

    Args:
      image_set: the images.
      batch_size: of the whole batch, over all devices.
      seed: of the order and of random crops.
      replicated: the sharding of `arrays`.
      sharded: the sharding of a batch along its first axis, over one axis of the mesh or several.
      placement: 'device', 'host', or 'auto': on the device up to 2 GiB. A `StreamedSet` is streamed ('auto', 'stream').
      workers: processes that read ahead of a `stream` of a `StreamedSet`; 0 for threads of this one.
      conditioning: arrays of one entry an image, which come with every batch.
      frozen: parameters that the step uses and does not train, wherever they are; `arrays['frozen']`.

    Attributes:
      arrays: the set, if it is on the devices, and what is frozen.
      on_device: whether it is.
      streamed: whether it is read from the disk.
      batch_size: of the whole batch.
      size: images of the set.
    """

    def __init__(
        self,
        image_set: Images | LatentSet,
        batch_size: int,
        seed: int,
        *,
        replicated: NamedSharding,
        sharded: NamedSharding,
        placement: str = 'auto',
        workers: int = 0,
        conditioning: Mapping[str, np.ndarray] | None = None,
        frozen: Any = None,
    ):
        lookup('placement', dict.fromkeys(PLACEMENTS), placement)
        shards = _num_shards(sharded)
        if batch_size < 1 or batch_size % shards:
            raise UsageError(
                f'batch_size must be a positive multiple of the {shards} parts that it is split in, got {batch_size}.'
            )
        if workers < 0:
            raise UsageError(f'workers must be 0 (threads of this process) or more, got {workers}.')
        self.streamed = image_set.streamed
        self._conditioning = dict(conditioning or {})
        given = {} if frozen is None else {FROZEN: frozen}
        if self.streamed and placement not in ('auto', 'stream'):
            raise UsageError(
                f"placement={placement!r} is for images in memory, and these are streamed: 'auto' or 'stream' fit, or "
                'data.load(..., streaming=False).'
            )
        if not self.streamed and (placement == 'stream' or workers):
            raise UsageError(
                f'placement={placement!r} with workers={workers} is for images that are streamed, and these are in '
                "memory: 'auto', 'device' or 'host' with workers=0 fit, or data.load(..., streaming=True)."
            )
        self.batch_size = batch_size
        self.size = len(image_set)
        self._seed = seed
        self._sharded = sharded
        self._workers = workers
        self.on_device, self.arrays = False, given
        if self.streamed:
            # Captions stay here: the workers have no use for them.
            self._set = dataclasses.replace(image_set, captions=None)
            places = sharded.addressable_devices_indices_map((batch_size,)).values()
            self._rows = np.unique(np.concatenate([np.arange(batch_size)[place] for place in places]))
            self._position = np.zeros(batch_size, np.int64)  # of a row of the batch among those that are read here
            self._position[self._rows] = np.arange(len(self._rows))
            return
        self._host = {**image_set.arrays(), **self._conditioning}
        self.on_device = placement == 'device' or (placement == 'auto' and image_set.nbytes <= MAX_DEVICE_BYTES)
        self.arrays: Arrays = given | (_place(self._host, replicated) if self.on_device else {})

    def __call__(self, step: int, count: int | None = None) -> Arrays:
        """Batch number `step`, for `cut`; with a count, that many from there on, stacked on a new first axis."""
        steps = range(step, step + (1 if count is None else count))
        if self.streamed:
            source = self._source(0)
            return self._place_rows([self._completed(source.read(i), i) for i in steps], count)
        indices = np.stack([batch_indices(self._seed, i, self.batch_size, self.size) for i in steps])
        indices = indices[0] if count is None else indices
        sharding = self._sharding(count)
        if self.on_device:
            return _place({'index': indices}, sharding)

        def rows(array):
            shape = (*indices.shape, *array.shape[1:])
            # Each process cuts out the rows of its own devices.
            return jax.make_array_from_callback(shape, sharding, lambda index: array[indices[index[: indices.ndim]]])

        return {name: rows(array) for name, array in self._host.items()}

    def stream(self, start: int, count: int | None = None) -> 'Stream':
        """Batches start, start + 1, .. without end, or stacks of `count` of them, read and placed ahead."""
        return Stream(self._streamed(start, count) if self.streamed else self._in_turn(start, count))

    def _in_turn(self, start: int, count: int | None) -> Iterator[Arrays]:
        for step in itertools.count(start, count or 1):
            yield self(step, count)

    def _streamed(self, start: int, count: int | None) -> Iterator[Arrays]:
        with contextlib.closing(read_ahead(self._source(start), self._workers)) as ahead:
            for step in itertools.count(start, count or 1):
                steps = range(step, step + (count or 1))
                yield self._place_rows([self._completed(next(ahead), i) for i in steps], count)

    def _completed(self, batch: dict[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
        """With what this process has of the conditioning."""
        indices = batch_indices(self._seed, step, self.batch_size, self.size)[self._rows]
        return batch | {name: array[indices] for name, array in self._conditioning.items()}

    def _source(self, start: int) -> StreamedBatches:
        return StreamedBatches(self._set, self._seed, self.batch_size, start, self._rows)

    def _sharding(self, count: int | None) -> NamedSharding:
        if count is None:
            return self._sharded
        return NamedSharding(self._sharded.mesh, PartitionSpec(None, *self._sharded.spec))

    def _place_rows(self, batches: list[dict[str, np.ndarray]], count: int | None) -> Arrays:
        """Batches of which only this process's rows are here, as global arrays."""

        def place(name: str) -> Array:
            read = batches[0][name] if count is None else np.stack([batch[name] for batch in batches])
            batch_axis = 0 if count is None else 1
            shape = (*read.shape[:batch_axis], self.batch_size, *read.shape[batch_axis + 1 :])

            def cut_out(index: tuple[slice, ...]) -> np.ndarray:
                return read[(*index[:batch_axis], self._position[index[batch_axis]])]

            return jax.make_array_from_callback(shape, self._sharding(count), cut_out)

        return {name: place(name) for name in batches[0]}


class Stream:
    """Batches in turn: while one is used, the next two are read and on their way to the devices.

    Close it, or use it as a context manager, to end what reads ahead.
    """

    def __init__(self, batches: Iterator[Arrays]):
        self._queue: queue.Queue = queue.Queue(maxsize=1)  # and one more in the thread's hand
        stop = threading.Event()
        thread = threading.Thread(target=_produce, args=(batches, self._queue, stop), name='batches', daemon=True)
        # Also where it is forgotten and when the interpreter ends. The thread knows the queue and not the stream.
        self._end = weakref.finalize(self, _end, self._queue, stop, thread)
        self._error: BaseException | None = None
        thread.start()

    def __iter__(self) -> 'Stream':
        return self

    def __next__(self) -> Arrays:
        if not self._end.alive:
            raise ValueError('the stream of batches is closed.')
        if self._error is None:
            batch, self._error = self._queue.get()
        if self._error is not None:
            raise self._error
        return batch

    def close(self) -> None:
        """Ends what reads ahead, worker processes too; nothing if it is closed already."""
        self._end()

    def __enter__(self) -> 'Stream':
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _produce(batches: Iterator[Arrays], filled: queue.Queue, stop: threading.Event) -> None:
    def put(item: tuple[Arrays | None, BaseException | None]) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return filled.put(item, timeout=0.1)

    with contextlib.closing(batches):
        while not stop.is_set():
            try:
                put((next(batches), None))
            except BaseException as error:
                return put((None, error))


def _end(filled: queue.Queue, stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():  # which collects garbage, too
        thread.join(30)
    while not filled.empty():
        filled.get_nowait()


def _num_shards(sharding: NamedSharding) -> int:
    axes = sharding.spec[0] if len(sharding.spec) else None
    axes = axes if isinstance(axes, tuple) else (axes,) if axes else ()
    return math.prod(sharding.mesh.shape[axis] for axis in axes)


def _place(arrays: dict[str, np.ndarray], sharding: NamedSharding) -> Arrays:
    """Host arrays, the same in every process, as global arrays."""
    return {
        name: jax.make_array_from_callback(array.shape, sharding, lambda index, array=array: array[index])
        for name, array in arrays.items()
    }


def cut(arrays: Arrays, batch: Arrays) -> Arrays:
    """Inside jit: the batch's images (uint8 [B, H, W, C]) and labels, wherever the set lives; and what is frozen."""
    frozen = {FROZEN: arrays[FROZEN]} if FROZEN in arrays else {}
    if 'index' in batch:
        batch = {name: array[batch['index']] for name, array in arrays.items() if name != FROZEN}
    return batch | frozen


def prepare(images: Array, key: PRNGKeyArray, flip: bool) -> Float[Array, 'B H W C']:
    """Inside jit: uint8 images as float32 in [-1, 1], each mirrored left to right with probability 1/2 if `flip`."""
    x = to_float(images)
    if flip:
        mirrored = jax.random.bernoulli(key, 0.5, x.shape[:1])
        x = jnp.where(mirrored[:, None, None, None], x[:, :, ::-1], x)
    return x
