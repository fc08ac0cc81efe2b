"""Images from a trained model: by label, with guidance, by any solver, over all devices."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32
from tqdm import tqdm

from diffusion_jax import guidance, samplers
from diffusion_jax.denoisers import Apply, Denoiser, ModelDenoiser
from diffusion_jax.errors import SamplingDiverged, UsageError
from diffusion_jax.images import to_float, to_uint8
from diffusion_jax.schedules import Schedule
from diffusion_jax.training.sharding import fetch, make_mesh, num_batch_shards, on_mesh, put, replicated, sharded_batch


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
    learned_variance: bool


class _Guidance(NamedTuple):
    """Traced: a new value compiles nothing."""

    scale: Float[Array, '']
    rescale: Float[Array, '']
    interval: tuple[Float[Array, ''], Float[Array, '']] | None


def _guidance(scale: float | None, rescale: float = 0.0, interval: tuple[float, float] | None = None):
    if scale is None:
        return None
    interval = None if interval is None else tuple(map(jnp.float32, interval))
    return _Guidance(jnp.float32(scale), jnp.float32(rescale), interval)


def _denoiser(model: _Model, params: Any, labels: Int[Array, 'B'] | None, guided: _Guidance | None) -> Denoiser:
    conditioning = {} if labels is None else {'label': labels}
    denoiser = ModelDenoiser(
        model.apply, params, model.schedule, model.prediction, conditioning, model.learned_variance
    )
    if guided is None:
        return denoiser
    null = {'label': jnp.full_like(labels, model.num_classes)}
    return guidance.classifier_free(denoiser, null, guided.scale, interval=guided.interval, rescale=guided.rescale)


@functools.partial(jax.jit, static_argnames=('model', 'clip', 'on_step', 'mesh'))
def _sample(
    params: Any,
    plan: samplers.Plan,
    seed: UInt32[Array, '2'],
    indices: Int[Array, 'B'],
    labels: Int[Array, 'B'] | None,
    guided: _Guidance | None,
    start: Float[Array, 'B H W C'] | None,
    known: samplers.Known | None,
    *,
    model: _Model,
    clip: bool,
    on_step: Callable | None,
    mesh: Mesh,
) -> tuple[UInt8[Array, 'B H W C'], Bool[Array, 'B']]:
    """(images, whether each is finite). `start` is an image to begin from, with noise to where the plan begins.

    The seed is a key's data: a host array, the same in every process.
    """
    keys_init, keys_steps = _keys(seed, indices)
    if start is None:
        x = samplers.prior(plan, keys_init, (len(indices), *model.image_shape))
    else:
        x = samplers.noised(plan, start, keys_init)

    def draw(x):
        denoiser = _denoiser(model, params, labels, guided)
        return samplers.sample(denoiser, plan, x, keys_steps, clip=clip, known=known, on_step=on_step)

    x = on_mesh(mesh, draw)(x)
    return to_uint8(x), jnp.isfinite(x).all(axis=(1, 2, 3))


def _keys(seed: UInt32[Array, '2'], indices: Int[Array, 'B']) -> tuple[Array, Array]:
    """A key for each sample's first noise, and one for that of its steps: of (seed, index) alone."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.wrap_key_data(seed), indices)
    keys_init, keys_steps = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    return keys_init, keys_steps


@functools.partial(jax.jit, static_argnames=('model', 'clip', 'mesh'))
def _trajectory(params, plan, seed, indices, labels, guided, *, model: _Model, clip: bool, mesh: Mesh):
    keys_init, keys_steps = _keys(seed, indices)
    x = samplers.prior(plan, keys_init, (len(indices), *model.image_shape))

    def draw(x):
        denoiser = _denoiser(model, params, labels, guided)
        return samplers.sample_trajectory(denoiser, plan, x, keys_steps, clip=clip)

    return on_mesh(mesh, draw)(x)


class ImagePipeline:
    """Draws images from a model; sample i depends on (seed, i) and its settings alone, not on the batch or the devices.

    Args:
      apply, params: the network.
      schedule: that it was trained on.
      prediction: what it predicts, one of `process.PREDICTIONS`.
      image_shape: (H, W, C).
      class_names: of the labels that it is conditioned on; empty if it is not.
      mesh: the devices to sample on; all by default.
      learned_variance: whether the network gives the variance besides, as `ModelDenoiser` has it.
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
        learned_variance: bool = False,
    ):
        self.class_names = tuple(class_names)
        self.mesh = mesh or make_mesh()
        self.params = jax.tree.map(self._placed, params)
        self._model = _Model(apply, schedule, prediction, tuple(image_shape), len(self.class_names), learned_variance)

    @property
    def num_classes(self) -> int:
        return self._model.num_classes

    def _placed(self, leaf: Array) -> Array:
        """On the mesh: a parameter that is there already, whole or in parts, stays as it is."""
        on_it = isinstance(leaf, jax.Array) and getattr(leaf.sharding, 'mesh', None) == self.mesh
        return leaf if on_it else put(leaf, replicated(self.mesh))

    def __call__(
        self,
        num: int,
        *,
        labels: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        solver: str = 'ddim',
        steps: int = 50,
        spacing: str = 'trailing',
        final: str = 'zero',
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        image: np.ndarray | None = None,
        strength: float = 1.0,
        mask: np.ndarray | None = None,
        seed: int = 0,
        batch_size: int = 100,
        clip: bool = True,
        progress: bool = False,
        **solver_options: Any,
    ) -> Samples:
        """Draws `num` images; or, given an image, makes variations of it (`strength`) or fills in a part (`mask`).

        Args:
          labels: taken in turn until there are `num`; every class in turn by default.
          guidance_scale: classifier-free; 1 is the conditional model, None that model without the unconditional half's
            cost. A new value compiles nothing.
          solver: one of `samplers.SOLVERS`; `solver_options` are its own (eta, variance, order, ...). What there is to
            know of each: `print(samplers.describe())`.
          steps: of the solver (twice as many images per model call with guidance).
          spacing, final: of the steps, one of `samplers.SPACINGS` and of `samplers.FINALS`.
          guidance_rescale, guidance_interval: of `guidance.classifier_free`.
          image: uint8, [H, W, C] or [num, H, W, C], to start from.
          strength: in (0, 1]: how much of `image` is given up to noise; 0.3 changes details, 1 all.
          mask: [H, W] or [num, H, W], 1 (or True) where `image` is kept and 0 where it is filled in.
          seed: of the initial noise and of the solver's.
          batch_size: images at a time, over all devices and processes; rounded up to a multiple of the batch's shards.
          clip: clip the predicted x0 to [-1, 1] at every step.
          progress: show a bar.

        Raises:
          UsageError: for settings that do not fit one another or the model.
          SamplingDiverged: the network gave NaN or inf.
        """
        settings = {name: value for name, value in locals().items() if name not in ('self', 'num', 'solver_options')}
        batches = list(self.batches(num, **settings, **solver_options))
        labels = None if batches[0].labels is None else np.concatenate([batch.labels for batch in batches])
        return Samples(np.concatenate([batch.images for batch in batches]), labels)

    def batches(
        self,
        num: int,
        *,
        first: int = 0,
        labels: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        solver: str = 'ddim',
        steps: int = 50,
        spacing: str = 'trailing',
        final: str = 'zero',
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        image: np.ndarray | None = None,
        strength: float = 1.0,
        mask: np.ndarray | None = None,
        seed: int = 0,
        batch_size: int = 100,
        clip: bool = True,
        progress: bool = False,
        **solver_options: Any,
    ) -> Iterator[Samples]:
        """As a call, batch by batch: for more samples than fit in memory, or to go on after the `first` ones.

        Args:
          first: the samples before this one are left out; sample i is the same whatever `first` is.

        In every process of several it yields the same samples: all of them.
        """
        plan = self.plan(solver, steps, spacing, final=final, strength=strength, **solver_options)
        wanted = self.check(num, labels, guidance_scale, batch_size)
        if not 0 <= first < num:
            raise UsageError(f'first must be in 0..{num - 1}, got {first}.')
        self.check_guidance(guidance_scale, guidance_rescale, guidance_interval)
        guided = _guidance(guidance_scale, guidance_rescale, guidance_interval)
        image, mask = self._check_image(num, image, strength, mask)
        shards = num_batch_shards(self.mesh)
        batch_size = -(-min(batch_size, num - first) // shards) * shards
        starts = range(first, num, batch_size)
        plan, guided = jax.tree.map(np.asarray, (plan, guided))  # host arrays: the same in every process
        key_data = np.asarray(jax.random.key_data(jax.random.key(seed)))
        sharding = sharded_batch(self.mesh)
        show = progress and jax.process_index() == 0
        bar = tqdm(total=len(starts) * plan.num_calls, desc='sampling', unit='step', leave=None) if show else None
        try:
            for start in starts:
                rows = np.arange(start, start + batch_size)
                placed = functools.partial(_place, rows=rows, sharding=sharding)
                start_image = placed(image)
                _PROGRESS.bar = bar
                batch, finite = _sample(
                    self.params,
                    plan,
                    key_data,
                    put(rows.astype(np.int32), sharding),
                    placed(wanted),
                    guided,
                    start_image if strength < 1 else None,
                    None if mask is None else samplers.Known(start_image, placed(mask)),
                    model=self._model,
                    clip=clip,
                    on_step=_PROGRESS if show else None,
                    mesh=self.mesh,
                )
                count = min(batch_size, num - start)
                images, finite = fetch(batch)[:count], fetch(finite)[:count]
                if show:
                    jax.effects_barrier()
                if not finite.all():
                    raise SamplingDiverged(int((~finite).sum()), count)
                yield Samples(images, None if wanted is None else wanted[start : start + count])
        finally:
            if bar is not None:
                bar.close()

    def trajectory(
        self,
        num: int,
        *,
        labels: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        solver: str = 'ddim',
        steps: int = 50,
        spacing: str = 'trailing',
        final: str = 'zero',
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        seed: int = 0,
        clip: bool = True,
        **solver_options: Any,
    ) -> samplers.Trajectory:
        """The way of `num` samples from noise to image: those that a call with these settings draws.

        Returns:
          x, float [steps + 1, num, H, W, C], from the noise on, and x0, [steps, num, ...], what was predicted at each
          step, both on the host. x is the solver's: of size alpha x0 + sigma eps.

        Raises:
          UsageError: as a call does.
          SamplingDiverged: the network gave NaN or inf.
        """
        plan = self.plan(solver, steps, spacing, final=final, **solver_options)
        self.check_guidance(guidance_scale, guidance_rescale, guidance_interval)
        wanted = self.check(num, labels, guidance_scale, num)
        guided = _guidance(guidance_scale, guidance_rescale, guidance_interval)
        plan, guided = jax.tree.map(np.asarray, (plan, guided))
        shards = num_batch_shards(self.mesh)
        rows = np.arange(-(-num // shards) * shards)
        sharding = sharded_batch(self.mesh)
        trajectory = _trajectory(
            self.params,
            plan,
            np.asarray(jax.random.key_data(jax.random.key(seed))),
            put(rows.astype(np.int32), sharding),
            _place(wanted, rows=rows, sharding=sharding),
            guided,
            model=self._model,
            clip=clip,
            mesh=self.mesh,
        )
        trajectory = jax.tree.map(lambda leaf: fetch(leaf)[:, :num], trajectory)
        if bad := int((~np.isfinite(trajectory.x[-1]).all(axis=(1, 2, 3))).sum()):
            raise SamplingDiverged(bad, num)
        return trajectory

    @property
    def schedule(self) -> Schedule:
        return self._model.schedule

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self._model.image_shape

    @property
    def learned_variance(self) -> bool:
        return self._model.learned_variance

    def denoiser(self, labels: Sequence[int] | None = None, guidance_scale: float | None = None) -> Denoiser:
        """The network as a denoiser, to use with `samplers` directly: inversion, restoration, ideas of your own.

        Args:
          labels: one per sample of the batch that it is called with; None for an unconditional model.
          guidance_scale: as in a call of the pipeline.
        """
        if labels is None and self.num_classes:
            raise UsageError(f'this model is conditioned on labels: give one per sample, 0..{self.num_classes - 1}.')
        wanted = None if labels is None else jnp.asarray(self.check(len(labels), labels, guidance_scale, len(labels)))
        return _denoiser(self._model, self.params, wanted, _guidance(guidance_scale))

    def denoiser_of(self, params: Any, labels: Int[Array, 'B'] | None = None) -> Denoiser:
        """As `denoiser`, without guidance, of traced parameters and labels: for use inside a jitted function."""
        return _denoiser(self._model, params, labels, None)

    def plan(self, solver: str, steps: int, spacing: str, **options: Any) -> samplers.Plan:
        """The solver on its grid, for the schedule of this model; options are those of `samplers.plan`."""
        plan = samplers.plan(solver, self._model.schedule, steps, spacing, **options)
        if plan.alpha[0] == 0 and self._model.prediction in ('eps', 'score'):
            raise UsageError(
                f'this model predicts {self._model.prediction}, which says nothing of the image where there is no '
                "signal, and the grid starts there: take spacing 'leading', 'log_snr' or 'karras'."
            )
        return plan

    def check_guidance(
        self, scale: float | None, rescale: float = 0.0, interval: tuple[float, float] | None = None
    ) -> None:
        """A `UsageError` for options of guidance that do not fit."""
        if scale is None and (rescale or interval is not None):
            raise UsageError('guidance_rescale and guidance_interval need a guidance_scale.')
        guidance.check_options(interval, rescale)

    def _check_image(self, num: int, image: np.ndarray | None, strength: float, mask: np.ndarray | None):
        """(image as float [num, H, W, C], mask as [num, H, W, 1]), each None where it is not given."""
        if image is None:
            if strength != 1 or mask is not None:
                raise UsageError('strength and mask need an image to start from.')
            return None, None
        if strength == 1 and mask is None:
            raise UsageError('an image needs a strength below 1 (variations of it) or a mask (filling in a part).')
        shape = self._model.image_shape
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.shape not in (shape, (num, *shape)):
            raise UsageError(
                f'image must be uint8 of shape {shape} or {(num, *shape)}, got {image.dtype} {image.shape}.'
            )
        if mask is not None:
            mask = np.asarray(mask)
            if mask.shape not in (shape[:2], (num, *shape[:2])) or not np.isin(mask, (0, 1)).all():
                raise UsageError(f'mask must hold 0 and 1 and be of shape {shape[:2]} or {(num, *shape[:2])}.')
            mask = np.broadcast_to(mask.astype(np.float32), (num, *shape[:2]))[..., None]
        return np.asarray(to_float(np.broadcast_to(image, (num, *shape)))), mask

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


def _place(array, *, rows: Int[np.ndarray, 'B'], sharding) -> Any:
    """These rows of an array of samples on the devices, from the start again where it ends."""
    return None if array is None else put(array[rows % len(array)], sharding)


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
