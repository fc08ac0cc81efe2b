"""Are the samples each clearly of one class, and of many classes together? exp E KL(p(y | x) | p(y)).

Salimans et al. 2016, section 4; with any feature network that gives logits.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion_jax.errors import UsageError
from diffusion_jax.evaluation.result import Batch, Result

SPLITS = 10
SEED = 2020


class Score(NamedTuple):
    mean: float
    std: float  # over the splits


class InceptionScore:
    """The score of a stream of `count` logits, in ten splits.

    Args:
      shuffle: whether splits are drawn at random, always the same way; else they are consecutive, which is another
        number for a set that is sorted by class.
    """

    def __init__(self, count: int, shuffle: bool = True):
        self._seen = 0
        order = np.random.RandomState(SEED).permutation(count) if shuffle else np.arange(count)
        self._split = order * SPLITS // count
        self._sums: list[list[Any]] = [[0, 0.0, 0.0] for _ in range(SPLITS)]  # samples, sum p log p, sum p

    def update(self, logits: Float[np.ndarray, 'B K']) -> None:
        logits = logits.astype(np.float64)
        logits = logits - logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        split = self._split[self._seen : self._seen + len(p)]
        for index in np.unique(split):
            rows = split == index
            sums = self._sums[index]
            sums[0] += int(rows.sum())
            sums[1] = sums[1] + (p[rows] * log_p[rows]).sum()
            sums[2] = sums[2] + p[rows].sum(axis=0)
        self._seen += len(p)

    def score(self) -> Score:
        scores = []
        for count, p_log_p, p in (sums for sums in self._sums if sums[0]):
            marginal = np.maximum(p / count, np.finfo(float).tiny)
            scores.append(np.exp(p_log_p / count - (marginal * np.log(marginal)).sum()))
        return Score(float(np.mean(scores)), float(np.std(scores)))


class InceptionScoreEvaluator:
    """`inception_score`, its spread, and that of the reference images for comparison."""

    needs_features, needs_model = True, False

    def __init__(self, setting: Any):
        self._setting = setting
        self._score = InceptionScore(setting.num)

    @staticmethod
    def check(setting: Any) -> None:
        setting.features()
        setting.needs_images('inception_score')
        if setting.num < SPLITS:
            raise UsageError(f'inception_score needs evaluate.num of {SPLITS} at least, got {setting.num}.')

    def update(self, batch: Batch) -> None:
        self._score.update(batch.logits)

    def result(self) -> Result:
        ours = self._score.score()
        scores = {
            'inception_score': ours.mean,
            'inception_score_std': ours.std,
            'inception_score_of_real_images': self._setting.reference().inception_score,
        }
        return Result(scores, {})
