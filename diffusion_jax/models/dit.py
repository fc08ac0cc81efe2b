"""DiT: a transformer over patches, told of time and label by its norms (Peebles & Xie 2023)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffusion_jax.errors import UsageError
from diffusion_jax.models.blocks import Attention, LayerNorm, conv, gelu_tanh, timestep_embedding
from diffusion_jax.models.layers import ZERO_INIT, channels_to_space, dense, dropout
from diffusion_jax.models.partition import split_batch
from diffusion_jax.models.unet import DTYPES, REMATS
from diffusion_jax.registry import lookup

TIME_FEATURES = 256
"""Of the waves of t."""

EMBEDDING_INIT = nnx.initializers.normal(0.02)
# Of a patch's projection: uniform by fan-average, as of a matrix [patch_size^2 C, D].
PATCH_INIT = nnx.initializers.variance_scaling(1.0, 'fan_avg', 'uniform', in_axis=(0, 1, 2), out_axis=3)


def positions_2d(height: int, width: int, features: int, base: int) -> Float[np.ndarray, 'N features']:
    """Sines and cosines of each position's column, and then of its row, height x width of them, row by row.

    Args:
      features: a multiple of 4.
      base: positions a side that the network was trained with: a side of any other number spans the same range.
    """
    # In float32 first and in float64 then, as diffusers has it.
    rows, columns = (np.arange(side, dtype=np.float32) / np.float32(side / base) for side in (height, width))
    frequencies = 10_000.0 ** (-np.arange(features // 4, dtype=np.float64) / (features // 4))

    def waves(at: Float[np.ndarray, 'side']) -> Float[np.ndarray, 'side half']:
        angles = at.astype(np.float64)[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    of_columns = np.tile(waves(columns), (height, 1))
    of_rows = np.repeat(waves(rows), width, axis=0)
    return np.concatenate([of_columns, of_rows], axis=-1).astype(np.float32)


class TimeEmbedder(nnx.Module):
    """Two layers on the waves of t."""

    def __init__(self, features: int, *, dtype, rngs: nnx.Rngs):
        make = {'dtype': dtype, 'rngs': rngs, 'init': EMBEDDING_INIT}
        self.linear_1 = dense(TIME_FEATURES, features, **make)
        self.linear_2 = dense(features, features, **make)

    def __call__(self, waves: Float[Array, 'B D']) -> Float[Array, 'B C']:
        return self.linear_2(jax.nn.silu(self.linear_1(waves)))


class Embedder(nnx.Module):
    """Time and label as one vector."""

    def __init__(self, features: int, *, num_classes: int, dtype, rngs: nnx.Rngs):
        self.timestep_embedder = TimeEmbedder(features, dtype=dtype, rngs=rngs)
        self.class_embedder = (
            nnx.Embed(num_classes + 1, features, dtype=dtype, embedding_init=EMBEDDING_INIT, rngs=rngs)
            if num_classes
            else None
        )

    def __call__(self, waves: Float[Array, 'B D'], label: Int[Array, 'B'] | None) -> Float[Array, 'B C']:
        embedding = self.timestep_embedder(waves)
        return embedding if label is None else embedding + self.class_embedder(label)


class FeedForward(nnx.Module):
    """A linear layer to four times the features, GELU (its tanh approximation), a linear layer back."""

    def __init__(self, features: int, *, dropout: float, dtype, rngs: nnx.Rngs):
        self.dropout = dropout
        self.proj = dense(features, 4 * features, dtype=dtype, rngs=rngs)
        self.out = dense(4 * features, features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, 'B L C'], dropout_key: PRNGKeyArray | None = None) -> Float[Array, 'B L C']:
        return self.out(dropout(gelu_tanh(self.proj(x)), self.dropout, dropout_key))


class DiTBlock(nnx.Module):
    """Self-attention and a feed-forward layer, scaled, shifted and gated by the embedding (adaLN-zero)."""

    def __init__(self, features: int, *, num_heads: int, epsilon: float, dropout: float, dtype, rngs: nnx.Rngs):
        self.dropout = dropout
        self.dtype = dtype
        self.modulation = dense(features, 6 * features, dtype=dtype, rngs=rngs, init=ZERO_INIT)
        self.norm1 = LayerNorm(features, epsilon=1e-6, affine=False, rngs=rngs)
        self.attn1 = Attention(features, num_heads=num_heads, bias=True, dtype=dtype, rngs=rngs)
        self.norm3 = LayerNorm(features, epsilon=epsilon, affine=False, rngs=rngs)
        self.ff = FeedForward(features, dropout=dropout, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, 'B L C'],
        embedding: Float[Array, 'B C'],
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, 'B L C']:
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        modulation = self.modulation(jax.nn.silu(embedding))[:, None, :]
        shift, scale, gate, shift_ff, scale_ff, gate_ff = jnp.split(modulation, 6, axis=-1)
        h = self.attn1((self.norm1(x) * (1 + scale) + shift).astype(self.dtype))
        x = x + gate * dropout(h, self.dropout, keys[0])
        h = self.ff((self.norm3(x) * (1 + scale_ff) + shift_ff).astype(self.dtype), keys[1])
        return x + gate_ff * h


class DiT(nnx.Module):
    """A transformer x_t, t (, label) -> a prediction of x_t's shape, wholly set by its arguments. Parameters: float32.

    The defaults are DiT-S/2. The paper's other sizes, as (channels, num_layers, num_heads): B (768, 12, 12),
    L (1024, 24, 16), XL (1152, 28, 16). It begins as zero, and every block as the identity.

    Args:
      resolution: height and width that it is trained at; it takes others, whose positions span the same range.
      image_channels: of x_t, and of the prediction.
      patch_size: squares of this many pixels (or latents) a side become one position.
      channels: of each position; a multiple of 4.
      num_layers: transformer blocks.
      num_heads: of attention.
      dropout: rate, of what attention gives and inside the feed-forward layers; the paper has none.
      epsilon: of each block's second LayerNorm; 1e-6 of the others. Published files in diffusers' layout have 1e-5.
      learned_variance: twice the channels come out: the prediction's, and then the reverse process's variance as
        `denoisers.ModelDenoiser` reads it, as in the paper.
      shared_embedder: one embedder of time and label; False: one for each block, of which the output has the first's.
      num_classes: 0 for an unconditional model; else labels 0 .. num_classes - 1, and num_classes is the learned null.
      dtype: compute dtype, 'float32' or 'bfloat16'; norms, softmax and the output are float32 either way.
      remat: what training keeps of each block for its gradient, as of `UNet`.
    """

    def __init__(
        self,
        *,
        resolution: int,
        image_channels: int = 4,
        patch_size: int = 2,
        channels: int = 384,
        num_layers: int = 12,
        num_heads: int = 6,
        dropout: float = 0.0,
        epsilon: float = 1e-6,
        learned_variance: bool = False,
        shared_embedder: bool = True,
        num_classes: int = 0,
        dtype: str = 'float32',
        remat: str = 'none',
        rngs: nnx.Rngs,
    ):
        lookup('remat', REMATS, remat)
        lookup('dtype', DTYPES, dtype)
        if min(channels, num_layers) < 1 or channels % 4:
            raise UsageError(
                f'a DiT needs at least one layer, and channels in a multiple of 4, got num_layers={num_layers}, '
                f'channels={channels}.'
            )
        if patch_size < 1 or resolution < 1 or resolution % patch_size:
            raise UsageError(
                f'patch_size must be at least 1 and divide the resolution, {resolution}: got {patch_size}.'
            )
        if not 0 <= dropout < 1:
            raise UsageError(f'dropout must be in [0, 1), got {dropout}.')
        self.patch_size = patch_size
        self.base = resolution // patch_size
        self.num_classes = num_classes
        self.dtype = DTYPES[dtype]
        self.remat = remat
        make = {'dtype': self.dtype, 'rngs': rngs}
        self.patch_embed = conv(
            image_channels, channels, patch_size, stride=patch_size, padding='VALID', init=PATCH_INIT, **make
        )
        self.embedders = nnx.List(
            [Embedder(channels, num_classes=num_classes, **make) for _ in range(1 if shared_embedder else num_layers)]
        )
        self.transformer_blocks = nnx.List(
            [
                DiTBlock(channels, num_heads=num_heads, epsilon=epsilon, dropout=dropout, **make)
                for _ in range(num_layers)
            ]
        )
        self.norm_out = LayerNorm(channels, epsilon=1e-6, affine=False, rngs=rngs)
        self.proj_out_1 = dense(channels, 2 * channels, init=ZERO_INIT, **make)
        features_out = patch_size**2 * image_channels * (1 + bool(learned_variance))
        self.proj_out_2 = dense(channels, features_out, dtype=jnp.float32, rngs=rngs, init=ZERO_INIT)

    def __call__(
        self,
        x: Float[Array, 'B H W C'],
        t: Float[Array, 'B'],
        label: Int[Array, 'B'] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, 'B H W K']:
        """The prediction at x_t, of K = C channels, or of 2 C with `learned_variance`.

        Args:
          x: x_t.
          t: timesteps as `Schedule.timestep` gives them.
          label: for a class-conditional model, and for no other.
          dropout_key: for dropout (training); without it there is none.
        """
        if (label is None) != (self.num_classes == 0):
            raise UsageError(
                f'this DiT has num_classes={self.num_classes}: it {"needs a" if label is None else "takes no"} label.'
            )
        height, width = (side // self.patch_size for side in x.shape[1:3])
        if (height * self.patch_size, width * self.patch_size) != x.shape[1:3]:
            raise UsageError(f'images of {x.shape[1]}x{x.shape[2]} cannot be cut in patches of {self.patch_size}.')

        def run(module, number, h, embedding):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, number)
            # The module is closed over, not passed: jax.checkpoint differentiates with respect to that as well.
            return split_batch(REMATS[self.remat](lambda h, embedding: module(h, embedding, key))(h, embedding))

        waves = split_batch(timestep_embedding(t, TIME_FEATURES, shift=1.0).astype(self.dtype))
        embeddings = [split_batch(embedder(waves, label)) for embedder in self.embedders]
        h = self.patch_embed(x.astype(self.dtype))
        h = h.reshape(x.shape[0], height * width, -1)
        h = split_batch(h + positions_2d(height, width, h.shape[-1], self.base).astype(self.dtype))
        for number, block in enumerate(self.transformer_blocks):
            h = run(block, number, h, embeddings[number % len(embeddings)])
        shift, scale = jnp.split(self.proj_out_1(jax.nn.silu(embeddings[0]))[:, None, :], 2, axis=-1)
        h = self.proj_out_2(self.norm_out(h) * (1 + scale) + shift)
        return channels_to_space(h.reshape(x.shape[0], height, width, -1), self.patch_size)
