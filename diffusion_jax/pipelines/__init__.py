"""Things that a user calls with a label: a network, a schedule and a sampler put together."""

from diffusion_jax.pipelines.autoencoders import load_autoencoder
from diffusion_jax.pipelines.images import ImagePipeline, Samples
from diffusion_jax.pipelines.model_file import pretrained
from diffusion_jax.pipelines.stepwise import walk
from diffusion_jax.pipelines.workdir import load_pipeline

__all__ = ['ImagePipeline', 'Samples', 'load_autoencoder', 'load_pipeline', 'pretrained', 'walk']
