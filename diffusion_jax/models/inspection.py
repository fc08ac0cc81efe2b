"""What goes on inside of a denoising network: its map, what its blocks give, its skip connections, where it attends to.

Each function takes the network's `apply`, as `functional` and `split` give it or as a pipeline or an `Experiment` has
it, and finds the module behind it. A network that is a user's own function has none, and is a `UsageError`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from diffusion_jax.models.functional import Params, count_params
from diffusion_jax.models.taps import children, module_apply, remember, submodule, with_taps
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


def _denoiser(apply: Callable[..., Any]) -> tuple[nnx.Module, nnx.Module]:
    """(module, the U-Net or DiT in it), of shapes alone."""
    module = module_apply(apply).module()
    if not isinstance(module, UNet | DDPMUNet | ConditionalUNet | TextUNet | DiT):
        raise UsageError(f'a {type(module).__name__} is no denoiser: it has no map.')
    return module, module.unet if isinstance(module, TextUNet) else module


def _kind(name: str, module: nnx.Module) -> str | None:
    """What a map shows a module as; None for what it shows the parts of."""
    resample = getattr(module, 'resample', None)
    if isinstance(resample, str):  # a ResBlock that changes the resolution; a level has a module of this name
        return f'{resample}sample'
    return NAMED_KINDS.get(name) or KINDS.get(type(module))


def _mapped(module: nnx.Module, path: str = '') -> dict[str, tuple[str, nnx.Module]]:
    """path -> (kind, module) of all that a map shows."""
    found = {}
    for name, child in children(module).items():
        at = f'{path}.{name}' if path else name
        kind = _kind(name, child)
        found |= _mapped(child, at) if kind is None else {at: (kind, child)}
    return found


def _output(module: nnx.Module, args: tuple, out: Any) -> Any:
    return out.last if isinstance(out, TextOutput) else out


# --- the map ----------------------------------------------------------------------------------------------------------


def network_map(apply: Callable[..., Any], shape: Sequence[int], **conditioning: Any) -> list[NetworkBlock]:
    """The blocks of a denoiser in the order in which they are computed. Nothing is run, and no parameters are needed.

    Args:
      apply: the network.
      shape: (H, W, C) of x_t as it sees it: of latents, if it works in them.
      conditioning: of `apply`, arrays [1, ..] or their shapes, where other than a text of the usual length.

    Raises:
      UsageError: the network is none of this package's denoisers, or does not take images of this size.
    """
    module, network = _denoiser(apply)
    height, width, channels = shape
    conditioning = _usual_conditioning(module, network, (height, width), 'context' in conditioning) | conditioning
    mapped = _mapped(module)
    outputs: dict[str, tuple[int, ...]] = {}
    taps = {path: remember(outputs, path, lambda *call: _output(*call).shape[1:]) for path in mapped}
    inner = module_apply(apply)
    x = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    jax.eval_shape(with_taps(inner, taps), inner.shapes, x, t, **conditioning)

    ran = [*outputs, *(path for path in mapped if path not in outputs)]
    found = []
    for path in ran:
        kind, block = mapped[path]
        output = outputs.get(path)
        side, level = _place(network, kind, path.removeprefix('unet.').split('.'))
        resolution = output[:2] if output is not None and len(output) == 3 else None
        if kind == 'dit_block':
            resolution = (height // network.patch_size, width // network.patch_size)
        found.append(
            NetworkBlock(
                path,
                kind,
                side,
                level,
                resolution,
                None if output is None else output[-1],
                _heads(block),
                output,
                count_params(jax.tree.leaves(nnx.state(block))),
                cross_attention=tuple(_cross_attention(block, path)),
            )
        )
    return _with_skips(found)


def _usual_conditioning(
    module: nnx.Module, network: nnx.Module, size: tuple[int, int], encoded: bool
) -> dict[str, Any]:
    """Shapes of what a denoiser is to be told, of one sample; without a text's ids if it comes encoded."""

    def shape(*of: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *of), dtype)

    given = {'label': shape(dtype=jnp.int32)} if network.num_classes else {}
    if isinstance(module, TextUNet):
        return given if encoded else given | {'ids': shape(module.text.length, dtype=jnp.int32)}
    if isinstance(network, ConditionalUNet):
        attention = network.mid_block.attentions[0].transformer_blocks[0].attn2
        given['context'] = shape(DEFAULT_TOKENS, attention.to_k.in_features)
        if network.pooled_features:
            given |= {'pooled': shape(network.pooled_features), 'sizes': shape(NUM_SIZES)}
        if network.extra_channels:
            given['extra'] = shape(*size, network.extra_channels)
    return given


def _place(network: nnx.Module, kind: str, names: list[str]) -> tuple[str | None, int | None]:
    """(side, level) of a block of a U-Net by its path."""
    if isinstance(network, DiT):
        return None, None
    last = len(network.down if isinstance(network, UNet) else network.down_blocks) - 1
    if names[0] in ('down', 'down_blocks'):
        return 'down', int(names[1])
    if names[0] in ('up', 'up_blocks'):
        return 'up', last - int(names[1])
    if names[0].startswith('mid'):
        return 'middle', last
    return {'conv_in': ('down', 0), 'norm_out': ('up', 0), 'conv_out': ('up', 0)}.get(kind, (None, None))


def _heads(module: nnx.Module) -> int | None:
    if isinstance(module, SpatialTransformer):
        module = module.transformer_blocks[0].attn1
    elif isinstance(module, DiTBlock):
        module = module.attn1
    return getattr(module, 'num_heads', None)


def _cross_attention(module: nnx.Module, path: str) -> list[str]:
    """Paths of the transformer blocks in a module that attend to a context, itself included."""
    if isinstance(module, TransformerBlock):
        return [path]
    return [each for name, child in children(module).items() for each in _cross_attention(child, f'{path}.{name}')]


def _with_skips(found: list[NetworkBlock]) -> list[NetworkBlock]:
    """With the skip connections, which are taken in the reverse of the order in which they are made."""
    found, made = list(found), []
    attends = ('attention', 'transformer')
    for i, block in enumerate(found):
        follows = found[i + 1].kind in attends if i + 1 < len(found) else False
        if block.side == 'down' and not (block.kind == 'res_block' and follows):
            found[i] = dataclasses.replace(block, skip_out=len(made))
            made.append(block)
        elif block.side == 'up' and block.kind == 'res_block':
            found[i] = dataclasses.replace(block, skip_in=len(made) - 1)
            made.pop()
    return found


# --- activations ------------------------------------------------------------------------------------------------------


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
    inner = module_apply(apply).module()
    every = _mapped(inner)
    asked = list(every) if paths is None else [paths] if isinstance(paths, str) else list(paths)
    for path in asked:
        if submodule(inner, path) is None:
            raise unknown('block of this network', path, every)
    # In one order, so that one program serves a choice in whatever order it was made.
    prediction, outputs = _activations(params, x, t, conditioning, apply=apply, paths=tuple(sorted(set(asked))))
    missing = [path for path in asked if path not in outputs]
    if missing and paths is not None:
        raise UsageError(
            f'the network does not call {", ".join(missing)} itself, or not on this conditioning: ask for a block of '
            f'its map ({", ".join(path for path in every if path not in missing)}).'
        )
    return Activations(prediction, {path: outputs[path] for path in asked if path in outputs})


@functools.partial(jax.jit, static_argnames=('apply', 'paths'))
def _activations(params, x, t, conditioning, *, apply: Callable[..., Any], paths: tuple[str, ...]):
    outputs: dict[str, Array] = {}
    taps = {path: remember(outputs, path, _output) for path in paths}
    return with_taps(apply, taps)(params, x, t, **conditioning), outputs


# --- skip connections -------------------------------------------------------------------------------------------------


def count_skips(apply: Callable[..., Any]) -> int:
    """The number of skip connections of a U-Net; 0 for a DiT."""
    _, network = _denoiser(apply)
    if isinstance(network, DiT):
        return 0
    levels = network.up if isinstance(network, UNet) else network.up_blocks
    return sum(len(level.blocks if isinstance(network, UNet) else level.resnets) for level in levels)


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
    skips = count_skips(apply)
    if not skips:
        raise UsageError('this network has no skip connections: only U-Nets have.')
    skip_scale = jnp.asarray(skip_scale, jnp.float32)
    if skip_scale.shape != (skips,):
        raise UsageError(f'skip_scale has a number for each of the {skips} skips, got shape {list(skip_scale.shape)}.')
    return Ablated(apply), {'network': params, 'skip_scale': skip_scale}


# --- cross-attention --------------------------------------------------------------------------------------------------


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
    module = module_apply(apply).module()
    every = [path for name, child in children(module).items() for path in _cross_attention(child, name)]
    if not every:
        raise UsageError(f'a {type(module).__name__} attends to no context: conditional_unet and text_unet do.')
    asked = every if paths is None else [paths] if isinstance(paths, str) else list(paths)
    for path in asked:
        if not any(f'{block}.'.startswith(f'{path}.') for block in every):
            raise unknown('block with cross-attention', path, every)
    chosen = tuple(block for block in every if any(f'{block}.'.startswith(f'{path}.') for path in asked))
    maps = _maps(params, x, t, conditioning, apply=apply, paths=chosen)
    return {path: maps[path] for path in chosen}


@functools.partial(jax.jit, static_argnames=('apply', 'paths'))
def _maps(params, x, t, conditioning, *, apply: Callable[..., Any], paths: tuple[str, ...]):
    # A transformer block sees positions in a row; what holds it (two names up) sees them as an image.
    holders = {path: path.rsplit('.', 2)[0] for path in paths}
    sizes: dict[str, tuple[int, int]] = {}
    weights: dict[str, Array] = {}
    taps = {holder: remember(sizes, holder, lambda _, args, out: args[0].shape[1:3]) for holder in holders.values()}
    for path in paths:
        taps[f'{path}.attn2'] = remember(weights, path, lambda module, args, out: _attention_weights(module, *args))
    with_taps(apply, taps)(params, x, t, **conditioning)
    return {path: w.reshape(w.shape[0], *sizes[holders[path]], -1) for path, w in weights.items()}


def _attention_weights(
    attention: blocks.Attention, x: Float[Array, 'B L C'], context: Float[Array, 'B S D']
) -> Float[Array, 'B L S']:
    """The mean over heads of softmax(q k^T / sqrt(d)), in float32."""

    def heads(projected: Float[Array, 'B N I']) -> Float[Array, 'B N heads d']:
        return projected.reshape(*projected.shape[:2], attention.num_heads, -1).astype(jnp.float32)

    q, k = heads(attention.to_q(x)), heads(attention.to_k(context))
    scores = jnp.einsum('blhd,bshd->bhls', q, k) / math.sqrt(q.shape[-1])
    return jax.nn.softmax(scores, axis=-1).mean(axis=1)


def average_maps(
    maps: Mapping[str, Float[Array, 'B h w S']], size: tuple[int, int] | None = None
) -> Float[Array, 'B H W S']:
    """The mean over blocks of maps that are resized (bilinear) to one size, the largest among them by default.

    Over the tokens it adds up to 1 again.
    """
    if not maps:
        raise UsageError('there are no maps to average.')
    height, width = size or max((each.shape[1:3] for each in maps.values()), key=math.prod)
    resized = [jax.image.resize(m, (m.shape[0], height, width, m.shape[3]), 'linear') for m in maps.values()]
    return sum(resized) / len(resized)
