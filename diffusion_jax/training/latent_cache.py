"""The images of a data set as latents, encoded once and kept in files."""

import functools
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion_jax.data import Splits
from diffusion_jax.data.latents import MAX_MEMORY_BYTES, LatentRecords, LatentSet, described, write_latents
from diffusion_jax.distributed import is_writer
from diffusion_jax.errors import UsageError
from diffusion_jax.images import to_float
from diffusion_jax.pipelines.parts import Parts, same_encoder
from diffusion_jax.training.sharding import fetch, make_mesh, num_batch_shards, put, sharded_batch

LOGGER = logging.getLogger(__name__)

AUTOENCODER = 'autoencoder'  # key of a cache's description
BATCH = 64
COMPARED = 32  # images, spread over a set, by which a cache is known to be of it


def cached_latents(config: ConfigDict, splits: Splits, parts: Parts, workdir: str | Path) -> Splits:
    """Latents of both splits, from the files that are there or are written now; a progress bar shows it.

    In several processes one encodes, by its own devices, and all read: the folder must be one that all see.

    Raises:
      UsageError: the files there are of other images or of another autoencoder, or are damaged.
    """
    if config.data.crop != 'center':
        raise UsageError(
            f'data.crop={config.data.crop!r} crops an image anew each time, and latents.cache=True encodes it once: '
            'set latents.cache=False.'
        )
    folder = Path(config.latents.cache_dir).expanduser() if config.latents.cache_dir else Path(workdir) / 'latents'
    for name, images in splits._asdict().items():
        wanted = _description(config, images, parts)
        found = described(folder, name)
        differs = [] if found is None else _differences(found, wanted)
        if differs:
            raise UsageError(
                f'{folder} has latents of something else (another {", ".join(differs)}): name another '
                'latents.cache_dir, or delete it, and the images are encoded again.'
            )
        if found is None and is_writer():
            write_latents(folder, name, _encoded(images, name, parts, config.data.flip), wanted)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices('latents')
    return Splits(*(_set_of(folder, name, images) for name, images in splits._asdict().items()))


def _set_of(folder: Path, split: str, images: Any) -> LatentSet:
    stored = LatentRecords(folder, split)
    streamed = len(stored) * stored.record_bytes > MAX_MEMORY_BYTES
    labels = images.labels
    if labels is not None:
        labels = np.asarray(labels[np.arange(len(images))], np.int32)
    return LatentSet(stored, labels, images.class_names, images.captions, streamed)


def _description(config: ConfigDict, images: Any, parts: Parts) -> dict[str, Any]:
    rows = np.linspace(0, len(images) - 1, min(len(images), COMPARED)).round().astype(np.int64)
    return {
        AUTOENCODER: list(parts.latent_info.probe),
        'number of images': len(images),
        'image shape': list(images.image_shape),
        'mirrored': config.data.flip,
        'images': hashlib.sha256(images.load(rows).images.tobytes()).hexdigest(),
    }


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs. An encoder computes a little otherwise on another device, or by another version of a compiler."""
    changed = [key for key in wanted if found.get(key) != wanted[key]]
    probe = found.get(AUTOENCODER)
    if isinstance(probe, list) and same_encoder(probe, wanted[AUTOENCODER]):
        changed = [key for key in changed if key != AUTOENCODER]
    return sorted(changed)


def _encoded(images: Any, name: str, parts: Parts, mirrored: bool) -> Iterator[dict[str, np.ndarray]]:
    space = parts.latents
    mesh = make_mesh(devices=jax.local_devices())
    size = -(-BATCH // num_batch_shards(mesh)) * num_batch_shards(mesh)
    params = jax.tree.map(lambda leaf: put(fetch(leaf), jax.sharding.NamedSharding(mesh, jax.P())), space.params)

    @functools.partial(jax.jit, static_argnames='mirror')
    def encode(params, images, mirror):
        x = to_float(images)
        return space.encoder(params, x[:, :, ::-1] if mirror else x)

    for start in tqdm(range(0, len(images), size), desc=f'encoding {name} images', unit='batch', leave=None):
        rows = np.minimum(np.arange(start, start + size), len(images) - 1)
        count = min(size, len(images) - start)
        pixels = put(images.load(rows).images, sharded_batch(mesh))
        found = {}
        for prefix, mirror in (('', False), ('mirrored_', True))[: 2 if mirrored else 1]:
            moments = encode(params, pixels, mirror)
            found |= {prefix + field: fetch(part)[:count] for field, part in moments._asdict().items()}
        yield found
