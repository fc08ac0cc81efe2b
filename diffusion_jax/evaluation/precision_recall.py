"""Are the samples among the real images (precision, density), and are all real images among them (recall, coverage)?

By neighbourhoods in feature space: each point with its k nearest of its own kind (Kynkäänniemi et al. 2019; density and
coverage: Naeem et al. 2020).
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion_jax.errors import UsageError
from diffusion_jax.evaluation.result import Batch, Kept, Result, check_real

NEIGHBOURS = 3
"""k of precision and recall, in their paper."""
DENSITY_NEIGHBOURS = 5
"""k of density and coverage, in theirs."""
ROWS = 1000  # of a matrix of distances, at a time


class Neighbourhoods(NamedTuple):
    """Shares in [0, 1]; density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def _squared_distances(x: np.ndarray, y: np.ndarray):
    """Rows of the matrix of squared distances, some at a time."""
    squares = (y**2).sum(axis=1)
    for start in range(0, len(x), ROWS):
        rows = x[start : start + ROWS]
        yield start, np.maximum((rows**2).sum(axis=1)[:, None] + squares - 2 * rows @ y.T, 0)


def _squared_radii(x: np.ndarray, neighbours: tuple[int, ...]) -> list[np.ndarray]:
    """For each k, the squared distance of each point to its k-th nearest other."""
    radii = [np.empty(len(x)) for _ in neighbours]
    for start, distances in _squared_distances(x, x):
        rows = np.arange(len(distances))
        distances[rows, start + rows] = np.inf  # itself
        nearest = np.partition(distances, [k - 1 for k in neighbours], axis=1)
        for radius, k in zip(radii, neighbours, strict=True):
            radius[start + rows] = nearest[:, k - 1]
    return radii


def neighbourhoods(
    real: Float[np.ndarray, 'N F'],
    generated: Float[np.ndarray, 'M F'],
    k: int = NEIGHBOURS,
    density_k: int = DENSITY_NEIGHBOURS,
) -> Neighbourhoods:
    """All four; time and memory grow with N M, and 10,000 of each take seconds."""
    real, generated = np.float64(real), np.float64(generated)
    real_radii, density_radii = _squared_radii(real, (k, density_k))
    (generated_radii,) = _squared_radii(generated, (k,))
    precise = within = 0
    recalled, nearest = np.zeros(len(real), bool), np.full(len(real), np.inf)
    for start, distances in _squared_distances(generated, real):
        precise += (distances <= real_radii).any(axis=1).sum()
        recalled |= (distances <= generated_radii[start : start + len(distances), None]).any(axis=0)
        within += (distances < density_radii).sum()
        nearest = np.minimum(nearest, distances.min(axis=0))
    return Neighbourhoods(
        precision=float(precise / len(generated)),
        recall=float(recalled.mean()),
        density=float(within / (density_k * len(generated))),
        coverage=float((nearest < density_radii).mean()),
    )


class PrecisionRecall:
    """`precision`, `recall`, `density`, `coverage`, and the other split's for comparison."""

    needs_features, needs_model = True, False

    def __init__(self, setting: Any):
        self._setting = setting
        self._kept = Kept(setting.num, setting.most_kept)

    @staticmethod
    def check(setting: Any) -> None:
        setting.features()
        setting.needs_images('precision_recall')
        check_real(setting.splits, DENSITY_NEIGHBOURS + 1, 'precision_recall')
        if setting.num <= DENSITY_NEIGHBOURS:
            raise UsageError(
                f'precision_recall looks at {DENSITY_NEIGHBOURS} neighbours and needs evaluate.num of '
                f'{DENSITY_NEIGHBOURS + 1} at least, got {setting.num}.'
            )

    def update(self, batch: Batch) -> None:
        self._kept.update(batch.features)

    def result(self) -> Result:
        reference, other = self._setting.reference().kept, self._setting.other().kept
        # Recall and coverage grow with the number of samples: the real ones that they are held against are as many.
        count = min(len(self._kept.rows()), len(other))
        real = neighbourhoods(reference, other[np.linspace(0, len(other) - 1, count).round().astype(int)])
        ours = neighbourhoods(reference, self._kept.rows())
        return Result(ours._asdict() | {f'{name}_of_real_images': value for name, value in real._asdict().items()}, {})
