"""The tensors of a PyTorch file (`torch.save` of a state dict), read without PyTorch and without running anything.

Such a file is a pickle, and a pickle may call any function. This reader knows four names, and refuses the rest.
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.errors import UsageError

STORAGES = {
    'FloatStorage': np.dtype('<f4'),
    'DoubleStorage': np.dtype('<f8'),
    'HalfStorage': np.dtype('<f2'),
    'LongStorage': np.dtype('<i8'),
    'IntStorage': np.dtype('<i4'),
    'ByteStorage': np.dtype('u1'),
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage, offset, shape, strides, *_) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


KNOWN: dict[tuple[str, str], Any] = {
    ('collections', 'OrderedDict'): collections.OrderedDict,
    ('torch._utils', '_rebuild_tensor_v2'): _rebuild_tensor,
    ('torch._utils', '_rebuild_parameter'): lambda tensor, *_: tensor,
    **{('torch', name): dtype for name, dtype in STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f'it calls {module}.{name}, which a file of plain tensors does not')
        return KNOWN[module, name]

    def persistent_load(self, saved: tuple) -> _Storage:
        _, dtype, key, *_ = saved
        return _Storage(dtype, str(key))


def _materialised(tensors: Any, bytes_of: Callable[[str], bytes]) -> dict[str, np.ndarray]:
    if not isinstance(tensors, dict) or not all(isinstance(tensor, _Tensor) for tensor in tensors.values()):
        raise pickle.UnpicklingError('it is no state dict, which holds tensors by name')
    arrays = {}
    for name, tensor in tensors.items():
        dtype = tensor.storage.dtype
        flat = np.frombuffer(bytes_of(tensor.storage.key), dtype)
        last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
        if tensor.offset < 0 or min(tensor.strides, default=0) < 0:
            raise pickle.UnpicklingError(f'{name} begins before what is stored of it')
        if 0 not in tensor.shape and not 0 <= last < len(flat):
            raise pickle.UnpicklingError(f'{name} is larger than what is stored of it')
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        arrays[name] = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides).copy()
    return arrays


def _read_zip(content: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith('/data.pkl'))
        folder = pickled.removesuffix('data.pkl')
        tensors = _Unpickler(io.BytesIO(archive.read(pickled))).load()
        return _materialised(tensors, lambda key: archive.read(f'{folder}data/{key}'))


def _read_legacy(content: bytes) -> dict[str, np.ndarray]:
    """PyTorch's format before 1.6: pickles one after another, then each storage with its length before it."""
    file = io.BytesIO(content)
    if _Unpickler(file).load() != LEGACY_MAGIC:
        raise pickle.UnpicklingError('it does not begin as a PyTorch file does')
    _Unpickler(file).load(), _Unpickler(file).load()  # version, system
    tensors = _Unpickler(file).load()
    keys = _Unpickler(file).load()
    sizes = {tensor.storage.key: tensor.storage.dtype.itemsize for tensor in tensors.values()}
    stored = {}
    for key in map(str, keys):
        count = int.from_bytes(file.read(8), 'little')
        stored[key] = file.read(count * sizes[key])
    return _materialised(tensors, stored.__getitem__)


def read_torch_file(path: str | Path) -> dict[str, np.ndarray]:
    """The state dict in a .pth or .pt file (of any version of PyTorch), or in a .safetensors file.

    Raises:
      UsageError: there is no such file, or it is damaged, or holds anything but tensors by name.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UsageError(f'there is no weights file {path}.')
    content = path.read_bytes()
    try:
        if path.suffix == '.safetensors':
            from safetensors.numpy import load

            return load(content)
        return (_read_zip if zipfile.is_zipfile(io.BytesIO(content)) else _read_legacy)(content)
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise UsageError(f'{path} cannot be read as a file of PyTorch tensors: {error}.') from error
