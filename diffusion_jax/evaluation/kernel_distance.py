"""How far are the samples' features from the real images', without bias at any number of samples? KID.

Binkowski et al. 2018: the squared maximum mean discrepancy with the kernel (x.y / F + 1)^3, averaged over subsets.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion_jax.errors import UsageError
from diffusion_jax.evaluation.result import Batch, Kept, Result, check_real

SUBSETS = 100
SUBSET_SIZE = 1000
SEED = 2020  # of the subsets, and their order: torch-fidelity's


class KernelDistance(NamedTuple):
    mean: float
    std: float  # over the subsets


def squared_mmd(x: Float[np.ndarray, 'N F'], y: Float[np.ndarray, 'N F']) -> float:
    """The unbiased estimate from equally many of both; it can be below 0."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    n, features = x.shape
    xx, yy, xy = ((a @ b.T / features + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (n * (n - 1))
    return float(within - 2 * xy.mean())


def kernel_distance(
    x: Float[np.ndarray, 'N F'], y: Float[np.ndarray, 'M F'], subsets: int = SUBSETS, size: int = SUBSET_SIZE
) -> KernelDistance:
    """Mean and standard deviation of `squared_mmd` over random subsets; of all, once, where a set is no larger."""
    size = min(size, len(x), len(y))
    rng = np.random.RandomState(SEED)
    estimates = []
    for _ in range(subsets if size < max(len(x), len(y)) else 1):
        first, second = (rows[rng.choice(len(rows), size, replace=False)] for rows in (x, y))
        estimates.append(squared_mmd(first, second))
    return KernelDistance(float(np.mean(estimates)), float(np.std(estimates)))


class KernelDistanceEvaluator:
    """`kernel_distance` to the reference images, its spread, and the other split's for comparison."""

    needs_features, needs_model = True, False

    def __init__(self, setting: Any):
        self._setting = setting
        self._kept = Kept(setting.num, setting.most_kept)

    @staticmethod
    def check(setting: Any) -> None:
        setting.features()
        setting.needs_images('kernel_distance')
        check_real(setting.splits, 2, 'kernel_distance')
        if setting.num < 2:
            raise UsageError(f'kernel_distance needs evaluate.num of 2 at least, got {setting.num}.')

    def update(self, batch: Batch) -> None:
        self._kept.update(batch.features)

    def result(self) -> Result:
        reference, other = self._setting.reference(), self._setting.other()
        ours = kernel_distance(self._kept.rows(), reference.kept)
        scores = {
            'kernel_distance': ours.mean,
            'kernel_distance_std': ours.std,
            'kernel_distance_of_real_images': kernel_distance(other.kept, reference.kept).mean,
        }
        return Result(scores, {})
