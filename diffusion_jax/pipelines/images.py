"""Images from a trained model: by label, with guidance, by any solver, over all devices."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray, UInt8
from tqdm import tqdm

from diffusion_jax import guidance, samplers
from diffusion_jax.denoisers import Apply, ModelDenoiser
from diffusion_jax.errors import UsageError
from diffusion_jax.images import to_uint8
from diffusion_jax.schedules import Schedule
from diffusion_jax.training.sharding import make_mesh, replicated, sharded_batch


class Samples(NamedTuple):
    """Generated images, uint8 [N, H, W, C], and the labels asked for, [N] (None from an unconditional model)."""

    images: UInt8[np.ndarray, 'N H W C']
    labels: Int[np.ndarray, 'N'] | None


class _Progress:
    """Moves whatever bar is set. One object for all pipelines, so that a new bar or pipeline is no new program."""

    bar: Any = None

    def __call__(self, step) -> None:
        if self.bar is not None:
            self.bar.update()


_PROGRESS = _Progress()


@dataclasses.dataclass(frozen=True)
class _Model:
    """What the compiled program is made for."""

    apply: Apply
    schedule: Schedule
    prediction: str
    image_shape: tuple[int, int, int]
    num_classes: int


@functools.partial(jax.jit, static_argnames=('model', 'clip', 'on_step'))
def _sample(
    params: Any,
    plan: samplers.Plan,
    keys: PRNGKeyArray,
    labels: Int[Array, 'B'] | None,
    guidance_scale: float | None,
    *,
    model: _Model,
    clip: bool,
    on_step: Callable | None,
) -> UInt8[Array, 'B H W C']:
    keys_init, keys_steps = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    x = jax.vmap(lambda key: jax.random.normal(key, model.image_shape))(keys_init)
    conditioning = {} if labels is None else {'label': labels}
    denoiser = ModelDenoiser(model.apply, params, model.schedule, model.prediction, conditioning)
    if guidance_scale is not None:
        null = {'label': jnp.full_like(labels, model.num_classes)}
        denoiser = guidance.classifier_free(denoiser, null, guidance_scale)
    return to_uint8(samplers.sample(denoiser, plan, x, keys_steps, clip=clip, on_step=on_step))


class ImagePipeline:
    """Draws images from a model; sample i depends on (seed, i) and its settings alone, not on the batch or the devices.

    Args:
      apply, params: the network.
      schedule: that it was trained on.
      prediction: what it predicts, one of `process.PREDICTIONS`.
      image_shape: (H, W, C).
      class_names: of the labels that it is conditioned on; empty if it is not.
      mesh: the devices to sample on; all by default.
    """

    def __init__(
        self,
        apply: Apply,
        params: Any,
        schedule: Schedule,
        prediction: str,
        image_shape: tuple[int, int, int],
        class_names: Sequence[str] = (),
        mesh: Mesh | None = None,
    ):
        self.class_names = tuple(class_names)
        self.mesh = mesh or make_mesh()
        self.params = jax.device_put(params, replicated(self.mesh))
        self._model = _Model(apply, schedule, prediction, tuple(image_shape), len(self.class_names))

    @property
    def num_classes(self) -> int:
        return self._model.num_classes

    def __call__(
        self,
        num: int,
        *,
        labels: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        solver: str = 'ddim',
        steps: int = 50,
        spacing: str = 'trailing',
        seed: int = 0,
        batch_size: int = 100,
        clip: bool = True,
        progress: bool = False,
        **solver_options: Any,
    ) -> Samples:
        """Draws `num` images.

        Args:
          labels: taken in turn until there are `num`; every class in turn by default.
          guidance_scale: classifier-free; 1 is the conditional model, None that model without the unconditional half's
            cost. A new value compiles nothing.
          solver: one of `samplers.SOLVERS`; `solver_options` are its own (eta, variance).
          steps: model calls per image (twice as many images per call with guidance).
          spacing: of the steps, one of `samplers.SPACINGS`.
          seed: of the initial noise and of the solver's.
          batch_size: images at a time, over all devices; rounded up to a multiple of their number.
          clip: clip the predicted x0 to [-1, 1] at every step.
          progress: show a bar.

        Raises:
          UsageError: for settings that do not fit one another or the model.
        """
        plan = self.plan(solver, steps, spacing, **solver_options)
        wanted = self.check(num, labels, guidance_scale, batch_size)
        devices = self.mesh.size
        batch_size = -(-min(batch_size, num) // devices) * devices
        batches = -(-num // batch_size)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batches * batch_size))
        sharding = sharded_batch(self.mesh)
        images = []
        _PROGRESS.bar = tqdm(total=batches * steps, desc='sampling', unit='step', leave=None) if progress else None
        for start in range(0, batches * batch_size, batch_size):
            part = slice(start, start + batch_size)
            batch = _sample(
                self.params,
                plan,
                jax.device_put(keys[part], sharding),
                None if wanted is None else jax.device_put(np.resize(wanted, len(keys))[part], sharding),
                None if guidance_scale is None else jnp.float32(guidance_scale),
                model=self._model,
                clip=clip,
                on_step=_PROGRESS if progress else None,
            )
            images.append(np.asarray(batch))
        if progress:
            jax.effects_barrier()
            _PROGRESS.bar.close()
        return Samples(np.concatenate(images)[:num], wanted)

    def plan(self, solver: str, steps: int, spacing: str, **solver_options: Any) -> samplers.Plan:
        """The solver on its grid, for the schedule of this model."""
        return samplers.plan(solver, self._model.schedule, steps, spacing, **solver_options)

    def check(
        self, num: int, labels: Sequence[int] | None, guidance_scale: float | None, batch_size: int
    ) -> Int[np.ndarray, 'N'] | None:
        """The label of each of `num` images, or a `UsageError`."""
        if num < 1 or batch_size < 1:
            raise UsageError(f'num and batch_size must be at least 1, got {num} and {batch_size}.')
        if guidance_scale is not None and not (np.isfinite(guidance_scale) and guidance_scale >= 0):
            raise UsageError(f'guidance_scale must be 0 or more, got {guidance_scale}.')
        if not self.num_classes:
            if labels is not None or guidance_scale is not None:
                raise UsageError('this model is unconditional: it takes no labels and no guidance_scale.')
            return None
        valid = f'0..{self.num_classes - 1} ({", ".join(self.class_names)})'
        labels = range(self.num_classes) if labels is None else labels
        if len(labels) == 0 or not all(0 <= label < self.num_classes for label in labels):
            raise UsageError(f'labels must be among {valid}, got {list(labels)}.')
        return np.resize(np.asarray(labels, np.int32), num)


def parse_labels(text: str) -> list[int] | None:
    """'all' as None, '3' as [3], '0,1,2' as [0, 1, 2]."""
    if text == 'all':
        return None
    try:
        return [int(label) for label in text.split(',')]
    except ValueError:
        raise UsageError(f"labels must be 'all' or numbers such as '3' or '0,1,2', got {text!r}.") from None


def save_npz(path: str | Path, samples: Samples, **settings: Any) -> None:
    """Writes `images` (uint8), `labels` where there are any, and each setting as an array."""
    arrays = {'images': samples.images} | ({} if samples.labels is None else {'labels': samples.labels})
    np.savez_compressed(path, **arrays, **{name: np.asarray(value) for name, value in settings.items()})
