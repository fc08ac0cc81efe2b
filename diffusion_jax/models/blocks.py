"""Blocks of the published latent models (Stable Diffusion and its kin), which compute exactly what diffusers' do.

Attributes have the names of the tensors in diffusers' files, so that `interop` can tell one from the other by name:
`conv1.kernel` here is `conv1.weight` there. Images are [B, H, W, C].
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from diffusion_jax.errors import UsageError
from diffusion_jax.models import layers
from diffusion_jax.models.convolution import conv_general_dilated
from diffusion_jax.models.layers import DEFAULT_INIT, ZERO_INIT, dense, dropout
from diffusion_jax.models.partition import split_heads

Padding = str | tuple[tuple[int, int], tuple[int, int]]

AROUND: Padding = ((1, 1), (1, 1))
"""One row and column on each side, which is SAME for a 3x3 kernel at stride 1, but not at stride 2."""
AFTER: Padding = ((0, 1), (0, 1))
"""At the bottom and the right only: what autoencoders and DDPM do before a stride of 2."""


def conv(
    features_in: int,
    features_out: int,
    kernel: int,
    *,
    dtype,
    rngs: nnx.Rngs,
    stride: int = 1,
    padding: Padding = AROUND,
    init=DEFAULT_INIT,
) -> nnx.Conv:
    return nnx.Conv(
        features_in,
        features_out,
        (kernel, kernel),
        strides=stride,
        padding='VALID' if kernel == 1 else padding,
        dtype=dtype,
        kernel_init=init,
        conv_general_dilated=conv_general_dilated,
        rngs=rngs,
    )


class GroupNorm(layers.GroupNorm):
    """Exactly `num_groups` groups, in float32 whatever the input."""

    def __init__(self, features: int, num_groups: int, *, epsilon: float, rngs: nnx.Rngs):
        super().__init__(features, num_groups, epsilon=epsilon, rngs=rngs)
        if num_groups < 1 or features % num_groups:
            raise UsageError(f'num_groups={num_groups} does not divide a layer of {features} channels.')
        self.num_groups = num_groups


class LayerNorm(nnx.Module):
    """In float32 whatever the input; with `affine=False` it has no parameters."""

    def __init__(self, features: int, *, epsilon: float = 1e-5, affine: bool = True, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(features)) if affine else None
        self.bias = nnx.Param(jnp.zeros(features)) if affine else None

    def __call__(self, x: Float[Array, '... C']) -> Float[Array, '... C']:
        x = x.astype(jnp.float32)
        x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.epsilon)
        return x if self.scale is None else x * self.scale + self.bias


def gelu(x: Float[Array, '...']) -> Float[Array, '...']:
    """x Phi(x) by the error function; the tanh approximation, JAX's default, is off by 1e-4."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Float[Array, '...']) -> Float[Array, '...']:
    """x sigmoid(1.702 x), as OpenAI's CLIP has it."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu_tanh(x: Float[Array, '...']) -> Float[Array, '...']:
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable] = {
    'gelu': gelu,
    'quick_gelu': quick_gelu,
    'gelu_new': gelu_tanh,
    'gelu_pytorch_tanh': gelu_tanh,
    'silu': jax.nn.silu,
    'relu': jax.nn.relu,
}
"""By the names that configs of transformers and diffusers have."""


def timestep_embedding(
    t: Float[Array, 'B'], features: int, *, cosine_first: bool = True, shift: float = 0.0, max_period: float = 10_000.0
) -> Float[Array, 'B features']:
    """Cosines and sines, in that order or not, of t at frequencies max_period^(-i / (features / 2 - shift)).

    Stable Diffusion: cosines first, shift 0. DiT: cosines first, shift 1. DDPM: sines first, shift 1.
    """
    half = features // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    waves = [jnp.cos(angles), jnp.sin(angles)]
    return jnp.concatenate(waves if cosine_first else waves[::-1], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Two layers on the waves of t, or on any other vector."""

    def __init__(self, features_in: int, features: int, *, dtype, rngs: nnx.Rngs):
        self.linear_1 = dense(features_in, features, dtype=dtype, rngs=rngs)
        self.linear_2 = dense(features, features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, 'B D']) -> Float[Array, 'B F']:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class ResnetBlock(nnx.Module):
    """norm, swish, conv, + embedding, norm, swish, dropout, conv, + input.

    Args:
      embedding_features: of the embedding of time, or None where there is none (autoencoders).
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        embedding_features: int | None,
        num_groups: int,
        epsilon: float,
        dropout: float = 0.0,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.dropout = dropout
        self.dtype = dtype
        self.norm1 = GroupNorm(features_in, num_groups, epsilon=epsilon, rngs=rngs)
        self.conv1 = conv(features_in, features_out, 3, dtype=dtype, rngs=rngs)
        self.time_emb_proj = (
            None if embedding_features is None else dense(embedding_features, features_out, dtype=dtype, rngs=rngs)
        )
        self.norm2 = GroupNorm(features_out, num_groups, epsilon=epsilon, rngs=rngs)
        self.conv2 = conv(features_out, features_out, 3, dtype=dtype, rngs=rngs, init=ZERO_INIT)
        self.conv_shortcut = (
            conv(features_in, features_out, 1, dtype=dtype, rngs=rngs) if features_in != features_out else None
        )

    def __call__(
        self,
        x: Float[Array, 'B H W C'],
        embedding: Float[Array, 'B E'] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, 'B H W D']:
        h = self.conv1(jax.nn.silu(self.norm1(x)).astype(self.dtype))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(jax.nn.silu(embedding))[:, None, None, :]
        h = dropout(jax.nn.silu(self.norm2(h)).astype(self.dtype), self.dropout, dropout_key)
        return self.conv2(h) + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """Multi-head attention of x [B, L, C] to a context [B, S, D], or to itself.

    Args:
      head_channels: of each of `num_heads` heads, features / num_heads by default.
      bias: of the queries, keys and values; the output has one always.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        head_channels: int | None = None,
        context_features: int | None = None,
        bias: bool,
        dtype,
        rngs: nnx.Rngs,
        init_out=DEFAULT_INIT,
    ):
        if num_heads < 1 or (head_channels is None and features % num_heads):
            raise UsageError(f'num_heads={num_heads} does not divide a layer of {features} channels.')
        inner = num_heads * (head_channels or features // num_heads)
        self.num_heads = num_heads

        def projection(features_in: int) -> nnx.Linear:
            return nnx.Linear(features_in, inner, use_bias=bias, dtype=dtype, kernel_init=DEFAULT_INIT, rngs=rngs)

        self.to_q = projection(features)
        self.to_k = projection(context_features or features)
        self.to_v = projection(context_features or features)
        self.to_out = dense(inner, features, dtype=dtype, rngs=rngs, init=init_out)

    def __call__(self, x: Float[Array, 'B L C'], context: Float[Array, 'B S D'] | None = None) -> Float[Array, 'B L C']:
        context = x if context is None else context

        def heads(projected: Float[Array, 'B N I']) -> Float[Array, 'B N heads K']:
            return split_heads(projected.reshape(*projected.shape[:2], self.num_heads, -1))

        h = jax.nn.dot_product_attention(heads(self.to_q(x)), heads(self.to_k(context)), heads(self.to_v(context)))
        return self.to_out(h.reshape(*h.shape[:2], -1))


class FeedForward(nnx.Module):
    """GEGLU (Shazeer 2020): a linear layer's one half, times the GELU of its other half, and a linear layer."""

    def __init__(self, features: int, *, dtype, rngs: nnx.Rngs, multiplier: int = 4):
        inner = multiplier * features
        self.proj = dense(features, 2 * inner, dtype=dtype, rngs=rngs)
        self.out = dense(inner, features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, 'B L C']) -> Float[Array, 'B L C']:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return self.out(value * gelu(gate))


class Downsample(nnx.Module):
    """Halves the resolution by a strided 3x3 convolution."""

    def __init__(self, features: int, *, padding: Padding, dtype, rngs: nnx.Rngs):
        self.conv = conv(features, features, 3, stride=2, padding=padding, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B h w C']:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest neighbour to twice the resolution, or to a size of up to that, then a 3x3 convolution."""

    def __init__(self, features: int, *, dtype, rngs: nnx.Rngs):
        self.conv = conv(features, features, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, 'B h w C'], size: tuple[int, int] | None = None) -> Float[Array, 'B H W C']:
        batch, height, width, features = x.shape
        target = size or (2 * height, 2 * width)
        if target == (2 * height, 2 * width):
            x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, features))
            return self.conv(x.reshape(batch, 2 * height, 2 * width, features))
        rows, columns = (jnp.arange(new) * old // new for new, old in zip(target, (height, width), strict=True))
        return self.conv(x[:, rows][:, :, columns])
