"""Published models, ready to sample: Stable Diffusion 1, 2 and XL, DDPM and DiT in diffusers' layout.

pipeline = load('stable-diffusion-v1-5')
image = pipeline(1, prompts='a red heart', guidance_scale=7.5, steps=25, solver='dpmpp_2m').images[0]
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from diffusion_jax import samplers
from diffusion_jax.errors import UsageError
from diffusion_jax.interop import schedulers
from diffusion_jax.interop.folders import Folder, Part, read_folder
from diffusion_jax.interop.lora import lora_changes
from diffusion_jax.interop.single_file import read_single_file
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
    like: str | Path | None = None,
    tokenizer: str | Path | None = None,
    prediction: str | None = None,
) -> ImagePipeline:
    """A pipeline from a folder in diffusers' layout, or one file; it needs neither torch nor diffusers nor a network.

    Args:
      path: of the folder: Stable Diffusion 1, 2, XL and its inpainting models; DDPM; DiT. Or of one .safetensors file
        in the original layout of Stable Diffusion 1, 2 or XL.
      variant: of the weights, such as 'fp16', for parts that have it.
      ema: the averaged weights, where there are such.
      dtype: that the networks compute in, 'float32' or 'bfloat16'.
      mesh: the devices to sample on; all by default.
      loras: (file, scale) of low-rank changes to add.
      like, tokenizer, prediction: of one file, as of `single_file.read_single_file`.

    Raises:
      UsageError: something is missing, damaged, does not fit its config, or is of a kind that we do not read.
    """
    folder = read_model(
        path,
        variant=variant,
        ema=ema,
        dtype=dtype,
        mesh=mesh,
        loras=loras,
        like=like,
        tokenizer=tokenizer,
        prediction=prediction,
    )
    return pipeline_of(folder, mesh)


def read_model(
    path: str | Path,
    *,
    variant: str | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    like: str | Path | None = None,
    tokenizer: str | Path | None = None,
    prediction: str | None = None,
    latent_scale: float | None = None,
    **options: Any,
) -> Folder:
    """The parts of a folder or of one file, with LoRAs added; arguments as of `load` and `read_single_file`."""
    changes = lora_changes(loras)
    of_file = {'like': like, 'tokenizer': tokenizer, 'prediction': prediction, 'latent_scale': latent_scale}
    if Path(path).expanduser().is_file():
        if variant is not None:
            raise UsageError(f'variant={variant!r} chooses among the files of a folder, and {path} is one file.')
        folder = read_single_file(path, changes=changes, **of_file, **options)
    else:
        if given := [name for name, value in of_file.items() if value is not None]:
            raise UsageError(f'{", ".join(given)}: for one .safetensors file; {path} is none, and a folder says it.')
        folder = read_folder(path, variant=variant, changes=changes, **options)
    if lost := changes.keys() - folder.parts.keys():
        raise UsageError(f'the LoRA changes {", ".join(sorted(lost))}, which {path} does not have.')
    return folder


def pipeline_of(folder: Folder, mesh: Mesh | None = None) -> ImagePipeline:
    """The pipeline that the parts of a folder make.

    Raises:
      UsageError: they make none.
    """
    parts = folder.parts
    denoiser = parts.get('unet') or parts.get('transformer')
    if denoiser is None:
        raise UsageError(f'there is no denoiser (unet or transformer) among the parts: {", ".join(parts) or "none"}.')
    if folder.scheduler is None:
        raise UsageError('there is no scheduler_config.json, which says what the denoiser predicts and when.')
    options = denoiser.options
    if 'num_classes' not in options:
        raise UsageError(f'a {denoiser.kind} is no denoiser.')
    latents = latent_space(parts['vae']) if 'vae' in parts else None
    prompts = _prompts(folder) if 'text_encoder' in parts else None
    of_text, of_classes = denoiser.kind == 'UNet2DConditionModel', 'transformer' in parts
    if of_text and prompts is None:
        raise UsageError('a UNet2DConditionModel needs a text_encoder and a tokenizer beside it.')
    if prompts is not None and not of_text:
        raise UsageError(f'a {denoiser.kind} takes no text, and there is a text_encoder beside it.')
    if options['num_classes'] and not of_classes:
        besides = ' besides the text' if of_text else ''
        raise UsageError(f'a {denoiser.kind} with labels{besides} is read, but has no pipeline.')
    scheduler = folder.scheduler
    if folder.index.get('_class_name') == 'DDIMPipeline':  # whose scheduler becomes one of DDIM, whatever it was
        scheduler = {**scheduler, '_class_name': 'DDIMScheduler'}
    sides = [side * (latents.factor if latents else 1) for side in _sides(denoiser)]
    channels = parts['vae'].options['image_channels'] if latents else options['image_channels']
    extra = options.get('extra_channels', 0)
    if extra not in (0, 1 + (latents.channels if latents else 0)):
        raise UsageError(f'a U-Net that sees {extra} more channels is not supported: an inpainting model sees 5.')
    return ImagePipeline(
        denoiser.apply,
        denoiser.params,
        schedulers.schedule_of(scheduler),
        schedulers.prediction_of(scheduler),
        (*sides, channels),
        _class_names(folder.index, options['num_classes']) if of_classes else (),
        mesh,
        options.get('learned_variance', False),
        latents=latents,
        prompts=prompts,
        # Latents of texts are not clipped, whatever an old config says; all else is as the config says.
        planner=ScheduledPlanner(scheduler, of_text and latents is not None),
        inpaints=extra > 0,
    )


def _sides(denoiser: Part) -> tuple[int, int]:
    """(height, width) that it was trained at, in its own pixels or latents."""
    size = denoiser.config.get('sample_size')
    resolution = denoiser.options['resolution']
    return tuple(size) if isinstance(size, list | tuple) else (resolution, resolution)


def _class_names(index: Mapping[str, Any], count: int) -> list[str]:
    """Of labels 0 .. count - 1, as model_index.json has them; their numbers where it has none."""
    names = index.get('id2label')
    names = names if isinstance(names, Mapping) else {}
    return [str(names.get(str(label), label)) for label in range(count)]


def latent_space(part: Part) -> LatentSpace:
    """The latents of an AutoencoderKL."""
    options = part.options
    return LatentSpace(
        encoder=functools.partial(encode, part.apply),
        decoder=functools.partial(decode, part.apply),
        params=part.params,
        scale=part.config.get('scaling_factor', 0.18215),
        shift=part.config.get('shift_factor') or 0.0,
        factor=2 ** (len(options['channel_multipliers']) - 1),
        channels=options['latent_channels'],
        image_channels=options['image_channels'],
    )


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
