"""A trained model as one safetensors file: parameters, the config of its training, and what it knows of its data.

Some such files ship with the package: `pretrained('fashion_mnist')` samples at once, with no training and no network.
"""

import dataclasses
import functools
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion_jax.config import flatten, with_defaults
from diffusion_jax.errors import UsageError
from diffusion_jax.experiment import DataInfo, Experiment, make_experiment, read_record
from diffusion_jax.models.functional import Params
from diffusion_jax.pipelines.images import ImagePipeline
from diffusion_jax.pipelines.parts import KEPT, Parts, pipeline_of, read_parts
from diffusion_jax.registry import unknown
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.sharding import make_mesh, param_shardings, put, replicated, with_shardings
from diffusion_jax.weights import check_shapes, load_weights, save_weights

MODEL = 'diffusion'
"""`kind` in the metadata of a model file."""

SHIPPED = Path(__file__).parent.parent / 'shipped'
PREFIX = 'pretrained:'

MATTERS = ('model.', 'schedule.', 'text.', 'loss.prediction', 'class_conditional')
"""Keys of a config that decide what a model's parameters mean."""


def save_model(
    path: str | Path, params: Params, config: ConfigDict, info: DataInfo, step: int, ema: bool, dtype: str = 'float32'
) -> None:
    """Writes a model file.

    Raises:
      UsageError: `weights.save_weights` says when.
    """
    metadata = {
        'kind': MODEL,
        'config': config.to_dict(),
        'data': dataclasses.asdict(info),
        'step': step,
        'ema': ema,
    }
    save_weights(path, params, metadata, dtype)


def load_model(path: str | Path) -> tuple[Experiment, Params, ConfigDict, int]:
    """(experiment, parameters on the host, config, step) of a model file.

    Raises:
      UsageError: there is no such file, it is damaged, or it holds something else.
    """
    params, metadata = load_weights(path)
    if metadata.get('kind') != MODEL:
        raise UsageError(
            f'{path} holds no diffusion model (but {metadata.get("kind", "weights without a kind")!r}): '
            '--mode=export writes one.'
        )
    config = ConfigDict(with_defaults(metadata['config']))
    experiment = make_experiment(config, DataInfo.of(metadata['data']))
    check_shapes(path, params, jax.eval_shape(experiment.init, jax.random.key(0)))
    return experiment, params, config, metadata['step']


def shipped_models() -> list[str]:
    """The names that `pretrained` takes."""
    others = ('_classifier', '_autoencoder')
    return sorted(path.stem for path in SHIPPED.glob('*.safetensors') if not path.stem.endswith(others))


def shipped_path(name: str) -> Path:
    if name not in shipped_models():
        raise unknown('pretrained model', name, shipped_models())
    return SHIPPED / f'{name}.safetensors'


def pretrained(name: str, mesh: Mesh | None = None) -> ImagePipeline:
    """A model that ships with the package, or one of yours in a file, ready to sample.

        images = pretrained('fashion_mnist')(16, guidance_scale=2.0).images

    Args:
      name: 'digits' (8x8) or 'fashion_mnist' (28x28), both class-conditional; how each was made and what it was
        measured to reach is in `diffusion_jax/shipped/NAME.md`. Or the path of a .safetensors file of --mode=export.
      mesh: the devices to sample on; all by default.

    Raises:
      UsageError: there is no model of that name, or the file holds none.
    """
    path = Path(name) if str(name).endswith('.safetensors') else shipped_path(name)
    experiment, params, config, _ = load_model(path) if path == Path(name) else load_shipped(name)
    return pipeline_of(experiment, params, mesh, parts_of_file(path, config, experiment.data, mesh))


def autoencoder_beside(path: str | Path) -> Path:
    """Where a model's file has its autoencoder: MODEL.safetensors in MODEL_autoencoder.safetensors."""
    path = Path(path)
    return path.with_name(f'{path.stem}_autoencoder.safetensors')


def parts_of_file(path: Path, config: ConfigDict, info: DataInfo, mesh: Mesh | None) -> Parts:
    """What a model's file needs besides: its autoencoder lies beside it, or is where its config says."""
    return read_parts(config, info, mesh, autoencoder_beside(path))


@functools.cache
def load_shipped(name: str) -> tuple[Experiment, Params, ConfigDict, int]:
    """Once: another time the network is the same function, and what was compiled for it is found again."""
    return load_model(shipped_path(name))


def _check_same_model(config: ConfigDict, theirs: ConfigDict, source: str) -> None:
    if config.model.name is None:  # whatever it is
        return
    ours, theirs = flatten(config.to_dict()), flatten(theirs.to_dict())
    # How a network is computed is not what it is.
    keys = (key for key in ours.keys() | theirs.keys() if key.startswith(MATTERS) and key not in ('model.remat',))
    changed = [
        f'{key}: {theirs.get(key, "(absent)")!r} -> {ours.get(key, "(absent)")!r}'
        for key in sorted(keys)
        if ours.get(key) != theirs.get(key)
    ]
    if changed:
        raise UsageError(
            f'init_from={source!r} is a model of another config. It differs in (model -> asked for): '
            f'{"; ".join(changed)}. Use the config that it was trained with.'
        )


def load_init(config: ConfigDict, mesh: Mesh) -> tuple[Experiment, Params, int]:
    """(experiment, parameters, step) of what `config.init_from` names.

    Raises:
      UsageError: there is nothing there, or it is a model of another config.
    """
    source = config.init_from
    if Path(source).is_dir():
        record = read_record(source)
        if record is None:
            raise UsageError(f'init_from={source!r} is a folder without a run (no config.json).')
        theirs = ConfigDict(record[0])
        _check_same_model(config, theirs, source)
        experiment = make_experiment(theirs, record[1])
        shapes = jax.eval_shape(experiment.init, jax.random.key(0))
        shapes = with_shardings(shapes, param_shardings(shapes, config.sharding_rules, mesh))
        params, step = Checkpoints(source).restore_params(shapes, config.sample.checkpoint, config.sample.ema)
        return experiment, params, step
    if source.startswith(PREFIX):
        path = shipped_path(source.removeprefix(PREFIX))
    elif source.endswith('.safetensors'):
        path = Path(source)
    else:
        raise UsageError(
            f'init_from={source!r} is no model: name a folder with a run, a .safetensors file of --mode=export, '
            f'or one of {", ".join(PREFIX + name for name in shipped_models())}.'
        )
    if not config.sample.ema or config.sample.checkpoint != 'newest':
        raise UsageError(
            f'init_from={source!r} is a file with one set of parameters: sample.ema and sample.checkpoint choose among '
            "those of a run's folder."
        )
    experiment, params, theirs, step = load_model(path)
    _check_same_model(config, theirs, source)
    return experiment, put(params, replicated(mesh)), step


def _is_single_file(path: Path) -> bool:
    from diffusion_jax.interop.single_file import is_single_file

    return path.is_file() and path.suffix == '.safetensors' and is_single_file(path)


def load_source(config: ConfigDict, mesh: Mesh | None = None) -> tuple[ImagePipeline, int]:
    """(pipeline, step) of what `config.init_from` names.

    That may be a model of others, too, of step 0: a folder in diffusers' layout, or a file in the original layout of
    Stable Diffusion, whose tokenizer is in the folder `config.text.tokenizer`.
    """
    mesh = mesh or make_mesh()
    source = Path(config.init_from).expanduser()
    if (source / 'model_index.json').is_file() or _is_single_file(source):
        from diffusion_jax.interop.load import load

        tokenizer = None if source.is_dir() or config.text.tokenizer == 'small' else config.text.tokenizer
        return load(source, mesh=mesh, tokenizer=tokenizer), 0
    experiment, params, step = load_init(config, mesh)
    if config.latents.autoencoder:  # another one than the model's own
        kept = None
    elif source.is_dir():
        config, kept = ConfigDict(read_record(source)[0]), source / KEPT
    else:
        path = shipped_path(config.init_from.removeprefix(PREFIX)) if config.init_from.startswith(PREFIX) else source
        config, kept = load_model(path)[2], autoencoder_beside(path)
    return pipeline_of(experiment, params, mesh, read_parts(config, experiment.data, mesh, kept)), step
