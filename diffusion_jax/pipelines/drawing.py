"""The compiled programs that draw samples from a network: pure functions, which images.py calls batch by batch."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from diffusion_jax import guidance, samplers
from diffusion_jax.denoisers import Apply, Denoiser, ModelDenoiser
from diffusion_jax.errors import UsageError
from diffusion_jax.images import to_uint8
from diffusion_jax.schedules import Schedule
from diffusion_jax.training.sharding import on_mesh, put

Conditioning = dict[str, Array]
"""Keyword arguments of a network's `apply`, arrays [B, ...]."""

Place = Callable[[np.ndarray], Array]
"""An array of one entry per sample, [B, ...] -> the same on the devices."""


@dataclasses.dataclass(frozen=True)
class Model:
    """What a program is compiled for.

    Attributes:
      apply: the network, `apply(params, x, t, **conditioning)`.
      schedule: that it was trained on.
      prediction: what it predicts, one of `process.PREDICTIONS`.
      learned_variance: whether it gives the variance besides, as `ModelDenoiser` has it.
    """

    apply: Apply
    schedule: Schedule
    prediction: str
    learned_variance: bool = False


class Guidance(NamedTuple):
    """Traced: a new value compiles nothing."""

    scale: Float[Array, '']
    rescale: Float[Array, '']
    interval: tuple[Float[Array, ''], Float[Array, '']] | None


class Batch(NamedTuple):
    """What samples are drawn from, one row a sample, on the devices.

    The seeds are keys' data: host arrays could be the same in every process, keys could not. Without guidance there is
    no `null`.
    """

    seeds: UInt32[Array, 'B 2']
    indices: Int[Array, 'B']
    conditioning: Conditioning
    null: Conditioning | None
    guidance: Guidance | None


def guidance_of(
    scale: float | None, rescale: float = 0.0, interval: tuple[float, float] | None = None
) -> Guidance | None:
    """On the host; None without a scale."""
    if scale is None:
        return None
    interval = None if interval is None else tuple(map(np.float32, interval))
    return Guidance(np.float32(scale), np.float32(rescale), interval)


def denoiser_of(
    model: Model, params: Any, conditioning: Conditioning, null: Conditioning | None, guided: Guidance | None
) -> Denoiser:
    """The network as a denoiser under this conditioning, with guidance away from `null`."""
    denoiser = ModelDenoiser(
        model.apply, params, model.schedule, model.prediction, conditioning, model.learned_variance
    )
    if guided is None:
        return denoiser
    return guidance.classifier_free(denoiser, null, guided.scale, interval=guided.interval, rescale=guided.rescale)


class _Progress:
    """Moves whatever bar is set. One object for all pipelines, so that a new bar or pipeline is no new program."""

    bar: Any = None

    def __call__(self, step) -> None:
        if self.bar is not None:
            self.bar.update()


PROGRESS = _Progress()


@functools.partial(jax.jit, static_argnames=('model', 'shape', 'clip', 'on_step', 'mesh'))
def sample(
    params: Any,
    plan: samplers.Plan,
    batch: Batch,
    noise: Float[Array, 'B H W C'] | None,
    start: Float[Array, 'B H W C'] | None,
    known: samplers.Known | None,
    *,
    model: Model,
    shape: tuple[int, int, int],
    clip: bool,
    on_step: Callable | None,
    mesh: Mesh,
) -> Float[Array, 'B H W C']:
    """Samples as the model has them. `start` is an image to begin from, with noise to where the plan begins."""
    keys_init, keys_steps = keys_of(batch)
    if start is not None:
        x = samplers.noised(plan, start, keys_init)
    elif noise is not None:
        x = jnp.asarray(plan.prior_std, jnp.float32) * noise
    else:
        x = samplers.prior(plan, keys_init, (len(batch.indices), *shape))

    def draw(x):
        denoiser = denoiser_of(model, params, batch.conditioning, batch.null, batch.guidance)
        return samplers.sample(denoiser, plan, x, keys_steps, clip=clip, known=known, on_step=on_step)

    return on_mesh(mesh, draw)(x)


@functools.partial(jax.jit, static_argnames=('model', 'shape', 'clip', 'mesh'))
def trajectory(
    params: Any,
    plan: samplers.Plan,
    batch: Batch,
    *,
    model: Model,
    shape: tuple[int, int, int],
    clip: bool,
    mesh: Mesh,
) -> samplers.Trajectory:
    """As `sample` from noise, with all that there was on the way."""
    keys_init, keys_steps = keys_of(batch)
    x = samplers.prior(plan, keys_init, (len(batch.indices), *shape))

    def draw(x):
        denoiser = denoiser_of(model, params, batch.conditioning, batch.null, batch.guidance)
        return samplers.sample_trajectory(denoiser, plan, x, keys_steps, clip=clip)

    return on_mesh(mesh, draw)(x)


@jax.jit
def finished(x: Float[Array, 'B H W C']) -> tuple[UInt8[Array, 'B H W C'], Bool[Array, 'B']]:
    """(images, whether each is finite)."""
    return to_uint8(x), jnp.isfinite(x).all(axis=(1, 2, 3))


def keys_of(batch: Batch) -> tuple[Array, Array]:
    """A key for each sample's first noise, and one for that of its steps: of (seed, index) alone."""
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(batch.seeds), batch.indices)
    keys_init, keys_steps = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    return keys_init, keys_steps


def place_rows(array: np.ndarray | None, *, rows: Int[np.ndarray, 'B'], sharding: Sharding) -> Array | None:
    """These rows of an array of samples on the devices, from the start again where it ends."""
    return None if array is None else put(array[rows % len(array)], sharding)


def seeds_of(seed: int | Sequence[int], num: int) -> tuple[UInt32[np.ndarray, 'N 2'], Int[np.ndarray, 'N']]:
    """(key data, index) of each sample.

    Raises:
      UsageError: it is no seed.
    """
    try:
        several = [int(value) for value in seed] if isinstance(seed, Sequence | np.ndarray) else None
        keys = [np.asarray(jax.random.key_data(jax.random.key(value))) for value in several or [int(seed)]]
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f'seed must be an integer, or some that are taken in turn; got {seed!r}: {error}.') from None
    turns = np.arange(num) % len(keys)
    return np.stack(keys)[turns], np.zeros(num, np.int32) if several else np.arange(num, dtype=np.int32)
