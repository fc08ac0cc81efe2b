"""The autoencoder whose latents become vectors of a learned codebook (van den Oord et al. 2017; Esser et al. 2021)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from diffusion_jax.errors import UsageError
from diffusion_jax.models.autoencoder import Decoder, Encoder, check_autoencoder, check_sides
from diffusion_jax.models.blocks import conv
from diffusion_jax.models.unet import DTYPES


class Quantised(NamedTuple):
    """Latents at the nearest vectors of the codebook.

    Attributes:
      z: the vectors, [B, h, w, d]; their gradient goes to the latents that they stand for (straight through).
      indices: which of the codebook.
      codebook_error: mean |sg(z) - e|^2 over the latents of an image, whose gradient moves the codebook alone.
      commitment_error: mean |z - sg(e)|^2, the same number, whose gradient moves the encoder alone.
    """

    z: Float[Array, 'B h w d']
    indices: Int[Array, 'B h w']
    codebook_error: Float[Array, 'B']
    commitment_error: Float[Array, 'B']


class VectorQuantiser(nnx.Module):
    """The nearest of `size` vectors; they start uniform in [-1 / size, 1 / size]."""

    def __init__(self, size: int, features: int, *, rngs: nnx.Rngs):
        def uniform(key, shape, dtype=jnp.float32, out_sharding=None):
            return jax.random.uniform(key, shape, dtype, -1 / size, 1 / size)

        self.embedding = nnx.Embed(size, features, embedding_init=uniform, rngs=rngs)

    def __call__(self, z: Float[Array, 'B h w d']) -> Quantised:
        z = z.astype(jnp.float32)
        codebook = self.embedding.embedding[...]
        # |z - e|^2 without |z|^2. In full precision: rounded products would choose other vectors on accelerators.
        products = jnp.einsum('bhwd,nd->bhwn', z, codebook, precision=jax.lax.Precision.HIGHEST)
        indices = jnp.argmin(jnp.square(codebook).sum(axis=-1) - 2 * products, axis=-1)
        nearest = codebook[indices]

        def error(a, b):
            return jnp.square(a - b).mean(axis=(1, 2, 3))

        fixed = jax.lax.stop_gradient(z)
        return Quantised(
            z + jax.lax.stop_gradient(nearest - z),
            indices,
            error(fixed, nearest),
            error(z, jax.lax.stop_gradient(nearest)),
        )


class VQAutoencoder(nnx.Module):
    """An autoencoder that decodes the nearest vectors of a codebook. Parameters are float32.

    Its latents, which `encode` gives and a diffusion model may learn, are those before they are quantised: `decode`
    quantises. Both are used through what `models.functional` makes of this module.

    Args:
      codebook_size: vectors.
      codebook_channels: numbers of each vector, d; `latent_channels` by default.
      latent_channels: channels on either side of the 1x1 convolutions around the codebook.
      image_channels, channels, channel_multipliers, num_res_blocks, num_groups, middle_attention, dtype, remat: as of
        `AutoencoderKL`.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        latent_channels: int = 4,
        codebook_size: int = 1024,
        codebook_channels: int | None = None,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        num_groups: int = 32,
        middle_attention: bool = True,
        dtype: str = 'float32',
        remat: str = 'none',
        rngs: nnx.Rngs,
    ):
        check_autoencoder(
            image_channels=image_channels,
            latent_channels=latent_channels,
            channels=channels,
            channel_multipliers=channel_multipliers,
            num_res_blocks=num_res_blocks,
            dtype=dtype,
            remat=remat,
        )
        features = latent_channels if codebook_channels is None else codebook_channels
        if codebook_size < 2 or features < 1:
            raise UsageError(
                'a codebook needs two vectors of one number at least, got '
                f'codebook_size={codebook_size}, codebook_channels={codebook_channels}.'
            )
        self.factor = 2 ** (len(channel_multipliers) - 1)
        widths = [channels * multiplier for multiplier in channel_multipliers]
        setup = {'num_groups': num_groups, 'dtype': DTYPES[dtype], 'remat': remat, 'rngs': rngs}
        self.encoder = Encoder(image_channels, latent_channels, widths, num_res_blocks, middle_attention, **setup)
        self.decoder = Decoder(latent_channels, image_channels, widths, num_res_blocks, middle_attention, **setup)
        self.quant_conv = conv(latent_channels, features, 1, dtype=jnp.float32, rngs=rngs)
        self.quantize = VectorQuantiser(codebook_size, features, rngs=rngs)
        self.post_quant_conv = conv(features, latent_channels, 1, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Float[Array, 'B H W C'], method: str = 'encode') -> Any:
        """`method` 'encode': images -> latents; 'quantise': latents -> `Quantised`; 'decode_quantised': its z ->
        images; 'decode': latents -> images, by way of the codebook."""
        match method:
            case 'encode':
                check_sides(x, self.factor)
                return self.quant_conv(self.encoder(x))
            case 'quantise':
                return self.quantize(x)
            case 'decode_quantised':
                return self.decoder(self.post_quant_conv(x))
            case 'decode':
                return self.decoder(self.post_quant_conv(self.quantize(x).z))
        raise UsageError(f"method must be 'encode', 'quantise', 'decode_quantised' or 'decode', got {method!r}.")


def quantise(apply: Callable[..., Any], params: Any, z: Float[Array, 'B h w d']) -> Quantised:
    """Latents -> the nearest vectors of the codebook, by a `VQAutoencoder`'s `apply`."""
    return apply(params, z, method='quantise')


def decode_quantised(apply: Callable[..., Any], params: Any, z: Float[Array, 'B h w d']) -> Float[Array, 'B H W C']:
    """Vectors of the codebook -> images."""
    return apply(params, z, method='decode_quantised')


def codebook_use(indices: Int[Array, '...'], size: int) -> tuple[Float[Array, ''], Float[Array, '']]:
    """(the share of the codebook that was used, the perplexity of how often: exp of its entropy, 1 to `size`)."""
    shares = jnp.bincount(indices.reshape(-1), length=size) / indices.size
    entropy = -jnp.sum(jax.scipy.special.xlogy(shares, shares))
    return jnp.mean(shares > 0), jnp.exp(entropy)
