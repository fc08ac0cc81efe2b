"""Flax (NNX) modules. Outside of here only `apply(params, x, t, **conditioning)` is seen: see `functional`."""

from collections.abc import Callable

from flax import nnx

from diffusion_jax.models import inspection
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.classifier import Classifier
from diffusion_jax.models.conditional_unet import ConditionalUNet
from diffusion_jax.models.ddpm_unet import DDPMUNet
from diffusion_jax.models.dit import DiT
from diffusion_jax.models.functional import Params, count_params, functional, split
from diffusion_jax.models.text_unet import TextUNet
from diffusion_jax.models.unet import UNet
from diffusion_jax.models.vq_autoencoder import VQAutoencoder

MODELS: dict[str, Callable[..., nnx.Module]] = {
    'unet': UNet,
    'conditional_unet': ConditionalUNet,
    'text_unet': TextUNet,
    'ddpm_unet': DDPMUNet,
    'dit': DiT,
    'autoencoder_kl': AutoencoderKL,
    'autoencoder_vq': VQAutoencoder,
}

__all__ = [
    'MODELS',
    'AutoencoderKL',
    'Classifier',
    'ConditionalUNet',
    'DDPMUNet',
    'DiT',
    'Params',
    'TextUNet',
    'UNet',
    'VQAutoencoder',
    'count_params',
    'functional',
    'inspection',
    'split',
]
