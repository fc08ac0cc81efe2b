"""Models in diffusers' layout: a folder with model_index.json and one folder per part, or one part alone.

What is read is kept with its config and the types of its tensors, so that it can be written back as it was.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from diffusion_jax.errors import UsageError
from diffusion_jax.interop import autoencoders, ddpm, dit, text_encoders
from diffusion_jax.interop.names import Place, Rename, export_params, import_params
from diffusion_jax.interop.tensors import TensorFiles, find_weights, read_json, save_tensors
from diffusion_jax.interop.unets import UNET_RENAME, unet_options
from diffusion_jax.models import AutoencoderKL, ConditionalUNet, DDPMUNet, DiT, functional
from diffusion_jax.models.clip_text import ClipText
from diffusion_jax.models.t5 import T5Encoder
from diffusion_jax.registry import lookup
from diffusion_jax.text import ClipTokenizer
from diffusion_jax.training.sharding import DEFAULT_RULES, make_mesh, param_shardings, put

Read = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Kind:
    """How models of one class of diffusers or transformers are read and written.

    Attributes:
      stem: of the name of their weights' file.
      build: arguments, rngs -> our module.
      options: config -> those arguments.
      read: (tensors, shapes, place=, dtype=) -> parameters.
      write: (parameters, names of the tensors there were, or None) -> float32 tensors by their names.
      layout: tensors -> arguments that not the config but they decide.
    """

    stem: str
    build: Callable[..., nnx.Module]
    options: Callable[[Mapping[str, Any]], dict[str, Any]]
    read: Read
    write: Callable[[Any, set[str] | None], dict[str, np.ndarray]]
    layout: Callable[[Any], dict[str, Any]] = lambda tensors: {}


def _named(rename_of: Callable[[Any], Rename], ignored: str = r'(?!)') -> dict[str, Callable]:
    """read and write of a module whose attributes bear the tensors' names; the names in a file decide on the rename."""

    def read(tensors, shapes, **options):
        return import_params(tensors, shapes, rename_of(tensors), ignored=ignored, **options)

    def write(params, names):
        return export_params(params, rename_of(names or set()))

    return {'read': read, 'write': write}


def _clip_options(projection: bool) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    return functools.partial(text_encoders.clip_options, projection=projection)


DIT = Kind('diffusion_pytorch_model', DiT, dit.dit_options, dit.read_dit, dit.write_dit, dit.dit_layout)

KINDS: dict[str, Kind] = {
    'UNet2DConditionModel': Kind(
        'diffusion_pytorch_model', ConditionalUNet, unet_options, **_named(lambda names: UNET_RENAME)
    ),
    'UNet2DModel': Kind('diffusion_pytorch_model', DDPMUNet, ddpm.ddpm_options, **_named(ddpm.ddpm_rename)),
    'DiTTransformer2DModel': DIT,
    'Transformer2DModel': DIT,  # what published ones call themselves
    'AutoencoderKL': Kind(
        'diffusion_pytorch_model',
        AutoencoderKL,
        autoencoders.autoencoder_options,
        **_named(autoencoders.autoencoder_rename),
    ),
    'CLIPTextModel': Kind(
        'model', ClipText, _clip_options(False), **_named(text_encoders.clip_rename, text_encoders.CLIP_IGNORED)
    ),
    'CLIPTextModelWithProjection': Kind(
        'model', ClipText, _clip_options(True), **_named(text_encoders.clip_rename, text_encoders.CLIP_IGNORED)
    ),
    'T5EncoderModel': Kind(
        'model',
        T5Encoder,
        text_encoders.t5_options,
        **_named(lambda names: text_encoders.T5_RENAME, text_encoders.T5_IGNORED),
    ),
}
"""By the class that a config or model_index.json names."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A network that was read.

    Attributes:
      kind: a key of `KINDS`.
      config: as it was read.
      apply, params: ours.
      dtypes: of its tensors, by their names in the file; None: all float32, by the names that are usual now.
    """

    kind: str
    config: dict[str, Any]
    apply: Callable[..., Any]
    params: Any
    dtypes: Mapping[str, str] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of our module."""
        return KINDS[self.kind].options(self.config)

    def tensors(self) -> dict[str, np.ndarray]:
        """As they are written: those that were read, of the type that they had."""
        import ml_dtypes

        written = KINDS[self.kind].write(self.params, None if self.dtypes is None else set(self.dtypes))
        types = self.dtypes or {}

        def typed(name: str) -> np.dtype:
            return np.dtype(ml_dtypes.bfloat16 if types.get(name) == 'bfloat16' else types.get(name, 'float32'))

        return {name: array.astype(typed(name), copy=False) for name, array in written.items()}


@dataclasses.dataclass(frozen=True)
class Folder:
    """All parts of a model in diffusers' layout.

    Attributes:
      index: model_index.json, or {} of a part that lies alone.
      parts: the networks, by the names of their folders.
      tokenizers, tokenizer_folders: what reads text, and where each was read from, to be copied if it is as it was.
      scheduler: its config; None if there is none.
    """

    index: dict[str, Any]
    parts: dict[str, Part]
    tokenizers: dict[str, ClipTokenizer] = dataclasses.field(default_factory=dict)
    tokenizer_folders: dict[str, Path] = dataclasses.field(default_factory=dict)
    scheduler: dict[str, Any] | None = None


LEFT_OUT = ('safety_checker', 'feature_extractor', 'image_encoder', 'watermark')
"""Parts of published folders that have no part in making images."""


def kind_of(config: Mapping[str, Any]) -> str:
    """The key of `KINDS` that a part's config names.

    Raises:
      UsageError: it is of a class that we do not read.
    """
    names = [config['_class_name']] if '_class_name' in config else config.get('architectures') or []
    if not names:
        raise UsageError('a config names its class as _class_name or in architectures; this one has neither.')
    lookup('class of a model', KINDS, names[0])
    return names[0]


def make_network(kind: str, config: Mapping[str, Any], dtype: str = 'float32', **layout: Any) -> tuple[Any, Callable]:
    """(shapes of the parameters, apply) of our module for a config and a file's layout, computing in `dtype`."""
    known = KINDS[kind]
    options = {**known.options(config), **layout, 'dtype': dtype}
    _, apply = functional(lambda rngs: known.build(**options, rngs=rngs))
    return apply.shapes, apply


def read_part(
    folder: str | Path,
    *,
    kind: str | None = None,
    variant: str | None = None,
    dtype: str = 'float32',
    mesh: Mesh | None = None,
    change: Callable[[TensorFiles], Mapping[str, np.ndarray]] | None = None,
) -> Part:
    """One network from a folder with config.json and its weights.

    Args:
      kind: what it is, if its config does not say.
      variant: of its weights: 'fp16', 'ema', ..; the plain ones by default, or the only ones.
      dtype: that it computes in, 'float32' or 'bfloat16'; its parameters are float32 either way.
      mesh: where the parameters live, split by the default sharding rules; each is put there as it is read.
      change: gives the tensors to read instead of those of the file, such as with a LoRA.

    Raises:
      UsageError: a file is missing, damaged or does not fit its config.
    """
    folder = Path(folder)
    config = read_json(folder / 'config.json')
    try:
        kind = kind or kind_of(config)
        shapes, apply = make_network(kind, config, dtype)
    except UsageError as error:
        raise UsageError(f'{folder / "config.json"}: {error}') from error
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UsageError(f'{folder / "config.json"} makes no {kind}: {error!r}') from error
    tensors = TensorFiles(find_weights(folder, KINDS[kind].stem, variant))
    if layout := KINDS[kind].layout(tensors):
        shapes, apply = make_network(kind, config, dtype, **layout)
    return part_of(kind, config, tensors, shapes, apply, mesh=mesh, change=change)


def part_of(
    kind: str,
    config: dict[str, Any],
    tensors: TensorFiles | Mapping[str, np.ndarray],
    shapes: Any,
    apply: Callable,
    *,
    mesh: Mesh | None = None,
    change: Callable[[Any], Mapping[str, np.ndarray]] | None = None,
) -> Part:
    """The part that these tensors make, read one at a time and put where they live."""
    read = tensors if change is None else change(tensors)
    params = KINDS[kind].read(read, shapes, place=placing(shapes, mesh or make_mesh()))
    types = {name: tensors.dtype(name) if hasattr(tensors, 'dtype') else str(tensors[name].dtype) for name in tensors}
    return Part(kind, config, apply, params, types)


def placing(shapes: Any, mesh: Mesh) -> Place:
    """What puts each parameter on the mesh, by the default sharding rules."""
    shardings = param_shardings(shapes, DEFAULT_RULES, mesh)

    def place(path: tuple[str, ...], array: np.ndarray) -> jax.Array:
        return put(array, functools.reduce(lambda node, key: node[key], path, shardings))

    return place


def read_folder(
    path: str | Path,
    *,
    variant: str | None = None,
    ema: bool = False,
    dtype: str = 'float32',
    mesh: Mesh | None = None,
    changes: Mapping[str, Callable] | None = None,
) -> Folder:
    """A model in diffusers' layout: with model_index.json, or a part alone (config.json and weights).

    Args:
      variant: of the weights, where a part has it; the plain ones where it has not.
      ema: the averaged weights of `unet_ema/`, where there is such a folder beside `unet/`.
      dtype, mesh: as of `read_part`.
      changes: part -> as `change` of `read_part`.

    Raises:
      UsageError: something is missing, damaged, does not fit its config, or is of a class that we do not read.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UsageError(f'there is no folder {path}.')
    read = functools.partial(read_part, dtype=dtype, mesh=mesh)
    if not (path / 'model_index.json').exists():
        if not (path / 'config.json').exists():
            raise UsageError(f'{path} holds neither model_index.json nor config.json: it is no model of diffusers.')
        part = read(path, variant=variant)
        scheduler = path / 'scheduler_config.json'
        config = read_json(scheduler) if scheduler.exists() else None
        return Folder({}, {_usual_name(part.kind): part}, scheduler=config)
    index = read_json(path / 'model_index.json')
    parts, tokenizers, folders, scheduler = {}, {}, {}, None
    for name, named in index.items():
        if name.startswith('_') or name in LEFT_OUT or not isinstance(named, list) or named in ([None, None], []):
            continue
        if Path(name).name != name or len(named) != 2:
            raise UsageError(f'{path / "model_index.json"} is damaged: {name!r} is {named!r}.')
        if name.startswith('tokenizer'):
            tokenizers[name], folders[name] = ClipTokenizer.from_folder(path / name), path / name
        elif name == 'scheduler':
            scheduler = {'_class_name': named[1], **read_json(_place_of(path, name, 'scheduler_config.json'))}
        else:
            lookup(f'class of {name} in {path / "model_index.json"}', KINDS, named[1])
            folder = _place_of(path, name, 'config.json').parent
            folder = path / f'{name}_ema' if ema and (path / f'{name}_ema').is_dir() else folder
            change = (changes or {}).get(name)
            parts[name] = read(folder, kind=named[1], variant=_variant_there(folder, named[1], variant), change=change)
    return Folder(index, parts, tokenizers, folders, scheduler)


def _place_of(path: Path, name: str, file: str) -> Path:
    """A file of a part: in the part's folder, or, where there is none, beside model_index.json, as of old models."""
    return path / file if not (path / name).is_dir() and (path / file).is_file() else path / name / file


def _variant_there(folder: Path, kind: str, variant: str | None) -> str | None:
    return variant if variant and list(folder.glob(f'{KINDS[kind].stem}*.{variant}.*')) else None


def _usual_name(kind: str) -> str:
    if KINDS[kind] is DIT:
        return 'transformer'
    names = {'AutoencoderKL': 'vae', 'UNet2DConditionModel': 'unet', 'UNet2DModel': 'unet'}
    return names.get(kind, 'text_encoder')


def write_part(folder: str | Path, part: Part, shard_bytes: int = 5 * 10**9) -> None:
    """Writes config.json and the weights, in shards with an index if they are larger than `shard_bytes`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem, tensors = KINDS[part.kind].stem, part.tensors()
    shards = _sharded(tensors, shard_bytes)
    if len(shards) == 1:
        save_tensors(folder / f'{stem}.safetensors', tensors)
    else:
        where = {}
        for number, names in enumerate(shards, 1):
            file = f'{stem}-{number:05}-of-{len(shards):05}.safetensors'
            save_tensors(folder / file, {name: tensors[name] for name in names})
            where |= dict.fromkeys(names, file)
        total = sum(array.nbytes for array in tensors.values())
        _write_json(folder / f'{stem}.safetensors.index.json', {'metadata': {'total_size': total}, 'weight_map': where})
    _write_json(folder / 'config.json', part.config)


def _sharded(tensors: Mapping[str, np.ndarray], limit: int) -> list[list[str]]:
    shards, size = [[]], 0
    for name, array in tensors.items():
        if shards[-1] and size + array.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += array.nbytes
    return shards


def check_new(path: Path) -> None:
    """A `UsageError` if there is a file at that path, or a folder that is not empty."""
    if path.is_file():
        raise UsageError(f'{path} is there already: nothing was written. Name a new one.')
    if path.exists() and any(path.iterdir()):
        raise UsageError(f'{path} is not empty: nothing was written. Name a new folder.')


def write_folder(path: str | Path, folder: Folder, shard_bytes: int = 5 * 10**9) -> None:
    """Writes a model in diffusers' layout; a part that lies alone without an index.

    Raises:
      UsageError: there is a model at that path already.
    """
    path = Path(path).expanduser()
    check_new(path)
    if not folder.index:
        (part,) = folder.parts.values()
        write_part(path, part, shard_bytes)
        if folder.scheduler is not None:
            _write_json(path / 'scheduler_config.json', folder.scheduler)
        return
    for name, part in folder.parts.items():
        write_part(path / name, part, shard_bytes)
    for name, tokenizer in folder.tokenizers.items():
        if name not in folder.tokenizer_folders:
            tokenizer.save(path / name)
    for name, source in folder.tokenizer_folders.items():
        (path / name).mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if file.suffix in ('.json', '.txt') and file.is_file():
                shutil.copyfile(file, path / name / file.name)
    if folder.scheduler is not None:
        _write_json(path / 'scheduler' / 'scheduler_config.json', folder.scheduler)
    _write_json(
        path / 'model_index.json', {**folder.index, **{name: [None, None] for name in LEFT_OUT if name in folder.index}}
    )


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix('.part')
    part.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n')
    part.replace(path)
