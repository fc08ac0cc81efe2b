"""Does an image show the label that was asked for? Judged by a classifier trained on the real images."""

from typing import Any

import numpy as np

from diffusion_jax.errors import UsageError
from diffusion_jax.evaluation.result import Batch, Result
from diffusion_jax.images import grid

SHOWN = 40


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
