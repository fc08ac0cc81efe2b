"""Layers that the denoising networks share. Images are [B, H, W, C]."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from diffusion_jax.errors import UsageError
from diffusion_jax.models.convolution import conv_general_dilated
from diffusion_jax.models.partition import split_heads

# Variance scaling with uniform fan-average, as in DDPM's code; zeros where a residual branch must start as nothing.
DEFAULT_INIT = nnx.initializers.variance_scaling(1.0, 'fan_avg', 'uniform')
ZERO_INIT = nnx.initializers.zeros_init()


def sinusoidal_embedding(
    t: Float[Array, 'B'], features: int, max_period: float = 10_000.0
) -> Float[Array, 'B features']:
    """[sin(t w), cos(t w)] with `features` / 2 frequencies w from 1 to 1 / max_period, as in DDPM; `features` even."""
    half = features // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half) / max(half - 1, 1))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def dropout(x: Float[Array, '...'], rate: float, key: PRNGKeyArray | None) -> Float[Array, '...']:
    """Zeroes entries with probability `rate` and rescales the rest; the identity without a key (evaluation)."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def conv(
    features_in: int, features_out: int, kernel: int, *, dtype, rngs, stride: int = 1, init=DEFAULT_INIT
) -> nnx.Conv:
    """A square convolution with XLA's SAME padding."""
    return nnx.Conv(
        features_in,
        features_out,
        (kernel, kernel),
        strides=stride,
        dtype=dtype,
        kernel_init=init,
        conv_general_dilated=conv_general_dilated,
        rngs=rngs,
    )


def dense(features_in: int, features_out: int, *, dtype, rngs, init=DEFAULT_INIT) -> nnx.Linear:
    return nnx.Linear(features_in, features_out, dtype=dtype, kernel_init=init, rngs=rngs)


def space_to_channels(x: Float[Array, 'B H W C'], size: int) -> Float[Array, 'B h w D']:
    """Squares of size x size pixels as the channels of one position: D = size^2 C."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // size, width // size, size * size * channels)


def channels_to_space(x: Float[Array, 'B h w D'], size: int) -> Float[Array, 'B H W C']:
    """The inverse of `space_to_channels`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, size, size, channels // size**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height * size, width * size, channels // size**2)


def scaled_skips(
    skips: list[Float[Array, 'B H W C']], scale: Float[Array, 'S'] | Float[Array, 'B S'] | None
) -> list[Float[Array, 'B H W C']]:
    """Each skip connection of a U-Net times its own number, the same for the batch or one per sample; None: as it is.

    Raises:
      UsageError: there are not as many numbers as skips.
    """
    if scale is None:
        return skips
    wanted = (len(skips),) if jnp.ndim(scale) == 1 else (len(skips[0]), len(skips))
    if jnp.shape(scale) != wanted:
        raise UsageError(
            f'skip_scale has a number for each of the {len(skips)} skips, [{len(skips)}] or [{len(skips[0])}, '
            f'{len(skips)}], got an array of shape {list(jnp.shape(scale))}.'
        )
    scale = jnp.asarray(scale)[..., None, None, None]
    return [skip * scale[..., i, :, :, :].astype(skip.dtype) for i, skip in enumerate(skips)]


class GroupNorm(nnx.Module):
    """Group normalisation (Wu & He 2018) in float32 whatever the input.

    There are `num_groups` groups, or as many fewer as it takes for each to have four channels or more and for their
    number to divide the channels. A group of one channel would subtract the very time embedding that was added to it.

    Sums go over positions first and over a group's channels after: on a CPU three times as fast as over both at once.
    """

    def __init__(self, features: int, num_groups: int, *, epsilon: float = 1e-6, rngs: nnx.Rngs):
        self.num_groups = math.gcd(features, min(num_groups, max(features // 4, 1)))
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def _group_mean(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B 1 1 C']:
        channels = x.mean(axis=(1, 2))
        groups = channels.reshape(x.shape[0], self.num_groups, -1)
        means = jnp.broadcast_to(groups.mean(axis=-1, keepdims=True), groups.shape)
        return means.reshape(x.shape[0], 1, 1, x.shape[-1])

    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
        x = x.astype(jnp.float32)
        x = x - self._group_mean(x)
        gain = self.scale * jax.lax.rsqrt(self._group_mean(jnp.square(x)) + self.epsilon)
        return x * gain + self.bias


class ResBlock(nnx.Module):
    """norm, swish, conv, + time, norm, swish, dropout, conv, + input; the last convolution starts at zero.

    Attributes:
      conditioning: 'additive' adds the projected embedding after the first convolution (DDPM); 'scale_shift' modulates
        the second norm with it (Nichol & Dhariwal 2021).
      resample: 'up', 'down' (by 2, inside the block, as in ADM) or None.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        embedding_features: int,
        *,
        dropout_rate: float,
        conditioning: str,
        num_groups: int,
        dtype,
        rngs: nnx.Rngs,
        resample: str | None = None,
    ):
        self.dropout_rate = dropout_rate
        self.scale_shift = conditioning == 'scale_shift'
        self.resample = resample
        self.dtype = dtype
        self.norm1 = GroupNorm(features_in, num_groups, rngs=rngs)
        self.conv1 = conv(features_in, features_out, 3, dtype=dtype, rngs=rngs)
        self.time = dense(embedding_features, features_out * (1 + self.scale_shift), dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(features_out, num_groups, rngs=rngs)
        self.conv2 = conv(features_out, features_out, 3, dtype=dtype, rngs=rngs, init=ZERO_INIT)
        self.shortcut = (
            conv(features_in, features_out, 1, dtype=dtype, rngs=rngs) if features_in != features_out else None
        )

    def __call__(self, x, embedding, key: PRNGKeyArray | None = None):
        h = jax.nn.silu(self.norm1(x)).astype(self.dtype)
        x, h = _resample(x, self.resample), _resample(h, self.resample)
        h = self.conv1(h)
        modulation = self.time(jax.nn.silu(embedding))[:, None, None, :]
        if self.scale_shift:
            scale, shift = jnp.split(modulation, 2, axis=-1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + modulation)
        h = self.conv2(dropout(jax.nn.silu(h).astype(self.dtype), self.dropout_rate, key))
        return h + (x if self.shortcut is None else self.shortcut(x))


class SelfAttention(nnx.Module):
    """Residual multi-head self-attention over all positions; the output projection starts at zero."""

    def __init__(self, features: int, *, num_heads: int, num_groups: int, dtype, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.dtype = dtype
        self.norm = GroupNorm(features, num_groups, rngs=rngs)
        self.query = dense(features, features, dtype=dtype, rngs=rngs)
        self.key = dense(features, features, dtype=dtype, rngs=rngs)
        self.value = dense(features, features, dtype=dtype, rngs=rngs)
        self.out = dense(features, features, dtype=dtype, rngs=rngs, init=ZERO_INIT)

    def __call__(self, x):
        batch, height, width, features = x.shape
        h = self.norm(x).astype(self.dtype).reshape(batch, height * width, features)

        def heads(projection):
            return split_heads(projection(h).reshape(batch, height * width, self.num_heads, -1))

        h = jax.nn.dot_product_attention(heads(self.query), heads(self.key), heads(self.value))
        return x + self.out(h.reshape(batch, height * width, features)).reshape(x.shape)


class Downsample(nnx.Module):
    """Halves the resolution by a strided 3x3 convolution."""

    def __init__(self, features: int, *, dtype, rngs: nnx.Rngs):
        self.conv = conv(features, features, 3, stride=2, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles the resolution: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, features: int, *, dtype, rngs: nnx.Rngs):
        self.conv = conv(features, features, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.conv(_resample(x, 'up'))


def _resample(x, direction: str | None):
    """Nearest-neighbour doubling, 2x2 mean halving, or nothing; no parameters."""
    batch, height, width, features = x.shape
    match direction:
        case 'up':
            x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, features))
            return x.reshape(batch, 2 * height, 2 * width, features)
        case 'down':
            return x.reshape(batch, height // 2, 2, width // 2, 2, features).mean(axis=(2, 4))
    return x
