"""Latents of a set of images, encoded once: files of ArrayRecord, held in memory or read when a batch needs them.

A record is one image's `Moments` as float16: mean, then log-variance; then perhaps those of its mirror image.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from diffusion_jax.errors import UsageError

MAX_MEMORY_BYTES = 8 * 1024**3

NAMES = ('mean', 'log_variance', 'mirrored_mean', 'mirrored_log_variance')

REMEDY = 'Delete it, and the images are encoded again.'


@dataclasses.dataclass(frozen=True, eq=False)
class LatentSet:
    """Latents as `Batches` takes them; labels and captions are those of the images.

    Attributes:
        stored: the records.
        labels, class_names, captions: as of `ImageSet`.
        streamed: read records when a batch needs them, instead of all of them at first.
    """

    stored: 'LatentRecords'
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    captions: tuple[str, ...] | None = None
    streamed: bool = False

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def nbytes(self) -> int:
        """What all of them take in memory."""
        return len(self.stored) * self.stored.record_bytes

    def arrays(self) -> dict[str, np.ndarray]:
        """All of them, and the labels, if there are any."""
        found = self.stored.read(np.arange(len(self)))
        return found if self.labels is None else {**found, 'label': self.labels}

    def read_fields(self, index: int, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """Those of one image."""
        return {name: array[0] for name, array in self.stored.read(np.array([index])).items()}


class LatentRecords:
    """The records of a folder of `write_latents`, opened anew in each process.

    Raises:
        UsageError: there are none, or they are not whole.
    """

    def __init__(self, folder: str | Path, split: str):
        self._path = str(records_path(folder, split))
        try:
            described = json.loads(description_path(folder, split).read_text())
            self.shape = tuple(described['shape'])
            self._mirrored, self._size = bool(described['mirrored']), int(described['num'])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f'{description_path(folder, split)} is missing or damaged ({error!r}). {REMEDY}'
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != '_reader'}

    @functools.cached_property
    def _reader(self) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        return ArrayRecordReader(self._path, options='readahead_buffer_size:0')

    def __len__(self) -> int:
        return self._size

    @property
    def record_bytes(self) -> int:
        return 2 * int(np.prod(self.shape)) * (4 if self._mirrored else 2)

    def read(self, rows: Int[np.ndarray, 'K']) -> dict[str, Float[np.ndarray, 'K h w c']]:
        """Some of them, by those of `NAMES` that there are."""
        names = NAMES if self._mirrored else NAMES[:2]
        try:
            if self._reader.num_records() != self._size:
                raise ValueError(f'{self._reader.num_records()} records instead of {self._size}')
            records = self._reader.read(rows.tolist()) if len(rows) else []
            flat = np.frombuffer(b''.join(records), np.float16).reshape(len(rows), len(names), *self.shape)
        except Exception as error:
            raise UsageError(f'{self._path} is damaged ({error}). {REMEDY}') from error
        if not np.isfinite(flat).all():
            raise UsageError(f'{self._path} has latents that are not finite. {REMEDY}')
        return {name: flat[:, i] for i, name in enumerate(names)}


def records_path(folder: str | Path, split: str) -> Path:
    return Path(folder) / f'{split}.array_record'


def description_path(folder: str | Path, split: str) -> Path:
    return Path(folder) / f'{split}.json'


def write_latents(
    folder: str | Path,
    split: str,
    batches: Iterable[Mapping[str, Float[np.ndarray, 'B h w c']]],
    description: Mapping[str, Any],
) -> None:
    """Writes records of arrays named by `NAMES` (the mirrored ones may be absent), complete or not at all.

    Args:
      description: what they are of, to be compared by `described`.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path = records_path(folder, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix('.part')
    # A group is what one read decompresses: rows of a batch lie anywhere.
    writer = ArrayRecordWriter(str(part), 'group_size:1,uncompressed')
    num, shape, mirrored = 0, None, False
    try:
        for batch in batches:
            names = [name for name in NAMES if name in batch]
            mirrored, shape = len(names) == 4, batch['mean'].shape[1:]
            rows = np.stack([batch[name].astype(np.float16) for name in names], axis=1)
            for row in rows:
                writer.write(row.tobytes())
            num += len(rows)
    finally:
        writer.close()
    part.replace(path)
    text = json.dumps({'num': num, 'shape': shape, 'mirrored': mirrored, 'of': description}, indent=1)
    unfinished = description_path(folder, split).with_suffix('.part')
    unfinished.write_text(text + '\n')
    unfinished.replace(description_path(folder, split))  # last: with it the records are whole


def described(folder: str | Path, split: str) -> Any:
    """What the records there are of; None if there are none."""
    try:
        return json.loads(description_path(folder, split).read_text())['of']
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f'{description_path(folder, split)} is damaged ({error!r}). {REMEDY}') from error
