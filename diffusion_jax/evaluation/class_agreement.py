"""Does an image show the label that was asked for? Judged by a classifier trained on the real images."""

from typing import Any

import numpy as np

from diffusion_jax.data import Splits
from diffusion_jax.errors import UsageError
from diffusion_jax.evaluation.result import Result
from diffusion_jax.images import grid
from diffusion_jax.pipelines.images import Samples

MAX_TRAINING_IMAGES = 10_000  # a support-vector machine's cost grows with the square


def features(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, C] as float64 [N, H * W * C] in [0, 1]."""
    return images.reshape(len(images), -1) / 255.0


def check(splits: Splits, num_classes: int) -> None:
    """A `UsageError` unless the model is conditioned on labels."""
    if not num_classes:
        raise UsageError(
            'the evaluator class_agreement needs labelled data and class_conditional=True: '
            'leave it out of evaluate.evaluators.'
        )


def evaluate(samples: Samples, splits: Splits) -> Result:
    """The share of samples that a support-vector machine (RBF kernel, on pixels) reads as the label asked for.

    It is trained on the real training images (each k-th of a large set, 10,000 at most); its own accuracy on the real
    test images bounds what the share can mean. The picture shows the samples that it reads otherwise.
    """
    from sklearn.svm import SVC

    train, test = (part.in_memory() for part in splits)
    fitted = np.arange(0, len(train), -(-len(train) // MAX_TRAINING_IMAGES))
    classifier = SVC(C=10.0, gamma='scale').fit(features(train.images[fitted]), train.labels[fitted])
    read = classifier.predict(features(samples.images))
    agrees = read == samples.labels
    per_class = {
        name: float(agrees[samples.labels == label].mean())
        for label, name in enumerate(train.class_names)
        if np.any(samples.labels == label)
    }
    scores: dict[str, Any] = {
        'class_agreement': float(agrees.mean()),
        'classifier_accuracy_on_real_test_images': float(classifier.score(features(test.images), test.labels)),
        'class_agreement_per_class': per_class,
    }
    wrong = samples.images[~agrees][:40]
    return Result(scores, {'misread': grid(wrong, columns=10)} if len(wrong) else {})
