"""The U-Net of DDPM (Ho et al. 2020) as diffusers computes it: google/ddpm-cifar10-32, -celebahq-256, -church-256, ..

`UNet` is the one to train; this one is for published files, tensor by tensor.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffusion_jax.errors import UsageError
from diffusion_jax.models.blocks import (
    AFTER,
    AROUND,
    Attention,
    Downsample,
    GroupNorm,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    conv,
    timestep_embedding,
)
from diffusion_jax.models.conditional_unet import Level
from diffusion_jax.models.layers import ZERO_INIT, scaled_skips
from diffusion_jax.models.partition import split_batch
from diffusion_jax.models.unet import DTYPES, REMATS
from diffusion_jax.registry import lookup

PADDINGS = {0: AFTER, 1: AROUND}
"""diffusers' number for what a strided convolution sees beyond the edges."""


class ImageAttention(Attention):
    """Self-attention over the positions of an image after a GroupNorm, added to the image."""

    def __init__(self, features: int, *, num_heads: int, num_groups: int, epsilon: float, dtype, rngs: nnx.Rngs):
        super().__init__(features, num_heads=num_heads, bias=True, dtype=dtype, rngs=rngs, init_out=ZERO_INIT)
        self.dtype = dtype
        self.group_norm = GroupNorm(features, num_groups, epsilon=epsilon, rngs=rngs)

    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
        h = self.group_norm(x).astype(self.dtype).reshape(x.shape[0], -1, x.shape[-1])
        return x + super().__call__(h).reshape(x.shape)


class DDPMUNet(nnx.Module):
    """A U-Net x_t, t (, label) -> a prediction of x_t's shape, wholly set by its arguments. Parameters are float32.

    The defaults are those of google/ddpm-cifar10-32. Of any size that halves evenly.

    Args:
      resolution: height and width that it is trained at; must halve len(channel_multipliers) - 1 times.
      image_channels: of x_t and of the prediction.
      channels: width of the first level; a multiple of `num_groups`.
      channel_multipliers: width of each level, in units of `channels`.
      num_res_blocks: ResBlocks per level on the way down; one more on the way up.
      attention_levels: those whose every ResBlock is followed by self-attention, from 0, the finest.
      middle_attention: attention between the two ResBlocks of the middle.
      middle_scale: what each block of the middle is divided by.
      head_channels: channels per attention head; None: one head.
      downsample_padding: 0: strided convolutions see one row and column of zeros at the bottom and the right (DDPM);
        1: on all sides.
      cosine_first, frequency_shift: of the waves of t, as of `blocks.timestep_embedding`.
      dropout: rate, inside every ResBlock.
      num_groups, epsilon: of every GroupNorm.
      learned_variance: twice the channels come out, as of `UNet`.
      num_classes: 0 for an unconditional model; else labels 0 .. num_classes - 1, and num_classes is the learned null.
      dtype: compute dtype, 'float32' or 'bfloat16'; norms, softmax and the output are float32 either way.
      remat: what training keeps of each block for its gradient, as of `UNet`.
    """

    def __init__(
        self,
        *,
        resolution: int,
        image_channels: int = 3,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_levels: Sequence[int] = (1,),
        middle_attention: bool = True,
        middle_scale: float = 1.0,
        head_channels: int | None = None,
        downsample_padding: int = 0,
        cosine_first: bool = False,
        frequency_shift: float = 1.0,
        dropout: float = 0.0,
        num_groups: int = 32,
        epsilon: float = 1e-6,
        learned_variance: bool = False,
        num_classes: int = 0,
        dtype: str = 'float32',
        remat: str = 'none',
        rngs: nnx.Rngs,
    ):
        lookup('remat', REMATS, remat)
        lookup('dtype', DTYPES, dtype)
        _check(
            resolution=resolution,
            channels=channels,
            channel_multipliers=channel_multipliers,
            num_res_blocks=num_res_blocks,
            attention_levels=attention_levels,
            middle_attention=middle_attention,
            middle_scale=middle_scale,
            head_channels=head_channels,
            downsample_padding=downsample_padding,
            frequency_shift=frequency_shift,
            dropout=dropout,
        )
        self.channels = channels
        self.middle_scale = middle_scale
        self.cosine_first = cosine_first
        self.frequency_shift = frequency_shift
        self.num_classes = num_classes
        self.dtype = DTYPES[dtype]
        self.remat = remat
        embedding_features = 4 * channels
        make = {'dtype': self.dtype, 'rngs': rngs}
        norm = {'num_groups': num_groups, 'epsilon': epsilon}

        def resnet(features_in: int, features_out: int) -> ResnetBlock:
            return ResnetBlock(
                features_in, features_out, embedding_features=embedding_features, dropout=dropout, **norm, **make
            )

        def attentions(features: int, count: int, wanted: bool) -> list[ImageAttention] | None:
            heads = features // head_channels if head_channels else 1
            return [ImageAttention(features, num_heads=heads, **norm, **make) for _ in range(count)] if wanted else None

        widths = [channels * multiplier for multiplier in channel_multipliers]
        last = len(widths) - 1
        self.time_embedding = TimestepEmbedding(channels, embedding_features, **make)
        self.class_embedding = nnx.Embed(num_classes + 1, embedding_features, **make) if num_classes else None
        self.conv_in = conv(image_channels, channels, 3, **make)

        features, skips, levels = channels, [channels], []
        for level, width in enumerate(widths):
            resnets = []
            for _ in range(num_res_blocks):
                resnets.append(resnet(features, width))
                features = width
                skips.append(width)
            down = None if level == last else Downsample(width, padding=PADDINGS[downsample_padding], **make)
            attending = attentions(width, num_res_blocks, level in attention_levels)
            levels.append(Level(resnets, attending, downsampler=down))
            if level != last:
                skips.append(width)
        self.down_blocks = nnx.List(levels)

        self.mid_block = Level(
            [resnet(features, features) for _ in range(2)], attentions(features, 1, bool(middle_attention))
        )

        levels = []
        for level, width in reversed(list(enumerate(widths))):
            resnets = []
            for _ in range(num_res_blocks + 1):
                resnets.append(resnet(features + skips.pop(), width))
                features = width
            up = Upsample(width, **make) if level else None
            attending = attentions(width, num_res_blocks + 1, level in attention_levels)
            levels.append(Level(resnets, attending, upsampler=up))
        self.up_blocks = nnx.List(levels)

        self.conv_norm_out = GroupNorm(features, num_groups, epsilon=epsilon, rngs=rngs)
        channels_out = image_channels * (1 + bool(learned_variance))
        self.conv_out = conv(features, channels_out, 3, dtype=jnp.float32, rngs=rngs, init=ZERO_INIT)

    def __call__(
        self,
        x: Float[Array, 'B H W C'],
        t: Float[Array, 'B'],
        label: Int[Array, 'B'] | None = None,
        dropout_key: PRNGKeyArray | None = None,
        skip_scale: Float[Array, 'S'] | Float[Array, 'B S'] | None = None,
    ) -> Float[Array, 'B H W K']:
        """The prediction at x_t, of K = C channels, or of 2 C with `learned_variance`.

        Args:
          x: x_t.
          t: timesteps as `Schedule.timestep` gives them.
          label: for a class-conditional model, and for no other.
          dropout_key: for dropout (training); without it there is none.
          skip_scale: what each of the S skip connections is multiplied with, in the order in which they are made, for
            the batch or for each sample: 1 (all, by default) leaves it as it is, 0 removes it.
        """
        if (label is None) != (self.num_classes == 0):
            raise UsageError(
                f'this U-Net has num_classes={self.num_classes}: it {"needs a" if label is None else "takes no"} label.'
            )
        halvings = len(self.down_blocks) - 1
        if x.shape[1] % 2**halvings or x.shape[2] % 2**halvings:
            raise UsageError(f'images of {x.shape[1]}x{x.shape[2]} cannot be halved {halvings} times.')
        num_blocks = 0

        def run(module, h):
            nonlocal num_blocks
            num_blocks += 1
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, num_blocks)
            args = (embedding, key) if isinstance(module, ResnetBlock) else ()
            # The module is closed over, not passed: jax.checkpoint differentiates with respect to that as well.
            return split_batch(REMATS[self.remat](lambda h: module(h, *args))(h))

        def blocks(level: Level):
            attentions = level.attentions or [None] * len(level.resnets)
            return zip(level.resnets, attentions, strict=True)

        waves = timestep_embedding(t, self.channels, cosine_first=self.cosine_first, shift=self.frequency_shift)
        embedding = self.time_embedding(split_batch(waves).astype(self.dtype))
        if label is not None:
            embedding = embedding + self.class_embedding(label)
        embedding = split_batch(embedding)

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
        for module in (first, *(self.mid_block.attentions or ()), second):
            h = run(module, h) / self.middle_scale
        skips = scaled_skips(skips, skip_scale)
        for level in self.up_blocks:
            for resnet, attention in blocks(level):
                h = run(resnet, jnp.concatenate([h, skips.pop()], axis=-1))
                h = h if attention is None else run(attention, h)
            if level.upsamplers is not None:
                h = split_batch(level.upsamplers[0](h))
        return self.conv_out(jax.nn.silu(self.conv_norm_out(h)))


def _check(
    *,
    resolution: int,
    channels: int,
    channel_multipliers: Sequence[int],
    num_res_blocks: int,
    attention_levels: Sequence[int],
    middle_attention: bool,
    middle_scale: float,
    head_channels: int | None,
    downsample_padding: int,
    frequency_shift: float,
    dropout: float,
) -> None:
    """A `UsageError` for settings of which no such U-Net can be made."""
    levels = len(channel_multipliers)
    if min(channels, num_res_blocks, levels, *channel_multipliers) < 1 or channels % 2:
        raise UsageError(
            'a U-Net needs an even number of channels, at least one channel multiplier and one ResBlock per level, got '
            f'channels={channels}, channel_multipliers={tuple(channel_multipliers)}, num_res_blocks={num_res_blocks}.'
        )
    if any(level not in range(levels) for level in attention_levels):
        raise UsageError(f'attention_levels={tuple(attention_levels)} must be of the levels 0 .. {levels - 1}.')
    if frequency_shift >= channels // 2:
        raise UsageError(f'frequency_shift={frequency_shift} must be less than half of {channels} channels.')
    if not 0 <= dropout < 1:
        raise UsageError(f'dropout must be in [0, 1), got {dropout}.')
    if downsample_padding not in PADDINGS:
        raise UsageError(f'downsample_padding must be 0 (at the bottom and the right) or 1, got {downsample_padding}.')
    if middle_scale == 0:
        raise UsageError('middle_scale must not be 0: it divides.')
    if resolution < 1 or resolution % 2 ** (levels - 1):
        raise UsageError(f'resolution {resolution} cannot be halved {levels - 1} times: use fewer channel_multipliers.')
    attending = set(attention_levels) | ({levels - 1} if middle_attention else set())
    widths = [channels * channel_multipliers[level] for level in sorted(attending)]
    if head_channels is not None and (head_channels < 1 or any(width % head_channels for width in widths)):
        raise UsageError(f'head_channels={head_channels} must divide the width of each level with attention, {widths}.')
