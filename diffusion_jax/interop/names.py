"""Parameters of our modules <-> tensors of PyTorch's, by name.

Modules of `models` that published checkpoints are read into have their attributes named as PyTorch's tensors are. What
is left is said here once: a kernel is a weight with its axes in another order, a scale and an embedding are weights
too, and some layers lie in lists. A kernel is told from an embedding by its name, never by its shape.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from diffusion_jax.errors import UsageError
from diffusion_jax.interop.tensors import TensorFiles

Rename = Callable[[str], str]
Place = Callable[[tuple[str, ...], np.ndarray], jax.Array]
"""(path, array on the host) -> the array where it shall live."""

WEIGHTS = ('kernel', 'scale', 'embedding')

COMMON = (
    (r'\.to_out\.(weight|bias)$', r'.to_out.0.\1'),  # .1 is dropout, which has no tensors
    (r'\.ff\.proj\.', '.ff.net.0.proj.'),
    (r'\.ff\.out\.', '.ff.net.2.'),
)
"""(pattern, replacement) of names in every part of diffusers' models."""


def renamed(*rules: tuple[str, str]) -> Rename:
    """The function that applies such rules, after those common to all, one after the other."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in (*COMMON, *rules)]

    def rename(name: str) -> str:
        for pattern, replacement in compiled:
            name = pattern.sub(replacement, name)
        return name

    return rename


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, (*path, key))]


def torch_name(path: Sequence[str], rename: Rename) -> str:
    """'a.b.weight' of ('a', 'b', 'kernel')."""
    *parents, leaf = path
    return rename('.'.join([*parents, 'weight' if leaf in WEIGHTS else leaf]))


def to_torch_layout(path: Sequence[str], array: np.ndarray) -> np.ndarray:
    """HWIO -> OIHW and [in, out] -> [out, in] of a kernel; all else as it is."""
    if path[-1] != 'kernel':
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def from_torch_layout(path: Sequence[str], array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch_layout`."""
    if path[-1] != 'kernel':
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _torch_shape(path: Sequence[str], shape: tuple[int, ...]) -> tuple[int, ...]:
    if path[-1] != 'kernel':
        return tuple(shape)
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else tuple(reversed(shape))


def _on_device(path: tuple[str, ...], array: np.ndarray) -> jax.Array:
    return jax.device_put(array)


def import_params(
    tensors: TensorFiles | Mapping[str, np.ndarray],
    shapes: Any,
    rename: Rename,
    *,
    dtype: str = 'float32',
    place: Place = _on_device,
    ignored: str = r'(?!)',
) -> Any:
    """The parameters of a module from the tensors of its PyTorch twin, one at a time.

    Args:
      shapes: of the parameters: nested dicts of arrays or of `jax.ShapeDtypeStruct`.
      rename: name by our attributes -> name in the file.
      dtype: of the parameters on the device.
      place: puts an array where it shall live; on the default device by default.
      ignored: a pattern of names in the file that are no parameters (buffers that old versions wrote).

    Raises:
      UsageError: that names the tensors that are missing, left over, misshapen or of integers.
    """
    wanted = {torch_name(path, rename): path for path, _ in _leaves(shapes)}
    check_names(tensors, torch_shapes(shapes, rename), ignored)
    params: dict[str, Any] = {}
    for name, path in wanted.items():
        array = tensors[name]
        if not _is_float(array.dtype):
            raise UsageError(f'{name} in {_source(tensors)} is of {array.dtype}, and parameters are floats.')
        array = from_torch_layout(path, array).astype(_numpy_dtype(dtype), copy=False)
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = place(path, np.ascontiguousarray(array))
    return params


def torch_shapes(shapes: Any, rename: Rename) -> dict[str, tuple[int, ...]]:
    """Name in the file -> shape there, of such parameters, in their order."""
    return {torch_name(path, rename): _torch_shape(path, leaf.shape) for path, leaf in _leaves(shapes)}


def export_params(params: Any, rename: Rename, dtype: str = 'float32') -> dict[str, np.ndarray]:
    """The inverse of `import_params`: tensors by their names in the file."""
    return {
        torch_name(path, rename): np.ascontiguousarray(
            to_torch_layout(path, np.asarray(jax.device_get(leaf))).astype(_numpy_dtype(dtype), copy=False)
        )
        for path, leaf in _leaves(params)
    }


def check_names(
    tensors: TensorFiles | Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], ignored: str = r'(?!)'
) -> None:
    """A `UsageError` unless the tensors are those wanted, of their shapes."""

    def shape(name: str) -> tuple[int, ...]:
        return tensors.shape(name) if hasattr(tensors, 'shape') else tensors[name].shape

    have = {name for name in tensors if not re.fullmatch(ignored, name)}
    wrong = [f'{name} is missing' for name in sorted(shapes.keys() - have)]
    wrong += [f'{name} is no part of this model' for name in sorted(have - shapes.keys())]
    wrong += [
        f'{name} is {shape(name)}, not {shapes[name]}'
        for name in sorted(have & shapes.keys())
        if shape(name) != shapes[name]
    ]
    if wrong:
        more = f' (and {len(wrong) - 6} more)' if len(wrong) > 6 else ''
        raise UsageError(f'{_source(tensors)} does not fit its config: {"; ".join(wrong[:6])}{more}.')


def _source(tensors: Any) -> str:
    return getattr(tensors, 'source', 'the checkpoint')


def _numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == 'bfloat16' else name)


def _is_float(dtype: np.dtype) -> bool:
    return np.issubdtype(dtype, np.floating) or dtype == ml_dtypes.bfloat16
