"""Image datasets: where they are read from and how they are held in memory."""

from diffusion_jax.data.examples import examples
from diffusion_jax.data.image_set import ImageSet, Splits
from diffusion_jax.data.sources import SOURCES, load
from diffusion_jax.data.streamed import StreamedSet

__all__ = ['SOURCES', 'ImageSet', 'Splits', 'StreamedSet', 'examples', 'load']
