"""Images from a trained model: by label or by text, with guidance, by any solver, over all devices."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt8, UInt32
from tqdm import tqdm

from diffusion_jax import guidance, samplers
from diffusion_jax.denoisers import Apply, Denoiser
from diffusion_jax.errors import SamplingDiverged, UsageError
from diffusion_jax.images import to_float, to_uint8
from diffusion_jax.pipelines import drawing
from diffusion_jax.pipelines.drawing import Batch, Conditioning, Guidance, Model, Place, guidance_of
from diffusion_jax.pipelines.latents import LatentSpace
from diffusion_jax.schedules import Schedule
from diffusion_jax.training.sharding import fetch, make_mesh, num_batch_shards, put, replicated, sharded_batch


class Samples(NamedTuple):
    """Generated images, uint8 [N, H, W, C], and the labels asked for, [N] (None from a model without labels)."""

    images: UInt8[np.ndarray, 'N H W C']
    labels: Int[np.ndarray, 'N'] | None


class Prompts(Protocol):
    """What makes texts into a model's conditioning."""

    def _check_labels(self, texts: Sequence[str]) -> None:
        """A `UsageError` for texts that cannot be read."""

    def condition(self, texts: Sequence[str], size: tuple[int, int], place: Place) -> dict[str, Array]:
        """Keyword arguments of `apply` for these texts, arrays [B, ...], and images of this height and width."""

    def null(self, texts: Sequence[str] | None, num: int, size: tuple[int, int], place: Place) -> dict[str, Array]:
        """The same for what guidance leads away from: `num` negative prompts, or None for none at all."""


class Planner(Protocol):
    """What makes the plan of a pipeline: it may know solvers, spacings and ends that fit the model best."""

    clip: bool
    """Whether the predicted x0 is clipped unless it is said."""

    def __call__(
        self,
        schedule: Schedule,
        solver: str | None,
        steps: int,
        spacing: str | None,
        final: str | None,
        strength: float,
        options: Mapping[str, Any],
    ) -> samplers.Plan:
        """The plan; what is None is for the planner to choose."""


@dataclasses.dataclass(frozen=True)
class DefaultPlanner:
    """DDIM on trailing steps to the data, where nothing else is said."""

    clip: bool = True

    def __call__(self, schedule, solver, steps, spacing, final, strength, options) -> samplers.Plan:
        return samplers.plan(
            solver or 'ddim', schedule, steps, spacing or 'trailing', final or 'zero', strength=strength, **options
        )


class Asked(NamedTuple):
    """What a call of a pipeline asks for, checked, with the defaults of the model in it, on the host.

    Attributes:
      plan: the solver on its grid.
      labels: of each sample, [N]; None from a model without labels.
      prompts, negative_prompts: to be taken in turn; None for those that there are none of.
      size: (height, width) of the images.
      seeds, indices: of each sample: its key's data and which noise of it.
      clip: whether the predicted x0 is clipped.
    """

    num: int
    plan: samplers.Plan
    labels: Int[np.ndarray, 'N'] | None
    prompts: list[str] | None
    negative_prompts: list[str] | None
    guidance: Guidance | None
    size: tuple[int, int]
    seeds: UInt32[np.ndarray, 'N 2']
    indices: Int[np.ndarray, 'N']
    clip: bool


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
      latents: the autoencoder in whose latents the network works; None for one that works on pixels.
      prompts: what makes texts into its conditioning; None if it takes no text.
      planner: what chooses solver and grid where a call does not.
      inpaints: whether it sees a mask and the masked image, as `extra`, besides x_t: then every call needs both.
      default_prompts: of a model that takes text, in turn, where a call has none.
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
        latents: LatentSpace | None = None,
        prompts: Prompts | None = None,
        planner: Planner | None = None,
        inpaints: bool = False,
        default_prompts: Sequence[str] = ('',),
    ):
        self.class_names = tuple(class_names)
        self.mesh = mesh or make_mesh()
        self.params = jax.tree.map(self._placed, params)
        self.image_shape = tuple(image_shape)
        self.latents = None if latents is None else latents.placed(self._placed)
        self.prompts = prompts
        self.planner = planner or DefaultPlanner(clip=latents is None)
        self.inpaints = inpaints
        self.default_prompts = tuple(default_prompts)
        self.model = Model(apply, schedule, prediction, learned_variance)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def _placed(self, leaf: Array) -> Array:
        """On the mesh: a parameter that is there already, whole or in parts, stays as it is."""
        on_it = isinstance(leaf, jax.Array) and getattr(leaf.sharding, 'mesh', None) == self.mesh
        return leaf if on_it else put(leaf, replicated(self.mesh))

    def __call__(
        self,
        num: int,
        *,
        labels: Sequence[int] | None = None,
        prompts: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        solver: str | None = None,
        steps: int = 50,
        spacing: str | None = None,
        final: str | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        image: np.ndarray | None = None,
        strength: float = 1.0,
        mask: np.ndarray | None = None,
        noise: np.ndarray | None = None,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 100,
        clip: bool | None = None,
        progress: bool = False,
        **solver_options: Any,
    ) -> Samples:
        """Draws `num` images; or, given an image, makes variations of it (`strength`) or fills in a part (`mask`).

        Args:
          labels: taken in turn until there are `num`; every class in turn by default.
          prompts: of a model that takes text: one text, or some that are taken in turn; '' by default, mostly.
          negative_prompt: what guidance leads away from: one text, or some that are taken in turn; none by default.
          guidance_scale: classifier-free; 1 is the conditional model, None that model without the unconditional half's
            cost. A new value compiles nothing.
          solver: one of `samplers.SOLVERS`; `solver_options` are its own (eta, variance, order, ...). What there is to
            know of each: `print(samplers.describe())`. By default DDIM, or what a model that was imported says.
          steps: of the solver (twice as many images per model call with guidance).
          spacing, final: of the steps, one of `samplers.SPACINGS` and of `samplers.FINALS`; 'trailing' and 'zero' by
            default, or what a model that was imported says.
          guidance_rescale, guidance_interval: of `guidance.classifier_free`.
          image: uint8, [H, W, C] or [num, H, W, C], to start from.
          strength: in (0, 1]: how much of `image` is given up to noise; 0.3 changes details, 1 all.
          mask: [H, W] or [num, H, W], 1 (or True) where `image` is kept and 0 where it is filled in.
          noise: what to begin with instead of noise of the seed: standard normal, [num, h, w, c] as the network has it.
          size: (height, width) of the images, those it was trained on by default; not every network takes others.
          seed: of the initial noise and of the solver's. One seed for all, of which sample i draws the i-th noise; or
            some that are taken in turn: then each sample is what that seed alone, with num=1, gives.
          batch_size: images at a time, over all devices and processes; rounded up to a multiple of the batch's shards.
          clip: clip the predicted x0 to [-1, 1] at every step; by default where the model's x0 are images.
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
        decode: bool = True,
        image: np.ndarray | None = None,
        strength: float = 1.0,
        mask: np.ndarray | None = None,
        noise: np.ndarray | None = None,
        batch_size: int = 100,
        progress: bool = False,
        **settings: Any,
    ) -> Iterator[Samples]:
        """As a call, batch by batch: for more samples than fit in memory, or to go on after the `first` ones.

        Args:
          first: the samples before this one are left out; sample i is the same whatever `first` is.
          decode: False gives the samples as the network has them, float32: latents, of a model of latents.
          image, .., settings: as a call takes them.

        In every process of several it yields the same samples: all of them.
        """
        asked = self.asked(num, strength=strength, **settings)
        check_batch_size(batch_size)
        if not 0 <= first < num:
            raise UsageError(f'first must be in 0..{num - 1}, got {first}.')
        image, mask = self._check_image(num, asked.size, image, strength, mask)
        shape = self.shape_of(asked.size)
        if noise is not None:
            noise = np.asarray(noise, np.float32)
            if noise.shape != (num, *shape) or strength < 1:
                raise UsageError(f'noise must be {(num, *shape)}, and the strength 1; got {noise.shape}, {strength}.')
        shards = num_batch_shards(self.mesh)
        batch_size = -(-min(batch_size, num - first) // shards) * shards
        starts = range(first, num, batch_size)
        show = progress and jax.process_index() == 0
        total = len(starts) * asked.plan.num_calls
        bar = tqdm(total=total, desc='sampling', unit='step', leave=None) if show else None
        try:
            for start in starts:
                placed = functools.partial(
                    drawing.place_rows,
                    rows=np.arange(start, start + batch_size),
                    sharding=sharded_batch(self.mesh),
                )
                batch = self.batch(asked, start, batch_size)
                origin, known = self._origin(placed(image), placed(mask))
                if self.inpaints:
                    batch, known = self._seeing(batch, placed(image), placed(mask)), None
                drawing.PROGRESS.bar = bar
                x = drawing.sample(
                    self.params,
                    asked.plan,
                    batch,
                    placed(noise),
                    origin if strength < 1 else None,
                    known,
                    model=self.model,
                    shape=shape,
                    clip=asked.clip,
                    on_step=drawing.PROGRESS if show else None,
                    mesh=self.mesh,
                )
                if decode and self.latents is not None:
                    x = self.latents.decode(x)
                count = min(batch_size, num - start)
                images, finite = (fetch(array)[:count] for array in drawing.finished(x))
                if show:
                    jax.effects_barrier()
                if not finite.all():
                    raise SamplingDiverged(int((~finite).sum()), count)
                part = slice(start, start + count)
                if not decode:
                    images = fetch(x)[:count]
                elif mask is not None and self.latents is not None:
                    # Pixels that are kept are so to the last bit; an autoencoder gives them nearly.
                    images = np.where(mask[part] != 0, np.asarray(to_uint8(image[part])), images)
                yield Samples(images, None if asked.labels is None else asked.labels[part])
        finally:
            if bar is not None:
                bar.close()

    def trajectory(self, num: int, **settings: Any) -> samplers.Trajectory:
        """The way of `num` samples from noise to image: those that a call with these settings draws.

        Args:
          settings: as a call takes them; all but those of an image to start from, and what is about batches.

        Returns:
          x, float [steps + 1, num, H, W, C], from the noise on, and x0, [steps, num, ...], what was predicted at each
          step, both on the host, and latents of a model of latents. x is the solver's: of size alpha x0 + sigma eps.

        Raises:
          UsageError: as a call does.
          SamplingDiverged: the network gave NaN or inf.
        """
        asked = self.asked_from_noise(num, **settings)
        trajectory = drawing.trajectory(
            self.params,
            asked.plan,
            self.batch(asked),
            model=self.model,
            shape=self.shape_of(asked.size),
            clip=asked.clip,
            mesh=self.mesh,
        )
        trajectory = jax.tree.map(lambda leaf: fetch(leaf)[:, :num], trajectory)
        if bad := int((~np.isfinite(trajectory.x[-1]).all(axis=(1, 2, 3))).sum()):
            raise SamplingDiverged(bad, num)
        return trajectory

    def asked(
        self,
        num: int,
        *,
        labels: Sequence[int] | None = None,
        prompts: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        solver: str | None = None,
        steps: int = 50,
        spacing: str | None = None,
        final: str | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        strength: float = 1.0,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        clip: bool | None = None,
        **solver_options: Any,
    ) -> Asked:
        """What a call with these settings asks for, or a `UsageError`."""
        size = self._check_size(size)
        plan = self.plan(solver, steps, spacing, final=final, strength=strength, **solver_options)
        wanted = self._check_labels(num, labels, guidance_scale)
        texts, negative = self._check_texts(num, prompts, negative_prompt, guidance_scale)
        self._check_guidance(guidance_scale, guidance_rescale, guidance_interval)
        seeds, indices = drawing.seeds_of(seed, num)
        return Asked(
            num,
            jax.tree.map(np.asarray, plan),  # host arrays: the same in every process
            wanted,
            texts,
            negative,
            guidance_of(guidance_scale, guidance_rescale, guidance_interval),
            size,
            seeds,
            indices,
            self.planner.clip if clip is None else clip,
        )

    def asked_from_noise(self, num: int, **settings: Any) -> Asked:
        """As `asked`, for what begins with noise alone: a `UsageError` from a model that fills in parts of images."""
        asked = self.asked(num, **settings)
        self._check_image(num, asked.size, None, settings.get('strength', 1.0), None)
        return asked

    def batch(self, asked: Asked, start: int = 0, count: int | None = None) -> Batch:
        """`count` samples from `start` on, all by default, and as many more as make the devices' shares even."""
        rows = self._rows(start, asked.num if count is None else count)
        placed = functools.partial(drawing.place_rows, rows=rows, sharding=sharded_batch(self.mesh))
        conditioning, null = self._condition(
            rows, asked.labels, asked.prompts, asked.negative_prompts, asked.size, asked.guidance is not None
        )
        return Batch(placed(asked.seeds), placed(asked.indices), conditioning, null, asked.guidance)

    def _rows(self, start: int, count: int) -> Int[np.ndarray, 'B']:
        shards = num_batch_shards(self.mesh)
        return np.arange(start, start + -(-count // shards) * shards)

    def _condition(
        self,
        rows: Int[np.ndarray, 'B'],
        labels: Int[np.ndarray, 'N'] | None,
        texts: list[str] | None,
        negative: list[str] | None,
        size: tuple[int, int],
        guided: bool,
    ) -> tuple[Conditioning, Conditioning | None]:
        """(conditioning, null) of these rows of the samples; no null without guidance."""
        sharding = sharded_batch(self.mesh)
        conditioning, null = {}, {}
        if labels is not None:
            conditioning['label'] = drawing.place_rows(labels, rows=rows, sharding=sharding)
            null['label'] = put(np.full(len(rows), self.num_classes, np.int32), sharding)
        if self.prompts is not None:

            def of_rows(values):
                return None if values is None else [values[row % len(values)] for row in rows]

            place = functools.partial(put, sharding=sharding)
            conditioning |= self.prompts.condition(of_rows(texts), size, place)
            if guided:
                null |= self.prompts.null(of_rows(negative), len(rows), size, place)
        return conditioning, null if guided else None

    def _origin(self, image, mask) -> tuple[Array | None, samplers.Known | None]:
        """(the image to start from, what inpainting keeps), as the network has them."""
        if image is None:
            return None, None
        if self.latents is None:
            return image, None if mask is None else samplers.Known(image, mask)
        latents = self.latents.encode(image)
        return latents, None if mask is None else samplers.Known(latents, self.latents.wholly(mask))

    def _seeing(self, batch: Batch, image, mask) -> Batch:
        """What a network that inpaints sees besides x_t: 1 where it shall paint, and the latents of what is kept."""
        visible = self.latents.encode(image * mask)
        extra = {'extra': jnp.concatenate([1.0 - self.latents.nearest(mask), visible], axis=-1)}
        null = None if batch.null is None else batch.null | extra
        return batch._replace(conditioning=batch.conditioning | extra, null=null)

    @property
    def schedule(self) -> Schedule:
        return self.model.schedule

    @property
    def apply(self) -> Apply:
        """The network: `apply(params, x, t, **conditioning)`."""
        return self.model.apply

    @property
    def prediction(self) -> str:
        """What it predicts, one of `process.PREDICTIONS`."""
        return self.model.prediction

    @property
    def model_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of what the network sees: of latents, if it works in them."""
        return self.shape_of(self.image_shape[:2])

    def conditioning(
        self, num: int, labels: Sequence[int] | None = None, prompts: str | Sequence[str] | None = None
    ) -> Conditioning:
        """Keyword arguments of `apply` for these labels or prompts, in turn, arrays [num, ..]; as a call has them.

        Raises:
          UsageError: the model does not take them.
        """
        wanted = self._check_labels(num, labels, None)
        texts, _ = self._check_texts(num, prompts, None, None)
        rows = self._rows(0, num)
        conditioning, _ = self._condition(rows, wanted, texts, None, self.image_shape[:2], False)
        return jax.tree.map(lambda leaf: put(fetch(leaf)[:num], replicated(self.mesh)), conditioning)

    @property
    def learned_variance(self) -> bool:
        return self.model.learned_variance

    def denoiser(self, labels: Sequence[int] | None = None, guidance_scale: float | None = None) -> Denoiser:
        """The network as a denoiser, to use with `samplers` directly: inversion, restoration, ideas of your own.

        Args:
          labels: one per sample of the batch that it is called with; None for a model without labels.
          guidance_scale: as in a call of the pipeline.
        """
        if labels is None and self.num_classes:
            raise UsageError(f'this model is conditioned on labels: give one per sample, 0..{self.num_classes - 1}.')
        if self.prompts is not None:
            raise UsageError('this model takes text: `conditioned` is the denoiser of such a one.')
        if labels is None:
            return self.conditioned({}, None, guidance_scale)
        wanted = jnp.asarray(self._check_labels(len(labels), labels, guidance_scale))
        return self.conditioned({'label': wanted}, {'label': jnp.full_like(wanted, self.num_classes)}, guidance_scale)

    def conditioned(
        self, conditioning: Conditioning, null: Conditioning | None = None, guidance_scale: float | None = None
    ) -> Denoiser:
        """The network as a denoiser under this conditioning, and with guidance away from `null`: arrays [B, ...]."""
        return drawing.denoiser_of(self.model, self.params, conditioning, null, guidance_of(guidance_scale))

    def denoiser_of(self, params: Any, labels: Int[Array, 'B'] | None = None) -> Denoiser:
        """As `denoiser`, without guidance, of traced parameters and labels: for use inside a jitted function."""
        return drawing.denoiser_of(self.model, params, {} if labels is None else {'label': labels}, None, None)

    def plan(
        self,
        solver: str | None,
        steps: int,
        spacing: str | None = None,
        final: str | None = None,
        strength: float = 1.0,
        **options: Any,
    ) -> samplers.Plan:
        """The solver on its grid, for the schedule of this model; what is None is as a call has it by default."""
        plan = self.planner(self.model.schedule, solver, steps, spacing, final, strength, options)
        if plan.alpha[0] == 0 and self.model.prediction in ('eps', 'score'):
            raise UsageError(
                f'this model predicts {self.model.prediction}, which says nothing of the image where there is no '
                "signal, and the grid starts there: take spacing 'leading', 'log_snr' or 'karras'."
            )
        return plan

    def _check_guidance(
        self, scale: float | None, rescale: float = 0.0, interval: tuple[float, float] | None = None
    ) -> None:
        """A `UsageError` for options of guidance that do not fit."""
        if scale is None and (rescale or interval is not None):
            raise UsageError('guidance_rescale and guidance_interval need a guidance_scale.')
        guidance.check_options(interval, rescale)

    def shape_of(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The shape that the network has images of this size in."""
        return (*size, self.image_shape[2]) if self.latents is None else self.latents.shape_of(size)

    def _check_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        size = self.image_shape[:2] if size is None else tuple(size)
        if len(size) != 2 or min(size) < 1:
            raise UsageError(f'size must be (height, width) in pixels, got {size}.')
        if self.latents is not None and any(side % self.latents.factor for side in size):
            raise UsageError(
                f'size must be in multiples of {self.latents.factor} pixels, which become one latent; got {size}.'
            )
        return size

    def _check_texts(
        self,
        num: int,
        prompts: str | Sequence[str] | None,
        negative: str | Sequence[str] | None,
        guidance_scale: float | None,
    ) -> tuple[list[str] | None, list[str] | None]:
        """(prompts, negative prompts), to be taken in turn; None for those that there are none of."""
        if self.prompts is None:
            if prompts is not None or negative is not None:
                raise UsageError('this model takes no text: no prompts and no negative_prompt.')
            return None, None
        if negative is not None and guidance_scale is None:
            raise UsageError('a negative_prompt is what guidance leads away from: set a guidance_scale, such as 7.5.')

        def listed(texts):
            texts = [texts] if isinstance(texts, str) else list(texts)
            if not texts or len(texts) > num:
                raise UsageError(f'there must be 1 to {num} prompts for {num} images, got {len(texts)}.')
            self.prompts.check(texts)
            return texts

        return listed(self.default_prompts[:num] if prompts is None else prompts), None if negative is None else listed(
            negative
        )

    def _check_image(
        self, num: int, size: tuple[int, int], image: np.ndarray | None, strength: float, mask: np.ndarray | None
    ):
        """(image as float [num, H, W, C], mask as [num, H, W, 1]), each None where it is not given."""
        if self.inpaints and (image is None or mask is None):
            raise UsageError('this model fills in a part of an image: give an image and a mask.')
        if image is None:
            if strength != 1 or mask is not None:
                raise UsageError('strength and mask need an image to start from.')
            return None, None
        if strength == 1 and mask is None:
            raise UsageError('an image needs a strength below 1 (variations of it) or a mask (filling in a part).')
        shape = (*size, self.image_shape[2])
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

    def _check_labels(
        self, num: int, labels: Sequence[int] | None, guidance_scale: float | None
    ) -> Int[np.ndarray, 'N'] | None:
        """The label of each of `num` images, or a `UsageError`."""
        if num < 1:
            raise UsageError(f'num must be at least 1, got {num}.')
        if guidance_scale is not None and not (np.isfinite(guidance_scale) and guidance_scale >= 0):
            raise UsageError(f'guidance_scale must be 0 or more, got {guidance_scale}.')
        if not self.num_classes:
            if labels is not None and self.prompts is not None:
                raise UsageError('this model takes text and no labels.')
            if labels is not None or (guidance_scale is not None and self.prompts is None):
                raise UsageError('this model is unconditional: it takes no labels and no guidance_scale.')
            return None
        valid = f'0..{self.num_classes - 1} ({", ".join(self.class_names)})'
        labels = range(self.num_classes) if labels is None else labels
        if len(labels) == 0 or not all(0 <= label < self.num_classes for label in labels):
            raise UsageError(f'labels must be among {valid}, got {list(labels)}.')
        return np.resize(np.asarray(labels, np.int32), num)


def check_batch_size(batch_size: int) -> None:
    """A `UsageError` for one that holds no image."""
    if batch_size < 1:
        raise UsageError(f'batch_size must be at least 1, got {batch_size}.')


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
