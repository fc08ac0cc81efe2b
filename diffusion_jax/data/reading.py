"""Streamed batches, read ahead by Grain in threads of this process or in worker processes."""

import functools
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Int

from diffusion_jax.data.latents import LatentSet
from diffusion_jax.data.order import batch_indices, crop_generator
from diffusion_jax.data.streamed import THREADS, StreamedSet
from diffusion_jax.errors import UsageError

READ_AHEAD = 2  # batches, in each process


class StreamedBatches:
    """Random access to whole batches: element i is what this process reads of batch `start` + i.

    A pure function of (seed, start + i): neither the workers nor where a run was resumed change it. It is sent to
    worker processes.

    Args:
      rows: those of a batch whose devices this process has.
    """

    def __init__(
        self, image_set: StreamedSet | LatentSet, seed: int, batch_size: int, start: int, rows: Int[np.ndarray, 'R']
    ):
        self._stored_set = image_set
        self._seed, self._batch_size, self._start, self._rows = seed, batch_size, start, rows

    def __len__(self) -> int:
        return 2**40  # without end

    def __getitem__(self, element: int) -> dict[str, Any]:
        """{'image': uint8 [R, H, W, C], 'label': int32 [R]} of the rows, or {'error': .., 'traceback': ..}."""
        # As data: of an exception, only what can be pickled would come through from a worker process.
        try:
            return self.read(self._start + int(element))
        except UsageError as error:
            return {'error': str(error), 'traceback': ''}
        except Exception as error:
            return {'error': repr(error), 'traceback': traceback.format_exc()}

    def read(self, step: int) -> dict[str, np.ndarray]:
        images = self._stored_set
        indices = batch_indices(self._seed, step, self._batch_size, len(images))[self._rows]

        def read(row: int, index: int) -> dict[str, np.ndarray]:
            return images.read_fields(index, crop_generator(self._seed, step * self._batch_size + row))

        read_rows = list(_threads().map(read, self._rows.tolist(), indices.tolist()))
        batch = {name: np.stack([row[name] for row in read_rows]) for name in read_rows[0]}
        if images.labels is not None:
            batch['label'] = np.asarray(images.labels[indices], np.int32)
        return batch


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix='images')


def checked(batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """The batch, or the error that it came to."""
    if 'error' not in batch:
        return batch
    if batch['traceback']:
        raise RuntimeError(f'reading a batch failed: {batch["error"]}\n{batch["traceback"]}')
    raise UsageError(batch['error'])


def read_ahead(batches: StreamedBatches, workers: int) -> Iterator[dict[str, np.ndarray]]:
    """The batches in turn; close the generator to end the workers.

    Raises:
      UsageError: an image cannot be read, or a worker process ended.
    """
    import grain  # it takes a second, and sets in memory do without
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain reads its own, which only a program of absl's has parsed
        flags.FLAGS.mark_as_parsed()

    ahead = 1 if workers else READ_AHEAD  # a worker has another in its queue
    options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
    dataset = grain.MapDataset.source(batches).to_iter_dataset(options)
    if workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1), worker_init_fn=_begin_worker
        )
    iterator = iter(dataset)
    try:
        while True:
            try:
                batch = next(iterator)
            except RuntimeError as error:
                if 'exit code' not in str(error):
                    raise
                raise UsageError(
                    f'a process that reads images ended ({str(error).split(". ")[0]}). -9 is a kill, perhaps for want '
                    'of memory, and -7 a full /dev/shm: try fewer --config.data.workers; 0 reads in threads of this '
                    "process. 1, in a script of one's own: start training below `if __name__ == '__main__':`."
                ) from error
            yield checked(batch)
    finally:
        iterator.close()


def _begin_worker(index: int, count: int) -> None:
    # Accelerators are the parent's.
    os.environ['JAX_PLATFORMS'] = 'cpu'
    if 'jax' in sys.modules:
        sys.modules['jax'].config.update('jax_platforms', 'cpu')
    # Ctrl-C and a cluster's SIGTERM reach all processes; the parent still needs batches up to where it stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """Ends this process when its parent has: one that is killed tells nobody."""
    multiprocessing.parent_process().join()
    os._exit(1)
