"""Evaluators on samples whose score is known: real images, copies, wrong labels, noise."""

import numpy as np
import pytest

from diffusion_jax import UsageError, data
from diffusion_jax.data import ImageSet, Splits
from diffusion_jax.evaluation import class_agreement, nearest_neighbour
from diffusion_jax.pipelines import Samples

SPLITS = data.load('digits')
REAL = Samples(SPLITS.test.images, SPLITS.test.labels)


def test_real_images_agree_with_their_labels_and_not_with_others():
    right = class_agreement.evaluate(REAL, SPLITS)
    assert right.scores['class_agreement'] > 0.98
    assert right.scores['class_agreement'] == right.scores['classifier_accuracy_on_real_test_images']
    wrong = class_agreement.evaluate(Samples(REAL.images, (REAL.labels + 1) % 10), SPLITS)
    assert wrong.scores['class_agreement'] < 0.02
    assert wrong.pictures['misread'].ndim == 3


def test_agreement_is_told_per_class():
    labels = np.where(REAL.labels == 4, 5, REAL.labels)
    scores = class_agreement.evaluate(Samples(REAL.images, labels), SPLITS).scores['class_agreement_per_class']
    assert '4' not in scores
    assert 0.3 < scores['5'] < 0.7
    assert scores['0'] > 0.95


def test_unseen_real_images_are_no_copies_and_training_images_are():
    unseen = nearest_neighbour.evaluate(REAL, SPLITS).scores
    assert unseen['near_copies'] <= 0.011
    assert unseen['exact_copies'] == 0
    assert unseen['median_distance_to_training_set'] == unseen['median_distance_of_real_test_images']
    copies = nearest_neighbour.evaluate(Samples(SPLITS.train.images[:100], None), SPLITS).scores
    assert copies['near_copies'] == 1
    assert copies['exact_copies'] == 100
    rng = np.random.default_rng(0)
    almost = np.clip(SPLITS.train.images[:100] + rng.integers(-9, 10, (100, 8, 8, 1)), 0, 255).astype(np.uint8)
    near = nearest_neighbour.evaluate(Samples(almost, None), SPLITS).scores
    assert near['near_copies'] > 0.9
    assert near['exact_copies'] == 0


def test_noise_is_far_from_everything():
    noise = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1)).astype(np.uint8)
    scores = nearest_neighbour.evaluate(Samples(noise, None), SPLITS).scores
    assert scores['median_distance_to_training_set'] > 2 * scores['median_distance_of_real_test_images']


def test_agreement_needs_a_conditional_model():
    unlabelled = Splits(ImageSet(SPLITS.train.images), ImageSet(SPLITS.test.images))
    nearest_neighbour.check(unlabelled, 0)
    with pytest.raises(UsageError, match=r'leave it out of evaluate.evaluators'):
        class_agreement.check(unlabelled, 0)
