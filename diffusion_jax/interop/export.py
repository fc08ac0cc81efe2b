"""Models trained here -> diffusers' layout, for whoever samples with PyTorch."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from diffusion_jax.config import default_config, options
from diffusion_jax.errors import UsageError
from diffusion_jax.experiment import Experiment, network_arguments, read_record
from diffusion_jax.interop import autoencoders, ddpm, dit, text_encoders
from diffusion_jax.interop.folders import KINDS, Folder, Part, make_network, read_part
from diffusion_jax.interop.schedulers import scheduler_config
from diffusion_jax.interop.unets import unet_config
from diffusion_jax.models import MODELS
from diffusion_jax.models.clip_text import ClipText
from diffusion_jax.pipelines.autoencoders import KIND as AUTOENCODER
from diffusion_jax.pipelines.autoencoders import load_autoencoder
from diffusion_jax.pipelines.model_file import MODEL, autoencoder_beside, load_init, load_model
from diffusion_jax.pipelines.parts import KEPT, read_parts
from diffusion_jax.registry import parameters_of
from diffusion_jax.schedules import SCHEDULES
from diffusion_jax.training.sharding import make_mesh
from diffusion_jax.weights import load_weights

UNETS = ('text_unet', 'conditional_unet')
DENOISERS = (*UNETS, 'ddpm_unet', 'dit')
"""What diffusers has the like of."""


def with_all_arguments(function: Callable, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those given, and the defaults of the others."""
    defaults = {name: each.default for name, each in parameters_of(function).items() if each.default is not each.empty}
    return defaults | dict(given)


def _part(kind: str, config: dict[str, Any], params: Any) -> Part:
    return Part(kind, config, make_network(kind, config)[1], params)


def folder_of(source: str | Path, *, ema: bool = True, mesh: Mesh | None = None) -> Folder:
    """A model of ours with all that it needs, as it is in diffusers' layout.

    A text_unet or conditional_unet of latents becomes a StableDiffusionPipeline, a dit of latents with labels a
    DiTPipeline, a ddpm_unet of pixels without labels a DDPMPipeline. All else of these networks, and an autoencoder_kl,
    becomes a part alone, with its scheduler_config.json.

    Args:
      source: the folder of a run, or a file of --mode=export.
      ema: the averaged parameters of a run's folder.

    Raises:
      UsageError: there is no model there, or diffusers has nothing like it.
    """
    source, mesh = Path(source).expanduser(), mesh or make_mesh()
    if not source.exists():
        raise UsageError(f'there is no {source}: name the folder of a run, or a file of --mode=export.')
    if _is_autoencoder(source):
        _, _, params, info = load_autoencoder(source)
        return Folder({}, {'vae': _autoencoder(info.config, info.data.image_shape[2], params, info.scale, info.shift)})
    config = default_config()
    config.model = ConfigDict({'name': placeholder(str)})
    config.init_from, config.sample.ema = str(source), ema
    experiment, params, _ = load_init(config, mesh)
    config = ConfigDict(read_record(source)[0]) if source.is_dir() else load_model(source)[2]
    name = config.model.name
    if name not in DENOISERS:
        raise UsageError(
            f'diffusers has no network like model.name={name!r}: {", ".join(DENOISERS)} and autoencoder_kl can be '
            "exported to its layout. --mode=export writes a file of any model in this package's own."
        )
    kept = source / KEPT if source.is_dir() else autoencoder_beside(source)
    return _denoiser(config, experiment, params, read_parts(config, experiment.data, mesh, kept), kept, mesh)


def _is_autoencoder(source: Path) -> bool:
    if source.is_dir():
        record = read_record(source)
        if record is None:
            raise UsageError(f'{source} holds no run (no config.json of one).')
        return record[0].get('task') == 'autoencoder'
    kind = load_weights(source)[1].get('kind')
    if kind not in (MODEL, AUTOENCODER):
        raise UsageError(
            f'{source} is no file of --mode=export. `import` reads files and folders of others, and writes them in '
            "diffusers' layout."
        )
    return kind == AUTOENCODER


def _autoencoder(config: ConfigDict, channels: int, params: Any, scale: float, shift: float) -> Part:
    if config.model.name != 'autoencoder_kl':
        raise UsageError(f'an autoencoder of model.name={config.model.name!r} is not exported, only autoencoder_kl is.')
    given = options(config.model) | {'image_channels': channels}
    theirs = autoencoders.autoencoder_config(with_all_arguments(MODELS['autoencoder_kl'], given), scale, shift)
    return _part('AutoencoderKL', theirs, params)


def without_shift(vae: Part) -> Part:
    """The same latents with their shift in the biases: diffusers' pipelines of Stable Diffusion and DiT heed no other.

    Raises:
      UsageError: the autoencoder has no 1 x 1 convolutions at its latents, whose biases could take it.
    """
    shift = vae.config.get('shift_factor') or 0.0
    if not shift:
        return vae
    if not vae.config['use_quant_conv']:
        raise UsageError('latents with a shift need model.quant_convs=True in their autoencoder to be exported.')
    params = {key: value if not isinstance(value, dict) else dict(value) for key, value in vae.params.items()}
    channels = vae.config['latent_channels']
    # The mean becomes mean - shift, and what the decoder is given is put back by as much.
    moments = np.array(params['quant_conv']['bias'], np.float64)
    moments[:channels] -= shift
    kernel = np.asarray(params['post_quant_conv']['kernel'], np.float64)
    decoded = np.asarray(params['post_quant_conv']['bias'], np.float64) + shift * kernel[0, 0].sum(axis=0)
    params['quant_conv']['bias'] = moments.astype(np.float32)
    params['post_quant_conv']['bias'] = decoded.astype(np.float32)
    return dataclasses.replace(vae, params=params, config={**vae.config, 'shift_factor': None})


def _denoiser(config: ConfigDict, experiment: Experiment, params: Any, parts: Any, kept: Path, mesh: Mesh) -> Folder:
    name, info = config.model.name, experiment.data
    arguments = with_all_arguments(MODELS[name], network_arguments(config, info))
    scheduler = scheduler_config(
        with_all_arguments(SCHEDULES[config.schedule.name], options(config.schedule)) | {'name': config.schedule.name},
        experiment.prediction,
    )
    found, tokenizers, folders = {}, {}, {}
    if info.latents is not None:
        found['vae'] = without_shift(_vae_of(config, info, kept, mesh))
    if name in UNETS:
        inner = {key: value for key, value in arguments.items() if not key.startswith(('text_', 'vocab'))}
        inner['context_features'] = arguments.get('text_features', arguments.get('context_features'))
        inner = with_all_arguments(MODELS['conditional_unet'], inner)
        unet = params['unet'] if name == 'text_unet' else params
        found['unet'] = _part('UNet2DConditionModel', unet_config(inner), unet)
        tokenizer = parts.tokenizer.with_length(info.text.length)
        tokenizers['tokenizer'] = tokenizer
        if name == 'text_unet':
            text = with_all_arguments(
                ClipText,
                {
                    'vocab_size': arguments['vocab_size'],
                    'length': arguments['text_length'],
                    'features': arguments['text_features'],
                    'inner_features': 4 * arguments['text_features'],
                    'num_layers': arguments['text_layers'],
                    'num_heads': arguments['text_heads'],
                    'activation': 'gelu',
                },
            )
            found['text_encoder'] = _part('CLIPTextModel', text_encoders.clip_config(text), params['text'])
        else:
            folder = Path(config.text.encoder).expanduser() / 'text_encoder'
            found['text_encoder'] = read_part(folder, kind='CLIPTextModel', mesh=mesh)
        if experiment.num_classes:
            raise UsageError('diffusers has no pipeline of texts with labels besides: class_conditional must be False.')
        pipeline = 'StableDiffusionPipeline' if 'vae' in found else None
        if pipeline is None:
            raise UsageError('diffusers has no pipeline from texts to pixels without an autoencoder.')
    elif name == 'dit':
        found['transformer'] = _part('DiTTransformer2DModel', dit.dit_config(arguments), params)
        pipeline = 'DiTPipeline' if 'vae' in found else None
    else:
        found['unet'] = _part('UNet2DModel', ddpm.ddpm_config(arguments), params)
        pipeline = None if experiment.num_classes or 'vae' in found else 'DDPMPipeline'
        if pipeline is None and 'vae' in found:
            del found['vae']  # which is exported from its own run
    if info.latents is None:
        scheduler |= {'clip_sample': True}
    if experiment.learned_variance or pipeline == 'DDPMPipeline':
        variance = 'learned_range' if experiment.learned_variance else 'fixed_small'
        dropped = ('set_alpha_to_one', 'steps_offset')
        scheduler = {key: value for key, value in scheduler.items() if key not in dropped}
        scheduler |= {'_class_name': 'DDPMScheduler', 'variance_type': variance}
    if pipeline is None:
        return Folder({}, found, scheduler=scheduler)
    index = {'_class_name': pipeline, 'scheduler': ['diffusers', scheduler['_class_name']]}
    for part in found:
        kind = found[part].kind
        index[part] = ['transformers' if kind.startswith('CLIP') else 'diffusers', kind]
    if tokenizers:
        index['tokenizer'] = ['transformers', 'CLIPTokenizer']
        index |= {'safety_checker': [None, None], 'feature_extractor': [None, None], 'requires_safety_checker': False}
    if name == 'dit':
        index['id2label'] = {str(label): text for label, text in enumerate(info.class_names)}
    assert all(part.kind in KINDS for part in found.values())
    return Folder(index, found, tokenizers, folders, scheduler)


def _vae_of(config: ConfigDict, info: Any, kept: Path, mesh: Mesh) -> Part:
    """The autoencoder of a model's latents, with the scale and shift that the model was trained with."""
    source = kept if kept.is_file() else Path(config.latents.autoencoder).expanduser()
    if source.is_dir() and 'task' not in (read_record(source) or ({},))[0]:
        part = read_part(source, kind='AutoencoderKL', mesh=mesh)
        theirs = {**part.config, 'scaling_factor': info.latents.scale, 'shift_factor': info.latents.shift or None}
        return dataclasses.replace(part, config=theirs)
    _, _, params, known = load_autoencoder(source)
    return _autoencoder(known.config, known.data.image_shape[2], params, info.latents.scale, info.latents.shift)
