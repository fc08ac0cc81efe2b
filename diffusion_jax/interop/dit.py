"""DiT: diffusers' config and names <-> ours.

In diffusers every block has an embedder of time and label of its own, and the output has the first block's. In the
paper's model, and in files made from it, all of them are copies of one: those are read as one.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.errors import UsageError
from diffusion_jax.interop.names import export_params, import_params, renamed
from diffusion_jax.interop.tensors import TensorFiles
from diffusion_jax.interop.unets import check_only

DIT_RENAME = renamed(
    (r'^patch_embed\.', 'pos_embed.proj.'),
    (r'^embedders\.(\d+)\.', r'transformer_blocks.\1.norm1.emb.'),
    (r'\.class_embedder\.', '.class_embedder.embedding_table.'),
    (r'\.modulation\.', '.norm1.linear.'),
)

EMBEDDER = re.compile(r'transformer_blocks\.(\d+)\.norm1\.emb\.(.+)')
COPIES = r'transformer_blocks\.[1-9]\d*\.norm1\.emb\..+'

ONLY: dict[str, tuple[Any, ...]] = {
    'norm_type': ('ada_norm_zero',),
    'activation_fn': ('gelu-approximate',),
    'attention_bias': (True,),
    'norm_elementwise_affine': (False,),
    'upcast_attention': (False,),
}
"""Keys of a config that would compute something else -> the values that we do, the first being the default."""

WHAT = 'a DiTTransformer2DModel'


def dit_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' DiTTransformer2DModel config -> arguments of `models.DiT`.

    Published ones call themselves Transformer2DModel, of which one with norm_type='ada_norm_zero' is a DiT.

    Raises:
      UsageError: it asks for something that `DiT` does not compute; the message names the key.
    """
    if config.get('_class_name') == 'Transformer2DModel':
        config = {'norm_type': 'layer_norm', **config}
    check_only(config, ONLY, WHAT)
    channels_in = config.get('in_channels', 4)
    channels_out = config.get('out_channels')
    channels_out = channels_in if channels_out is None else channels_out
    if channels_out not in (channels_in, 2 * channels_in):
        raise UsageError(
            f'{WHAT} with in_channels={channels_in} and out_channels={channels_out} is not supported: as many, or '
            'twice as many for a learned variance.'
        )
    classes = config.get('num_embeds_ada_norm', 1000)
    if not isinstance(classes, int) or classes < 1:
        raise UsageError(f'{WHAT} with num_embeds_ada_norm={classes!r} is not supported: a number of classes.')
    heads = config.get('num_attention_heads', 16)
    return {
        'resolution': config.get('sample_size', 32),
        'image_channels': channels_in,
        'patch_size': config.get('patch_size', 2),
        'channels': heads * config.get('attention_head_dim', 72),
        'num_layers': config.get('num_layers', 28),
        'num_heads': heads,
        'dropout': config.get('dropout', 0.0),
        'epsilon': config.get('norm_eps', 1e-5),
        'learned_variance': channels_out != channels_in,
        'num_classes': classes,
    }


def dit_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `dit_options`: what diffusers builds the same network from.

    Raises:
      UsageError: diffusers has no such DiT: one without labels.
    """
    if not options.get('num_classes'):
        raise UsageError('diffusers has no DiT without labels: num_classes must be 1 or more.')
    return {
        '_class_name': 'DiTTransformer2DModel',
        'sample_size': options['resolution'],
        'in_channels': options['image_channels'],
        'out_channels': options['image_channels'] * (1 + options.get('learned_variance', False)),
        'patch_size': options['patch_size'],
        'num_attention_heads': options['num_heads'],
        'attention_head_dim': options['channels'] // options['num_heads'],
        'num_layers': options['num_layers'],
        'dropout': options.get('dropout', 0.0),
        'norm_eps': options.get('epsilon', 1e-6),
        'num_embeds_ada_norm': options['num_classes'],
        'norm_type': 'ada_norm_zero',
        'activation_fn': 'gelu-approximate',
        'attention_bias': True,
        'norm_elementwise_affine': False,
    }


def dit_layout(tensors: TensorFiles | Mapping[str, np.ndarray]) -> dict[str, bool]:
    """{'shared_embedder': whether every block's embedder is there and a copy of the first's}."""
    blocks = {match[1] for name in tensors if (match := re.match(r'transformer_blocks\.(\d+)\.', name))}
    first, others = {}, []
    for name in tensors:
        if match := EMBEDDER.fullmatch(name):
            first |= {match[2]: name} if match[1] == '0' else {}
            others += [] if match[1] == '0' else [(match[2], name)]
    complete = len(others) == len(first) * max(len(blocks) - 1, 0)
    shared = complete and all(
        leaf in first and _bits(tensors[name]) == _bits(tensors[first[leaf]]) for leaf, name in others
    )
    return {'shared_embedder': shared}


def _bits(array: np.ndarray) -> tuple[Any, ...]:
    return array.dtype, array.shape, array.tobytes()


def read_dit(tensors: TensorFiles | Mapping[str, np.ndarray], shapes: Any, **options: Any) -> Any:
    """`import_params` of a DiT; one with a shared embedder has it of the first block.

    Raises:
      UsageError: that names the tensors that do not fit, or of embedders that differ where one is to be shared.
    """
    shared = len(shapes['embedders']) < len(shapes['transformer_blocks'])
    if shared and not dit_layout(tensors)['shared_embedder']:
        raise UsageError("the blocks' embedders of time and label are no copies of one: set shared_embedder=False.")
    return import_params(tensors, shapes, DIT_RENAME, ignored=COPIES if shared else r'(?!)', **options)


def write_dit(params: Any, names: set[str] | None = None) -> dict[str, np.ndarray]:
    """The inverse of `read_dit`: float32 tensors by their names, a shared embedder once for each block."""
    tensors = export_params(params, DIT_RENAME)
    if len(params['embedders']) == 1:
        embedder = {match[2]: array for name, array in tensors.items() if (match := EMBEDDER.fullmatch(name))}
        for number in range(1, len(params['transformer_blocks'])):
            tensors |= {f'transformer_blocks.{number}.norm1.emb.{leaf}': array for leaf, array in embedder.items()}
    return tensors
