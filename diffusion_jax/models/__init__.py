"""Flax (NNX) modules. Outside of here only `apply(params, x, t, **conditioning)` is seen: see `functional`."""

from collections.abc import Callable

from flax import nnx

from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.classifier import Classifier
from diffusion_jax.models.conditional_unet import ConditionalUNet
from diffusion_jax.models.functional import Params, count_params, functional, split
from diffusion_jax.models.unet import UNet
from diffusion_jax.models.vq_autoencoder import VQAutoencoder

MODELS: dict[str, Callable[..., nnx.Module]] = {
    'unet': UNet,
    'conditional_unet': ConditionalUNet,
    'autoencoder_kl': AutoencoderKL,
    'autoencoder_vq': VQAutoencoder,
}

__all__ = [
    'MODELS',
    'AutoencoderKL',
    'Classifier',
    'ConditionalUNet',
    'Params',
    'UNet',
    'VQAutoencoder',
    'count_params',
    'functional',
    'split',
]
