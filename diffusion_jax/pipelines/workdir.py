"""Sampling from what a run left in its workdir."""

import hashlib
import json
import logging
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion_jax.compilation import use_cache
from diffusion_jax.config import solver_options
from diffusion_jax.distributed import is_writer
from diffusion_jax.errors import UsageError
from diffusion_jax.experiment import check_same_run, load_data, make_experiment, read_record
from diffusion_jax.images import grid, save_png
from diffusion_jax.pipelines.autoencoders import export_autoencoder, sample_reconstructions
from diffusion_jax.pipelines.images import ImagePipeline, Samples, check_batch_size, parse_labels, save_npz
from diffusion_jax.pipelines.model_file import autoencoder_beside, load_source, save_model
from diffusion_jax.pipelines.parts import KEPT, pipeline_of, read_parts
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.sharding import fetch, make_mesh, param_shardings, with_shardings
from diffusion_jax.weights import sha256_of

LOGGER = logging.getLogger(__name__)

SHOWN = 400  # samples, in a picture; all are in the .npz


def load_pipeline(
    workdir: str | Path,
    checkpoint: str = 'newest',
    ema: bool = True,
    mesh: Mesh | None = None,
    autoencoder: str | None = None,
) -> tuple[ImagePipeline, int]:
    """(pipeline, step) of the 'newest' or 'best' undamaged checkpoint in a workdir; its data need not be at hand.

    Args:
      checkpoint: or the number of its step.
      mesh: the devices to sample on, all of them by default; the run's sharding rules place the parameters on it.
      autoencoder: of a model of latents: another than the run's own, with the same encoder.

    Raises:
      UsageError: there is no run or no checkpoint there, or none that is undamaged.
    """
    record = read_record(workdir)
    if record is None:
        raise UsageError(f'no run in {workdir}. Train first: the same command with --mode=train.')
    config = ConfigDict(record[0])
    experiment = make_experiment(config, record[1])
    mesh = mesh or make_mesh()
    shapes = jax.eval_shape(experiment.init, jax.random.key(0))
    shapes = with_shardings(shapes, param_shardings(shapes, config.sharding_rules, mesh))
    params, step = Checkpoints(workdir).restore_params(shapes, checkpoint, ema)
    if autoencoder is not None:
        config.latents.autoencoder = autoencoder
    kept = Path(workdir) / KEPT if autoencoder is None else None
    return pipeline_of(experiment, params, mesh, read_parts(config, experiment.data, mesh, kept)), step


def _settings(section: ConfigDict, num: int) -> dict[str, Any]:
    """What a config's `sample` section says to a pipeline that draws `num` images."""
    return {
        'labels': parse_labels(section.labels),
        'prompts': tuple(section.prompts[:num]) or None,
        'negative_prompt': section.negative_prompt,
        'guidance_scale': section.guidance_scale,
        'solver': section.solver,
        'steps': section.steps,
        'spacing': section.spacing,
        'final': section.final,
        'guidance_rescale': section.guidance_rescale,
        'guidance_interval': section.guidance_interval,
        'seed': section.seed,
        'batch_size': section.batch_size,
        'clip': section.clip,
        'progress': True,
        **solver_options(section),
    }


def sample_as_configured(pipeline: ImagePipeline, section: ConfigDict, num: int | None = None) -> Samples:
    """Draws `num` images (`section.num` by default) as a config's `sample` section says, with a progress bar."""
    num = num or section.num
    return pipeline(num, **_settings(section, num))


def sample_in_parts(pipeline: ImagePipeline, section: ConfigDict, num: int, parts: Path) -> Samples:
    """As `sample_as_configured`, each batch kept in the folder `parts`: killed and called again, it goes on.

    The folder is for the caller to remove, once the samples are safe elsewhere. It is not made for a single batch.
    In a process that does not write, the samples that had been kept are left out.
    """
    batches = list(stream_in_parts(pipeline, section, num, parts))
    return joined(batches) if batches else Samples(np.empty((0, *pipeline.image_shape), np.uint8), None)


def joined(batches: Sequence[Samples]) -> Samples:
    """Batches as one, of which there is one at least."""
    labels = None if batches[0].labels is None else np.concatenate([batch.labels for batch in batches])
    return Samples(np.concatenate([batch.images for batch in batches]), labels)


def stream_in_parts(pipeline: ImagePipeline, section: ConfigDict, num: int, parts: Path) -> Iterator[Samples]:
    """As `sample_in_parts`, batch by batch: more samples than memory holds."""
    if num <= section.batch_size and not _of_process_0(parts.exists()):
        yield sample_as_configured(pipeline, section, num)
        return
    kept = _read_parts(parts) if is_writer() else []
    first = _of_process_0(sum(count for _, count in kept))
    if first:
        LOGGER.info('going on after the %d samples that are in %s', first, parts)
    left = num
    for path, _ in kept:
        batch = _read_part(path)
        some = Samples(batch.images[:left], None if batch.labels is None else batch.labels[:left])
        left -= len(some.images)
        if len(some.images):
            yield some
    if first < num:
        for batch in pipeline.batches(num, first=first, **_settings(section, num)):
            if is_writer():
                save_part(parts, first, batch)
            first += len(batch.images)
            yield batch


def save_part(parts: Path, first: int, batch: Samples) -> None:
    """Writes a batch that begins with sample `first`, complete or not at all."""
    parts.mkdir(parents=True, exist_ok=True)
    path = parts / f'{first:08}.npz'
    unfinished = path.with_suffix('.part.npz')
    save_npz(unfinished, batch)
    unfinished.replace(path)


def _read_part(path: Path) -> Samples:
    with np.load(path) as arrays:
        return Samples(arrays['images'], arrays.get('labels'))


def _read_parts(parts: Path) -> list[tuple[Path, int]]:
    """The (file, number of samples) of the batches in a folder, up to the first that is missing or cannot be read."""
    kept, first = [], 0
    while (path := parts / f'{first:08}.npz').exists():
        try:
            count = len(_read_part(path).images)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, EOFError):
            LOGGER.warning('%s cannot be read: these samples are drawn again.', path)
            break
        kept.append((path, count))
        first += count
    return kept


def _of_process_0(number: int) -> int:
    """The same number in every process."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def check_sampling(pipeline: ImagePipeline, section: ConfigDict) -> None:
    """A `UsageError` if the model cannot be sampled as a config's `sample` section says."""
    settings = _settings(section, section.num)
    check_batch_size(settings.pop('batch_size'))
    del settings['progress']
    pipeline.asked(section.num, **settings)


def picture_of(samples: Samples, num_classes: int) -> Any:
    """The first samples as one picture: a column a class where they go through the classes in turn."""
    in_turn = num_classes and len(set(samples.labels[:num_classes])) == num_classes <= 20
    return grid(samples.images[:SHOWN], columns=num_classes if in_turn else None)


def fingerprint(section: ConfigDict, init_from: str | None = None) -> str:
    """A short name for all that decides what sample i looks like (its batch and how many there are do not)."""
    settings = {key: value for key, value in section.items() if key not in ('num', 'batch_size', 'checkpoint')}
    settings |= {'init_from': init_from} if init_from else {}
    if init_from and Path(init_from).is_file():  # it may be written anew
        settings['sha256'] = sha256_of(init_from)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _file_name(section: ConfigDict, step: int) -> str:
    """A name that tells every setting that changes the images, so that no samples overwrite others."""
    labels = parse_labels(section.labels)
    words = [
        f'step{step}',
        f'{section.solver or "solver"}{section.steps}',
        *([] if section.spacing is None else [section.spacing]),
        f'seed{section.seed}',
        f'num{section.num}',
    ]
    if section.prompts:
        first = re.sub(r'[^a-z0-9]+', '-', section.prompts[0].lower()).strip('-')[:40]
        words.insert(0, f'{first}-{hashlib.sha256(repr(tuple(section.prompts)).encode()).hexdigest()[:6]}')
    if section.negative_prompt is not None:
        words.append(f'not{hashlib.sha256(section.negative_prompt.encode()).hexdigest()[:6]}')
    if labels is not None:
        words.append(f'labels{"-".join(map(str, labels))}')
    if section.guidance_scale is not None:
        words.append(f'guidance{section.guidance_scale}')
    if section.guidance_rescale:
        words.append(f'rescale{section.guidance_rescale}')
    if section.guidance_interval is not None:
        words.append(f'interval{"to".join(map(str, section.guidance_interval))}')
    if section.final not in ('zero', None):
        words.append(section.final)
    words += [f'{name}{value}' for name, value in solver_options(section).items()]
    words += [word for word, holds in (('unclipped', section.clip is False), ('raw', not section.ema)) if holds]
    return '_'.join(words)


def load_pipeline_for(config: ConfigDict, workdir: str | Path, mesh: Mesh) -> tuple[ImagePipeline, int]:
    """(pipeline, step) of what a command is about: the workdir's run, or where there is none, `config.init_from`.

    Raises:
      UsageError: there is neither, or it is of another config.
    """
    if config.init_from and read_record(workdir) is None:
        return load_source(config, mesh)
    check_same_run(config, workdir)
    theirs = read_record(workdir)
    other = config.latents.autoencoder
    if theirs is not None and other == theirs[0]['latents']['autoencoder']:
        other = None
    return load_pipeline(workdir, config.sample.checkpoint, config.sample.ema, mesh, other)


def sample(config: ConfigDict, workdir: str | Path) -> Path:
    """`--mode=sample`: writes a PNG grid, and images and labels as `.npz`, to `workdir/samples`; returns the PNG.

    Of an autoencoder: `autoencoders.sample_reconstructions`.
    """
    if config.task == 'autoencoder':
        return sample_reconstructions(config, workdir)
    section = config.sample
    pipeline, step = load_pipeline_for(config, workdir, make_mesh(config.mesh))
    if section.prompts and pipeline.prompts is None:
        raise UsageError('this model takes no text: --mode=sample draws from it.')
    if pipeline.prompts is not None and not section.prompts:
        pipeline.default_prompts = load_data(config).test.captions or ('',)
    check_sampling(pipeline, section)
    use_cache(workdir)
    path = Path(workdir) / 'samples' / f'{_file_name(section, step)}.png'
    parts = path.parent / f'{path.stem}_{fingerprint(section, config.init_from)}.parts'
    samples = sample_in_parts(pipeline, section, section.num, parts)
    if is_writer():
        settings = {name: value for name, value in section.items() if name != 'labels' and value is not None}
        save_png(path, picture_of(samples, pipeline.num_classes))
        save_npz(path.with_suffix('.npz'), samples, step=step, **settings)
        shutil.rmtree(parts, ignore_errors=True)
    LOGGER.info('%d images of step %d: %s and .npz', section.num, step, path)
    return path


def generate(
    config: ConfigDict,
    workdir: str | Path,
    prompts: Sequence[str],
    negative_prompt: str | None = None,
    num: int | None = None,
) -> Path:
    """`--mode=generate`: as `sample`, images of these texts, in turn; one of each by default.

    The model is the workdir's, or what `config.init_from` names: also a folder in diffusers' layout.
    """
    if not prompts:
        raise UsageError("--mode=generate needs --prompt='...', one or several times.")
    if config.task != 'diffusion':
        raise UsageError('an autoencoder generates nothing by itself: name a config of a model that takes text.')
    num = len(prompts) if num is None else num
    if num < len(prompts):
        raise UsageError(f'--num={num} is less than the {len(prompts)} prompts.')
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.sample.update(prompts=tuple(prompts), num=num, negative_prompt=negative_prompt)
    return sample(config, workdir)


def export(config: ConfigDict, workdir: str | Path) -> Path:
    """`--mode=export`: writes the run's parameters and config as one file, `workdir/model.safetensors`; returns it.

    `config.sample` says which checkpoint, and whether the averaged or the raw parameters. Of an autoencoder:
    `autoencoders.export_autoencoder`.
    """
    if config.task == 'autoencoder':
        return export_autoencoder(config, workdir)
    record = read_record(workdir)
    if record is None:
        raise UsageError(f'no run in {workdir} to export. Train first: the same command with --mode=train.')
    check_same_run(config, workdir)
    pipeline, step = load_pipeline(workdir, config.sample.checkpoint, config.sample.ema, make_mesh(config.mesh))
    params = jax.tree.map(fetch, pipeline.params)
    path = Path(workdir) / 'model.safetensors'
    if is_writer():
        save_model(path, params, ConfigDict(record[0]), record[1], step, config.sample.ema, config.export_dtype)
        if (kept := Path(workdir) / KEPT).is_file():
            shutil.copyfile(kept, autoencoder_beside(path))
    LOGGER.info('step %d: %s', step, path)
    return path
