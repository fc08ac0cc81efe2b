"""Text encoders of transformers: their configs as arguments of our modules, and their names of tensors."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from diffusion_jax.errors import UsageError
from diffusion_jax.interop.names import Rename, renamed
from diffusion_jax.models.blocks import ACTIVATIONS
from diffusion_jax.models.clip_text import ClipText
from diffusion_jax.registry import parameters_of, unknown

CLIP_PREFIX = 'text_model.'
CLIP_IGNORED = r'(?:.*\.)?position_ids'
"""A buffer that transformers wrote until 4.31."""
T5_IGNORED = r'encoder\.embed_tokens\.weight'
"""The same table as `shared`."""

T5_RENAME: Rename = renamed()

_CLIP_KEYS = {
    'vocab_size': ('vocab_size', 49_408),
    'length': ('max_position_embeddings', 77),
    'features': ('hidden_size', 512),
    'inner_features': ('intermediate_size', 2048),
    'num_layers': ('num_hidden_layers', 12),
    'num_heads': ('num_attention_heads', 8),
}
_T5_KEYS = {
    'vocab_size': ('vocab_size', 32_128),
    'features': ('d_model', 512),
    'head_channels': ('d_kv', 64),
    'inner_features': ('d_ff', 2048),
    'num_layers': ('num_layers', 6),
    'num_heads': ('num_heads', 8),
    'num_buckets': ('relative_attention_num_buckets', 32),
    'max_distance': ('relative_attention_max_distance', 128),
}
"""Our argument -> its key in a config.json, and transformers' value where that is absent."""
_CLIP_END = 49_407
_WRONG_END = 2
"""What configs from before transformers 4.31 have for the end's id. It means: the greatest id is the end."""


def clip_options(config: Mapping[str, Any], projection: bool | None = None) -> dict[str, Any]:
    """Arguments of `ClipText` from the config.json of a CLIPTextModel or CLIPTextModelWithProjection.

    Args:
      config: as read from the file; an absent key means transformers' default.
      projection: whether the model ends in one, where that is known from elsewhere, as from the tensors' names; by
        default what `architectures` says.

    Raises:
      UsageError: it is of another model, or has a value that cannot be.
    """
    _check_type(config, 'clip_text_model')
    options = _integers(config, _CLIP_KEYS)
    activation = config.get('hidden_act', 'quick_gelu')
    if activation not in ACTIVATIONS:
        raise unknown('hidden_act', activation, ACTIVATIONS)
    if projection is None:
        projection = 'CLIPTextModelWithProjection' in _names(config)
    width = _integer(config, 'projection_dim', 512) if projection else 0
    end = _integer(config, 'eos_token_id', _CLIP_END, least=0)
    pool = {'pool': 'last'} if end == _WRONG_END else {'pool': 'first_end', 'end_id': end}
    epsilon = _epsilon(config, 'layer_norm_eps', 1e-5)
    return {**options, 'activation': activation, 'epsilon': epsilon, 'projection_features': width, **pool}


def clip_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that transformers reads a `ClipText` of such arguments from; the inverse of `clip_options`.

    Raises:
      UsageError: no config can say it: an end_id of 2 with pool='first_end'.
    """
    defaults = {name: parameter.default for name, parameter in parameters_of(ClipText).items()}
    options = {**defaults, **options}
    if options['pool'] == 'first_end' and options['end_id'] == _WRONG_END:
        raise UsageError(
            f'an end_id of {_WRONG_END} with pool="first_end" has no config in transformers, to which an eos_token_id '
            f'of {_WRONG_END} means pool="last".'
        )
    width = options['projection_features']
    return {
        'architectures': ['CLIPTextModelWithProjection' if width else 'CLIPTextModel'],
        'model_type': 'clip_text_model',
        **{key: options[name] for name, (key, _) in _CLIP_KEYS.items()},
        'hidden_act': options['activation'],
        'layer_norm_eps': options['epsilon'],
        'projection_dim': width or options['features'],
        'eos_token_id': _WRONG_END if options['pool'] == 'last' else options['end_id'],
        'attention_dropout': 0.0,
    }


def t5_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `T5Encoder` from the config.json of a T5EncoderModel, or of a whole T5.

    Args:
      config: as read from the file; an absent key means transformers' default.

    Raises:
      UsageError: it is of another model, or has a value that cannot be.
    """
    _check_type(config, 't5')
    projection = config.get('feed_forward_proj', 'relu')
    gate, _, name = projection.rpartition('-') if isinstance(projection, str) else ('?', '', '')
    # A name that does not say which GELU it is: with a gate it always was the approximate one.
    activation = 'gelu_new' if projection == 'gated-gelu' else name
    if gate not in ('', 'gated') or activation not in ACTIVATIONS:
        raise unknown(
            'feed_forward_proj', projection, [f'{gate}{name}' for gate in ('', 'gated-') for name in ACTIVATIONS]
        )
    return {
        **_integers(config, _T5_KEYS),
        'activation': activation,
        'gated': gate == 'gated',
        'epsilon': _epsilon(config, 'layer_norm_epsilon', 1e-6),
    }


def clip_rename(tensors: Iterable[str], prefix: str | None = None) -> Rename:
    """The function to the names in a file of a CLIP text model, for `import_params` and `export_params`.

    Files of CLIPTextModel have `text_model.` before each up to transformers 5.5, and not from 5.6 on; files of
    CLIPTextModelWithProjection always have it.

    Args:
      tensors: names in the file (a `TensorFiles` is one).
      prefix: the prefix, for names yet to be written: see `CLIP_PREFIX`.
    """
    if prefix is None:
        prefix = CLIP_PREFIX if any(name.startswith(CLIP_PREFIX) for name in tensors) else ''
    return renamed((r'^(?!text_projection\.)', prefix))


def _check_type(config: Mapping[str, Any], wanted: str) -> None:
    found = config.get('model_type', wanted)
    if found != wanted:
        raise UsageError(
            f'unknown model_type {str(found)[:80]!r} of a text encoder: this one is read from {wanted!r}. Name the '
            'folder text_encoder of a model, and the class that its model_index.json says.'
        )


def _names(config: Mapping[str, Any]) -> list[str]:
    names = config.get('architectures')
    return names if isinstance(names, list) else []


def _integers(config: Mapping[str, Any], keys: Mapping[str, tuple[str, int]]) -> dict[str, int]:
    return {name: _integer(config, key, default) for name, (key, default) in keys.items()}


def _integer(config: Mapping[str, Any], key: str, default: int, least: int = 1) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        raise UsageError(f'{key} of a text encoder must be an integer from {least} on, got {str(value)[:80]!r}.')
    return value


def _epsilon(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1 or not math.isfinite(value):
        raise UsageError(f'{key} of a text encoder must be a number between 0 and 1, got {str(value)[:80]!r}.')
    return float(value)
