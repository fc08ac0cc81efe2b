"""The discriminator of patches (Isola et al. 2017; as in VQGAN, Esser et al. 2021): is this part of an image real?"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diffusion_jax.errors import UsageError
from diffusion_jax.models.blocks import AROUND, conv
from diffusion_jax.models.layers import GroupNorm
from diffusion_jax.models.partition import split_batch

WIDEST = 8
KERNEL = 4


class PatchDiscriminator(nnx.Module):
    """Images -> a number for each of their overlapping patches, high where it takes it for real.

    4x4 convolutions: `num_layers` that halve, one that does not, and the last to one channel. Norms are of groups of
    channels within an image, where the papers' are over the batch: these have no state and are the same on any number
    of devices.

    Args:
      resolution: height and width of the images.
      channels: of the first layer; doubled by each after it, up to eight times as many.
      num_layers: that halve; with 3, a patch is 70 pixels wide.
    """

    def __init__(
        self, *, resolution: int, image_channels: int = 3, channels: int = 64, num_layers: int = 3, rngs: nnx.Rngs
    ):
        if min(image_channels, channels, num_layers) < 1:
            raise UsageError(f'a discriminator needs channels and layers, got {channels} and {num_layers}.')
        if resolution >> num_layers < 3:
            most = max(0, (resolution // 3).bit_length() - 1)
            raise UsageError(
                f'images of {resolution}x{resolution} are too small for a discriminator that halves them {num_layers} '
                f'times: set autoencoder.discriminator_layers to at most {most}'
                + (', or autoencoder.discriminator_weight=0.' if most else ': set autoencoder.discriminator_weight=0.')
            )
        init = nnx.initializers.normal(0.02)
        widths = [channels * min(2**layer, WIDEST) for layer in range(num_layers + 1)]

        def layer(features_in: int, features_out: int, stride: int) -> nnx.Conv:
            make = {'stride': stride, 'padding': AROUND, 'dtype': jnp.float32, 'rngs': rngs, 'init': init}
            return conv(features_in, features_out, KERNEL, **make)

        convolutions = [layer(image_channels, widths[0], 2)]
        for index, (before, width) in enumerate(itertools.pairwise(widths), 1):
            convolutions.append(layer(before, width, 2 if index < num_layers else 1))
        self.convolutions = nnx.List(convolutions)
        self.norms = nnx.List([GroupNorm(width, 32, rngs=rngs) for width in widths[1:]])
        self.out = layer(widths[-1], 1, 1)

    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B h w']:
        h = x
        for index, convolution in enumerate(self.convolutions):
            h = split_batch(convolution(h))
            h = jax.nn.leaky_relu(self.norms[index - 1](h) if index else h, 0.2)
        return self.out(h)[..., 0]
