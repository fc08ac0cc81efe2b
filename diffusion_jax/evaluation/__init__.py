"""Scores of samples, by evaluators that a config names."""

import logging
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax.compilation import use_cache
from diffusion_jax.data import Splits
from diffusion_jax.distributed import is_writer
from diffusion_jax.errors import UsageError
from diffusion_jax.evaluation.bits_per_dim import BitsPerDim
from diffusion_jax.evaluation.class_agreement import ClassAgreement
from diffusion_jax.evaluation.frechet_distance import FrechetDistance
from diffusion_jax.evaluation.inception_score import InceptionScoreEvaluator
from diffusion_jax.evaluation.kernel_distance import KernelDistanceEvaluator
from diffusion_jax.evaluation.nearest_neighbour import NearestNeighbour
from diffusion_jax.evaluation.precision_recall import PrecisionRecall
from diffusion_jax.evaluation.reconstruction import RECONSTRUCTION_SCORES, evaluate_autoencoder
from diffusion_jax.evaluation.report import save_evaluation, write_report
from diffusion_jax.evaluation.result import Evaluator, Result
from diffusion_jax.evaluation.setting import Setting, setting_of
from diffusion_jax.experiment import info_of, load_data
from diffusion_jax.images import save_png
from diffusion_jax.pipelines.images import ImagePipeline, Samples
from diffusion_jax.pipelines.workdir import (
    check_sampling,
    fingerprint,
    joined,
    load_pipeline_for,
    picture_of,
    sample_as_configured,
    stream_in_parts,
)
from diffusion_jax.registry import lookup
from diffusion_jax.training.sharding import make_mesh

LOGGER = logging.getLogger(__name__)

SHOWN = 100  # samples, in a picture

EVALUATORS: dict[str, type[Evaluator]] = {
    'bits_per_dim': BitsPerDim,
    'class_agreement': ClassAgreement,
    'frechet_distance': FrechetDistance,
    'inception_score': InceptionScoreEvaluator,
    'kernel_distance': KernelDistanceEvaluator,
    'nearest_neighbour': NearestNeighbour,
    'precision_recall': PrecisionRecall,
}

__all__ = [
    'EVALUATORS',
    'RECONSTRUCTION_SCORES',
    'Result',
    'Setting',
    'check_evaluators',
    'evaluate',
    'evaluate_pipeline',
    'score',
]


def score(samples: Samples | Iterable[Samples], setting: Setting, evaluators: Sequence[str]) -> Result:
    """What the evaluators of these names say of samples, `setting.num` of them, which may come batch by batch.

        samples = pipeline(1000, guidance_scale=2.0)
        setting = Setting(data.load('fashion_mnist'), pipeline.class_names, num=1000)
        scores = score(samples, setting, ['frechet_distance', 'class_agreement']).scores

    In several processes all call this; the writer alone has the result, and the others one that is empty.

    Raises:
      UsageError: an unknown name, what an evaluator needs is not there, samples that are not as the real images are,
        or another number of them.
    """
    chosen = [lookup('evaluator', EVALUATORS, name) for name in evaluators]
    for kind in chosen:
        kind.check(setting)
    at_work = [kind(setting) for kind in chosen] if is_writer() else []
    with_features = any(evaluator.needs_features for evaluator in at_work)
    count = 0
    for batch in [samples] if isinstance(samples, Samples) else samples:
        if not is_writer():
            continue
        _check_images(batch.images, setting)
        count += len(batch.images)
        if count > setting.num:
            raise UsageError(f'{count} samples and more came, and the setting says num={setting.num}.')
        read = setting.read(batch.images, batch.labels, with_features)
        for evaluator in at_work:
            evaluator.update(read)
    if is_writer() and count != setting.num:
        raise UsageError(f'{count} samples came, and the setting says num={setting.num}.')
    scores: dict[str, Any] = {}
    pictures: dict[str, np.ndarray] = {}
    for index, kind in enumerate(chosen):
        if is_writer() or kind.needs_model:
            result = (at_work[index] if is_writer() else kind(setting)).result()
            scores |= result.scores
            pictures |= result.pictures
    return Result(scores, pictures) if is_writer() else Result({}, {})


def _check_images(images: Any, setting: Setting) -> None:
    shape = setting.splits.train.image_shape
    if images.dtype != np.uint8:
        bad = '' if np.isfinite(images).all() else ' with NaN or inf among them'
        raise UsageError(f'samples must be uint8, got {images.dtype}{bad}: `images.to_uint8` rounds finite ones.')
    if images.shape[1:] != tuple(shape):
        raise UsageError(
            f'samples of shape {images.shape[1:]} cannot be held against real images of shape {tuple(shape)}: set '
            'data.resolution to that of the samples.'
        )


def check_evaluators(config: ConfigDict, splits: Splits, pipeline: ImagePipeline) -> None:
    """A `UsageError` if what a config's `evaluate` section names cannot be done with these data and this model."""
    section = config.evaluate
    if section.every < 0:
        raise UsageError(f'evaluate.every must be 0 (never) or more, got {section.every}.')
    sizes = {'num': section.num} | ({'num_during_training': section.num_during_training} if section.every else {})
    for key, num in sizes.items():
        try:
            setting = setting_of(section, splits, pipeline.class_names, num=num, pipeline=pipeline)
            for name in section.evaluators:
                lookup('evaluator', EVALUATORS, name).check(setting)
        except UsageError as error:
            raise UsageError(re.sub(r'evaluate\.num\b', f'evaluate.{key}', str(error))) from None


def evaluate_during_training(
    pipeline: ImagePipeline, splits: Splits, config: ConfigDict, workdir: str | Path
) -> dict[str, float]:
    """The numbers that `config.evaluate.num_during_training` samples are given; {} in all processes but the writer."""
    num = config.evaluate.num_during_training
    setting = setting_of(
        config.evaluate, splits, pipeline.class_names, num=num, pipeline=pipeline, cache=Path(workdir) / 'cache'
    )
    scores = score(sample_as_configured(pipeline, config.sample, num), setting, config.evaluate.evaluators).scores
    return {name: float(value) for name, value in scores.items() if isinstance(value, int | float)}


def _keeping_the_first(num: int, batches: Iterable[Samples], kept: list[Samples]) -> Iterator[Samples]:
    """The same batches; those with the first `num` samples are put into `kept`."""
    for batch in batches:
        if num > 0:
            kept.append(batch)
            num -= len(batch.images)
        yield batch


def evaluate_pipeline(
    pipeline: ImagePipeline, splits: Splits, config: ConfigDict, workdir: str | Path, step: int
) -> dict[str, Any]:
    """Draws `config.evaluate.num` samples as `config.sample` says, scores them, and writes it all to the workdir.

    The samples are kept in the workdir batch by batch until they are scored: killed and called again, it goes on.

    Returns:
      What `evaluation.json` then holds: the scores, and what is needed to repeat them. Of several processes one scores
      and writes; the others return {}.
    """
    began = time.perf_counter()
    workdir, section = Path(workdir), config.evaluate
    setting = setting_of(section, splits, pipeline.class_names, pipeline=pipeline, cache=workdir / 'cache')
    parts = workdir / 'evaluation' / f'step{step}_{fingerprint(config.sample, config.init_from)}.parts'
    shown: list[Samples] = []
    samples = _keeping_the_first(SHOWN, stream_in_parts(pipeline, config.sample, section.num, parts), shown)
    result = score(samples, setting, section.evaluators)
    if not is_writer():
        return {}
    first = joined(shown)
    first = Samples(first.images[:SHOWN], None if first.labels is None else first.labels[:SHOWN])
    pictures = result.pictures | {'samples': picture_of(first, pipeline.num_classes)}
    for label, picture in pictures.items():
        save_png(workdir / 'evaluation' / f'{label}.png', picture)
    needs_features = any(EVALUATORS[name].needs_features for name in section.evaluators)
    network = setting.features() if needs_features else None
    report = save_evaluation(
        config,
        workdir,
        result.scores,
        step=step,
        num=section.num,
        network=network,
        splits=splits,
        seconds=time.perf_counter() - began,
        mesh=pipeline.mesh,
    )
    shutil.rmtree(parts, ignore_errors=True)
    return report


def evaluate(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """`--mode=evaluate`: scores what `config.sample.checkpoint` or `config.init_from` names; writes `evaluation.json`.

    The page `report.html` is written anew, too. Of an autoencoder: `reconstruction.evaluate_autoencoder`.
    """
    if config.task == 'autoencoder':
        return evaluate_autoencoder(config, workdir)
    pipeline, step = load_pipeline_for(config, workdir, make_mesh(config.mesh))
    check_sampling(pipeline, config.sample)
    splits = load_data(config)
    shape = info_of(splits).image_shape
    if tuple(shape) != pipeline.image_shape:
        raise UsageError(f'the model makes images of {pipeline.image_shape}, and the data are {tuple(shape)}.')
    if pipeline.num_classes and pipeline.class_names != tuple(splits.train.class_names):
        raise UsageError(
            f'the model makes images of {", ".join(pipeline.class_names)}, and the classes of the data are '
            f'{", ".join(splits.train.class_names) or "none"}: set data.name to what it was trained on.'
        )
    check_evaluators(config, splits, pipeline)
    use_cache(workdir)
    report = evaluate_pipeline(pipeline, splits, config, workdir, step)
    write_report(config, workdir, pipeline, step)
    return report
