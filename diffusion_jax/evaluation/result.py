"""What goes into an evaluator, and what it says."""

import zipfile
import zlib
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int, UInt8

from diffusion_jax.errors import UsageError

UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)
"""What a damaged .npz file may raise."""


class Batch(NamedTuple):
    """Samples, and what the feature network reads in them (None where there is none).

    Attributes:
      images: [B, H, W, C].
      labels: that were asked for; None from an unconditional model.
      features: [B, F].
      logits: [B, K].
    """

    images: UInt8[np.ndarray, 'B H W C']
    labels: Int[np.ndarray, 'B'] | None = None
    features: Float[np.ndarray, 'B F'] | None = None
    logits: Float[np.ndarray, 'B K'] | None = None


class Result(NamedTuple):
    """Scores by name (numbers, or dicts of them), and pictures by name, uint8 [h, w, 3]."""

    scores: dict[str, Any]
    pictures: dict[str, np.ndarray]


class Evaluator(Protocol):
    """Sees all samples, batch by batch, and then says its scores. `setting` is an `evaluation.setting.Setting`.

    Attributes:
      needs_features: whether it looks at `Batch.features` or `Batch.logits`.
      needs_model: whether its result calls the model; every process then asks for it, and else the writer alone.
    """

    needs_features: bool
    needs_model: bool

    def __init__(self, setting: Any): ...

    @staticmethod
    def check(setting: Any) -> None:
        """A `UsageError` if it cannot be done with these data, this model and this many samples."""

    def update(self, batch: Batch) -> None: ...

    def result(self) -> Result: ...


def evenly(count: int, most: int) -> Int[np.ndarray, 'K']:
    """At most `most` of 0 .. count - 1, spread evenly."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


class Kept:
    """The rows of a stream of `count` that are kept, `most` at most, spread evenly over it."""

    def __init__(self, count: int, most: int):
        self._wanted = evenly(count, most)
        self._seen = 0
        self._rows: list[np.ndarray] = []

    def update(self, rows: np.ndarray) -> None:
        first, last = np.searchsorted(self._wanted, (self._seen, self._seen + len(rows)))
        self._rows.append(rows[self._wanted[first:last] - self._seen])
        self._seen += len(rows)

    def rows(self) -> np.ndarray:
        return np.concatenate(self._rows)


def check_real(splits: Any, least: int, evaluator: str) -> None:
    """A `UsageError` unless both splits have as many images."""
    for name, images in splits._asdict().items():
        if len(images) < least:
            raise UsageError(
                f'{evaluator} needs {least} real images at least, and the {name} split has {len(images)}: take more '
                'data, or leave it out of evaluate.evaluators.'
            )
