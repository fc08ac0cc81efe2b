"""Are the samples new, or copies of training images?"""

from typing import Any

import numpy as np

from diffusion_jax.evaluation.result import Batch, Result, evenly
from diffusion_jax.images import grid

SHOWN = 20
MOST_REFERENCES = 2000  # test images whose distances are taken


def pixels(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, C] as float32 [N, H * W * C] in [0, 1]."""
    return images.reshape(len(images), -1) / np.float32(255)


class NearestNeighbour:
    """Distances (Euclidean, pixels in [0, 1]) of samples to their nearest training image, beside those of test images.

    Test images are real and new by construction: their distances say how near an unseen real image comes. `near_copies`
    is the share of samples nearer than 99% of the test images come: about 0.01 for images as new as the test set, about
    1 for a model that recites. Of a streamed set an excerpt counts (`StreamedSet.in_memory`). The picture shows the
    nearest pairs of all, samples above their training images.
    """

    needs_features, needs_model = False, False

    def __init__(self, setting: Any):
        from sklearn.neighbors import NearestNeighbors

        self._train, test = (part.in_memory().images for part in setting.splits)
        self._index = NearestNeighbors(n_neighbors=1, algorithm='brute').fit(pixels(self._train))
        self._test = test[evenly(len(test), MOST_REFERENCES)]
        self._distances: list[np.ndarray] = []
        self._exact = 0
        self._closest = np.empty(0), self._train[:0], self._train[:0]  # distances, samples, training images

    @staticmethod
    def check(setting: Any) -> None:
        """Any images will do."""

    def _nearest(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        distances, rows = self._index.kneighbors(pixels(images))
        return distances[:, 0], rows[:, 0]

    def update(self, batch: Batch) -> None:
        distances, rows = self._nearest(batch.images)
        partners = self._train[rows]
        self._distances.append(distances)
        self._exact += int(np.all(batch.images == partners, axis=(1, 2, 3)).sum())
        together = [
            np.concatenate(pair) for pair in zip(self._closest, (distances, batch.images, partners), strict=True)
        ]
        order = np.argsort(together[0], kind='stable')[:SHOWN]
        self._closest = tuple(column[order] for column in together)

    def result(self) -> Result:
        reference, _ = self._nearest(self._test)
        distances = np.concatenate(self._distances)
        scores = {
            'median_distance_to_training_set': float(np.median(distances)),
            'median_distance_of_real_test_images': float(np.median(reference)),
            'near_copies': float(np.mean(distances < np.quantile(reference, 0.01))),
            'exact_copies': self._exact,
        }
        _, samples, partners = self._closest
        return Result(scores, {'nearest': grid(np.concatenate([samples, partners]), columns=len(samples))})
