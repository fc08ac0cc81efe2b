"""What evaluators share: the real images and what the feature network reads in them, computed once and kept."""

import dataclasses
import functools
import hashlib
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion_jax.data import Splits
from diffusion_jax.errors import UsageError
from diffusion_jax.evaluation.features import FeatureNetwork, load_features, shipped_classifier
from diffusion_jax.evaluation.frechet_distance import Moments
from diffusion_jax.evaluation.inception_score import InceptionScore
from diffusion_jax.evaluation.result import UNREADABLE, Batch, Kept, evenly
from diffusion_jax.registry import unknown
from diffusion_jax.training.sharding import make_mesh

LOGGER = logging.getLogger(__name__)

MOST_KEPT = 10_000  # features that are compared pair by pair
ROWS = 2000  # images of a set, at a time
SPLITS = ('train', 'test')


class RealFeatures(NamedTuple):
    """What a feature network reads in a set of real images."""

    moments: Moments
    kept: np.ndarray  # [at most MOST_KEPT, F], spread evenly over the set
    inception_score: float
    accuracy: float | None  # where the network's classes are the set's


@dataclasses.dataclass(eq=False)
class Setting:
    """Everything that an evaluator may ask for.

    Args:
      splits: the real images.
      class_names: that the model is conditioned on; empty if it is not.
      num: how many samples will come.
      features_name, weights: of the feature network, as `features.load_features` takes them.
      reference_name: 'train', 'test', or the path of an .npz file of statistics, for frechet_distance alone.
      pipeline: the model, for evaluators that look at it.
      num_likelihood: test images whose likelihood is computed.
      seed: of what is random in an evaluator.
      cache: a folder to keep the real images' features in.
      most_kept: samples whose features are compared one by one, at most.
    """

    splits: Splits
    class_names: tuple[str, ...]
    num: int
    features_name: str = 'auto'
    weights: str | None = None
    reference_name: str = 'train'
    pipeline: Any = None
    num_likelihood: int = 64
    seed: int = 0
    cache: Path | None = None
    most_kept: int = MOST_KEPT
    _known: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.num < 1:
            raise UsageError(f'evaluate.num must be at least 1, got {self.num}.')
        if self.reference_name not in SPLITS and not self.reference_name.endswith('.npz'):
            raise unknown('evaluate.reference', self.reference_name, (*SPLITS, 'FILE.npz with mu and sigma'))

    @property
    def statistics(self) -> str | None:
        """The file that stands for the reference images, if one does."""
        return None if self.reference_name in SPLITS else self.reference_name

    def needs_images(self, evaluator: str) -> None:
        """A `UsageError` if the reference is a file of statistics."""
        if self.statistics:
            raise UsageError(
                f"{evaluator} compares images one by one: set evaluate.reference='train' or 'test', not a file of "
                'statistics, or leave it out of evaluate.evaluators.'
            )

    @functools.cached_property
    def mesh(self) -> Mesh:
        """This process's devices: the writer reads features on its own, so that no other waits for it."""
        return make_mesh(devices=jax.local_devices())

    @functools.cached_property
    def _features(self) -> FeatureNetwork:
        train = self.splits.train
        return load_features(self.features_name, self.weights, train.class_names, train.image_shape)

    def features(self) -> FeatureNetwork:
        """The feature network."""
        return self._features

    @functools.cached_property
    def _classifier(self) -> FeatureNetwork:
        train = self.splits.train
        if self.features_name != 'auto' and self.features().class_names == tuple(train.class_names):
            return self.features()
        network = shipped_classifier(train.class_names, train.image_shape)
        if network is None:
            raise UsageError(
                'class_agreement needs a classifier of these classes, and none is shipped: train one with '
                'experiments/classifiers/train.py, and set evaluate.features=classifier and evaluate.weights=FILE; or '
                'leave it out of evaluate.evaluators.'
            )
        return network

    def classifier(self) -> FeatureNetwork:
        """The feature network, if it reads the model's classes, and else the shipped classifier that does."""
        return self._classifier

    def read(self, images: np.ndarray, labels: np.ndarray | None, with_features: bool) -> Batch:
        """A batch of samples, and what the feature network reads in them."""
        if not with_features:
            return Batch(images, labels)
        return Batch(images, labels, *self.features()(images, self.mesh))

    def reference(self) -> RealFeatures:
        """Of the split that samples are held against."""
        return self._real(self.features(), self.reference_name)

    def other(self) -> RealFeatures:
        """Of the other split: real, and not the reference."""
        return self._real(self.features(), 'test' if self.reference_name == 'train' else 'train')

    def accuracy_on_test_images(self) -> float:
        return self._real(self.classifier(), 'test').accuracy

    def _real(self, network: FeatureNetwork, split: str) -> RealFeatures:
        key = (network.sha256, split)
        if key not in self._known:
            self._known[key] = self._read_real(network, split)
        return self._known[key]

    def _read_real(self, network: FeatureNetwork, split: str) -> RealFeatures:
        part = getattr(self.splits, split)
        path = None
        if self.cache is not None:
            path = self.cache / f'real_{network.name}_{network.sha256[:12]}_{_fingerprint(part)}.npz'
            if path.exists():
                try:
                    with np.load(path) as stored:
                        moments = Moments(stored['mean'], stored['covariance'], int(stored['count']))
                        accuracy = float(stored['accuracy']) if stored['accuracy'].size else None
                        return RealFeatures(moments, stored['kept'], float(stored['inception_score']), accuracy)
                except UNREADABLE as error:
                    LOGGER.warning('%s cannot be read (%s): computed again.', path, error)
        moments, kept, score, right = Moments(), Kept(len(part), MOST_KEPT), InceptionScore(len(part)), []
        readable = part.labels is not None and network.class_names == tuple(part.class_names)
        starts = range(0, len(part), ROWS)
        name = f'features of real images ({split})'
        for start in tqdm(starts, desc=name, unit='batch', leave=None, disable=len(starts) == 1):
            some = part.load(np.arange(start, min(start + ROWS, len(part))))
            features, logits = network(some.images, self.mesh)
            moments.update(features)
            kept.update(features)
            score.update(logits)
            if readable:
                right.append(logits.argmax(axis=1) == some.labels)
        accuracy = float(np.concatenate(right).mean()) if readable else None
        real = RealFeatures(moments, kept.rows(), score.score().mean, accuracy)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            part_path = path.with_suffix('.part.npz')
            np.savez(
                part_path,
                mean=moments.mean,
                covariance=moments.covariance,
                count=moments.count,
                kept=real.kept,
                inception_score=real.inception_score,
                accuracy=np.array([] if accuracy is None else accuracy),
            )
            part_path.replace(path)
        return real


def _fingerprint(part: Any) -> str:
    """A short name for a set of images: of a streamed one, by its length and some of its images."""
    digest = hashlib.sha256(str((len(part), part.image_shape)).encode())
    images = getattr(part, 'images', None)
    if images is None:
        images = part.load(evenly(len(part), 64)).images
    digest.update(np.ascontiguousarray(images).tobytes())
    if part.labels is not None:  # the classifier's accuracy is kept, too
        digest.update(repr(part.class_names).encode())
        digest.update(np.asarray(part.labels[evenly(len(part), 10_000)], np.int32).tobytes())
    return digest.hexdigest()[:12]


def setting_of(section: ConfigDict, splits: Splits, class_names: tuple[str, ...], **given: Any) -> Setting:
    """The setting that a config's `evaluate` section describes."""
    return Setting(
        splits,
        tuple(class_names),
        given.pop('num', section.num),
        section.features,
        section.weights,
        section.reference,
        num_likelihood=section.num_likelihood,
        **given,
    )
