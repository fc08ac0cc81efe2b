"""Names in the single files of latent diffusion's original code, from diffusers' names of the same tensors.

One direction serves both reading and writing: which tensors a model has is known from its config.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

UNET = 'model.diffusion_model.'
VAE = 'first_stage_model.'
EMA = 'model_ema.'

Rules = Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where and how a file holds a tensor.

    Attributes:
      name: in the file.
      third: which third of its rows, of query, key and value that are stored as one; None: all of it.
      transposed: whether it is stored as [in, out].
      convolution: whether a matrix is stored as a convolution of 1 x 1.
    """

    name: str
    third: int | None = None
    transposed: bool = False
    convolution: bool = False


def _replaced(name: str, rules: Rules) -> str:
    """The name with the first rule applied whose first half it begins with, up to a dot."""
    for ours, theirs in rules:
        if name.startswith(f'{ours}.'):
            return theirs + name[len(ours) :]
    return name


_UNET_RESNET = (
    ('norm1', 'in_layers.0'),
    ('conv1', 'in_layers.2'),
    ('time_emb_proj', 'emb_layers.1'),
    ('norm2', 'out_layers.0'),
    ('conv2', 'out_layers.3'),
    ('conv_shortcut', 'skip_connection'),
)
_UNET_TOP = (
    ('time_embedding.linear_1', 'time_embed.0'),
    ('time_embedding.linear_2', 'time_embed.2'),
    ('add_embedding.linear_1', 'label_emb.0.0'),
    ('add_embedding.linear_2', 'label_emb.0.2'),
    ('conv_in', 'input_blocks.0.0'),
    ('mid_block.resnets.0', 'middle_block.0'),
    ('mid_block.attentions.0', 'middle_block.1'),
    ('mid_block.resnets.1', 'middle_block.2'),
    ('conv_norm_out', 'out.0'),
    ('conv_out', 'out.2'),
)


def unet_names(names: Sequence[str], layers_per_block: int) -> dict[str, Stored]:
    """diffusers' name of each tensor of a UNet2DConditionModel -> how a single file has it, without its prefix.

    Blocks that diffusers keeps in lists of levels are in one list there: each level's resnets with their attention,
    then its down- or upsampling; the latter is in the last block of its level.
    """
    attends = {match[1] for name in names if (match := re.match(r'(up_blocks\.\d+)\.attentions\.', name))}
    down, up = layers_per_block + 1, layers_per_block + 1

    def block(name: str) -> str:
        match = re.match(r'(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)', name)
        if not match:
            return _replaced(name, _UNET_TOP)
        way, level, layer, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if layer == 'downsamplers':
            return f'input_blocks.{(level + 1) * down}.0.{rest.replace("conv", "op", 1)}'
        if layer == 'upsamplers':
            place = 2 if f'up_blocks.{level}' in attends else 1
            return f'output_blocks.{level * up + up - 1}.{place}.{rest}'
        place = 0 if layer == 'resnets' else 1
        if way == 'down':
            return f'input_blocks.{1 + level * down + number}.{place}.{rest}'
        return f'output_blocks.{level * up + number}.{place}.{rest}'

    def stored(name: str) -> Stored:
        theirs = block(name)
        if match := re.match(r'(?:down_blocks|up_blocks|mid_block).*\.resnets\.\d+\.(.*)', name):
            theirs = theirs.removesuffix(match[1]) + _replaced(match[1], _UNET_RESNET)
        return Stored(theirs)

    return {name: stored(name) for name in names}


_VAE_RULES = (
    (r'^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.', r'encoder.down.\1.block.\2.'),
    (r'^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.', r'encoder.down.\1.downsample.'),
    (r'\.mid_block\.resnets\.0\.', '.mid.block_1.'),
    (r'\.mid_block\.resnets\.1\.', '.mid.block_2.'),
    (r'\.mid_block\.attentions\.0\.group_norm\.', '.mid.attn_1.norm.'),
    (r'\.mid_block\.attentions\.0\.to_out\.0\.', '.mid.attn_1.proj_out.'),
    (r'\.mid_block\.attentions\.0\.to_([qkv])\.', r'.mid.attn_1.\1.'),
    (r'\.conv_norm_out\.', '.norm_out.'),
    (r'\.conv_shortcut\.', '.nin_shortcut.'),
)


def autoencoder_names(names: Sequence[str], levels: int) -> dict[str, Stored]:
    """diffusers' name of each tensor of an AutoencoderKL -> how a single file has it, without its prefix.

    The decoder's levels are counted from the finest there, and the attention's layers are convolutions of 1 x 1.
    """

    def stored(name: str) -> Stored:
        theirs = name
        if match := re.match(r'decoder\.up_blocks\.(\d+)\.(resnets\.(\d+)|upsamplers\.0)\.(.*)', name):
            layer = f'block.{match[3]}' if match[3] else 'upsample'
            theirs = f'decoder.up.{levels - 1 - int(match[1])}.{layer}.{match[4]}'
        for pattern, replacement in _VAE_RULES:
            theirs = re.sub(pattern, replacement, theirs)
        matrix = '.mid.attn_1.' in theirs and theirs.endswith('weight') and '.norm.' not in theirs
        return Stored(theirs, convolution=matrix)

    return {name: stored(name) for name in names}


_OPEN_CLIP_TOP = (
    ('embeddings.token_embedding.weight', 'token_embedding.weight'),
    ('embeddings.position_embedding.weight', 'positional_embedding'),
    ('final_layer_norm', 'ln_final'),
)
_OPEN_CLIP_LAYER = (
    ('layer_norm1', 'ln_1'),
    ('layer_norm2', 'ln_2'),
    ('mlp.fc1', 'mlp.c_fc'),
    ('mlp.fc2', 'mlp.c_proj'),
    ('self_attn.out_proj', 'attn.out_proj'),
)


def open_clip_names(names: Sequence[str]) -> dict[str, Stored]:
    """transformers' name of each tensor of a CLIP text model -> how OpenCLIP has it: as of open_clip.CLIP."""

    def stored(name: str) -> Stored:
        name = name.removeprefix('text_model.')  # which is there or not, by the version of transformers
        if name == 'text_projection.weight':
            return Stored('text_projection', transposed=True)
        if not (match := re.match(r'encoder\.layers\.(\d+)\.(.*)', name)):
            return Stored(_replaced(f'{name}.', _OPEN_CLIP_TOP).removesuffix('.'))
        layer, rest = f'transformer.resblocks.{match[1]}', match[2]
        if qkv := re.fullmatch(r'self_attn\.([qkv])_proj\.(weight|bias)', rest):
            return Stored(f'{layer}.attn.in_proj_{qkv[2]}', third='qkv'.index(qkv[1]))
        return Stored(f'{layer}.{_replaced(rest, _OPEN_CLIP_LAYER)}')

    return {name: stored(name) for name in names}


def with_prefix(names: Mapping[str, Stored], prefix: str) -> dict[str, Stored]:
    """The same tensors, as of a part of a file."""
    return {name: dataclasses.replace(stored, name=prefix + stored.name) for name, stored in names.items()}


def averaged(names: Mapping[str, Stored]) -> dict[str, Stored]:
    """The U-Net's averaged weights: their names are those of the training's, without dots."""
    return {
        name: dataclasses.replace(stored, name=EMA + stored.name.removeprefix('model.').replace('.', ''))
        for name, stored in names.items()
    }
