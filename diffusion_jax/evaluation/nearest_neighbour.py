"""Are the samples new, or copies of training images?"""

import numpy as np

from diffusion_jax.data import Splits
from diffusion_jax.evaluation.class_agreement import features
from diffusion_jax.evaluation.result import Result
from diffusion_jax.images import grid
from diffusion_jax.pipelines.images import Samples

SHOWN = 20


def check(splits: Splits, num_classes: int) -> None:
    """Any images will do."""


def evaluate(samples: Samples, splits: Splits) -> Result:
    """Distances (Euclidean, pixels in [0, 1]) of samples to their nearest training image, beside those of test images.

    Test images are real and new by construction: their distances say how near an unseen real image comes. `near_copies`
    is the share of samples nearer than 99% of the test images come: about 0.01 for images as new as the test set, about
    1 for a model that recites. Of a streamed set an excerpt counts (`StreamedSet.in_memory`). The picture shows the
    nearest pairs of all, samples above their training images.
    """
    from sklearn.neighbors import NearestNeighbors

    training_images, test_images = (part.in_memory().images for part in splits)
    train = features(training_images)
    index = NearestNeighbors(n_neighbors=1, algorithm='brute').fit(train)
    distances, nearest = (column[:, 0] for column in index.kneighbors(features(samples.images)))
    reference = index.kneighbors(features(test_images))[0][:, 0]
    scores = {
        'median_distance_to_training_set': float(np.median(distances)),
        'median_distance_of_real_test_images': float(np.median(reference)),
        'near_copies': float(np.mean(distances < np.quantile(reference, 0.01))),
        'exact_copies': int(np.sum(np.all(samples.images == training_images[nearest], axis=(1, 2, 3)))),
    }
    closest = np.argsort(distances)[:SHOWN]
    pairs = np.concatenate([samples.images[closest], training_images[nearest[closest]]])
    return Result(scores, {'nearest': grid(pairs, columns=len(closest))})
