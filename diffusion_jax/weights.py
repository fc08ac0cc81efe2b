"""Parameters in one safetensors file, with what is needed to build their network in its metadata.

Nothing in such a file is ever executed, and it opens without this package.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax.errors import UsageError

DTYPES = ('float16', 'float32')


def _flat(params: Any, prefix: str = '') -> dict[str, np.ndarray]:
    if not isinstance(params, dict):
        return {prefix[:-1]: np.asarray(params)}
    return {name: leaf for key, value in params.items() for name, leaf in _flat(value, f'{prefix}{key}.').items()}


def save_weights(path: str | Path, params: Any, metadata: dict[str, Any], dtype: str = 'float32') -> None:
    """Writes parameters (nested dicts of arrays), complete or not at all.

    Args:
      metadata: anything that JSON holds.
      dtype: 'float32', or 'float16' for half the size.

    Raises:
      UsageError: an unknown dtype, or a value that it cannot hold.
    """
    from safetensors.numpy import save

    if dtype not in DTYPES:
        raise UsageError(f'dtype must be one of {", ".join(DTYPES)}, got {dtype!r}.')
    tensors = {}
    for name, leaf in _flat(params).items():
        with np.errstate(over='ignore'):
            tensors[name] = np.ascontiguousarray(leaf.astype(dtype))
        if not np.isfinite(tensors[name]).all():
            raise UsageError(f'{name} has values that {dtype} cannot hold, or is not finite: nothing was written.')
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix('.part')
    part.write_bytes(save(tensors, {key: json.dumps(value) for key, value in metadata.items()}))
    part.replace(path)


def load_weights(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters as nested dicts of float32 arrays, metadata) that `save_weights` wrote.

    Raises:
      UsageError: there is no such file, or it is damaged or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path).expanduser()
    if not path.is_file():
        raise UsageError(f'there is no weights file {path}.')
    params: dict[str, Any] = {}
    try:
        with safe_open(path, 'numpy') as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            for name in file.keys():  # noqa: SIM118 (not a dict)
                *parents, last = name.split('.')
                node = params
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = file.get_tensor(name).astype(np.float32)
    except (SafetensorError, json.JSONDecodeError, TypeError, AttributeError, OSError) as error:
        raise UsageError(f'{path} is no weights file of this library, or is damaged: {error}') from error
    return params, metadata


def check_shapes(path: str | Path, params: Any, expected: Any) -> None:
    """A `UsageError` that names what is missing, left over or of another shape than in `expected`."""
    have = {name: leaf.shape for name, leaf in _flat(params).items()}
    want = {jax.tree_util.keystr(key, simple=True, separator='.'): leaf.shape for key, leaf in _leaves(expected)}
    wrong = [f'{name} is missing' for name in sorted(want.keys() - have.keys())]
    wrong += [f'{name} is not of this network' for name in sorted(have.keys() - want.keys())]
    wrong += [f'{k} is {have[k]}, not {want[k]}' for k in sorted(have.keys() & want.keys()) if have[k] != want[k]]
    if wrong:
        more = f' (and {len(wrong) - 5} more)' if len(wrong) > 5 else ''
        raise UsageError(f'{path} does not fit its network: {"; ".join(wrong[:5])}{more}.')


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree.leaves_with_path(tree)


def sha256_of(path: str | Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
