"""The conditional U-Net of Stable Diffusion 1, 2 and XL: diffusers' config and names <-> ours."""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.errors import UsageError
from diffusion_jax.interop.names import renamed

UNET_RENAME = renamed()

CROSS, PLAIN = 'CrossAttnDownBlock2D', 'DownBlock2D'
CROSS_UP, PLAIN_UP = 'CrossAttnUpBlock2D', 'UpBlock2D'

ONLY: dict[str, tuple[Any, ...]] = {
    'center_input_sample': (False,),
    'flip_sin_to_cos': (True,),
    'freq_shift': (0,),
    'mid_block_type': ('UNetMidBlock2DCrossAttn',),
    'downsample_padding': (1,),
    'mid_block_scale_factor': (1,),
    'act_fn': ('silu', 'swish'),
    'encoder_hid_dim': (None,),
    'encoder_hid_dim_type': (None,),
    'dual_cross_attention': (False,),
    'class_embed_type': (None,),
    'addition_embed_type': (None, 'text_time'),
    'resnet_time_scale_shift': ('default',),
    'resnet_skip_time_act': (False,),
    'resnet_out_scale_factor': (1.0,),
    'time_embedding_type': ('positional',),
    'time_embedding_act_fn': (None,),
    'timestep_post_act': (None,),
    'time_cond_proj_dim': (None,),
    'conv_in_kernel': (3,),
    'conv_out_kernel': (3,),
    'attention_type': ('default',),
    'class_embeddings_concat': (False,),
    'mid_block_only_cross_attention': (None, False),
    'cross_attention_norm': (None,),
    'reverse_transformer_layers_per_block': (None,),
    'num_attention_heads': (None,),
}
"""Keys of a config that would compute something else -> the values that we do, the first being the default."""


def check_only(config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], what: str) -> None:
    """A `UsageError` for the first key whose value is none of those allowed."""
    for key, values in allowed.items():
        value = config.get(key, values[0])
        if value not in values:
            raise UsageError(f'{what} with {key}={value!r} is not supported, only {" or ".join(map(repr, values))}.')


def unet_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' UNet2DConditionModel config -> arguments of `models.ConditionalUNet`.

    Raises:
      UsageError: it asks for something that `ConditionalUNet` does not compute; the message names the key.
    """
    check_only(config, ONLY, 'a UNet2DConditionModel')
    only_cross = config.get('only_cross_attention', False)
    if any(only_cross) if isinstance(only_cross, list | tuple) else only_cross:
        raise UsageError(f'a UNet2DConditionModel with only_cross_attention={only_cross!r} is not supported.')
    down = list(config.get('down_block_types', [CROSS, CROSS, CROSS, PLAIN]))
    up = list(config.get('up_block_types', [PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP]))
    widths = list(config.get('block_out_channels', [320, 640, 1280, 1280]))
    if set(down) - {CROSS, PLAIN} or [{CROSS: CROSS_UP, PLAIN: PLAIN_UP}[kind] for kind in reversed(down)] != up:
        raise UsageError(
            f'a UNet2DConditionModel with down_block_types={down} and up_block_types={up} is not supported: they must '
            f'be {CROSS} or {PLAIN}, and their like in reverse.'
        )
    if len(down) != len(widths) or any(width % widths[0] for width in widths):
        raise UsageError(
            f'a UNet2DConditionModel with block_out_channels={widths} is not supported: there must be one for each of '
            f'{len(down)} blocks, multiples of the first.'
        )
    per_level = {
        key: _single(config.get(key, default), key)
        for key, default in (('layers_per_block', 2), ('cross_attention_dim', 1280))
    }
    depths = config.get('transformer_layers_per_block', 1)
    depths = list(depths) if isinstance(depths, list | tuple) else [depths] * len(down)
    if not all(isinstance(depth, int) for depth in depths):
        raise UsageError(f'a UNet2DConditionModel with transformer_layers_per_block={depths} is not supported.')
    heads = config.get('attention_head_dim', 8)  # a misnomer of diffusers': it is their number
    pooled, sizes = 0, 256
    if config.get('addition_embed_type') == 'text_time':
        sizes = config['addition_time_embed_dim']
        pooled = config['projection_class_embeddings_input_dim'] - 6 * sizes
    classes = config.get('num_class_embeds') or 0
    channels_in, channels_out = config.get('in_channels', 4), config.get('out_channels', 4)
    if channels_in < channels_out:
        raise UsageError(f'a UNet2DConditionModel of in_channels={channels_in}, out_channels={channels_out}?')
    sample_size = config.get('sample_size') or 64
    return {
        'resolution': sample_size if isinstance(sample_size, int) else max(sample_size),
        'image_channels': channels_out,
        'channels': widths[0],
        'channel_multipliers': tuple(width // widths[0] for width in widths),
        'num_res_blocks': per_level['layers_per_block'],
        'attention_depths': tuple(depth if kind == CROSS else 0 for kind, depth in zip(down, depths, strict=True)),
        'middle_depth': depths[-1],
        'num_heads': tuple(heads) if isinstance(heads, list | tuple) else heads,
        'context_features': per_level['cross_attention_dim'],
        'pooled_features': pooled,
        'size_features': sizes,
        'extra_channels': channels_in - channels_out,
        'linear_projection': bool(config.get('use_linear_projection', False)),
        'dropout': config.get('dropout', 0.0),
        'num_groups': config.get('norm_num_groups', 32),
        'epsilon': config.get('norm_eps', 1e-5),
        'num_classes': max(classes - 1, 0),
    }


def unet_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `unet_options`: what diffusers builds the same network from."""
    depths = options['attention_depths']
    widths = [options['channels'] * multiplier for multiplier in options['channel_multipliers']]
    heads = options['num_heads']
    if options.get('head_channels'):
        heads = [width // options['head_channels'] for width in widths]
    middle = options.get('middle_depth')
    if middle is None:
        middle = next((depth for depth in reversed(depths) if depth), 1)
    layers = [depth or middle for depth in depths]
    if layers[-1] != middle:
        raise UsageError(f'diffusers has no U-Net with middle_depth={middle} and attention_depths={tuple(depths)}.')
    config = {
        '_class_name': 'UNet2DConditionModel',
        'sample_size': options['resolution'],
        'in_channels': options['image_channels'] + options.get('extra_channels', 0),
        'out_channels': options['image_channels'],
        'down_block_types': [CROSS if depth else PLAIN for depth in depths],
        'up_block_types': [CROSS_UP if depth else PLAIN_UP for depth in reversed(depths)],
        'block_out_channels': widths,
        'layers_per_block': options['num_res_blocks'],
        'cross_attention_dim': options['context_features'],
        'transformer_layers_per_block': layers[0] if len(set(layers)) == 1 else layers,
        'attention_head_dim': heads if isinstance(heads, int) else list(heads),
        'use_linear_projection': options.get('linear_projection', False),
        'dropout': options.get('dropout', 0.0),
        'norm_num_groups': options.get('num_groups', 32),
        'norm_eps': options.get('epsilon', 1e-5),
    }
    if options.get('num_classes'):
        config['num_class_embeds'] = options['num_classes'] + 1
    if options.get('pooled_features'):
        config |= {
            'addition_embed_type': 'text_time',
            'addition_time_embed_dim': options['size_features'],
            'projection_class_embeddings_input_dim': options['pooled_features'] + 6 * options['size_features'],
        }
    return config


def _single(value: Any, key: str) -> int:
    values = set(value) if isinstance(value, list | tuple) else {value}
    if len(values) != 1:
        raise UsageError(f'a UNet2DConditionModel with {key}={value!r} is not supported: one number for all levels.')
    return values.pop()
