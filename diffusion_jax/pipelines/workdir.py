"""Sampling from what a run left in its workdir."""

import logging
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion_jax.config import solver_options
from diffusion_jax.errors import UsageError
from diffusion_jax.experiment import Experiment, check_same_run, make_experiment, read_record
from diffusion_jax.images import grid, save_png
from diffusion_jax.pipelines.images import ImagePipeline, Samples, parse_labels, save_npz
from diffusion_jax.training.checkpoints import Checkpoints, abstract
from diffusion_jax.training.sharding import make_mesh, replicated

LOGGER = logging.getLogger(__name__)


def pipeline_of(experiment: Experiment, params: Any, mesh: Mesh | None = None) -> ImagePipeline:
    """An experiment's network with these parameters, ready to sample."""
    return ImagePipeline(
        experiment.apply,
        params,
        experiment.schedule,
        experiment.prediction,
        experiment.data.image_shape,
        experiment.data.class_names if experiment.num_classes else (),
        mesh,
        experiment.learned_variance,
    )


def load_pipeline(workdir: str | Path, checkpoint: str = 'newest', ema: bool = True) -> tuple[ImagePipeline, int]:
    """(pipeline, step) of the 'newest' or 'best' checkpoint in a workdir; its data need not be at hand.

    Raises:
      UsageError: there is no run or no checkpoint there, or it cannot be read.
    """
    record = read_record(workdir)
    if record is None:
        raise UsageError(f'no run in {workdir}. Train first: the same command with --mode=train.')
    experiment = make_experiment(ConfigDict(record[0]), record[1])
    checkpoints = Checkpoints(workdir)
    step = checkpoints.choose(checkpoint)
    mesh = make_mesh()
    shapes = jax.eval_shape(experiment.init, jax.random.key(0))
    params = checkpoints.restore_params(abstract(shapes, replicated(mesh)), step, ema)
    return pipeline_of(experiment, params, mesh), step


def sample_as_configured(pipeline: ImagePipeline, section: ConfigDict, num: int | None = None) -> Samples:
    """Draws `num` images (`section.num` by default) as a config's `sample` section says, with a progress bar."""
    return pipeline(
        num or section.num,
        labels=parse_labels(section.labels),
        guidance_scale=section.guidance_scale,
        solver=section.solver,
        steps=section.steps,
        spacing=section.spacing,
        final=section.final,
        guidance_rescale=section.guidance_rescale,
        guidance_interval=section.guidance_interval,
        seed=section.seed,
        batch_size=section.batch_size,
        clip=section.clip,
        progress=True,
        **solver_options(section),
    )


def check_sampling(pipeline: ImagePipeline, section: ConfigDict) -> None:
    """A `UsageError` if the model cannot be sampled as a config's `sample` section says."""
    pipeline.plan(section.solver, section.steps, section.spacing, final=section.final, **solver_options(section))
    pipeline.check(section.num, parse_labels(section.labels), section.guidance_scale, section.batch_size)
    pipeline.check_guidance(section.guidance_scale, section.guidance_rescale, section.guidance_interval)


def picture_of(samples: Samples, num_classes: int) -> Any:
    """The samples as one picture: a column a class where they go through the classes in turn."""
    in_turn = num_classes and len(set(samples.labels[:num_classes])) == num_classes <= 20
    return grid(samples.images, columns=num_classes if in_turn else None)


def _file_name(section: ConfigDict, step: int) -> str:
    """A name that tells every setting that changes the images, so that no samples overwrite others."""
    labels = parse_labels(section.labels)
    words = [
        f'step{step}',
        f'{section.solver}{section.steps}',
        section.spacing,
        f'seed{section.seed}',
        f'num{section.num}',
    ]
    if labels is not None:
        words.append(f'labels{"-".join(map(str, labels))}')
    if section.guidance_scale is not None:
        words.append(f'guidance{section.guidance_scale}')
    if section.guidance_rescale:
        words.append(f'rescale{section.guidance_rescale}')
    if section.guidance_interval is not None:
        words.append(f'interval{"to".join(map(str, section.guidance_interval))}')
    if section.final != 'zero':
        words.append(section.final)
    words += [f'{name}{value}' for name, value in solver_options(section).items()]
    words += [word for word, holds in (('unclipped', not section.clip), ('raw', not section.ema)) if holds]
    return '_'.join(words)


def sample(config: ConfigDict, workdir: str | Path) -> Path:
    """`--mode=sample`: writes a PNG grid, and images and labels as `.npz`, to `workdir/samples`; returns the PNG."""
    check_same_run(config, workdir)
    section = config.sample
    pipeline, step = load_pipeline(workdir, section.checkpoint, section.ema)
    check_sampling(pipeline, section)
    samples = sample_as_configured(pipeline, section)
    settings = {name: value for name, value in section.items() if name != 'labels' and value is not None}
    path = Path(workdir) / 'samples' / f'{_file_name(section, step)}.png'
    save_png(path, picture_of(samples, pipeline.num_classes))
    save_npz(path.with_suffix('.npz'), samples, step=step, **settings)
    LOGGER.info('%d images of step %d: %s and .npz', section.num, step, path)
    return path
