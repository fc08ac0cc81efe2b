"""The U-Net of latent diffusion (Rombach et al. 2022), conditioned by cross-attention: Stable Diffusion 1, 2 and XL."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffusion_jax.errors import UsageError
from diffusion_jax.models.blocks import (
    AROUND,
    Attention,
    Downsample,
    FeedForward,
    GroupNorm,
    LayerNorm,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    conv,
    timestep_embedding,
)
from diffusion_jax.models.layers import ZERO_INIT, dense, scaled_skips
from diffusion_jax.models.partition import split_batch
from diffusion_jax.models.unet import DTYPES, REMATS
from diffusion_jax.registry import lookup

NUM_SIZES = 6
"""What Stable Diffusion XL is told of sizes: height and width before cropping, the crop's top and left, the target's
height and width."""


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention and a feed-forward layer, each after a LayerNorm and added to its input."""

    def __init__(self, features: int, context_features: int, *, num_heads: int, dtype, rngs: nnx.Rngs):
        make = {'num_heads': num_heads, 'bias': False, 'dtype': dtype, 'rngs': rngs}
        self.dtype = dtype
        self.norm1 = LayerNorm(features, rngs=rngs)
        self.attn1 = Attention(features, **make)
        self.norm2 = LayerNorm(features, rngs=rngs)
        self.attn2 = Attention(features, context_features=context_features, **make)
        self.norm3 = LayerNorm(features, rngs=rngs)
        self.ff = FeedForward(features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, 'B L C'], context: Float[Array, 'B S D']) -> Float[Array, 'B L C']:
        x = x + self.attn1(self.norm1(x).astype(self.dtype))
        x = x + self.attn2(self.norm2(x).astype(self.dtype), context)
        return x + self.ff(self.norm3(x).astype(self.dtype))


class SpatialTransformer(nnx.Module):
    """Transformer blocks over the positions of an image, between two projections, added to the image."""

    def __init__(
        self,
        features: int,
        context_features: int,
        *,
        depth: int,
        num_heads: int,
        num_groups: int,
        linear: bool,
        dtype,
        rngs: nnx.Rngs,
    ):
        def projection(init=None) -> nnx.Module:
            options = {'dtype': dtype, 'rngs': rngs} | ({} if init is None else {'init': init})
            return dense(features, features, **options) if linear else conv(features, features, 1, **options)

        self.linear = linear
        self.dtype = dtype
        self.norm = GroupNorm(features, num_groups, epsilon=1e-6, rngs=rngs)
        self.proj_in = projection()
        self.transformer_blocks = nnx.List(
            [
                TransformerBlock(features, context_features, num_heads=num_heads, dtype=dtype, rngs=rngs)
                for _ in range(depth)
            ]
        )
        self.proj_out = projection(ZERO_INIT)

    def __call__(self, x: Float[Array, 'B H W C'], context: Float[Array, 'B S D']) -> Float[Array, 'B H W C']:
        h = self.proj_in(self.norm(x).astype(self.dtype))
        h = h.reshape(x.shape[0], -1, x.shape[-1])
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.reshape(x.shape))


class Level(nnx.Module):
    """The blocks at one resolution, and the layer that leaves it (None at the end of the path)."""

    def __init__(
        self,
        resnets: list[ResnetBlock],
        attentions: list[SpatialTransformer] | None,
        *,
        downsampler: Downsample | None = None,
        upsampler: Upsample | None = None,
    ):
        self.resnets = nnx.List(resnets)
        self.attentions = nnx.List(attentions) if attentions else None
        self.downsamplers = None if downsampler is None else nnx.List([downsampler])
        self.upsamplers = None if upsampler is None else nnx.List([upsampler])


class ConditionalUNet(nnx.Module):
    """A U-Net x_t, t, context -> a prediction of x_t's shape, wholly set by its arguments. Parameters are float32.

    Images are latents, mostly. Of any size: one that does not halve evenly is taken up to the size of its skip.

    Args:
      resolution: height and width that it is trained at; it must halve len(channel_multipliers) - 1 times at least down
        to one position.
      image_channels: of x_t and of the prediction.
      channels: width of the first level; a multiple of `num_groups`.
      channel_multipliers: width of each level, in units of `channels`.
      num_res_blocks: ResBlocks per level on the way down; one more on the way up.
      attention_depths: of each level, how many transformer blocks follow each of its ResBlocks; 0: none.
      middle_depth: of the middle, likewise, the last level's or else the last that is not 0 by default.
      num_heads: attention heads, of all levels or of each.
      head_channels: channels per head; sets the number of heads if it is given.
      context_features: D of the context [B, S, D] that positions attend to.
      pooled_features: of a vector that stands for the whole text, as Stable Diffusion XL has it with `sizes`; 0: none.
      size_features: of the waves that each of the six sizes is embedded in.
      extra_channels: of an image that x_t is seen with (inpainting models: a mask and the masked latents); 0: none.
      linear_projection: of positions, in and out of the transformers; else a 1x1 convolution, the same but for the
        layout of its tensor.
      dropout: rate, inside every ResBlock.
      num_groups, epsilon: of the GroupNorms of ResBlocks.
      num_classes: 0, or labels 0 .. num_classes - 1 besides the context, and num_classes is the learned null.
      dtype: compute dtype, 'float32' or 'bfloat16'; norms, softmax and the output are float32 either way.
      remat: what training keeps of each block for its gradient, as of `UNet`.
    """

    def __init__(
        self,
        *,
        resolution: int,
        image_channels: int = 4,
        channels: int = 320,
        channel_multipliers: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_depths: Sequence[int] = (1, 1, 1, 0),
        middle_depth: int | None = None,
        num_heads: int | Sequence[int] = 8,
        head_channels: int | None = None,
        context_features: int = 768,
        pooled_features: int = 0,
        size_features: int = 256,
        extra_channels: int = 0,
        linear_projection: bool = False,
        dropout: float = 0.0,
        num_groups: int = 32,
        epsilon: float = 1e-5,
        num_classes: int = 0,
        dtype: str = 'float32',
        remat: str = 'none',
        rngs: nnx.Rngs,
    ):
        lookup('remat', REMATS, remat)
        lookup('dtype', DTYPES, dtype)
        heads = _check(
            resolution=resolution,
            channels=channels,
            channel_multipliers=channel_multipliers,
            num_res_blocks=num_res_blocks,
            attention_depths=attention_depths,
            num_heads=num_heads,
            head_channels=head_channels,
            context_features=context_features,
            dropout=dropout,
        )
        if middle_depth is None:
            middle_depth = next((depth for depth in reversed(attention_depths) if depth), 1)
        self.channels = channels
        self.num_classes = num_classes
        self.pooled_features = pooled_features
        self.size_features = size_features
        self.extra_channels = extra_channels
        self.dtype = DTYPES[dtype]
        self.remat = remat
        embedding_features = 4 * channels

        def resnet(features_in: int, features_out: int) -> ResnetBlock:
            return ResnetBlock(
                features_in,
                features_out,
                embedding_features=embedding_features,
                num_groups=num_groups,
                epsilon=epsilon,
                dropout=dropout,
                dtype=self.dtype,
                rngs=rngs,
            )

        def transformer(level: int, depth: int) -> SpatialTransformer:
            return SpatialTransformer(
                widths[level],
                context_features,
                depth=depth,
                num_heads=heads[level],
                num_groups=num_groups,
                linear=linear_projection,
                dtype=self.dtype,
                rngs=rngs,
            )

        def transformers(level: int, count: int) -> list[SpatialTransformer] | None:
            depth = attention_depths[level]
            return [transformer(level, depth) for _ in range(count)] if depth else None

        widths = [channels * multiplier for multiplier in channel_multipliers]
        last = len(widths) - 1
        make = {'dtype': self.dtype, 'rngs': rngs}
        self.time_embedding = TimestepEmbedding(channels, embedding_features, **make)
        self.add_embedding = (
            TimestepEmbedding(pooled_features + NUM_SIZES * size_features, embedding_features, **make)
            if pooled_features
            else None
        )
        self.class_embedding = (
            nnx.Embed(num_classes + 1, embedding_features, dtype=self.dtype, rngs=rngs) if num_classes else None
        )
        self.conv_in = conv(image_channels + extra_channels, channels, 3, **make)

        features, skips, levels = channels, [channels], []
        for level, width in enumerate(widths):
            resnets = []
            for _ in range(num_res_blocks):
                resnets.append(resnet(features, width))
                features = width
                skips.append(width)
            down = None if level == last else Downsample(width, padding=AROUND, **make)
            levels.append(Level(resnets, transformers(level, num_res_blocks), downsampler=down))
            if level != last:
                skips.append(width)
        self.down_blocks = nnx.List(levels)

        self.mid_block = Level([resnet(features, features) for _ in range(2)], [transformer(last, middle_depth)])

        levels = []
        for level, width in reversed(list(enumerate(widths))):
            resnets = []
            for _ in range(num_res_blocks + 1):
                resnets.append(resnet(features + skips.pop(), width))
                features = width
            up = Upsample(width, **make) if level else None
            levels.append(Level(resnets, transformers(level, num_res_blocks + 1), upsampler=up))
        self.up_blocks = nnx.List(levels)

        self.conv_norm_out = GroupNorm(features, num_groups, epsilon=epsilon, rngs=rngs)
        self.conv_out = conv(features, image_channels, 3, dtype=jnp.float32, rngs=rngs, init=ZERO_INIT)

    def __call__(
        self,
        x: Float[Array, 'B H W C'],
        t: Float[Array, 'B'],
        context: Float[Array, 'B S D'] | None = None,
        label: Int[Array, 'B'] | None = None,
        pooled: Float[Array, 'B P'] | None = None,
        sizes: Float[Array, 'B 6'] | None = None,
        extra: Float[Array, 'B H W E'] | None = None,
        dropout_key: PRNGKeyArray | None = None,
        skip_scale: Float[Array, 'S'] | Float[Array, 'B S'] | None = None,
    ) -> Float[Array, 'B H W C']:
        """The prediction at x_t.

        Args:
          x: x_t.
          t: timesteps as `Schedule.timestep` gives them.
          context: what is attended to, such as a text encoder's hidden states.
          label: with num_classes.
          pooled, sizes: with pooled_features; sizes in pixels, as `NUM_SIZES` says.
          extra: with extra_channels.
          dropout_key: for dropout (training); without it there is none.
          skip_scale: what each of the S skip connections is multiplied with, in the order in which they are made, for
            the batch or for each sample: 1 (all, by default) leaves it as it is, 0 removes it.
        """
        self._check_conditioning(context=context, label=label, pooled=pooled, sizes=sizes, extra=extra)
        num_blocks = 0

        def run(module, h, *args):
            nonlocal num_blocks
            num_blocks += 1
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, num_blocks)
            args = (embedding, key) if isinstance(module, ResnetBlock) else (context, *args)
            # The module is closed over, not passed: jax.checkpoint differentiates with respect to that as well.
            return split_batch(REMATS[self.remat](lambda h: module(h, *args))(h))

        def blocks(level: Level):
            attentions = level.attentions or [None] * len(level.resnets)
            return zip(level.resnets, attentions, strict=True)

        embedding = self.time_embedding(split_batch(timestep_embedding(t, self.channels)).astype(self.dtype))
        if label is not None:
            embedding = embedding + self.class_embedding(label)
        if pooled is not None:
            waves = timestep_embedding(sizes.reshape(-1), self.size_features).reshape(len(sizes), -1)
            embedding = embedding + self.add_embedding(jnp.concatenate([pooled, waves], axis=-1).astype(self.dtype))
        embedding = split_batch(embedding)
        context = split_batch(context.astype(self.dtype))

        if extra is not None:
            x = jnp.concatenate([x, extra], axis=-1)
        h = split_batch(self.conv_in(x.astype(self.dtype)))
        skips = [h]
        for level in self.down_blocks:
            for resnet, attention in blocks(level):
                h = run(resnet, h)
                h = h if attention is None else run(attention, h)
                skips.append(h)
            if level.downsamplers is not None:
                h = split_batch(level.downsamplers[0](h))
                skips.append(h)
        first, second = self.mid_block.resnets
        h = run(second, run(self.mid_block.attentions[0], run(first, h)))
        skips = scaled_skips(skips, skip_scale)
        for level in self.up_blocks:
            for resnet, attention in blocks(level):
                h = run(resnet, jnp.concatenate([h, skips.pop()], axis=-1))
                h = h if attention is None else run(attention, h)
            if level.upsamplers is not None:
                h = split_batch(level.upsamplers[0](h, skips[-1].shape[1:3]))
        return self.conv_out(jax.nn.silu(self.conv_norm_out(h)))

    def _check_conditioning(self, **given) -> None:
        wanted = {
            'context': True,
            'label': self.num_classes > 0,
            'pooled': self.pooled_features > 0,
            'sizes': self.pooled_features > 0,
            'extra': self.extra_channels > 0,
        }
        for name, value in given.items():
            if (value is not None) != wanted[name]:
                raise UsageError(f'this U-Net {"needs" if wanted[name] else "takes no"} {name}.')


def _check(
    *,
    resolution: int,
    channels: int,
    channel_multipliers: Sequence[int],
    num_res_blocks: int,
    attention_depths: Sequence[int],
    num_heads: int | Sequence[int],
    head_channels: int | None,
    context_features: int,
    dropout: float,
) -> list[int]:
    """Heads of each level, or a `UsageError` for settings of which no such U-Net can be made."""
    levels = len(channel_multipliers)
    if min(channels, num_res_blocks, context_features, levels, *channel_multipliers) < 1 or channels % 2:
        raise UsageError(
            'a U-Net needs an even number of channels, at least one channel multiplier, one ResBlock per level and one '
            f'feature of context, got channels={channels}, channel_multipliers={tuple(channel_multipliers)}, '
            f'num_res_blocks={num_res_blocks}, context_features={context_features}.'
        )
    if len(attention_depths) != levels or min(attention_depths) < 0:
        raise UsageError(
            f'attention_depths={tuple(attention_depths)} must have a number, 0 or more, for each of the {levels} '
            f'levels of channel_multipliers={tuple(channel_multipliers)}.'
        )
    if not 0 <= dropout < 1:
        raise UsageError(f'dropout must be in [0, 1), got {dropout}.')
    if resolution >> (levels - 1) < 1:
        raise UsageError(f'resolution {resolution} cannot be halved {levels - 1} times: use fewer channel_multipliers.')
    widths = [channels * multiplier for multiplier in channel_multipliers]
    if head_channels is not None:
        heads = [width // head_channels if head_channels > 0 and width % head_channels == 0 else 0 for width in widths]
        if 0 in heads:
            raise UsageError(f'head_channels={head_channels} must divide the width of every level, {widths}.')
        return heads
    heads = [num_heads] * levels if isinstance(num_heads, int) else list(num_heads)
    if len(heads) != levels:
        raise UsageError(f'num_heads={tuple(heads)} must have one number, or one for each of the {levels} levels.')
    for count, width in zip(heads, widths, strict=True):
        if count < 1 or width % count:
            raise UsageError(f'num_heads={count} does not divide a level of {width} channels.')
    return heads
