"""Published models, ready to sample: Stable Diffusion 1, 2 and XL in diffusers' layout.

pipeline = load('stable-diffusion-v1-5')
image = pipeline(1, prompts='a red heart', guidance_scale=7.5, steps=25, solver='dpmpp_2m').images[0]
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from diffusion_jax import samplers
from diffusion_jax.errors import UsageError
from diffusion_jax.interop import schedulers
from diffusion_jax.interop.folders import Folder, Part, read_folder
from diffusion_jax.interop.lora import lora_changes
from diffusion_jax.models.autoencoder import decode, encode
from diffusion_jax.pipelines.clip_prompts import ClipPrompts, ClipPromptsXL, Encoder
from diffusion_jax.pipelines.images import ImagePipeline
from diffusion_jax.pipelines.latents import LatentSpace
from diffusion_jax.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class ScheduledPlanner:
    """Solver and grid as a scheduler's config has them, or as its grid is for another solver."""

    config: Mapping[str, Any]
    latent: bool

    @property
    def clip(self) -> bool:
        return not self.latent and schedulers.sampling_of(self.config).clip

    def __call__(self, schedule: Schedule, solver, steps, spacing, final, strength, options) -> samplers.Plan:
        sampling = schedulers.sampling_of(self.config, solver)
        if spacing is None and final is None:
            return sampling.plan(schedule, steps, strength, **options)
        options = {**sampling.options, **options}
        return samplers.plan(
            sampling.solver,
            schedule,
            steps,
            spacing or sampling.spacing,
            final or sampling.final,
            strength=strength,
            **options,
        )


def load(
    path: str | Path,
    *,
    variant: str | None = None,
    ema: bool = False,
    dtype: str = 'float32',
    mesh: Mesh | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
) -> ImagePipeline:
    """A pipeline from a folder in diffusers' layout; it needs neither torch nor diffusers nor a network.

    Args:
      path: of the folder: Stable Diffusion 1, 2, XL and its inpainting models.
      variant: of the weights, such as 'fp16', for parts that have it.
      ema: the averaged weights, where there are such.
      dtype: that the networks compute in, 'float32' or 'bfloat16'.
      mesh: the devices to sample on; all by default.
      loras: (file, scale) of low-rank changes to add.

    Raises:
      UsageError: something is missing, damaged, does not fit its config, or is of a kind that we do not read.
    """
    changes = lora_changes(loras)
    folder = read_folder(path, variant=variant, ema=ema, dtype=dtype, mesh=mesh, changes=changes)
    if lost := changes.keys() - folder.parts.keys():
        raise UsageError(f'the LoRA changes {", ".join(sorted(lost))}, which {path} does not have.')
    return pipeline_of(folder, mesh)


def pipeline_of(folder: Folder, mesh: Mesh | None = None) -> ImagePipeline:
    """The pipeline that the parts of a folder make.

    Raises:
      UsageError: they make none.
    """
    parts = folder.parts
    denoiser = parts.get('unet')
    if denoiser is None:
        raise UsageError(f'there is no denoiser (unet) among the parts: {", ".join(parts) or "none"}.')
    if folder.scheduler is None:
        raise UsageError('there is no scheduler_config.json, which says what the denoiser predicts and when.')
    options = denoiser.options
    latents = latent_space(parts['vae']) if 'vae' in parts else None
    prompts = _prompts(folder) if 'text_encoder' in parts else None
    if prompts is None:
        raise UsageError('a UNet2DConditionModel needs a text_encoder and a tokenizer beside it.')
    if options['num_classes']:
        raise UsageError('a UNet2DConditionModel with labels besides the text is read, but has no pipeline.')
    size = options['resolution'] * (latents.factor if latents else 1)
    channels = parts['vae'].options['image_channels'] if latents else options['image_channels']
    extra = options.get('extra_channels', 0)
    if extra not in (0, 1 + (latents.channels if latents else 0)):
        raise UsageError(f'a U-Net that sees {extra} more channels is not supported: an inpainting model sees 5.')
    return ImagePipeline(
        denoiser.apply,
        denoiser.params,
        schedulers.schedule_of(folder.scheduler),
        schedulers.prediction_of(folder.scheduler),
        (size, size, channels),
        mesh=mesh,
        latents=latents,
        prompts=prompts,
        planner=ScheduledPlanner(folder.scheduler, latents is not None),
        inpaints=extra > 0,
    )


def latent_space(part: Part) -> LatentSpace:
    """The latents of an AutoencoderKL."""
    options = part.options
    return LatentSpace(
        encoder=_mean_of(part.apply),
        decoder=_decoder_of(part.apply),
        params=part.params,
        scale=part.config.get('scaling_factor', 0.18215),
        shift=part.config.get('shift_factor') or 0.0,
        factor=2 ** (len(options['channel_multipliers']) - 1),
        channels=options['latent_channels'],
    )


def _mean_of(apply: Callable) -> Callable:
    return lambda params, images: encode(apply, params, images).mean


def _decoder_of(apply: Callable) -> Callable:
    return lambda params, z: decode(apply, params, z)


def _prompts(folder: Folder) -> ClipPrompts:
    names = [name for name in ('text_encoder', 'text_encoder_2') if name in folder.parts]
    encoders = []
    for name in names:
        tokenizer = name.replace('text_encoder', 'tokenizer')
        if tokenizer not in folder.tokenizers:
            raise UsageError(f'{name} has no {tokenizer} beside it.')
        part = folder.parts[name]
        encoders.append(Encoder(folder.tokenizers[tokenizer], part.apply, part.params))
    if len(encoders) == 2:
        return ClipPromptsXL(tuple(encoders), bool(folder.index.get('force_zeros_for_empty_prompt', True)))
    return ClipPrompts(tuple(encoders))
