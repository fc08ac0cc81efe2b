"""The latents of an autoencoder, as a pipeline has them: of mean 0 and unit variance, more or less."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.models.autoencoder import Moments

Encode = Callable[[Any, Float[Array, 'B H W C']], Moments]
"""(params, images in [-1, 1]) -> the Gaussians of their latents, as the autoencoder has them."""
Decode = Callable[[Any, Float[Array, 'B h w c']], Float[Array, 'B H W C']]


@dataclasses.dataclass(frozen=True, eq=False)
class LatentSpace:
    """An autoencoder between images and a network's x0 = (z - shift) scale.

    Attributes:
      encoder, decoder: pure functions of the parameters.
      params: of both.
      scale, shift: of the latents.
      factor: pixels per latent, along each side.
      channels: of the latents.
      image_channels: of the images.
    """

    encoder: Encode
    decoder: Decode
    params: Any
    scale: float
    shift: float
    factor: int
    channels: int
    image_channels: int = 3

    def placed(self, place: Callable[[Array], Array]) -> 'LatentSpace':
        """With its parameters where `place` puts each of them."""
        return dataclasses.replace(self, params=jax.tree.map(place, self.params))

    def shape_of(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Of the latents of an image of this height and width."""
        return (size[0] // self.factor, size[1] // self.factor, self.channels)

    def encode(self, images: Float[Array, 'B H W C']) -> Float[Array, 'B h w c']:
        """Images in [-1, 1] -> x0, of the latents' means."""
        return _encode(self.params, images, self.scale, self.shift, encoder=self.encoder)

    def decode(self, x0: Float[Array, 'B h w c']) -> Float[Array, 'B H W C']:
        """x0 -> images, mostly in [-1, 1]."""
        return _decode(self.params, x0, self.scale, self.shift, decoder=self.decoder)

    def between(
        self, first: Float[Array, 'B h w c'], second: Float[Array, 'B h w c'], fraction: float
    ) -> Float[Array, 'B H W C']:
        """Images on the straight line between two latents: 0 gives the first, 1 the second, decoded."""
        return self.decode(first + fraction * (second - first))

    def wholly(self, mask: Float[Array, 'B H W 1']) -> Float[Array, 'B h w 1']:
        """1 for latents all of whose pixels are 1: what lies at an edge is filled in."""
        batch, height, width, _ = mask.shape
        cells = mask.reshape(batch, height // self.factor, self.factor, width // self.factor, self.factor, 1)
        return cells.min(axis=(2, 4))

    def nearest(self, mask: Float[Array, 'B H W 1']) -> Float[Array, 'B h w 1']:
        """The mask's pixel at each latent's upper left corner, as networks that inpaint were trained with."""
        return mask[:, :: self.factor, :: self.factor]


@functools.partial(jax.jit, static_argnames='encoder')
def _encode(params, images, scale, shift, *, encoder: Encode):
    return (encoder(params, images).mean.astype(jnp.float32) - shift) * scale


@functools.partial(jax.jit, static_argnames='decoder')
def _decode(params, x0, scale, shift, *, decoder: Decode):
    return decoder(params, x0 / scale + shift).astype(jnp.float32)
