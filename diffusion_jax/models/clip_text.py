"""CLIP's text transformer (Radford et al. 2021), which computes exactly what transformers' CLIPTextModel does."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from diffusion_jax.errors import UsageError
from diffusion_jax.models.blocks import ACTIVATIONS, LayerNorm
from diffusion_jax.models.partition import split_batch, split_heads
from diffusion_jax.models.unet import DTYPES
from diffusion_jax.registry import lookup

POOLS = ('last', 'first_end')

_INIT = nnx.initializers.normal(0.02)
_POSITION_INIT = nnx.initializers.normal(0.01)


class TextOutput(NamedTuple):
    """What a text encoder says of B texts of L tokens, float32.

    Attributes:
      hidden: the embeddings, and what each layer gives, [B, L, features]: num_layers + 1, none with the final norm.
      last: the last of them with the final norm.
      pooled: [B, features] of `last` where each text ends; [B, projection_features] with a projection.
    """

    hidden: tuple[Float[Array, 'B L F'], ...]
    last: Float[Array, 'B L F']
    pooled: Float[Array, 'B P']


def _dense(features_in: int, features: int, *, dtype, rngs: nnx.Rngs, use_bias: bool = True) -> nnx.Linear:
    return nnx.Linear(features_in, features, use_bias=use_bias, dtype=dtype, kernel_init=_INIT, rngs=rngs)


class Embeddings(nnx.Module):
    """Tokens and positions -> vectors."""

    def __init__(self, vocab_size: int, length: int, features: int, *, rngs: nnx.Rngs):
        self.token_embedding = nnx.Embed(vocab_size, features, embedding_init=_INIT, rngs=rngs)
        self.position_embedding = nnx.Embed(length, features, embedding_init=_POSITION_INIT, rngs=rngs)

    def __call__(self, ids: Int[Array, 'B L']) -> Float[Array, 'B L F']:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class CausalAttention(nnx.Module):
    """Multi-head attention of each position to itself and those before it."""

    def __init__(self, features: int, num_heads: int, *, dtype, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.q_proj = _dense(features, features, dtype=dtype, rngs=rngs)
        self.k_proj = _dense(features, features, dtype=dtype, rngs=rngs)
        self.v_proj = _dense(features, features, dtype=dtype, rngs=rngs)
        self.out_proj = _dense(features, features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, 'B L F']) -> Float[Array, 'B L F']:
        def heads(projected: Float[Array, 'B L F']) -> Float[Array, 'B L heads K']:
            return split_heads(projected.reshape(*projected.shape[:2], self.num_heads, -1))

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        h = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(h.reshape(x.shape))


class Mlp(nnx.Module):
    def __init__(self, features: int, inner_features: int, activation: str, *, dtype, rngs: nnx.Rngs):
        self.activation = activation
        self.fc1 = _dense(features, inner_features, dtype=dtype, rngs=rngs)
        self.fc2 = _dense(inner_features, features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, 'B L F']) -> Float[Array, 'B L F']:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Layer(nnx.Module):
    """x + attention(norm(x)), and then x + mlp(norm(x))."""

    def __init__(
        self,
        features: int,
        inner_features: int,
        num_heads: int,
        *,
        activation: str,
        epsilon: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.layer_norm1 = LayerNorm(features, epsilon=epsilon, rngs=rngs)
        self.self_attn = CausalAttention(features, num_heads, dtype=dtype, rngs=rngs)
        self.layer_norm2 = LayerNorm(features, epsilon=epsilon, rngs=rngs)
        self.mlp = Mlp(features, inner_features, activation, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, 'B L F']) -> Float[Array, 'B L F']:
        # The sum over layers stays in float32: x is, and what is added to it becomes so.
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    def __init__(self, layers: list[Layer]):
        self.layers = nnx.List(layers)


class ClipText(nnx.Module):
    """Ids of a `ClipTokenizer` -> the states that Stable Diffusion attends to. Parameters are float32.

    The mask is causal and there is none for padding: what follows a text's end changes no state before it. Attributes
    have the names of the tensors in transformers' files; see `interop.text_encoders`.

    Args:
      vocab_size: ids are below it.
      length: the longest text; 77 in CLIP.
      features: of each state.
      inner_features: of the layer between two in each MLP.
      num_layers, num_heads: of the transformer.
      activation: of `blocks.ACTIVATIONS`: 'quick_gelu' (OpenAI's CLIP) or 'gelu' (OpenCLIP's, in SD 2 and XL).
      epsilon: of every norm.
      projection_features: of the projection of the pooled state, which has no bias; 0: there is none.
      pool: where a text ends: 'last' at its greatest id (the first of several), 'first_end' at the first `end_id`, and
        at its first token if there is none. Both are the same for CLIP's ids, in which the end has the greatest.
      end_id: for 'first_end'.
      dtype: compute dtype, 'float32' or 'bfloat16'; norms, softmax, the sum over layers and the output are float32.

    Raises:
      UsageError: of these no text encoder can be made.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        length: int = 77,
        features: int = 768,
        inner_features: int = 3072,
        num_layers: int = 12,
        num_heads: int = 12,
        activation: str = 'quick_gelu',
        epsilon: float = 1e-5,
        projection_features: int = 0,
        pool: str = 'last',
        end_id: int = 49_407,
        dtype: str = 'float32',
        rngs: nnx.Rngs,
    ):
        lookup('activation', ACTIVATIONS, activation)
        lookup('pool', dict.fromkeys(POOLS), pool)
        lookup('dtype', DTYPES, dtype)
        sizes = {
            'vocab_size': vocab_size,
            'length': length,
            'features': features,
            'inner_features': inner_features,
            'num_layers': num_layers,
            'num_heads': num_heads,
        }
        for name, size in sizes.items():
            if size < 1:
                raise UsageError(f'a text encoder needs a {name} of at least 1, got {size}.')
        if features % num_heads:
            raise UsageError(f'num_heads={num_heads} does not divide the {features} features of a text encoder.')
        if projection_features < 0:
            raise UsageError(f'projection_features must be 0 (no projection) or more, got {projection_features}.')
        if pool == 'first_end' and not 0 <= end_id < vocab_size:
            raise UsageError(f'end_id must be one of the {vocab_size} tokens for pool="first_end", got {end_id}.')
        self.length = length
        self.pool = pool
        self.end_id = end_id
        make = {'dtype': DTYPES[dtype], 'rngs': rngs}
        self.embeddings = Embeddings(vocab_size, length, features, rngs=rngs)
        options = {'activation': activation, 'epsilon': epsilon, **make}
        self.encoder = Encoder([Layer(features, inner_features, num_heads, **options) for _ in range(num_layers)])
        self.final_layer_norm = LayerNorm(features, epsilon=epsilon, rngs=rngs)
        self.text_projection = (
            _dense(features, projection_features, use_bias=False, **make) if projection_features else None
        )

    def __call__(self, ids: Int[Array, 'B L']) -> TextOutput:
        """The states of B texts; ids outside of the vocabulary give NaN.

        Args:
          ids: [B, L], L at most `length`.

        Raises:
          UsageError: they are longer, or of another shape.
        """
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.length:
            raise UsageError(
                f'a text encoder reads ids [texts, tokens] of at most {self.length} tokens, got {tuple(ids.shape)}: '
                'let the tokenizer cut them.'
            )
        x = split_batch(self.embeddings(ids))
        hidden = [x]
        for layer in self.encoder.layers:
            x = split_batch(layer(x))
            hidden.append(x)
        last = self.final_layer_norm(x)
        end = jnp.argmax(ids if self.pool == 'last' else ids == self.end_id, axis=1)
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        if self.text_projection is not None:
            pooled = self.text_projection(pooled).astype(jnp.float32)
        return TextOutput(tuple(hidden), last, pooled)
