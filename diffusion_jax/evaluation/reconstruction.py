"""Scores of an autoencoder: how near its reconstructions are to their images."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8
from ml_collections import ConfigDict

from diffusion_jax.compilation import use_cache
from diffusion_jax.data import Splits
from diffusion_jax.distributed import is_writer
from diffusion_jax.errors import UsageError
from diffusion_jax.evaluation.features import load_features
from diffusion_jax.evaluation.frechet_distance import Moments, distance
from diffusion_jax.evaluation.report import save_evaluation, write_autoencoder_report
from diffusion_jax.experiment import Autoencoder, load_data
from diffusion_jax.images import save_png, to_float
from diffusion_jax.models.functional import Params
from diffusion_jax.models.vq_autoencoder import codebook_use, quantise
from diffusion_jax.pipelines.autoencoders import SHOWN, check_splits, load_for, picture_of_pairs, reconstruct
from diffusion_jax.registry import lookup
from diffusion_jax.training.sharding import fetch, make_mesh, num_batch_shards, put, sharded_batch

LOGGER = logging.getLogger(__name__)

Pair = tuple[UInt8[np.ndarray, 'B H W C'], UInt8[np.ndarray, 'B H W C']]


class Psnr:
    """`psnr`: the mean over images of 10 log10(255^2 / mean squared difference), in dB, of uint8 numbers.

    An image that is reconstructed to the last bit counts as one number in it that is off by one.
    """

    def __init__(self, task: 'Reconstructions'):
        self._values: list[np.ndarray] = []

    @staticmethod
    def check(task: 'Reconstructions') -> None:
        pass

    def update(self, images: np.ndarray, reconstructions: np.ndarray) -> None:
        self._values.append(psnr(images, reconstructions))

    def result(self) -> dict[str, float]:
        return {'psnr': float(np.concatenate(self._values).mean())}


class ReconstructionDistance:
    """`frechet_distance` of the features of reconstructions to those of their images: 0 for a perfect autoencoder."""

    def __init__(self, task: 'Reconstructions'):
        self._network = task.features()
        self._moments = Moments(), Moments()

    @staticmethod
    def check(task: 'Reconstructions') -> None:
        network = task.features()
        if task.num <= network.num_features:
            raise UsageError(
                f'{task.num} images are too few for frechet_distance: the covariance of the {network.num_features} '
                f'features of {network.name} needs at least {network.num_features + 1}. Raise evaluate.num (the '
                f'{task.reference} split has {task.available}), or leave it out of evaluate.evaluators.'
            )

    def update(self, images: np.ndarray, reconstructions: np.ndarray) -> None:
        for moments, some in zip(self._moments, (images, reconstructions), strict=True):
            features, _ = self._network(some)
            moments.update(features)

    def result(self) -> dict[str, float]:
        return {'frechet_distance': distance(*self._moments)}


class CodebookUse:
    """`codebook_used`, the share of a codebook that some image makes use of, and `codebook_perplexity`."""

    def __init__(self, task: 'Reconstructions'):
        self._task = task
        self._counts = np.zeros(task.autoencoder.codebook_size, np.int64)

    @staticmethod
    def check(task: 'Reconstructions') -> None:
        if not task.autoencoder.codebook_size:
            raise UsageError('codebook_use is for model.name=autoencoder_vq: leave it out of evaluate.evaluators.')

    def update(self, images: np.ndarray, reconstructions: np.ndarray) -> None:
        indices = np.asarray(self._task.indices(images)).reshape(-1)
        self._counts += np.bincount(indices, minlength=len(self._counts))

    def result(self) -> dict[str, float]:
        indices = np.repeat(np.arange(len(self._counts)), self._counts)
        used, perplexity = codebook_use(indices, len(self._counts))
        return {'codebook_used': float(used), 'codebook_perplexity': float(perplexity)}


RECONSTRUCTION_SCORES: dict[str, Callable[['Reconstructions'], Any]] = {
    'psnr': Psnr,
    'frechet_distance': ReconstructionDistance,
    'codebook_use': CodebookUse,
}
"""What `config.evaluate.evaluators` may name for an autoencoder."""


def psnr(images: UInt8[np.ndarray, 'B H W C'], reconstructions: UInt8[np.ndarray, 'B H W C']) -> np.ndarray:
    """Peak signal-to-noise ratio of each image, in dB, [B]; at most that of a single number off by one."""
    squares = np.square(images.astype(np.float64) - reconstructions).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(squares, 1 / images[0].size))


class Reconstructions:
    """The images of a split that an autoencoder is held against, and what the scores need besides.

    Raises:
      UsageError: what `config.evaluate` names cannot be done with these data and this autoencoder.
    """

    def __init__(self, config: ConfigDict, autoencoder: Autoencoder, splits: Splits, num: int | None = None):
        section = config.evaluate
        if section.reference not in ('train', 'test'):
            raise UsageError(
                f"evaluate.reference={section.reference!r} must be 'train' or 'test' for an autoencoder: the images "
                'that are reconstructed.'
            )
        num = section.num if num is None else num
        if num < 1 or section.every < 0:
            raise UsageError(
                f'evaluate.num must be 1 or more and evaluate.every 0 or more, got {num}, {section.every}.'
            )
        self.autoencoder, self.reference = autoencoder, section.reference
        self._section, self._images = section, getattr(splits, section.reference)
        self.available = len(self._images)
        self.num = min(num, self.available)
        self._batch_size = config.sample.batch_size
        self._params: Params = None
        self.kinds = [lookup('score of reconstructions', RECONSTRUCTION_SCORES, name) for name in section.evaluators]
        for kind in self.kinds:
            kind.check(self)

    def features(self):
        """The feature network that `config.evaluate` names."""
        images = self._images
        return load_features(self._section.features, self._section.weights, images.class_names, images.image_shape)

    def indices(self, images: np.ndarray) -> np.ndarray:
        """Of the codebook, for each latent of images."""
        return self._indices(self._params, images)

    def _run(self, params: Params, mesh: Mesh) -> Iterator[Pair]:
        size = -(-self._batch_size // num_batch_shards(mesh)) * num_batch_shards(mesh)
        for start in range(0, self.num, size):
            images = self._images.load(np.arange(start, min(start + size, self.num))).images
            yield images, reconstruct(self.autoencoder, params, images, mesh, size)

    def score(self, params: Params, mesh: Mesh) -> tuple[dict[str, float], UInt8[np.ndarray, 'h w 3'] | None]:
        """(scores by name, a picture of the first images and their reconstructions).

        Every process calls it; only the writer has scores and a picture.
        """
        apply, sharding = self.autoencoder.apply, sharded_batch(mesh)
        read = jax.jit(lambda params, x: quantise(apply, params, self.autoencoder.encode(params, to_float(x))).indices)

        def indices(params, images):
            rows = np.minimum(np.arange(-(-len(images) // shards) * shards), len(images) - 1)
            return fetch(read(params, put(images[rows], sharding)))[: len(images)]

        shards = num_batch_shards(mesh)
        self._params, self._indices = params, indices
        at_work = [kind(self) for kind in self.kinds]
        shown: list[Pair] = []
        for images, reconstructions in self._run(params, mesh):
            if sum(len(pair[0]) for pair in shown) < SHOWN:
                shown.append((images, reconstructions))
            for score in at_work:
                if is_writer() or isinstance(score, CodebookUse):  # which runs the model: all take part
                    score.update(images, reconstructions)
        if not is_writer():
            return {}, None
        scores = {name: value for score in at_work for name, value in score.result().items()}
        return scores, picture_of_pairs(*(np.concatenate(part) for part in zip(*shown, strict=True)))


def evaluate_reconstructions(
    autoencoder: Autoencoder,
    params: Params,
    splits: Splits,
    config: ConfigDict,
    workdir: str | Path,
    step: int,
    mesh: Mesh,
) -> dict[str, Any]:
    """Scores reconstructions of up to `config.evaluate.num` images of the split `config.evaluate.reference`.

    Returns:
      What `evaluation.json` then holds, as `evaluation.evaluate_pipeline` writes it; {} in processes that do not write.
    """
    began = time.perf_counter()
    task = Reconstructions(config, autoencoder, splits)
    scores, picture = task.score(params, mesh)
    if not is_writer():
        return {}
    save_png(Path(workdir) / 'evaluation' / 'reconstructions.png', picture)
    network = task.features() if ReconstructionDistance in task.kinds else None
    return save_evaluation(
        config,
        workdir,
        scores,
        step=step,
        num=task.num,
        network=network,
        splits=splits,
        seconds=time.perf_counter() - began,
        mesh=mesh,
    )


def evaluate_autoencoder(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """`--mode=evaluate` of an autoencoder: scores the checkpoint that `config.sample` names; writes evaluation.json.

    The page `report.html` is written anew, too.
    """
    mesh = make_mesh(config.mesh)
    autoencoder, params, step = load_for(config, workdir, mesh)
    splits = check_splits(load_data(config), autoencoder)
    Reconstructions(config, autoencoder, splits)
    use_cache(workdir)
    report = evaluate_reconstructions(autoencoder, params, splits, config, workdir, step, mesh)
    write_autoencoder_report(config, workdir, autoencoder, params, step)
    return report
