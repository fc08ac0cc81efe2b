"""Evaluators: named in the config, each a module with `check(splits)` and `evaluate(samples, splits) -> Result`."""

import json
import logging
import shutil
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.compilation import use_cache
from diffusion_jax.data import Splits
from diffusion_jax.distributed import is_writer
from diffusion_jax.errors import UsageError
from diffusion_jax.evaluation import class_agreement, nearest_neighbour
from diffusion_jax.evaluation.result import Result
from diffusion_jax.experiment import check_same_run, load_data
from diffusion_jax.images import save_png
from diffusion_jax.pipelines.images import ImagePipeline
from diffusion_jax.pipelines.workdir import check_sampling, fingerprint, load_pipeline, sample_in_parts
from diffusion_jax.registry import lookup
from diffusion_jax.training.sharding import make_mesh

LOGGER = logging.getLogger(__name__)

EVALUATORS: dict[str, ModuleType] = {
    'class_agreement': class_agreement,
    'nearest_neighbour': nearest_neighbour,
}


def check_evaluators(section: ConfigDict, splits: Splits, num_classes: int) -> None:
    """A `UsageError` if what a config's `evaluate` section names cannot be done with these data and this model."""
    if section.num < 1:
        raise UsageError(f'evaluate.num must be at least 1, got {section.num}.')
    for name in section.evaluators:
        lookup('evaluator', EVALUATORS, name).check(splits, num_classes)


def evaluate_pipeline(
    pipeline: ImagePipeline, splits: Splits, config: ConfigDict, workdir: str | Path, step: int
) -> dict[str, Any]:
    """Draws `config.evaluate.num` samples as `config.sample` says, scores them, and writes it all to the workdir.

    Returns:
      What `evaluation.json` then holds: the scores, and what is needed to repeat them. Of several processes one scores
      and writes; the others return {}.
    """
    began = time.perf_counter()
    parts = Path(workdir) / 'evaluation' / f'step{step}_{fingerprint(config.sample)}.parts'
    samples = sample_in_parts(pipeline, config.sample, config.evaluate.num, parts)
    if not is_writer():
        return {}
    report = {'step': step, 'num': config.evaluate.num, 'sample': config.sample.to_dict(), 'scores': {}}
    for name in config.evaluate.evaluators:
        result: Result = EVALUATORS[name].evaluate(samples, splits)
        report['scores'] |= result.scores
        for label, picture in result.pictures.items():
            save_png(Path(workdir) / 'evaluation' / f'{label}.png', picture)
    report['seconds'] = round(time.perf_counter() - began, 1)
    (Path(workdir) / 'evaluation.json').write_text(json.dumps(report, indent=1) + '\n')
    shutil.rmtree(parts, ignore_errors=True)
    for name, value in report['scores'].items():
        if not isinstance(value, dict):
            LOGGER.info('%s: %s', name, f'{value:.4f}' if isinstance(value, float) else value)
    return report


def evaluate(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """`--mode=evaluate`: scores the checkpoint that `config.sample.checkpoint` names; writes `evaluation.json`."""
    check_same_run(config, workdir)
    pipeline, step = load_pipeline(workdir, config.sample.checkpoint, config.sample.ema, make_mesh(config.mesh))
    check_sampling(pipeline, config.sample)
    splits = load_data(config)
    check_evaluators(config.evaluate, splits, pipeline.num_classes)
    use_cache(workdir)
    return evaluate_pipeline(pipeline, splits, config, workdir, step)
