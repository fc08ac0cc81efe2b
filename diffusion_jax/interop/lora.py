"""Low-rank changes of weights (Hu et al. 2022, "LoRA"), added to the weights as they are read.

Files as diffusers (with and without PEFT) and kohya's scripts write them.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from diffusion_jax.errors import UsageError
from diffusion_jax.interop.tensors import TensorFiles

PARTS = ('unet', 'transformer', 'text_encoder', 'text_encoder_2')
KOHYA_PARTS = {'unet': 'unet', 'te': 'text_encoder', 'te1': 'text_encoder', 'te2': 'text_encoder_2'}
ROLES = {'lora_A': 'down', 'lora_B': 'up', 'lora_down': 'down', 'lora_up': 'up', 'down': 'down', 'up': 'up'}

PATTERNS = (
    re.compile(r'lora_(?P<kohya>unet|te|te1|te2)_(?P<base>.+)\.(?P<role>lora_down|lora_up)\.weight'),
    re.compile(r'lora_(?P<kohya>unet|te|te1|te2)_(?P<base>.+)\.(?P<alpha>alpha)'),
    re.compile(r'(?P<base>.+)\.processor\.(?P<layer>to_[qkv]|to_out)_lora\.(?P<role>down|up)\.weight'),
    re.compile(r'(?P<base>.+)\.lora(_linear_layer)?\.(?P<role>down|up)\.weight'),
    re.compile(r'(?P<base>.+)\.(?P<role>lora_A|lora_B)(\.default)?\.weight'),
    re.compile(r'(?P<base>.+)\.(?P<alpha>alpha)'),
)


@dataclasses.dataclass
class Change:
    """Of one weight, in the layout of its file: scale * up @ down, down [r, in, ..], up [out, r, ..]."""

    down: np.ndarray | None = None
    up: np.ndarray | None = None
    alpha: float | None = None

    def of(self, weight: np.ndarray) -> np.ndarray:
        """What is added to the weight at scale 1.

        Raises:
          UsageError: it is of another shape.
        """
        down, up = (np.asarray(factor, np.float32) for factor in (self.down, self.up))
        rank = down.shape[0]
        product = up.reshape(len(up), -1) @ down.reshape(rank, -1) if up.size == len(up) * rank else None
        if product is None or product.size != weight.size or len(product) != len(weight):
            raise UsageError(f'a change of {up.shape} x {down.shape} does not fit a weight of {weight.shape}')
        return product.reshape(weight.shape) * (1.0 if self.alpha is None else self.alpha / rank)


class Changed(Mapping[str, np.ndarray]):
    """Tensors, some of them with changes added as they are read."""

    def __init__(self, tensors: TensorFiles, changes: Mapping[str, list[tuple[Change, float]]]):
        self._tensors, self._changes = tensors, changes
        self.source = tensors.source

    def __getitem__(self, name: str) -> np.ndarray:
        weight = self._tensors[name]
        if name not in self._changes:
            return weight
        weight = weight.astype(np.float32)
        for change, scale in self._changes[name]:
            try:
                weight = weight + scale * change.of(weight)
            except UsageError as error:
                raise UsageError(f'{name}: {error}.') from None
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(name)


def read_lora(path: str | Path) -> dict[str, dict[str, Change]]:
    """Part of the model -> name of the weight, with '_' for '.' -> its change.

    Raises:
      UsageError: the file is damaged, or holds something else than such changes.
    """
    path = Path(path).expanduser()
    tensors = TensorFiles([path])
    found: dict[str, dict[str, Change]] = {}
    strange = []
    for name in tensors:
        match = next((match for pattern in PATTERNS if (match := pattern.fullmatch(name))), None)
        if match is None:
            strange.append(name)
            continue
        words = match.groupdict()
        part, base = _part_and_base(words)
        change = found.setdefault(part, {}).setdefault(base, Change())
        if words.get('alpha'):
            change.alpha = float(tensors[name])
        else:
            setattr(change, ROLES[words['role']], tensors[name])
    if strange:
        raise UsageError(
            f'{path} holds tensors that are no low-rank changes as diffusers or kohya write them: '
            f'{", ".join(sorted(strange)[:4])}{", .." if len(strange) > 4 else ""}. DoRA, LoHa and LoKr are not '
            'supported.'
        )
    if not found:
        raise UsageError(f'{path} holds no low-rank changes.')
    for part, changes in found.items():
        for base, change in changes.items():
            if change.down is None or change.up is None:
                raise UsageError(f'{path}: {part}.{base} has only one of its two factors.')
    _add_alphas(path, found)
    return found


def _part_and_base(words: Mapping[str, str | None]) -> tuple[str, str]:
    base = words['base'] + (f'.{words["layer"]}' if words.get('layer') else '')
    if words.get('kohya'):
        part = KOHYA_PARTS[words['kohya']]
    else:
        first, _, rest = base.partition('.')
        part, base = (first, rest) if first in PARTS else ('unet', base)
    base = base.replace('.', '_')
    return part, re.sub(r'_to_out$', '_to_out_0', base)


def _add_alphas(path: Path, found: Mapping[str, Mapping[str, Change]]) -> None:
    """PEFT's files have no alpha beside each change, but settings of all of them in the header."""
    from safetensors import safe_open

    with safe_open(path, 'numpy') as file:
        text = (file.metadata() or {}).get('lora_adapter_metadata')
    if text is None:
        return
    try:
        settings = json.loads(text)
        for part, changes in found.items():
            alpha = settings.get(f'{part}.lora_alpha')
            patterns = settings.get(f'{part}.alpha_pattern') or {}
            if settings.get(f'{part}.use_dora'):
                raise UsageError(f'{path}: DoRA is not supported.')
            for base, change in changes.items():
                special = [value for key, value in patterns.items() if base.endswith(key.replace('.', '_'))]
                if change.alpha is None and (special or alpha is not None):
                    change.alpha = float(special[0] if special else alpha)
                    if settings.get(f'{part}.use_rslora'):
                        change.alpha *= len(change.down) ** 0.5
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f'{path}: the settings of PEFT in its header are damaged: {error!r}') from error


def lora_changes(loras: Sequence[tuple[str | Path, float]]) -> dict[str, Callable[[TensorFiles], Changed]]:
    """Part of the model -> what changes its tensors: `changes` of `folders.read_folder`.

    Args:
      loras: (file, scale), of which any number are added.

    Raises:
      UsageError: as `read_lora`; and when the tensors are read, for changes of weights that are not there.
    """
    of_part: dict[str, list[tuple[Path, str, Change, float]]] = {}
    for path, scale in loras:
        for part, changes in read_lora(path).items():
            of_part.setdefault(part, []).extend((Path(path), base, change, scale) for base, change in changes.items())

    def changing(part: str) -> Callable[[TensorFiles], Changed]:
        def change(tensors: TensorFiles) -> Changed:
            names = _by_flat_name(tensors)
            changes: dict[str, list[tuple[Change, float]]] = {}
            lost: list[tuple[Path, str]] = []
            for path, base, each, scale in of_part[part]:
                if base in names:
                    changes.setdefault(names[base], []).append((each, scale))
                else:
                    lost.append((path, base))
            if lost:
                raise UsageError(
                    f'{lost[0][0]} changes {len(lost)} weights that {tensors.source} does not have, such as '
                    f'{part}.{lost[0][1]}: it is of another model.'
                )
            return Changed(tensors, changes)

        return change

    return {part: changing(part) for part in of_part}


def _by_flat_name(tensors: TensorFiles) -> dict[str, str]:
    """'a_b' -> 'a.b.weight', with and without the prefix that CLIP's text models have in some files."""
    names = {}
    for name in tensors:
        if name.endswith('.weight'):
            flat = name.removesuffix('.weight').replace('.', '_')
            names[flat] = name
            prefix = 'text_model_'
            names.setdefault(flat.removeprefix(prefix) if flat.startswith(prefix) else prefix + flat, name)
    return names
