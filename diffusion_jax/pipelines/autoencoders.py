"""Autoencoders that were trained: read, measured, shown, and written as one file."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8
from ml_collections import ConfigDict

from diffusion_jax.compilation import use_cache
from diffusion_jax.config import flatten, with_defaults
from diffusion_jax.data import Splits
from diffusion_jax.distributed import is_writer
from diffusion_jax.errors import UsageError
from diffusion_jax.experiment import (
    Autoencoder,
    DataInfo,
    check_same_run,
    info_of,
    load_data,
    make_autoencoder,
    read_record,
)
from diffusion_jax.images import grid, save_png, to_float, to_uint8
from diffusion_jax.models.autoencoder import LOG_VARIANCE_RANGE, Moments
from diffusion_jax.models.functional import Params
from diffusion_jax.pipelines.latents import LatentSpace
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.sharding import (
    fetch,
    make_mesh,
    num_batch_shards,
    on_mesh,
    param_shardings,
    put,
    replicated,
    sharded_batch,
    with_shardings,
)
from diffusion_jax.weights import check_shapes, load_weights, save_weights

LOGGER = logging.getLogger(__name__)

KIND = 'autoencoder'
"""`kind` in the metadata of an autoencoder's file."""

MEASURED = 10_000  # images that the scale of latents is measured on
SHOWN = 100  # images, in a picture


@dataclasses.dataclass(frozen=True)
class AutoencoderInfo:
    """What is known of an autoencoder besides its functions.

    Attributes:
      config: of its training.
      data: what it knows of its images.
      step: of training.
      scale, shift: (z - shift) scale has mean 0 and variance 1 over the images that it was trained on.
      factor: pixels per latent along each side.
      channels: of the latents.
    """

    config: ConfigDict
    data: DataInfo
    step: int
    scale: float
    shift: float
    factor: int
    channels: int


def load_autoencoder(source: str | Path) -> tuple[Callable, Callable, Params, AutoencoderInfo]:
    """(encode, decode, params, info) of a file of --mode=export, or of a workdir's newest checkpoint (averaged).

        encode, decode, params, info = load_autoencoder('runs/fashion_mnist_autoencoder/model.safetensors')
        z = jax.jit(encode)(params, images)  # images float [B, H, W, C] in [-1, 1]; z [B, H / f, W / f, c]
        again = jax.jit(decode)(params, z)

    A workdir's scale and shift are measured on its training images, which must be at hand; a file has them.

    Raises:
      UsageError: there is no autoencoder there, or it is damaged.
    """
    source = Path(source).expanduser()
    if source.is_dir():
        autoencoder, config, data = _of_workdir(source)
        params, step = _restored(autoencoder, config, source, make_mesh())
        splits = load_data(config)
        scale, shift = measure_scale(functools.partial(autoencoder.encode, params), _spread(splits.train))
    else:
        autoencoder, params, config, metadata = _of_file(source)
        data = autoencoder.data
        params = jax.tree.map(jax.numpy.asarray, params)
        step, scale, shift = metadata['step'], metadata['scale'], metadata['shift']
    info = AutoencoderInfo(config, data, step, scale, shift, autoencoder.factor, autoencoder.latent_channels)
    return autoencoder.encode, autoencoder.decode, params, info


def load_autoencoder_file(source: Path, mesh: Mesh) -> LatentSpace:
    """The latents of a file of --mode=export, or of a run's folder.

    Raises:
      UsageError: there is no autoencoder there, or it is damaged.
    """
    encode, decode, params, info = load_autoencoder(source)
    quantised = info.config.model.name == 'autoencoder_vq'

    def moments(params, images):
        encoded = encode(params, images)
        # A point: the least variance that the other autoencoders have.
        return Moments(encoded, jnp.full_like(encoded, LOG_VARIANCE_RANGE[0]))

    autoencoder = make_autoencoder(info.config, info.data)
    return LatentSpace(
        encoder=moments if quantised else functools.partial(autoencoder.apply, method='encode'),
        decoder=decode,
        params=put(jax.tree.map(fetch, params), replicated(mesh)),
        scale=info.scale,
        shift=info.shift,
        factor=info.factor,
        channels=info.channels,
        image_channels=info.data.image_shape[2],
    )


def _of_workdir(workdir: Path) -> tuple[Autoencoder, ConfigDict, DataInfo]:
    record = read_record(workdir)
    if record is None:
        raise UsageError(f'no run in {workdir}. Train first: the same command with --mode=train.')
    config = ConfigDict(record[0])
    if config.task != 'autoencoder':
        raise UsageError(f'{workdir} holds a run of a diffusion model: `pipelines.load_pipeline` reads it.')
    return make_autoencoder(config, record[1]), config, record[1]


def _restored(autoencoder: Autoencoder, config: ConfigDict, workdir: str | Path, mesh: Mesh) -> tuple[Params, int]:
    shapes = jax.eval_shape(autoencoder.init, jax.random.key(0))
    shapes = with_shardings(shapes, param_shardings(shapes, config.sharding_rules, mesh))
    return Checkpoints(workdir).restore_params(shapes, config.sample.checkpoint, config.sample.ema)


def _of_file(path: Path) -> tuple[Autoencoder, Params, ConfigDict, dict[str, Any]]:
    params, metadata = load_weights(path)
    if metadata.get('kind') != KIND:
        raise UsageError(
            f'{path} holds no autoencoder (but {metadata.get("kind", "weights without a kind")!r}): --mode=export of a '
            "run with task='autoencoder' writes one."
        )
    config = ConfigDict(with_defaults(metadata['config']))
    data = DataInfo.of(metadata['data'])
    autoencoder = make_autoencoder(config, data)
    check_shapes(path, params, jax.eval_shape(autoencoder.init, jax.random.key(0)))
    return autoencoder, params, config, metadata


def load_init(config: ConfigDict, mesh: Mesh) -> Params:
    """The parameters of the autoencoder that `config.init_from` names: a run's folder or a file of --mode=export.

    Raises:
      UsageError: there is none, or it is another network.
    """
    source = Path(config.init_from).expanduser()
    if source.is_dir():
        autoencoder, theirs, _ = _of_workdir(source)
        theirs.sample.update(checkpoint=config.sample.checkpoint, ema=config.sample.ema)
        _check_same_network(config, theirs)
        theirs.sharding_rules = config.sharding_rules
        return _restored(autoencoder, theirs, source, mesh)[0]
    if source.suffix != '.safetensors':
        raise UsageError(
            f'init_from={config.init_from!r} is no autoencoder: name a folder with a run of one, or a file of its '
            '--mode=export (.safetensors).'
        )
    _, params, theirs, _ = _of_file(source)
    _check_same_network(config, theirs)
    return put(params, replicated(mesh))


def _check_same_network(config: ConfigDict, theirs: ConfigDict) -> None:
    ours, others = flatten(config.model.to_dict()), flatten(theirs.model.to_dict())
    changed = [
        f'model.{key}: {others.get(key, "(absent)")!r} -> {ours.get(key, "(absent)")!r}'
        for key in sorted(ours.keys() | others.keys())
        if ours.get(key) != others.get(key) and key not in ('remat', 'dtype')
    ]
    if changed:
        raise UsageError(
            f'init_from={config.init_from!r} is a model of another config. It differs in (model -> asked for): '
            f'{"; ".join(changed)}. Use the config that it was trained with.'
        )


# --- what it does to images -------------------------------------------------------------------------------------------


def measure_scale(encode: Callable, images: UInt8[np.ndarray, 'N H W C'], batch_size: int = 256) -> tuple[float, float]:
    """(scale, shift): 1 / the standard deviation and the mean of all numbers of the latents of images.

    Latent Diffusion has the scale alone, of one batch (Rombach et al. 2022, appendix G); the shift is that of Stable
    Diffusion 3.

    Args:
      encode: float images [B, H, W, C] in [-1, 1] -> latents.
      images: in batches of `batch_size`.

    Raises:
      UsageError: the latents are all one number, or not finite.
    """
    run = jax.jit(lambda images: encode(to_float(images)))
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(images), batch_size):
        rows = np.minimum(np.arange(start, start + min(batch_size, len(images))), len(images) - 1)
        z = np.asarray(run(images[rows]), np.float64)[: len(images) - start]
        count, total, squares = count + z.size, total + z.sum(), squares + np.square(z).sum()
    shift = total / count
    variance = squares / count - shift**2
    if not (np.isfinite(variance) and variance > 0):
        raise UsageError(f'the latents have mean {shift} and variance {variance}: this autoencoder was not trained.')
    return float(1 / np.sqrt(variance)), float(shift)


def _spread(images: Any, most: int = MEASURED) -> UInt8[np.ndarray, 'N H W C']:
    """At most as many images of a set, spread evenly over it."""
    rows = np.linspace(0, len(images) - 1, min(len(images), most)).round().astype(np.int64)
    return images.load(rows).images


def first_of(images: Any, num: int) -> UInt8[np.ndarray, 'N H W C']:
    """The first `num` images of a set, or all that it has."""
    return images.load(np.arange(min(num, len(images)))).images


@functools.partial(jax.jit, static_argnames=('autoencoder', 'mesh'))
def _reconstruct(params: Params, images: jax.Array, *, autoencoder: Autoencoder, mesh: Mesh):
    def run(params, images):
        return to_uint8(autoencoder.decode(params, autoencoder.encode(params, to_float(images))))

    return on_mesh(mesh, run)(params, images)


def reconstruct(
    autoencoder: Autoencoder, params: Params, images: UInt8[np.ndarray, 'N H W C'], mesh: Mesh, batch_size: int
) -> UInt8[np.ndarray, 'N H W C']:
    """Images decoded from the means of their latents, over all devices of the mesh; every process calls it."""
    shards = num_batch_shards(mesh)
    size = -(-min(batch_size, len(images)) // shards) * shards
    parts = []
    for start in range(0, len(images), size):
        rows = np.minimum(np.arange(start, start + size), len(images) - 1)
        out = _reconstruct(params, put(images[rows], sharded_batch(mesh)), autoencoder=autoencoder, mesh=mesh)
        parts.append(fetch(out)[: len(images) - start])
    return np.concatenate(parts)


def picture_of_pairs(
    images: UInt8[np.ndarray, 'N H W C'], reconstructions: UInt8[np.ndarray, 'N H W C']
) -> UInt8[np.ndarray, 'h w 3']:
    """The first images as one picture, in rows of at most ten: a row of images, and below it their reconstructions."""
    images, reconstructions = images[:SHOWN], reconstructions[:SHOWN]
    columns = min(10, len(images))
    blank = np.full_like(images[:1], 255)
    rows = []
    for start in range(0, len(images), columns):
        for part in (images, reconstructions):
            row = part[start : start + columns]
            rows += [row, np.repeat(blank, columns - len(row), axis=0)]
    return grid(np.concatenate(rows), columns=columns)


# --- modes of the command line ----------------------------------------------------------------------------------------


def load_for(config: ConfigDict, workdir: str | Path, mesh: Mesh) -> tuple[Autoencoder, Params, int]:
    """(autoencoder, parameters, step) of the run in a workdir, by the checkpoint that `config.sample` names."""
    record = read_record(workdir)
    if record is None:
        raise UsageError(f'no run in {workdir}. Train first: the same command with --mode=train.')
    check_same_run(config, workdir)
    autoencoder = make_autoencoder(config, record[1])
    return autoencoder, *_restored(autoencoder, config, workdir, mesh)


def check_reconstructing(section: ConfigDict) -> None:
    """A `UsageError` for a config's `sample` section that asks for no images."""
    if section.num < 1 or section.batch_size < 1:
        raise UsageError(
            f'sample.num and sample.batch_size must be at least 1, got {section.num} and {section.batch_size}.'
        )


def sample_reconstructions(config: ConfigDict, workdir: str | Path) -> Path:
    """`--mode=sample` of an autoencoder: `config.sample.num` held-out images above their reconstructions, as a PNG.

    Beside it an `.npz` has both, `images` and `reconstructions`. Returns the PNG's path.
    """
    section = config.sample
    check_reconstructing(section)
    mesh = make_mesh(config.mesh)
    autoencoder, params, step = load_for(config, workdir, mesh)
    images = first_of(check_splits(load_data(config), autoencoder).test, section.num)
    use_cache(workdir)
    reconstructions = reconstruct(autoencoder, params, images, mesh, section.batch_size)
    raw = '' if section.ema else '_raw'
    path = Path(workdir) / 'samples' / f'step{step}_reconstructions_num{len(images)}{raw}.png'
    if is_writer():
        save_png(path, picture_of_pairs(images, reconstructions))
        np.savez_compressed(path.with_suffix('.npz'), images=images, reconstructions=reconstructions, step=step)
    LOGGER.info('%d held-out images and their reconstructions of step %d: %s and .npz', len(images), step, path)
    return path


def export_autoencoder(config: ConfigDict, workdir: str | Path) -> Path:
    """`--mode=export` of an autoencoder: `workdir/model.safetensors`, which `load_autoencoder` reads; returns it.

    Its metadata has the scale and shift of the latents, measured on up to `MEASURED` training images.
    """
    autoencoder, params, step = load_for(config, workdir, make_mesh(config.mesh))
    path = Path(workdir) / 'model.safetensors'
    _write(path, autoencoder, params, config, read_record(workdir)[0], step)
    return path


def write_autoencoder(workdir: str | Path, path: Path) -> None:
    """Writes the newest checkpoint of a run as a file for `load_autoencoder`."""
    autoencoder, config, _ = _of_workdir(Path(workdir))
    params, step = _restored(autoencoder, config, workdir, make_mesh())
    _write(path, autoencoder, params, config, config.to_dict(), step)


def _write(path: Path, autoencoder: Autoencoder, params: Params, config: ConfigDict, record: dict, step: int) -> None:
    splits = check_splits(load_data(config), autoencoder)
    params = jax.tree.map(fetch, params)
    scale, shift = measure_scale(functools.partial(autoencoder.encode, params), _spread(splits.train))
    if is_writer():
        metadata = {
            'kind': KIND,
            'config': record,
            'data': dataclasses.asdict(autoencoder.data),
            'step': step,
            'ema': config.sample.ema,
            'scale': scale,
            'shift': shift,
        }
        save_weights(path, params, metadata, config.export_dtype)
    LOGGER.info('step %d, latents of scale %.4f and shift %.4f: %s', step, scale, shift, path)


def check_splits(splits: Splits, autoencoder: Autoencoder) -> Splits:
    """The data, or a `UsageError` if their images are of another shape."""
    shape = info_of(splits).image_shape
    if tuple(shape) != tuple(autoencoder.data.image_shape):
        raise UsageError(
            f'the autoencoder was trained on images of {tuple(autoencoder.data.image_shape)}, and the data are '
            f'{tuple(shape)}: set data.resolution and data.name to what it was trained on.'
        )
    return splits
