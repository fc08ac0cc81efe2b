"""Does an image show the label that was asked for? Judged by a classifier trained on the real images."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from diffusion_jax.errors import UsageError
from diffusion_jax.evaluation.result import Batch, Result
from diffusion_jax.images import grid

SHOWN = 40


def share_read_as(logits: Float[np.ndarray, 'N K'], labels: Int[np.ndarray, 'N']) -> float:
    """The share of images, in [0, 1], that a classifier with these logits reads as these labels."""
    return float((logits.argmax(axis=1) == labels).mean())


def mean_distance(features: Float[np.ndarray, 'N F']) -> float:
    """How diverse images are: the mean Euclidean distance between the features of two of them; 0 for copies of one."""
    if len(features) < 2:
        raise UsageError(f'the distance between images needs two of them or more, got {len(features)}.')
    features = np.asarray(features, np.float64)
    apart = np.linalg.norm(features[:, None] - features[None], axis=-1)
    return float(apart[np.triu_indices(len(features), 1)].mean())


class ClassAgreement:
    """The share of samples that the classifier reads as the label asked for, overall and per class.

    Its own accuracy on the real test images, which it has not seen, says what the share can mean: guidance makes
    samples that are easier to read than real images. The picture shows samples that it reads otherwise.
    """

    needs_features, needs_model = False, False  # its classifier need not be the feature network

    def __init__(self, setting: Any):
        self._setting = setting
        self._agrees: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._misread: list[np.ndarray] = []

    @staticmethod
    def check(setting: Any) -> None:
        if not setting.class_names:
            raise UsageError(
                'the evaluator class_agreement needs labelled data and class_conditional=True: '
                'leave it out of evaluate.evaluators.'
            )
        setting.classifier()

    def update(self, batch: Batch) -> None:
        network = self._setting.classifier()
        was_read = batch.logits is not None and network is self._setting.features()
        logits = batch.logits if was_read else network(batch.images, self._setting.mesh)[1]
        agrees = logits.argmax(axis=1) == batch.labels
        self._agrees.append(agrees)
        self._labels.append(batch.labels)
        if (left := SHOWN - sum(map(len, self._misread))) > 0:
            self._misread.append(batch.images[~agrees][:left])

    def result(self) -> Result:
        agrees, labels, misread = map(np.concatenate, (self._agrees, self._labels, self._misread))
        names = self._setting.class_names
        scores: dict[str, Any] = {
            'class_agreement': float(agrees.mean()),
            'classifier_accuracy_on_real_test_images': self._setting.accuracy_on_test_images(),
            'class_agreement_per_class': {names[k]: float(agrees[labels == k].mean()) for k in np.unique(labels)},
        }
        return Result(scores, {'misread': grid(misread, columns=10)} if len(misread) else {})
