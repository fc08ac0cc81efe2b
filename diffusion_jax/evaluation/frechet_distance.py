"""How far are the samples' features from the real images', as if both were normal? FID, by Inception's features.

Heusel et al. 2017, eq. 6: |mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2)).
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from diffusion_jax.errors import UsageError
from diffusion_jax.evaluation.result import UNREADABLE, Batch, Result, check_real


class Moments:
    """Mean and covariance of a stream of vectors, in float64 on the host: no cancellation, and no samples kept."""

    def __init__(self, mean: np.ndarray | None = None, covariance: np.ndarray | None = None, count: int = 0):
        self.count, self.mean = count, mean
        self._scatter = None if covariance is None else covariance * (count - 1)

    def update(self, rows: Float[np.ndarray, 'B F']) -> None:
        rows = rows.astype(np.float64)
        count, mean = len(rows), rows.mean(axis=0)
        centred = rows - mean
        scatter = centred.T @ centred
        if self.mean is None:
            self.count, self.mean, self._scatter = count, mean, scatter
            return
        # Chan, Golub & LeVeque 1979: the scatter of two sets from those of each.
        total, apart = self.count + count, mean - self.mean
        self._scatter += scatter + np.outer(apart, apart) * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    @property
    def covariance(self) -> Float[np.ndarray, 'F F']:
        """Unbiased."""
        return self._scatter / (self.count - 1)


def distance(a: Moments, b: Moments) -> float:
    """The Frechet distance of the normal distributions with these moments, squared as is the custom.

    tr (C C')^(1/2) is the sum of the square roots of the eigenvalues of C^(1/2) C' C^(1/2), which is symmetric: no
    complex numbers, and covariances without full rank are no special case.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(np.maximum(inner, 0)).sum()
    return float(np.sum((a.mean - b.mean) ** 2) + trace)


def read_statistics(path: str | Path, num_features: int) -> Moments:
    """The moments in an .npz file with mu and sigma, as pytorch-fid and others write them.

    Raises:
      UsageError: there is no such file, or it holds anything else.
    """
    try:
        with np.load(Path(path).expanduser()) as arrays:
            mean, covariance = np.float64(arrays['mu']), np.float64(arrays['sigma'])
    except UNREADABLE as error:
        raise UsageError(f'{path} is no .npz file with mu and sigma: {error}') from error
    if mean.shape != (num_features,) or covariance.shape != (num_features, num_features):
        raise UsageError(
            f'{path} holds statistics of {mean.shape} features, and the feature network has {num_features}.'
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UsageError(f'{path} holds statistics with NaN or inf.')
    return Moments(mean, covariance, 2)


class FrechetDistance:
    """`frechet_distance` to the reference images, beside `frechet_distance_of_real_images`: the other split's."""

    needs_features, needs_model = True, False

    def __init__(self, setting: Any):
        self._setting = setting
        self._moments = Moments()

    @staticmethod
    def check(setting: Any) -> None:
        features = setting.features()
        if setting.num <= features.num_features:
            raise UsageError(
                f'evaluate.num={setting.num} samples are too few for frechet_distance: the covariance of the '
                f'{features.num_features} features of {features.name} needs at least {features.num_features + 1}, and '
                '10,000 to 50,000 are usual. Raise evaluate.num, or take kernel_distance, which has no bias.'
            )
        if setting.statistics:
            read_statistics(setting.statistics, features.num_features)
        else:
            check_real(setting.splits, 2, 'frechet_distance')

    def update(self, batch: Batch) -> None:
        self._moments.update(batch.features)

    def result(self) -> Result:
        if self._setting.statistics:
            reference = read_statistics(self._setting.statistics, len(self._moments.mean))
            return Result({'frechet_distance': distance(self._moments, reference)}, {})
        reference, other = self._setting.reference(), self._setting.other()
        scores = {
            'frechet_distance': distance(self._moments, reference.moments),
            'frechet_distance_of_real_images': distance(other.moments, reference.moments),
        }
        return Result(scores, {})
