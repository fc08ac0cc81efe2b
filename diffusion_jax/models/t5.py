"""The encoder of T5 (Raffel et al. 2020), v1.0 and v1.1: it computes exactly what transformers' T5EncoderModel does."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from diffusion_jax.errors import UsageError
from diffusion_jax.models.blocks import ACTIVATIONS
from diffusion_jax.models.partition import split_batch, split_heads
from diffusion_jax.models.unet import DTYPES
from diffusion_jax.registry import lookup


def _dense(features_in: int, features: int, std: float, *, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(std)
    return nnx.Linear(features_in, features, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, 'L L']:
    """The bucket of each (query, key): half of them for keys behind the query, and for each sign half exact distances.

    The others grow in proportion to the distance; the last is of all from `max_distance` on. In float32, as the
    original: some distances lie at the very edge of a bucket.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    away = np.abs(distance)
    with np.errstate(divide='ignore'):
        scale = np.log(away.astype(np.float32) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    far = exact + np.where(away < exact, 0, scale * np.float32(half - exact)).astype(np.int32)
    return ((distance > 0) * half + np.where(away < exact, away, np.minimum(far, half - 1))).astype(np.int32)


class RMSNorm(nnx.Module):
    """x / rms(x), scaled: neither mean nor bias (Zhang & Sennrich 2019); in float32 whatever the input."""

    def __init__(self, features: int, *, epsilon: float, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(features))

    def __call__(self, x: Float[Array, '... C']) -> Float[Array, '... C']:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.epsilon) * self.scale


class RelativeAttention(nnx.Module):
    """Attention whose scores are q k, not divided by anything, plus a bias by distance.

    The first block's alone has the table of biases.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        head_channels: int,
        *,
        num_buckets: int | None,
        max_distance: int,
        dtype,
        rngs: nnx.Rngs,
    ):
        inner = num_heads * head_channels
        self.num_heads = num_heads
        self.num_buckets, self.max_distance = num_buckets, max_distance
        make = {'dtype': dtype, 'rngs': rngs}
        self.q = _dense(features, inner, (features * head_channels) ** -0.5, **make)
        self.k = _dense(features, inner, features**-0.5, **make)
        self.v = _dense(features, inner, features**-0.5, **make)
        self.o = _dense(inner, features, inner**-0.5, **make)
        init = nnx.initializers.normal(features**-0.5)
        self.relative_attention_bias = (
            nnx.Embed(num_buckets, num_heads, embedding_init=init, rngs=rngs) if num_buckets else None
        )

    def bias(self, length: int) -> Float[Array, '1 heads L L']:
        buckets = relative_buckets(length, self.num_buckets, self.max_distance)
        return self.relative_attention_bias(jnp.asarray(buckets)).transpose(2, 0, 1)[None]

    def __call__(
        self, x: Float[Array, 'B L F'], bias: Float[Array, '1 heads L L'], mask: Bool[Array, 'B L'] | None
    ) -> Float[Array, 'B L F']:
        def heads(projected: Float[Array, 'B L I']) -> Float[Array, 'B L heads K']:
            return split_heads(projected.reshape(*projected.shape[:2], self.num_heads, -1))

        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        keys = None if mask is None else mask[:, None, None, :]
        h = jax.nn.dot_product_attention(q, k, v, bias, keys, scale=1.0)
        return self.o(h.reshape(*h.shape[:2], -1))


class FeedForward(nnx.Module):
    """wo(act(wi x)), or with a gate wo(act(wi_0 x) wi_1 x)."""

    def __init__(self, features: int, inner_features: int, *, activation: str, gated: bool, dtype, rngs: nnx.Rngs):
        self.activation = activation
        self.gated = gated
        names = ('wi_0', 'wi_1') if gated else ('wi',)
        for name in names:
            setattr(self, name, _dense(features, inner_features, features**-0.5, dtype=dtype, rngs=rngs))
        self.wo = _dense(inner_features, features, inner_features**-0.5, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, 'B L F']) -> Float[Array, 'B L F']:
        act = ACTIVATIONS[self.activation]
        return self.wo(act(self.wi_0(x)) * self.wi_1(x) if self.gated else act(self.wi(x)))


class AttentionLayer(nnx.Module):
    def __init__(self, attention: RelativeAttention, norm: RMSNorm):
        self.SelfAttention = attention
        self.layer_norm = norm


class FeedForwardLayer(nnx.Module):
    def __init__(self, feed_forward: FeedForward, norm: RMSNorm):
        self.DenseReluDense = feed_forward  # of this name in files, whatever its activation
        self.layer_norm = norm


class Block(nnx.Module):
    """x + attention(norm(x)), and then x + feed_forward(norm(x))."""

    def __init__(self, attention: AttentionLayer, feed_forward: FeedForwardLayer):
        self.layer = nnx.List([attention, feed_forward])

    def __call__(self, x, bias, mask):
        attention, feed_forward = self.layer
        x = x + attention.SelfAttention(attention.layer_norm(x), bias, mask)
        return x + feed_forward.DenseReluDense(feed_forward.layer_norm(x))


class Stack(nnx.Module):
    def __init__(self, blocks: list[Block], norm: RMSNorm):
        self.block = nnx.List(blocks)
        self.final_layer_norm = norm


class T5Encoder(nnx.Module):
    """Ids of T5's SentencePiece tokenizer -> states. Parameters are float32.

    Attributes have the names of the tensors in transformers' files; see `interop.text_encoders`.

    Args:
      vocab_size: ids are below it.
      features: of each state (d_model).
      head_channels: of each head (d_kv); num_heads * head_channels need not be `features`.
      inner_features: of the feed-forward layers (d_ff).
      num_layers, num_heads: of the transformer.
      num_buckets, max_distance: of the table of biases by distance: see `relative_buckets`.
      activation: of `blocks.ACTIVATIONS`: 'relu' (v1.0), 'gelu_new' (v1.1).
      gated: the activation multiplies another linear layer (v1.1).
      epsilon: of every norm.
      dtype: compute dtype, 'float32' or 'bfloat16'; norms, softmax, the sum over layers and the output are float32.

    Raises:
      UsageError: of these no encoder can be made.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 32_128,
        features: int = 512,
        head_channels: int = 64,
        inner_features: int = 2048,
        num_layers: int = 6,
        num_heads: int = 8,
        num_buckets: int = 32,
        max_distance: int = 128,
        activation: str = 'gelu_new',
        gated: bool = True,
        epsilon: float = 1e-6,
        dtype: str = 'float32',
        rngs: nnx.Rngs,
    ):
        lookup('activation', ACTIVATIONS, activation)
        lookup('dtype', DTYPES, dtype)
        sizes = {
            'vocab_size': vocab_size,
            'features': features,
            'head_channels': head_channels,
            'inner_features': inner_features,
            'num_layers': num_layers,
            'num_heads': num_heads,
        }
        for name, size in sizes.items():
            if size < 1:
                raise UsageError(f'a T5 encoder needs {name} of at least 1, got {size}.')
        if num_buckets < 4 or num_buckets % 4 or max_distance <= num_buckets // 4:
            raise UsageError(
                'a T5 encoder needs a number of buckets that 4 divides and a max_distance above a quarter of it, got '
                f'num_buckets={num_buckets}, max_distance={max_distance}.'
            )
        make = {'dtype': DTYPES[dtype], 'rngs': rngs}

        def norm() -> RMSNorm:
            return RMSNorm(features, epsilon=epsilon, rngs=rngs)

        def block(first: bool) -> Block:
            buckets = {'num_buckets': num_buckets if first else None, 'max_distance': max_distance}
            attention = RelativeAttention(features, num_heads, head_channels, **buckets, **make)
            feed_forward = FeedForward(features, inner_features, activation=activation, gated=gated, **make)
            return Block(AttentionLayer(attention, norm()), FeedForwardLayer(feed_forward, norm()))

        self.shared = nnx.Embed(vocab_size, features, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.encoder = Stack([block(i == 0) for i in range(num_layers)], norm())

    def __call__(
        self, ids: Int[Array, 'B L'], mask: Bool[Array, 'B L'] | Int[Array, 'B L'] | None = None
    ) -> Float[Array, 'B L F']:
        """The states of B texts, float32; ids outside of the vocabulary give NaN.

        Args:
          ids: of tokens.
          mask: true where a token is no padding, which nothing attends to; all are read by default.

        Raises:
          UsageError: the shapes are not these.
        """
        if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
            other = '' if mask is None else f' and a mask {tuple(mask.shape)}'
            raise UsageError(
                f'a T5 encoder reads ids [texts, tokens] and a mask of that shape, got {ids.shape}{other}.'
            )
        mask = None if mask is None else mask.astype(bool)
        x = split_batch(self.shared(ids))
        bias = self.encoder.block[0].layer[0].SelfAttention.bias(ids.shape[1])
        for block in self.encoder.block:
            x = split_batch(block(x, bias, mask))
        return self.encoder.final_layer_norm(x)
