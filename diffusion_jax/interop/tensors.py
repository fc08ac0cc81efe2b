"""Tensors of PyTorch checkpoints, read from safetensors files one at a time, and written so.

Nothing pickled is ever opened.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.errors import UsageError

DTYPES = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16', 'I64': 'int64', 'I32': 'int32'}
"""What a tensor may be of, by safetensors' names."""

FLOATS = ('float32', 'float16', 'bfloat16')
"""What parameters may be written as."""


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of one or more safetensors files by name; each is read when it is asked for.

    Raises:
      UsageError: a file is missing, damaged or of another kind, or two of them hold a tensor of one name.
    """

    def __init__(self, paths: list[Path]):
        from safetensors import SafetensorError, safe_open

        self._where: dict[str, Any] = {}
        self._slices: dict[str, tuple[tuple[int, ...], str]] = {}
        self.source = ', '.join(map(str, paths))
        self.metadata: dict[str, str] = {}
        for path in paths:
            if not path.is_file():
                raise UsageError(f'there is no file {path}.')
            try:
                file = safe_open(path, 'numpy')
                self.metadata |= file.metadata() or {}
                names = list(file.keys())
                for name in names:
                    if name in self._where:
                        raise UsageError(f'{path} holds {name}, which another file of the same model holds as well.')
                    part = file.get_slice(name)
                    self._where[name] = file
                    self._slices[name] = (tuple(part.get_shape()), part.get_dtype())
            except (SafetensorError, OSError, ValueError, OverflowError) as error:
                if isinstance(error, UsageError):
                    raise
                raise UsageError(f'{path} is no safetensors file, or is damaged: {error}') from error

    def __getitem__(self, name: str) -> np.ndarray:
        from safetensors import SafetensorError

        file = self._where[name]
        self.dtype(name)
        try:
            return file.get_tensor(name)
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise UsageError(f'{name} in {self.source} cannot be read: {error}') from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        return self._slices[name][0]

    def dtype(self, name: str) -> str:
        """One of `DTYPES`' values.

        Raises:
          UsageError: it is something else.
        """
        stored = self._slices[name][1]
        if stored not in DTYPES:
            raise UsageError(f'{name} in {self.source} is of type {stored}; readable are {", ".join(DTYPES)}.')
        return DTYPES[stored]


def find_weights(folder: str | Path, stem: str, variant: str | None = None) -> list[Path]:
    """The safetensors files of one part of a model: `STEM[.VARIANT].safetensors`, or the shards of an index.

    Without a variant, and where there is none without, the only one there is is taken.

    Raises:
      UsageError: there is none, or an index names files out of its folder.
    """
    folder = Path(folder)
    found = _variants(folder, stem)
    if variant is None and None not in found and len(found) == 1:
        variant = next(iter(found))
    if variant not in found:
        pickled = sorted(path.name for path in folder.glob('*.bin')) if folder.is_dir() else []
        hint = f' Only pickled ones are ({pickled[0]}), which are never opened.' if pickled and not found else ''
        there = ', '.join(str(name) for name in found) or 'none'
        raise UsageError(
            f'{folder} holds no {stem}{f".{variant}" if variant else ""}.safetensors (variants there: {there}).{hint}'
        )
    path = found[variant]
    return _shards(path) if path.suffix == '.json' else [path]


def _variants(folder: Path, stem: str) -> dict[str | None, Path]:
    """Variant (None: the plain one) -> its file or its index."""
    found: dict[str | None, Path] = {}
    for path in sorted(folder.glob(f'{stem}.*')):
        words = path.name.removeprefix(stem).strip('.').split('.')
        if words[0].startswith(('safetensors-', 'fp16-')) or '-of-' in path.name:
            continue
        if words[-1] == 'safetensors':
            variant = words[:-1]
        elif words[-2:] == ['index', 'json'] and words[0] == 'safetensors':
            variant = words[1:-2]
        else:
            continue
        if len(variant) <= 1:
            found[variant[0] if variant else None] = path
    return found


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())['weight_map'].values()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise UsageError(f'{index} is damaged: {error!r}') from error
    for name in names:
        if not isinstance(name, str) or not name.endswith('.safetensors') or Path(name).name != name:
            raise UsageError(f'{index} names a file {name!r}, which is not the plain name of a .safetensors beside it.')
    return [index.parent / name for name in names]


def save_tensors(
    path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one safetensors file, complete or not at all."""
    from safetensors.numpy import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.part')
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, part, {'format': 'pt', **(metadata or {})})
    part.replace(path)


def read_json(path: str | Path) -> dict[str, Any]:
    """An object in a JSON file.

    Raises:
      UsageError: there is no such file, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f'there is no file {path}.')
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f'{path} is no JSON: {error}') from error
    if not isinstance(value, dict):
        raise UsageError(f'{path} holds no JSON object.')
    return value
