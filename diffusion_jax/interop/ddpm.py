"""The U-Net of DDPM: diffusers' UNet2DModel config and names <-> ours."""

from collections.abc import Iterable, Mapping
from typing import Any

from diffusion_jax.errors import UsageError
from diffusion_jax.interop.autoencoders import autoencoder_rename
from diffusion_jax.interop.names import Rename
from diffusion_jax.interop.unets import PLAIN, PLAIN_UP, check_only

ATTENDING, ATTENDING_UP = 'AttnDownBlock2D', 'AttnUpBlock2D'

ONLY: dict[str, tuple[Any, ...]] = {
    'center_input_sample': (False,),
    'time_embedding_type': ('positional',),
    'mid_block_type': ('UNetMidBlock2D',),
    'downsample_padding': (1, 0),
    'downsample_type': ('conv',),
    'upsample_type': ('conv',),
    'act_fn': ('silu', 'swish'),
    'attn_norm_num_groups': (None,),
    'resnet_time_scale_shift': ('default',),
    'class_embed_type': (None,),
}
"""Keys of a config that would compute something else -> the values that we do, the first being the default."""

WHAT = 'a UNet2DModel'


def ddpm_rename(names: Iterable[str]) -> Rename:
    """Our names -> those of a file; attention layers of old files are named as those of old autoencoders are."""
    return autoencoder_rename(names)


def ddpm_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' UNet2DModel config -> arguments of `models.DDPMUNet`.

    Raises:
      UsageError: it asks for something that `DDPMUNet` does not compute; the message names the key.
    """
    check_only(config, ONLY, WHAT)
    down = list(config.get('down_block_types', [PLAIN, ATTENDING, ATTENDING, ATTENDING]))
    up = list(config.get('up_block_types', [ATTENDING_UP, ATTENDING_UP, ATTENDING_UP, PLAIN_UP]))
    widths = list(config.get('block_out_channels', [224, 448, 672, 896]))
    if (
        set(down) - {PLAIN, ATTENDING}
        or [{PLAIN: PLAIN_UP, ATTENDING: ATTENDING_UP}[kind] for kind in reversed(down)] != up
    ):
        raise UsageError(
            f'{WHAT} with down_block_types={down} and up_block_types={up} is not supported: they must be {PLAIN} or '
            f'{ATTENDING}, and their like in reverse.'
        )
    if len(down) != len(widths) or any(width % widths[0] for width in widths):
        raise UsageError(
            f'{WHAT} with block_out_channels={widths} is not supported: there must be one for each of {len(down)} '
            'blocks, multiples of the first.'
        )
    if config.get('time_embedding_dim') not in (None, 4 * widths[0]):
        raise UsageError(
            f'{WHAT} with time_embedding_dim={config["time_embedding_dim"]} is not supported, only four times the '
            f'first of block_out_channels, {4 * widths[0]}.'
        )
    channels_in, channels_out = config.get('in_channels', 3), config.get('out_channels', 3)
    if channels_out not in (channels_in, 2 * channels_in):
        raise UsageError(
            f'{WHAT} with in_channels={channels_in} and out_channels={channels_out} is not supported: as many, or '
            'twice as many for a learned variance.'
        )
    classes = config.get('num_class_embeds')
    if classes is not None and classes < 2:
        raise UsageError(f'{WHAT} with num_class_embeds={classes} is not supported: None, or 2 and more.')
    sample_size = config.get('sample_size') or 32
    return {
        'resolution': sample_size if isinstance(sample_size, int) else max(sample_size),
        'image_channels': channels_in,
        'channels': widths[0],
        'channel_multipliers': tuple(width // widths[0] for width in widths),
        'num_res_blocks': config.get('layers_per_block', 2),
        'attention_levels': tuple(level for level, kind in enumerate(down) if kind == ATTENDING),
        'middle_attention': bool(config.get('add_attention', True)),
        'middle_scale': config.get('mid_block_scale_factor', 1),
        'head_channels': config.get('attention_head_dim', 8),
        'downsample_padding': config.get('downsample_padding', 1),
        'cosine_first': bool(config.get('flip_sin_to_cos', True)),
        'frequency_shift': config.get('freq_shift', 0),
        'dropout': config.get('dropout', 0.0),
        'num_groups': config.get('norm_num_groups', 32),
        'epsilon': config.get('norm_eps', 1e-5),
        'learned_variance': channels_out != channels_in,
        'num_classes': 0 if classes is None else classes - 1,
    }


def ddpm_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `ddpm_options`: what diffusers builds the same network from."""
    levels = range(len(options['channel_multipliers']))
    attends = [level in options['attention_levels'] for level in levels]
    config = {
        '_class_name': 'UNet2DModel',
        'sample_size': options['resolution'],
        'in_channels': options['image_channels'],
        'out_channels': options['image_channels'] * (1 + options.get('learned_variance', False)),
        'down_block_types': [ATTENDING if attending else PLAIN for attending in attends],
        'up_block_types': [ATTENDING_UP if attending else PLAIN_UP for attending in reversed(attends)],
        'block_out_channels': [options['channels'] * multiplier for multiplier in options['channel_multipliers']],
        'layers_per_block': options['num_res_blocks'],
        'add_attention': options.get('middle_attention', True),
        'mid_block_scale_factor': options.get('middle_scale', 1),
        'attention_head_dim': options.get('head_channels'),
        'downsample_padding': options.get('downsample_padding', 0),
        'flip_sin_to_cos': options.get('cosine_first', False),
        'freq_shift': options.get('frequency_shift', 1),
        'dropout': options.get('dropout', 0.0),
        'norm_num_groups': options.get('num_groups', 32),
        'norm_eps': options.get('epsilon', 1e-6),
    }
    if options.get('num_classes'):
        config['num_class_embeds'] = options['num_classes'] + 1
    return config
