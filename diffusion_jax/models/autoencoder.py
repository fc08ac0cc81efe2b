"""The autoencoder of Latent Diffusion and Stable Diffusion (Rombach et al. 2022), between images and latents."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from diffusion_jax.errors import UsageError
from diffusion_jax.models.blocks import AFTER, Attention, Downsample, GroupNorm, ResnetBlock, Upsample, conv
from diffusion_jax.models.layers import DEFAULT_INIT
from diffusion_jax.models.partition import split_batch
from diffusion_jax.models.unet import DTYPES, REMATS
from diffusion_jax.registry import lookup

EPSILON = 1e-6
"""Of every norm in it."""

LOG_VARIANCE_RANGE = (-30.0, 20.0)


class Moments(NamedTuple):
    """Of the Gaussian that the encoder gives for an image: mean and log-variance of each latent, [B, h, w, c]."""

    mean: Float[Array, 'B h w c']
    log_variance: Float[Array, 'B h w c']

    def sample(self, key: PRNGKeyArray) -> Float[Array, 'B h w c']:
        """A draw."""
        return self.mean + jnp.exp(0.5 * self.log_variance) * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def kl(self) -> Float[Array, 'B']:
        """KL(q || N(0, I)) of each image, in nats, over all of its latents."""
        each = jnp.square(self.mean) + jnp.exp(self.log_variance) - 1.0 - self.log_variance
        return 0.5 * each.sum(axis=(1, 2, 3))


class SelfAttention(nnx.Module):
    """One head over all positions, added to its input."""

    def __init__(self, features: int, *, num_groups: int, dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.group_norm = GroupNorm(features, num_groups, epsilon=EPSILON, rngs=rngs)
        attention = Attention(features, num_heads=1, bias=True, dtype=dtype, rngs=rngs)
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out = attention.to_out

    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
        h = self.group_norm(x).astype(self.dtype).reshape(x.shape[0], -1, 1, x.shape[-1])
        h = jax.nn.dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out(h).reshape(x.shape)


class Middle(nnx.Module):
    """A ResBlock, attention, a ResBlock."""

    def __init__(self, resnets: list[ResnetBlock], attention: SelfAttention | None):
        self.resnets = nnx.List(resnets)
        self.attentions = None if attention is None else nnx.List([attention])


class Level(nnx.Module):
    """The blocks at one resolution, and the layer that leaves it."""

    def __init__(
        self,
        resnets: list[ResnetBlock],
        *,
        downsampler: Downsample | None = None,
        upsampler: Upsample | None = None,
    ):
        self.resnets = nnx.List(resnets)
        self.downsamplers = None if downsampler is None else nnx.List([downsampler])
        self.upsamplers = None if upsampler is None else nnx.List([upsampler])


def _resnet(features_in: int, features_out: int, **make) -> ResnetBlock:
    return ResnetBlock(features_in, features_out, embedding_features=None, epsilon=EPSILON, **make)


def _middle(features: int, attends: bool, **make) -> Middle:
    first = _resnet(features, features, **make)
    attention = SelfAttention(features, **make) if attends else None
    return Middle([first, _resnet(features, features, **make)], attention)


class _Half(nnx.Module):
    """What encoder and decoder share."""

    dtype: Any
    remat: str

    def _run(self, module: nnx.Module, x):
        # The module is closed over, not passed: jax.checkpoint differentiates with respect to that as well.
        return split_batch(REMATS[self.remat](lambda x: module(x))(x))

    def _run_middle(self, middle: Middle, x):
        first, second = middle.resnets
        x = self._run(first, x)
        if middle.attentions is not None:
            x = self._run(middle.attentions[0], x)
        return self._run(second, x)


class Encoder(_Half):
    """Images -> 2 c channels at each latent's position."""

    def __init__(
        self,
        image_channels: int,
        features_out: int,
        widths: Sequence[int],
        num_res_blocks: int,
        attends: bool,
        *,
        num_groups: int,
        dtype,
        remat: str,
        rngs: nnx.Rngs,
    ):
        self.dtype, self.remat = dtype, remat
        make = {'dtype': dtype, 'rngs': rngs}
        norms = {'num_groups': num_groups, **make}
        self.conv_in = conv(image_channels, widths[0], 3, **make)
        features, levels = widths[0], []
        for level, width in enumerate(widths):
            resnets = [_resnet(features if i == 0 else width, width, **norms) for i in range(num_res_blocks)]
            features = width
            down = None if level == len(widths) - 1 else Downsample(width, padding=AFTER, **make)
            levels.append(Level(resnets, downsampler=down))
        self.down_blocks = nnx.List(levels)
        self.mid_block = _middle(features, attends, **norms)
        self.conv_norm_out = GroupNorm(features, num_groups, epsilon=EPSILON, rngs=rngs)
        self.conv_out = conv(features, features_out, 3, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B h w D']:
        h = split_batch(self.conv_in(x.astype(self.dtype)))
        for level in self.down_blocks:
            for resnet in level.resnets:
                h = self._run(resnet, h)
            if level.downsamplers is not None:
                h = self._run(level.downsamplers[0], h)
        h = self._run_middle(self.mid_block, h)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(h)))


class Decoder(_Half):
    """Latents -> images."""

    def __init__(
        self,
        latent_channels: int,
        image_channels: int,
        widths: Sequence[int],
        num_res_blocks: int,
        attends: bool,
        *,
        num_groups: int,
        dtype,
        remat: str,
        rngs: nnx.Rngs,
    ):
        self.dtype, self.remat = dtype, remat
        make = {'dtype': dtype, 'rngs': rngs}
        norms = {'num_groups': num_groups, **make}
        features = widths[-1]
        self.conv_in = conv(latent_channels, features, 3, **make)
        self.mid_block = _middle(features, attends, **norms)
        levels = []
        for level, width in reversed(list(enumerate(widths))):
            resnets = [_resnet(features if i == 0 else width, width, **norms) for i in range(num_res_blocks + 1)]
            features = width
            levels.append(Level(resnets, upsampler=Upsample(width, **make) if level else None))
        self.up_blocks = nnx.List(levels)
        self.conv_norm_out = GroupNorm(features, num_groups, epsilon=EPSILON, rngs=rngs)
        self.conv_out = conv(features, image_channels, 3, dtype=jnp.float32, rngs=rngs)

    def __call__(self, z: Float[Array, 'B h w c']) -> Float[Array, 'B H W C']:
        h = self._run_middle(self.mid_block, split_batch(self.conv_in(z.astype(self.dtype))))
        for level in self.up_blocks:
            for resnet in level.resnets:
                h = self._run(resnet, h)
            if level.upsamplers is not None:
                h = self._run(level.upsamplers[0], h)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(h)))


class AutoencoderKL(nnx.Module):
    """An autoencoder whose latents are kept near N(0, I) by a small KL term. Parameters are float32.

    Use `encode` and `decode` of this module with what `models.functional` makes of it.

    Args:
      image_channels: 1 for grey, 3 for RGB.
      latent_channels: of each latent, c.
      channels: width of the first level; a multiple of `num_groups`.
      channel_multipliers: width of each level, in units of `channels`; a latent stands for f x f pixels, f = 2 to the
        number of levels less one.
      num_res_blocks: ResBlocks per level of the encoder; the decoder has one more.
      num_groups: of every GroupNorm.
      middle_attention: attention between the two ResBlocks of the middle.
      quant_convs: 1x1 convolutions after the encoder and before the decoder, which Stable Diffusion 3 has not.
      dtype: compute dtype, 'float32' or 'bfloat16'; norms, softmax and the outputs are float32 either way.
      remat: what training keeps of each block for its gradient, as of `UNet`.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        latent_channels: int = 4,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        num_groups: int = 32,
        middle_attention: bool = True,
        quant_convs: bool = True,
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
        self.factor = 2 ** (len(channel_multipliers) - 1)
        widths = [channels * multiplier for multiplier in channel_multipliers]
        setup = {'num_groups': num_groups, 'dtype': DTYPES[dtype], 'remat': remat, 'rngs': rngs}
        self.encoder = Encoder(image_channels, 2 * latent_channels, widths, num_res_blocks, middle_attention, **setup)
        self.decoder = Decoder(latent_channels, image_channels, widths, num_res_blocks, middle_attention, **setup)

        def mix(features: int) -> nnx.Conv | None:
            return conv(features, features, 1, dtype=jnp.float32, rngs=rngs, init=DEFAULT_INIT) if quant_convs else None

        self.quant_conv = mix(2 * latent_channels)
        self.post_quant_conv = mix(latent_channels)

    def __call__(self, x: Float[Array, 'B H W C'], method: str = 'encode') -> Moments | Float[Array, 'B H W C']:
        """`method` 'encode': images -> `Moments`; 'decode': latents -> images."""
        match method:
            case 'encode':
                return self._encoded(x)
            case 'decode':
                return self._decoded(x)
        raise UsageError(f"method must be 'encode' or 'decode', got {method!r}.")

    def _encoded(self, x: Float[Array, 'B H W C']) -> Moments:
        check_sides(x, self.factor)
        h = self.encoder(x)
        mean, log_variance = jnp.split(h if self.quant_conv is None else self.quant_conv(h), 2, axis=-1)
        return Moments(mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE))

    def _decoded(self, z: Float[Array, 'B h w c']) -> Float[Array, 'B H W C']:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))


def check_autoencoder(
    *,
    image_channels: int,
    latent_channels: int,
    channels: int,
    channel_multipliers: Sequence[int],
    num_res_blocks: int,
    dtype: str,
    remat: str,
) -> None:
    """A `UsageError` for settings of which no autoencoder can be made."""
    lookup('remat', REMATS, remat)
    lookup('dtype', DTYPES, dtype)
    sizes = (image_channels, latent_channels, channels, num_res_blocks, len(channel_multipliers))
    if min(*sizes, *channel_multipliers) < 1:
        raise UsageError(
            'an autoencoder needs at least one channel of images and latents, one channel multiplier and one '
            f'ResBlock per level, got image_channels={image_channels}, latent_channels={latent_channels}, '
            f'channels={channels}, channel_multipliers={tuple(channel_multipliers)}, num_res_blocks={num_res_blocks}.'
        )


def check_sides(x: Float[Array, 'B H W C'], factor: int) -> None:
    """A `UsageError` for images that do not halve evenly."""
    if x.shape[1] % factor or x.shape[2] % factor:
        raise UsageError(
            f'images of {x.shape[1]}x{x.shape[2]} cannot be encoded: their sides must be multiples of {factor}.'
        )


def encode(apply: Callable[..., Any], params: Any, images: Float[Array, 'B H W C']) -> Moments:
    """Images in [-1, 1] -> the Gaussians of their latents, by an autoencoder's `apply`."""
    return apply(params, images, method='encode')


def decode(apply: Callable[..., Any], params: Any, z: Float[Array, 'B h w c']) -> Float[Array, 'B H W C']:
    """Latents, as the autoencoder has them -> images, mostly in [-1, 1]."""
    return apply(params, z, method='decode')
