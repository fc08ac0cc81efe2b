"""The denoising U-Net of DDPM (Ho et al. 2020), with the options of improved DDPM and ADM."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffusion_jax.errors import UsageError
from diffusion_jax.models.layers import (
    ZERO_INIT,
    Downsample,
    GroupNorm,
    ResBlock,
    SelfAttention,
    Upsample,
    channels_to_space,
    conv,
    dense,
    scaled_skips,
    sinusoidal_embedding,
    space_to_channels,
)
from diffusion_jax.models.partition import split_batch
from diffusion_jax.registry import lookup

TIME_CONDITIONINGS = ('additive', 'scale_shift')
RESAMPLINGS = ('conv', 'resblock')
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


def _is_conv(primitive, *_, **__) -> bool:
    return primitive.name in ('conv_general_dilated', 'dot_general')


REMATS: dict[str, Callable[[Callable], Callable]] = {
    'none': lambda function: function,
    'convs': functools.partial(jax.checkpoint, policy=_is_conv),
    'blocks': jax.checkpoint,
}
"""Name -> function -> the same function, that recomputes more or less of itself for its gradient."""


class Block(nnx.Module):
    """A ResBlock, and attention after it where the level has it."""

    def __init__(self, res: ResBlock, attention: SelfAttention | None):
        self.res = res
        self.attention = attention

    def __call__(self, x, embedding, key=None):
        x = self.res(x, embedding, key)
        return x if self.attention is None else self.attention(x)


class Level(nnx.Module):
    """The blocks at one resolution, and the layer that leaves it (None at the end of the path)."""

    def __init__(self, blocks: list[Block], resample: nnx.Module | None):
        self.blocks = nnx.List(blocks)
        self.resample = resample


class UNet(nnx.Module):
    """A U-Net x_t, t (, label) -> a prediction of x_t's shape, wholly set by its arguments. Parameters are float32.

    Args:
      resolution: height and width of the images; must halve len(channel_multipliers) - 1 times.
      image_channels: 1 for grey, 3 for RGB.
      channels: width of the first level.
      channel_multipliers: width of each level, in units of `channels`.
      num_res_blocks: ResBlocks per level on the way down; one more on the way up.
      attention_resolutions: resolutions of the levels whose every ResBlock is followed by self-attention.
      patch_size: squares of this many pixels a side become the channels of one position, and the first level has
        resolution / patch_size positions a side (Luhman & Luhman 2022): less work, at some cost in detail.
      middle_attention: attention between the two ResBlocks of the middle.
      num_heads: attention heads. `head_channels`, if given, sets channels per head instead.
      dropout: rate, inside every ResBlock.
      num_groups: groups of every GroupNorm, at most: each has four channels or more.
      time_conditioning: 'additive' or 'scale_shift': how the embedding enters every ResBlock.
      resampling: 'conv' (strided, and nearest + conv) or 'resblock' (ResBlocks that resample, as in ADM).
      learned_variance: twice the channels come out: the prediction's, and then the reverse process's variance as
        `denoisers.ModelDenoiser` reads it (Nichol & Dhariwal 2021, section 3.1).
      num_classes: 0 for an unconditional model; else labels 0 .. num_classes - 1, and num_classes is the learned null.
      dtype: compute dtype, 'float32' or 'bfloat16'; norms, softmax and the output are float32 either way.
      remat: what training keeps of each block for its gradient, less memory for more time: 'none' keeps all, 'convs'
        what convolutions and matrix products give, 'blocks' the blocks' inputs alone. The results are the same.
    """

    def __init__(
        self,
        *,
        resolution: int,
        image_channels: int = 3,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        patch_size: int = 1,
        middle_attention: bool = True,
        num_heads: int = 1,
        head_channels: int | None = None,
        dropout: float = 0.0,
        num_groups: int = 32,
        time_conditioning: str = 'additive',
        resampling: str = 'conv',
        learned_variance: bool = False,
        num_classes: int = 0,
        dtype: str = 'float32',
        remat: str = 'none',
        rngs: nnx.Rngs,
    ):
        lookup('remat', REMATS, remat)
        check_unet(
            resolution=resolution,
            channels=channels,
            channel_multipliers=channel_multipliers,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            patch_size=patch_size,
            num_heads=num_heads,
            head_channels=head_channels,
            dropout=dropout,
            time_conditioning=time_conditioning,
            resampling=resampling,
            dtype=dtype,
        )
        self.resolution = resolution
        self.patch_size = patch_size
        self.channels = channels
        self.num_classes = num_classes
        self.dtype = DTYPES[dtype]
        self.remat = remat
        embedding_features = 4 * channels
        attention_at = set(attention_resolutions)
        make = {'num_groups': num_groups, 'dtype': self.dtype, 'rngs': rngs}

        def res_block(features_in: int, features_out: int, resample: str | None = None) -> ResBlock:
            return ResBlock(
                features_in,
                features_out,
                embedding_features,
                dropout_rate=dropout,
                conditioning=time_conditioning,
                resample=resample,
                **make,
            )

        def attention(features: int) -> SelfAttention:
            return SelfAttention(features, num_heads=features // head_channels if head_channels else num_heads, **make)

        def block(features_in: int, features_out: int, level: int) -> Block:
            attends = resolution // patch_size >> level in attention_at
            return Block(res_block(features_in, features_out), attention(features_out) if attends else None)

        def down(features: int) -> nnx.Module:
            return (
                Downsample(features, dtype=self.dtype, rngs=rngs)
                if resampling == 'conv'
                else res_block(features, features, 'down')
            )

        def up(features: int) -> nnx.Module:
            return (
                Upsample(features, dtype=self.dtype, rngs=rngs)
                if resampling == 'conv'
                else res_block(features, features, 'up')
            )

        self.time_in = dense(channels, embedding_features, dtype=self.dtype, rngs=rngs)
        self.time_out = dense(embedding_features, embedding_features, dtype=self.dtype, rngs=rngs)
        self.label = (
            nnx.Embed(num_classes + 1, embedding_features, dtype=self.dtype, rngs=rngs) if num_classes else None
        )
        self.conv_in = conv(image_channels * patch_size**2, channels, 3, dtype=self.dtype, rngs=rngs)

        widths = [channels * multiplier for multiplier in channel_multipliers]
        features = channels
        skips = [channels]
        levels = []
        for level, width in enumerate(widths):
            blocks = []
            for _ in range(num_res_blocks):
                blocks.append(block(features, width, level))
                features = width
                skips.append(width)
            last = level == len(widths) - 1
            levels.append(Level(blocks, None if last else down(width)))
            if not last:
                skips.append(width)
        self.down = nnx.List(levels)

        self.middle_in = Block(res_block(features, features), attention(features) if middle_attention else None)
        self.middle_out = res_block(features, features)

        levels = []
        for level, width in reversed(list(enumerate(widths))):
            blocks = []
            for _ in range(num_res_blocks + 1):
                blocks.append(block(features + skips.pop(), width, level))
                features = width
            levels.append(Level(blocks, up(width) if level else None))
        self.up = nnx.List(levels)

        self.norm_out = GroupNorm(features, num_groups, rngs=rngs)
        channels_out = image_channels * (1 + learned_variance) * patch_size**2
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
        halvings = len(self.down) - 1
        factor = self.patch_size * 2**halvings
        if x.shape[1] % factor or x.shape[2] % factor:
            patches = '' if self.patch_size == 1 else f'cut in patches of {self.patch_size} and '
            raise UsageError(f'images of {x.shape[1]}x{x.shape[2]} cannot be {patches}halved {halvings} times.')
        num_blocks = 0

        def run(module, x):
            nonlocal num_blocks
            if isinstance(module, Downsample | Upsample):
                return split_batch(module(x))
            num_blocks += 1
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, num_blocks)
            # The module is closed over, not passed: jax.checkpoint differentiates with respect to that as well.
            return split_batch(REMATS[self.remat](lambda x, embedding: module(x, embedding, key))(x, embedding))

        embedding = split_batch(sinusoidal_embedding(t, self.channels).astype(self.dtype))
        embedding = self.time_out(jax.nn.silu(self.time_in(embedding)))
        if label is not None:
            embedding = embedding + self.label(label)
        embedding = split_batch(embedding)

        h = split_batch(self.conv_in(space_to_channels(x.astype(self.dtype), self.patch_size)))
        skips = [h]
        for level in self.down:
            for block in level.blocks:
                h = run(block, h)
                skips.append(h)
            if level.resample is not None:
                h = run(level.resample, h)
                skips.append(h)
        h = run(self.middle_out, run(self.middle_in, h))
        skips = scaled_skips(skips, skip_scale)
        for level in self.up:
            for block in level.blocks:
                h = run(block, jnp.concatenate([h, skips.pop()], axis=-1))
            if level.resample is not None:
                h = run(level.resample, h)
        return channels_to_space(self.conv_out(jax.nn.silu(self.norm_out(h))), self.patch_size)


def check_unet(
    *,
    resolution: int,
    channels: int,
    channel_multipliers: Sequence[int],
    num_res_blocks: int,
    attention_resolutions: Sequence[int],
    patch_size: int,
    num_heads: int,
    head_channels: int | None,
    dropout: float,
    time_conditioning: str,
    resampling: str,
    dtype: str,
) -> None:
    """A `UsageError` for settings of which no U-Net can be made."""
    lookup('time_conditioning', dict.fromkeys(TIME_CONDITIONINGS), time_conditioning)
    lookup('resampling', dict.fromkeys(RESAMPLINGS), resampling)
    lookup('dtype', DTYPES, dtype)
    if min(channels, num_res_blocks, len(channel_multipliers), *channel_multipliers) < 1 or channels % 2:
        raise UsageError(
            'a U-Net needs an even number of channels, at least one channel multiplier and one ResBlock per level, got '
            f'channels={channels}, channel_multipliers={tuple(channel_multipliers)}, num_res_blocks={num_res_blocks}.'
        )
    if not 0 <= dropout < 1:
        raise UsageError(f'dropout must be in [0, 1), got {dropout}.')
    if patch_size < 1 or resolution % patch_size:
        raise UsageError(f'patch_size must be at least 1 and divide the resolution, {resolution}: got {patch_size}.')
    resolution //= patch_size
    halvings = len(channel_multipliers) - 1
    if resolution < 1 or resolution % 2**halvings:
        most = max(n for n in range(32) if resolution >= 1 and resolution % 2**n == 0) if resolution >= 1 else 0
        raise UsageError(
            f'resolution {resolution} cannot be halved {halvings} times, as {halvings + 1} channel_multipliers ask: '
            f'use a multiple of {2**halvings} for the resolution, or at most {most + 1} channel_multipliers.'
        )
    levels = [resolution >> level for level in range(halvings + 1)]
    for wanted in attention_resolutions:
        if wanted not in levels:
            raise UsageError(f'attention_resolutions has {wanted}, but the levels of this U-Net are at {levels}.')
    for multiplier in channel_multipliers:
        width = channels * multiplier
        if head_channels is not None and (head_channels < 1 or width % head_channels):
            raise UsageError(f'head_channels={head_channels} does not divide a level of {width} channels.')
        if head_channels is None and (num_heads < 1 or width % num_heads):
            raise UsageError(f'num_heads={num_heads} does not divide a level of {width} channels.')
