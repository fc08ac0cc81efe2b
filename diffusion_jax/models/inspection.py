"""What goes on inside of a denoising network: its map, what its blocks give, its skip connections, where it attends to.

Each function takes the network's `apply`, as `functional` and `split` give it or as a pipeline or an `Experiment` has
it, and finds the module behind it. A network that is a user's own function has none, and is a `UsageError`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diffusion_jax.errors import UsageError
from diffusion_jax.models import blocks, layers
from diffusion_jax.models.clip_text import ClipText, TextOutput
from diffusion_jax.models.conditional_unet import NUM_SIZES, ConditionalUNet, SpatialTransformer, TransformerBlock
from diffusion_jax.models.ddpm_unet import DDPMUNet, ImageAttention
from diffusion_jax.models.dit import DiT, DiTBlock, TimeEmbedder
from diffusion_jax.models.functional import ModuleApply, Params, count_params
from diffusion_jax.models.text_unet import TextUNet
from diffusion_jax.models.unet import UNet
from diffusion_jax.registry import unknown

KINDS: dict[type[nnx.Module], str] = {
    layers.ResBlock: 'res_block',
    blocks.ResnetBlock: 'res_block',
    layers.SelfAttention: 'attention',
    ImageAttention: 'attention',
    SpatialTransformer: 'transformer',
    DiTBlock: 'dit_block',
    layers.Downsample: 'downsample',
    blocks.Downsample: 'downsample',
    layers.Upsample: 'upsample',
    blocks.Upsample: 'upsample',
    TimeEmbedder: 'time_embedding',
    ClipText: 'text_encoder',
}
"""What a map shows as one block, by its class .."""

NAMED_KINDS = {
    'time_in': 'time_embedding',
    'time_out': 'time_embedding',
    'time_embedding': 'time_embedding',
    'add_embedding': 'size_embedding',
    'label': 'label_embedding',
    'class_embedding': 'label_embedding',
    'class_embedder': 'label_embedding',
    'conv_in': 'conv_in',
    'patch_embed': 'conv_in',
    'norm_out': 'norm_out',
    'conv_norm_out': 'norm_out',
    'proj_out_1': 'modulation_out',
    'conv_out': 'conv_out',
    'proj_out_2': 'conv_out',
}
""".. or by its name in the network."""

DEFAULT_TOKENS = 77
"""Length of the text that a map supposes, where the network does not say."""


@dataclasses.dataclass(frozen=True)
class NetworkBlock:
    """One block of a network's map.

    Attributes:
      path: where its parameters are in the params dict, such as 'down.0.blocks.1.res'; what `activations` takes.
      kind: a value of `KINDS` or `NAMED_KINDS`: 'res_block', 'attention', 'transformer' (self-attention,
        cross-attention and feed-forward layers), 'dit_block', 'downsample', 'upsample', 'conv_in', 'conv_out',
        'norm_out', 'modulation_out', 'time_embedding', 'label_embedding', 'size_embedding', 'text_encoder'.
      side: 'down', 'middle' or 'up' of a U-Net; None for what lies on no side (embeddings, all of a DiT).
      level: from 0, the finest; None likewise.
      resolution: (height, width) of what it gives, in positions; None if it gives a vector or a text's states.
      channels: of what it gives.
      heads: of its attention; None if it has none.
      output_shape: of what it gives, without the batch: (h, w, channels), (tokens, channels) or (channels,); None if
        the network does not run it on this conditioning.
      num_params: those of all blocks add up to `count_params` of the network.
      skip_out: the number of the skip connection that it makes, which is its place in `skip_scale`; None if none.
      skip_in: the number of the skip connection that it takes; None if none.
      cross_attention: paths of the transformer blocks in it that attend to the context, as `cross_attention_maps`
        takes them.
    """

    path: str
    kind: str
    side: str | None
    level: int | None
    resolution: tuple[int, int] | None
    channels: int | None
    heads: int | None
    output_shape: tuple[int, ...] | None
    num_params: int
    skip_out: int | None = None
    skip_in: int | None = None
    cross_attention: tuple[str, ...] = ()


class Activations(NamedTuple):
    """What a network gives, and some of its blocks on the way.

    Attributes:
      prediction: of the network, [B, H, W, K].
      blocks: path -> [B, h, w, C] of a U-Net's block, [B, tokens, C] of a transformer's, [B, C] of an embedding.
    """

    prediction: Float[Array, 'B H W K']
    blocks: dict[str, Float[Array, 'B ...']]


# --- the module behind a function -------------------------------------------------------------------------------------


def module_apply(apply: Callable[..., Any]) -> ModuleApply:
    """The `ModuleApply` that a network's function is, or wraps; `.module(params)` is then the module.

    It is found in `functools.partial`s, in `jax.jit`s and in dataclasses that have it as `apply`, such as
    `denoisers.EdmPreconditioned` and `Ablated`.

    Raises:
      UsageError: there is none.
    """
    found = []
    _rewrapped(apply, lambda inner: found.append(inner) or inner)
    return found[0]


def _rewrapped(apply: Callable[..., Any], change: Callable[[ModuleApply], Callable]) -> Callable[..., Any]:
    """The same function around another network. Pure, as nothing else would be under tracing and in many threads."""
    if isinstance(apply, ModuleApply):
        return change(apply)
    if isinstance(apply, functools.partial):
        return functools.partial(_rewrapped(apply.func, change), *apply.args, **apply.keywords)
    if isinstance(apply, jax.stages.Wrapped) and hasattr(apply, '__wrapped__'):
        return _rewrapped(apply.__wrapped__, change)
    if dataclasses.is_dataclass(apply) and callable(getattr(apply, 'apply', None)):
        return dataclasses.replace(apply, apply=_rewrapped(apply.apply, change))
    raise UsageError(
        f'this network ({getattr(apply, "__name__", type(apply).__name__)}) is a function, and one cannot see into it: '
        'inspect an `apply` of models.functional or models.split, or that of a pipeline of this package.'
    )


def _denoiser(apply: Callable[..., Any]) -> tuple[nnx.Module, nnx.Module]:
    """(module, the U-Net or DiT in it), of shapes alone."""
    module = module_apply(apply).module()
    if not isinstance(module, UNet | DDPMUNet | ConditionalUNet | TextUNet | DiT):
        raise UsageError(f'a {type(module).__name__} is no denoiser: it has no map.')
    return module, module.unet if isinstance(module, TextUNet) else module


def network_map(apply: Callable[..., Any], shape: Sequence[int], **conditioning: Any) -> list[NetworkBlock]:
    """The blocks of a denoiser in the order in which they are computed. Nothing is run, and no parameters are needed.

    Args:
      apply: the network.
      shape: (H, W, C) of x_t as it sees it: of latents, if it works in them.
      conditioning: of `apply`, arrays [1, ..] or their shapes, where other than a text of the usual length.

    Raises:
      UsageError: the network is none of this package's denoisers, or does not take this shape.
    """
    raise NotImplementedError


def activations(
    apply: Callable[..., Any],
    params: Params,
    x: Float[Array, 'B H W C'],
    t: Float[Array, 'B'],
    paths: Iterable[str] | None = None,
    **conditioning: Any,
) -> Activations:
    """What blocks of a network give at x_t, and its prediction, in one compiled call.

    Another x, t, conditioning or parameters compile nothing; another choice of blocks does. To look at one after the
    other, ask for all at once.

    Args:
      apply, params: the network.
      x: x_t.
      t: timesteps as `Schedule.timestep` gives them.
      paths: of blocks, as `network_map` has them, or of any other submodule that the network calls; None: all blocks.
      conditioning: of `apply`.

    Raises:
      UsageError: there is no such block, or the network does not run it on this conditioning.
    """
    raise NotImplementedError


def count_skips(apply: Callable[..., Any]) -> int:
    """The number of skip connections of a U-Net; 0 for a DiT."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Ablated:
    """A U-Net whose skip connections are scaled, as a network: params is {'network': .., 'skip_scale': [S]}."""

    apply: Callable[..., Any]

    def __call__(self, params: Params, x: Float[Array, 'B H W C'], t: Float[Array, 'B'], **conditioning: Any):
        return self.apply(params['network'], x, t, skip_scale=params['skip_scale'], **conditioning)


def ablated(
    apply: Callable[..., Any], params: Params, skip_scale: Float[Array, 'S'] | Sequence[float]
) -> tuple[Ablated, Params]:
    """(apply, params) of a U-Net with each skip connection times its own number: 0 removes it, 1 leaves it as it is.

    It is a network as any other: of a `ModelDenoiser`, guided or not, of a pipeline, of the functions here. The numbers
    are among its parameters, so that other ones compile nothing. To have others for each sample of a batch, give
    `apply` itself a `skip_scale` [B, S].

    Raises:
      UsageError: the network has no skip connections, or another number of them.
    """
    raise NotImplementedError


def cross_attention_maps(
    apply: Callable[..., Any],
    params: Params,
    x: Float[Array, 'B H W C'],
    t: Float[Array, 'B'],
    paths: Iterable[str] | None = None,
    **conditioning: Any,
) -> dict[str, Float[Array, 'B h w S']]:
    """How much each position attends to each token of the context: softmax(q k^T / sqrt(d)), the mean of all heads.

    Over the tokens they add up to 1. What compiles is as of `activations`.

    Args:
      apply, params: a `ConditionalUNet` or `TextUNet`.
      x: x_t.
      t: timesteps as `Schedule.timestep` gives them.
      paths: of transformer blocks, or of what has some in it, as `network_map` has both; None: all.
      conditioning: of `apply`.

    Returns:
      The maps of each transformer block by its path, in the order in which they are computed.

    Raises:
      UsageError: the network attends to nothing, or there is no such block.
    """
    raise NotImplementedError


def average_maps(
    maps: Mapping[str, Float[Array, 'B h w S']], size: tuple[int, int] | None = None
) -> Float[Array, 'B H W S']:
    """The mean over blocks of maps that are resized (bilinearly) to one size, the largest among them by default.

    Over the tokens it adds up to 1 again.
    """
    raise NotImplementedError
