"""AutoencoderKL and VQModel: diffusers' configs and names <-> ours."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from diffusion_jax.errors import UsageError
from diffusion_jax.interop.names import Rename, renamed
from diffusion_jax.interop.unets import check_only

SCALING_FACTOR = 0.18215
"""Of Stable Diffusion 1 and 2, whose configs mostly leave it out."""

ONLY: dict[str, tuple[Any, ...]] = {'act_fn': ('silu', 'swish'), 'latents_mean': (None,), 'latents_std': (None,)}
VQ_ONLY: dict[str, tuple[Any, ...]] = {
    'act_fn': ('silu', 'swish'),
    'norm_type': ('group',),
    'lookup_from_codebook': (False,),
}
NEW = renamed()
# Before version 0.15, diffusers named an attention's layers otherwise.
OLD = renamed(
    (r'(\.attentions\.\d+)\.to_q\.', r'\1.query.'),
    (r'(\.attentions\.\d+)\.to_k\.', r'\1.key.'),
    (r'(\.attentions\.\d+)\.to_v\.', r'\1.value.'),
    (r'(\.attentions\.\d+)\.to_out\.0\.', r'\1.proj_attn.'),
)


def autoencoder_rename(names: Iterable[str]) -> Rename:
    """Our names -> those of a file, which are old ones or new ones."""
    return OLD if any(re.search(r'\.attentions\.\d+\.proj_attn\.', name) for name in names) else NEW


def autoencoder_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' AutoencoderKL config -> arguments of `models.AutoencoderKL`.

    Raises:
      UsageError: it asks for something that ours does not compute; the message names the key.
    """
    what = 'an AutoencoderKL'
    check_only(config, ONLY, what)
    convs = {config.get('use_quant_conv', True), config.get('use_post_quant_conv', True)}
    if len(convs) > 1:
        raise UsageError(f'{what} with only one of use_quant_conv and use_post_quant_conv is not supported.')
    return {**_shared_options(config, what, latent_channels=4), 'quant_convs': convs.pop()}


def vq_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' VQModel config -> arguments of `models.VQAutoencoder`.

    Raises:
      UsageError: it asks for something that ours does not compute; the message names the key.
    """
    check_only(config, VQ_ONLY, 'a VQModel')
    return {
        **_shared_options(config, 'a VQModel', latent_channels=3),
        'codebook_size': config.get('num_vq_embeddings', 256),
        'codebook_channels': config.get('vq_embed_dim'),
    }


def latent_scale(config: Mapping[str, Any]) -> tuple[float, float]:
    """(scale, shift): a diffusion model's x0 is (z - shift) scale."""
    scale, shift = config.get('scaling_factor'), config.get('shift_factor')
    return (SCALING_FACTOR if scale is None else float(scale)), float(shift or 0.0)


def _shared_options(config: Mapping[str, Any], what: str, latent_channels: int) -> dict[str, Any]:
    widths = list(config.get('block_out_channels', [64]))
    for key, kind in (('down_block_types', 'DownEncoderBlock2D'), ('up_block_types', 'UpDecoderBlock2D')):
        types = list(config.get(key, [kind]))
        if types != [kind] * len(widths):
            raise UsageError(f'{what} with {key}={types} is not supported, only {kind} for each level.')
    if any(width % widths[0] for width in widths):
        raise UsageError(f'{what} with block_out_channels={widths} is not supported: multiples of the first.')
    if config.get('in_channels', 3) != config.get('out_channels', 3):
        raise UsageError(f'{what} with other in_channels than out_channels is not supported.')
    return {
        'image_channels': config.get('in_channels', 3),
        'latent_channels': config.get('latent_channels', latent_channels),
        'channels': widths[0],
        'channel_multipliers': tuple(width // widths[0] for width in widths),
        'num_res_blocks': config.get('layers_per_block', 1),
        'num_groups': config.get('norm_num_groups', 32),
        'middle_attention': config.get('mid_block_add_attention', True),
    }


def autoencoder_config(options: Mapping[str, Any], scale: float, shift: float = 0.0) -> dict[str, Any]:
    """The inverse of `autoencoder_options`: what diffusers builds the same network from, with the latents' scale."""
    return {
        '_class_name': 'AutoencoderKL',
        **_shared_config(options, scale),
        'use_quant_conv': options['quant_convs'],
        'use_post_quant_conv': options['quant_convs'],
        'shift_factor': shift or None,
    }


def vq_config(options: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The inverse of `vq_options`."""
    return {
        '_class_name': 'VQModel',
        **_shared_config(options, scale),
        'num_vq_embeddings': options['codebook_size'],
        'vq_embed_dim': options['codebook_channels'],
    }


def _shared_config(options: Mapping[str, Any], scale: float) -> dict[str, Any]:
    levels = len(options['channel_multipliers'])
    return {
        'in_channels': options['image_channels'],
        'out_channels': options['image_channels'],
        'latent_channels': options['latent_channels'],
        'block_out_channels': [options['channels'] * multiplier for multiplier in options['channel_multipliers']],
        'down_block_types': ['DownEncoderBlock2D'] * levels,
        'up_block_types': ['UpDecoderBlock2D'] * levels,
        'layers_per_block': options['num_res_blocks'],
        'norm_num_groups': options['num_groups'],
        'mid_block_add_attention': options['middle_attention'],
        'scaling_factor': scale,
    }
