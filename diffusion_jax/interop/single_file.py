"""Stable Diffusion 1, 2 and XL in one file, as the original code and most collections of checkpoints have them.

Such a file holds the weights of all parts and neither configs nor a tokenizer: what the network is follows from its
tensors' shapes, what reads the texts has to be named.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from diffusion_jax.errors import UsageError
from diffusion_jax.interop import autoencoders
from diffusion_jax.interop.folders import KINDS, Folder, Part, check_new, make_network, part_of
from diffusion_jax.interop.ldm_names import (
    EMA,
    UNET,
    VAE,
    Stored,
    autoencoder_names,
    averaged,
    open_clip_names,
    unet_names,
    with_prefix,
)
from diffusion_jax.interop.names import Rename, torch_shapes
from diffusion_jax.interop.schedulers import PREDICTIONS
from diffusion_jax.interop.tensors import TensorFiles, read_json, save_tensors
from diffusion_jax.interop.text_encoders import CLIP_PREFIX, clip_rename
from diffusion_jax.interop.unets import UNET_RENAME, unet_config
from diffusion_jax.text import ClipTokenizer

CLIP, OPEN_CLIP = 'CLIPTextModel', 'CLIPTextModelWithProjection'
TEXT_ENCODERS = {
    'text_encoder': {
        'cond_stage_model.transformer.': 'clip',
        'cond_stage_model.model.': 'open_clip',
        'conditioner.embedders.0.transformer.': 'clip',
    },
    'text_encoder_2': {'conditioner.embedders.1.model.': 'open_clip'},
}
"""Part -> prefix in a file -> whose names follow."""

NO_WEIGHTS = re.compile(
    r'(model_ema\.(decay|num_updates))|(sqrt_|log_)?(one_minus_)?(recip(m1)?_)?(alphas_cumprod|betas|alphas_cumprod_prev)'
    r'|sqrt_recip(m1)?_alphas_cumprod|sqrt_one_minus_alphas_cumprod|log_one_minus_alphas_cumprod|lvlb_weights'
    r'|posterior_(variance|log_variance_clipped|mean_coef[12])|scale_factor|logvar|denoiser\.sigmas'
    r'|v_pred|ztsnr|edm_mean_std|first_stage_model\.loss\..*|.*\.position_ids|.*\.logit_scale|.*\.attn_mask'
)
"""Names in published files of what is no weight: buffers, and networks that only trained the autoencoder."""

LATENT_SCALES = {1: 0.18215, 2: 0.18215, 'XL': 0.13025}
BETAS = {'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear', 'num_train_timesteps': 1000}
SCHEDULERS = {
    1: {'_class_name': 'PNDMScheduler', **BETAS, 'set_alpha_to_one': False, 'skip_prk_steps': True, 'steps_offset': 1},
    2: {'_class_name': 'DDIMScheduler', **BETAS, 'set_alpha_to_one': False, 'clip_sample': False, 'steps_offset': 1},
    'XL': {'_class_name': 'EulerDiscreteScheduler', **BETAS, 'timestep_spacing': 'leading', 'steps_offset': 1},
}
"""As the first published folders of these have them."""
CLASSES = {1: 'StableDiffusionPipeline', 2: 'StableDiffusionPipeline', 'XL': 'StableDiffusionXLPipeline'}
SIZES = {1: 64, 2: 64, 'XL': 128}
"""Of the latents that it was trained on; 96 for version 2 with predictions of v."""


class Renamed(Mapping[str, np.ndarray]):
    """Some of a file's tensors by diffusers' names; each is read when it is asked for."""

    def __init__(self, tensors: TensorFiles, names: Mapping[str, Stored]):
        self._tensors, self._names = tensors, names
        self.source = tensors.source

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> np.ndarray:
        stored = self._names[name]
        array = self._tensors[stored.name]
        if stored.third is not None:
            array = np.split(array, 3)[stored.third]
        if stored.convolution and array.shape[2:] == (1, 1):
            array = array[:, :, 0, 0]
        return array.T if stored.transposed else array

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._names[name]
        shape = self._tensors.shape(stored.name)
        if stored.third is not None:
            if shape[0] % 3:
                raise UsageError(f'{stored.name} in {self.source} is {shape}, which are no query, key and value.')
            shape = (shape[0] // 3, *shape[1:])
        if stored.convolution and shape[2:] == (1, 1):
            shape = shape[:2]
        return tuple(reversed(shape)) if stored.transposed else shape

    def dtype(self, name: str) -> str:
        return self._tensors.dtype(self._names[name].name)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a single file holds, told from names and shapes alone.

    Attributes:
      version: 1, 2 or 'XL'; None of an autoencoder alone.
      configs: part -> the config that its shapes say.
      prefixes: part -> the beginning of its names in the file.
      open_clips: the parts with OpenCLIP's names.
      averaged: whether there are averaged weights of the U-Net besides.
      prediction: 'eps' or 'v' if the file says or its version does; None: it cannot be told.
      zero_snr: whether it was trained up to no signal at all.
    """

    version: int | str | None
    configs: dict[str, dict[str, Any]]
    prefixes: dict[str, str]
    open_clips: frozenset[str]
    averaged: bool
    prediction: str | None
    zero_snr: bool


def is_single_file(path: str | Path) -> bool:
    """Whether a file is one of those that `read_single_file` reads, by its tensors' names."""
    tensors = TensorFiles([Path(path).expanduser()])
    return any(name.startswith((UNET, VAE)) or name == 'encoder.down.0.block.0.conv1.weight' for name in tensors)


def contents_of(tensors: Any, metadata: Mapping[str, str] | None = None) -> Contents:
    """What a file with such tensors holds; only `shape(name)` of each is asked for.

    Raises:
      UsageError: it is none of Stable Diffusion 1, 2, XL (not its refiner) or their autoencoder.
    """
    prefixes, open_clips = {}, set()
    if f'{UNET}input_blocks.0.0.weight' in tensors:
        prefixes['unet'] = UNET
    for prefix in (VAE, 'vae.', ''):
        if f'{prefix}encoder.conv_in.weight' in tensors:
            prefixes['vae'] = prefix
            break
    for part, known in TEXT_ENCODERS.items():
        for prefix, names in known.items():
            if any(name.startswith(prefix) for name in tensors):
                within = prefix + CLIP_PREFIX  # mostly
                prefixes[part] = within if any(name.startswith(within) for name in tensors) else prefix
                open_clips |= {part} if names == 'open_clip' else set()
    if 'vae' not in prefixes or ('unet' in prefixes) != ('text_encoder' in prefixes):
        if any(name.startswith('conditioner.embedders.0.model.') for name in tensors):
            raise UsageError(f"{tensors.source} is Stable Diffusion XL's refiner, which is not supported.")
        there = ', '.join(prefixes) or 'none of them'
        raise UsageError(
            f'{tensors.source} is no Stable Diffusion 1, 2 or XL in one file: of unet, vae and text_encoder it holds '
            f'{there}. A LoRA is given beside a model (--lora), a part in a folder with its config.json.'
        )
    version = None
    if 'unet' in prefixes:
        version = 'XL' if 'text_encoder_2' in prefixes else 2 if 'text_encoder' in open_clips else 1
    metadata = metadata or {}
    said = {'epsilon': 'eps', 'v': 'v', 'v_prediction': 'v', 'v-prediction': 'v'}
    prediction = 'v' if 'v_pred' in tensors else said.get(str(metadata.get('modelspec.prediction_type')).lower())
    if version in (1, 'XL'):
        prediction = prediction or 'eps'
    make = {'unet': _unet_of, 'vae': _autoencoder_of}
    configs = {}
    try:
        for part, prefix in prefixes.items():
            shapes = _Shapes(tensors, prefix)
            if part in make:
                configs[part] = make[part](shapes, version)
            else:
                text = _open_clip_of if part in open_clips else _clip_of
                configs[part] = text(shapes, projection=part == 'text_encoder_2')
    except (KeyError, IndexError, ValueError, ZeroDivisionError, StopIteration) as error:
        raise UsageError(f'{tensors.source} is no Stable Diffusion 1, 2 or XL: {error!r}') from error
    return Contents(
        version,
        configs,
        prefixes,
        frozenset(open_clips),
        any(name.startswith(f'{EMA}diffusion_model') for name in tensors),
        prediction,
        'ztsnr' in tensors,
    )


class _Shapes:
    """The shapes of one part's tensors by their names after the prefix."""

    def __init__(self, tensors: Any, prefix: str):
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self:
            raise UsageError(f'{self._tensors.source} does not hold {self._prefix}{name}.')
        return self._tensors.shape(self._prefix + name)

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def count(self, template: str) -> int:
        """How many of 0, 1, .. there are in the place of {}."""
        number = 0
        while template.format(number) in self:
            number += 1
        return number


def _unet_of(shapes: _Shapes, version: int | str | None) -> dict[str, Any]:
    channels, seen = shapes['input_blocks.0.0.weight'][:2]
    blocks = 1
    while f'input_blocks.{blocks}.0.op.weight' in shapes or f'input_blocks.{blocks}.0.in_layers.0.weight' in shapes:
        blocks += 1
    downs = [number for number in range(blocks) if f'input_blocks.{number}.0.op.weight' in shapes]
    levels = len(downs) + 1
    per_level = downs[0] if downs else blocks  # the resnets of a level and its downsampling
    firsts = [1 + level * per_level for level in range(levels)]
    widths = [shapes[f'input_blocks.{first}.0.out_layers.3.weight'][0] for first in firsts]
    depths = [shapes.count(f'input_blocks.{first}.1.transformer_blocks.{{}}.norm1.weight') for first in firsts]
    middle = shapes.count('middle_block.1.transformer_blocks.{}.norm1.weight')
    linear = len(shapes['middle_block.1.proj_in.weight']) == 2
    sizes = {}
    if version == 'XL':
        sizes = {'size_features': 256, 'pooled_features': shapes['label_emb.0.0.weight'][1] - 6 * 256}
    out = shapes['out.2.weight'][0]
    return unet_config(
        {
            'resolution': SIZES[version],
            'image_channels': out,
            'extra_channels': seen - out,
            'channels': channels,
            'channel_multipliers': [width // channels for width in widths],
            'num_res_blocks': per_level - 1,
            'attention_depths': depths,
            'middle_depth': middle,
            'num_heads': [width // 64 for width in widths] if linear else 8,
            'context_features': shapes['middle_block.1.transformer_blocks.0.attn2.to_k.weight'][1],
            'linear_projection': linear,
            **sizes,
        }
    )


def _autoencoder_of(shapes: _Shapes, version: int | str | None) -> dict[str, Any]:
    levels = shapes.count('encoder.down.{}.block.0.norm1.weight')
    widths = [shapes[f'encoder.down.{level}.block.0.conv2.weight'][0] for level in range(levels)]
    options = {
        'image_channels': shapes['encoder.conv_in.weight'][1],
        'latent_channels': shapes['decoder.conv_in.weight'][1],
        'channels': widths[0],
        'channel_multipliers': [width // widths[0] for width in widths],
        'num_res_blocks': shapes.count('encoder.down.0.block.{}.norm1.weight'),
        'num_groups': 32,
        'middle_attention': 'encoder.mid.attn_1.norm.weight' in shapes,
        'quant_convs': 'quant_conv.weight' in shapes,
    }
    return autoencoders.autoencoder_config(options, LATENT_SCALES.get(version))


def _text_config(projection: int, width: int, **values: Any) -> dict[str, Any]:
    return {
        'architectures': [OPEN_CLIP if projection else CLIP],
        'model_type': 'clip_text_model',
        'hidden_size': width,
        'projection_dim': projection or width,
        'num_attention_heads': width // 64,
        'layer_norm_eps': 1e-5,
        'eos_token_id': 2,  # which means: the greatest id is the end
        'attention_dropout': 0.0,
        **values,
    }


def _clip_of(shapes: _Shapes, projection: bool) -> dict[str, Any]:
    vocabulary, width = shapes['embeddings.token_embedding.weight']
    return _text_config(
        0,
        width,
        vocab_size=vocabulary,
        max_position_embeddings=shapes['embeddings.position_embedding.weight'][0],
        intermediate_size=shapes['encoder.layers.0.mlp.fc1.weight'][0],
        num_hidden_layers=shapes.count('encoder.layers.{}.layer_norm1.weight'),
        hidden_act='quick_gelu',
    )


def _open_clip_of(shapes: _Shapes, projection: bool) -> dict[str, Any]:
    vocabulary, width = shapes['token_embedding.weight']
    layers = shapes.count('transformer.resblocks.{}.ln_1.weight')
    if not projection and 'text_projection' in shapes:
        layers -= 1  # a whole OpenCLIP, of which version 2 sees what its last but one layer gives
    return _text_config(
        shapes['text_projection'][1] if projection else 0,
        width,
        vocab_size=vocabulary,
        max_position_embeddings=shapes['positional_embedding'][0],
        intermediate_size=shapes['transformer.resblocks.0.mlp.c_fc.weight'][0],
        num_hidden_layers=layers,
        hidden_act='gelu',
    )


def _kind_of(part: str) -> str:
    return {'unet': 'UNet2DConditionModel', 'vae': 'AutoencoderKL', 'text_encoder_2': OPEN_CLIP}.get(part, CLIP)


def _rename_of(part: str) -> Rename:
    text = clip_rename((), CLIP_PREFIX)
    return {'unet': UNET_RENAME, 'vae': autoencoders.NEW}.get(part, text)


def stored_names(part: str, config: Mapping[str, Any], names: list[str], prefix: str, open_clip: bool):
    """diffusers' name -> how the file has it, for one part."""
    if part == 'unet':
        stored = unet_names(names, KINDS['UNet2DConditionModel'].options(config)['num_res_blocks'])
    elif part == 'vae':
        stored = autoencoder_names(names, len(config['block_out_channels']))
    elif open_clip:
        stored = open_clip_names(names)
    else:
        stored = {name: Stored(name.removeprefix(CLIP_PREFIX)) for name in names}
    return with_prefix(stored, prefix)


def read_single_file(
    path: str | Path,
    *,
    like: str | Path | None = None,
    tokenizer: str | Path | None = None,
    prediction: str | None = None,
    latent_scale: float | None = None,
    ema: bool = False,
    dtype: str = 'float32',
    mesh: Mesh | None = None,
    changes: Mapping[str, Callable] | None = None,
) -> Folder:
    """A model from one safetensors file of the original layout, as if it had been read from a folder of diffusers'.

    Args:
      path: of the file: Stable Diffusion 1, 2 or XL, or their autoencoder alone.
      like: a folder of diffusers' whose configs, tokenizers and scheduler it has; by default they follow from the
        tensors' shapes, and the scheduler is that of the first published folders.
      tokenizer: a folder with the tokenizer of CLIP (vocab.json and merges.txt); those in `like` by default.
      prediction: 'eps' or 'v', for files of version 2 that do not say.
      latent_scale: of an autoencoder alone, which the file cannot say: 0.18215 of versions 1 and 2, 0.13025 of XL.
      ema: the averaged weights of the U-Net instead of the others.
      dtype, mesh: as of `folders.read_part`.
      changes: part -> change of its tensors, as of `lora.lora_changes`.

    Raises:
      UsageError: it is something else or damaged, a tensor is missing, misshapen or of no part, or an argument is
        wanting.
    """
    path = Path(path).expanduser()
    if path.suffix != '.safetensors':
        raise UsageError(f'{path} is no .safetensors file. Pickled files (.ckpt, .pt, .bin) are never opened.')
    tensors = TensorFiles([path])
    found = contents_of(tensors, tensors.metadata)
    configs = found.configs if like is None else _configs_like(Path(like).expanduser(), found.configs)
    if found.version is None and like is None:
        if latent_scale is None:
            raise UsageError(
                f"{path} is an autoencoder alone, and cannot say its latents' scale. Name it: latent_scale (--latent-"
                'scale), which is 0.18215 of Stable Diffusion 1 and 2, and 0.13025 of XL.'
            )
        configs['vae'] = {**configs['vae'], 'scaling_factor': latent_scale}
    elif latent_scale is not None:
        raise UsageError(
            'latent_scale is for an autoencoder alone: the other files say it, or the folder of like does.'
        )
    if ema and not found.averaged:
        raise UsageError(f'{path} holds no averaged weights (model_ema.*): leave ema out.')
    index, scheduler, tokenizers, folders = {}, None, {}, {}
    if found.version is not None:
        if like is None:
            scheduler = _scheduler_of(found, prediction, path)
            index = _index_of(found, scheduler)
        else:
            index = read_json(Path(like).expanduser() / 'model_index.json')
            scheduler = read_json(Path(like).expanduser() / 'scheduler' / 'scheduler_config.json')
            if prediction is not None:
                scheduler |= {'prediction_type': _diffusers_prediction(prediction)}
        tokenizers, folders = _tokenizers_of(found, like, tokenizer, path)
        if found.version == 2 and like is None and scheduler['prediction_type'] == 'v_prediction':
            configs['unet'] = {**configs['unet'], 'sample_size': 96}
    plans, used = {}, set()
    for part, config in configs.items():
        shapes, apply = make_network(_kind_of(part), config, dtype)
        names = list(torch_shapes(shapes, _rename_of(part)))
        stored = stored_names(part, config, names, found.prefixes[part], part in found.open_clips)
        others = averaged(stored) if part == 'unet' else {}
        used |= {each.name for each in (*stored.values(), *(others.values() if found.averaged else ()))}
        plans[part] = (shapes, apply, others if ema and part == 'unet' else stored)
    _check_all(tensors, used, found)
    parts = {}
    for part, (shapes, apply, stored) in plans.items():
        kind, view = _kind_of(part), Renamed(tensors, stored)
        parts[part] = part_of(kind, configs[part], view, shapes, apply, mesh=mesh, change=(changes or {}).get(part))
    return Folder(index, parts, tokenizers, folders, scheduler)


def unused_names(tensors: Any) -> list[str]:
    """Names of what is no weight of any part, and known not to be: buffers, and networks of the training."""
    return sorted(name for name in tensors if NO_WEIGHTS.fullmatch(name))


def _check_all(tensors: TensorFiles, used: set[str], found: Contents) -> None:
    """A `UsageError` unless every tensor is of a part, or known to be of none."""
    dropped = ()
    if found.version == 2 and 'text_encoder' in found.open_clips:
        last = found.configs['text_encoder']['num_hidden_layers']
        prefix = found.prefixes['text_encoder']
        dropped = (f'{prefix}transformer.resblocks.{last}.', f'{prefix}text_projection')
    missing = sorted(used - set(tensors))
    left = sorted(
        name for name in set(tensors) - used if not NO_WEIGHTS.fullmatch(name) and not name.startswith(dropped or '\0')
    )
    wrong = [f'{name} is missing' for name in missing] + [f'{name} is of no part of this model' for name in left]
    if wrong:
        more = f' (and {len(wrong) - 6} more)' if len(wrong) > 6 else ''
        raise UsageError(f'{tensors.source} does not fit its config: {"; ".join(wrong[:6])}{more}.')


def _configs_like(like: Path, parts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    if set(parts) == {'vae'} and (like / 'config.json').is_file():
        return {'vae': read_json(like / 'config.json')}
    return {part: read_json(like / part / 'config.json') for part in parts}


def _diffusers_prediction(prediction: str) -> str:
    names = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if prediction not in ('eps', 'v'):
        raise UsageError(f"unknown prediction {prediction!r} of a single file: 'eps' or 'v'.")
    return names[prediction]


def _scheduler_of(found: Contents, prediction: str | None, path: Path) -> dict[str, Any]:
    predicted = prediction or found.prediction
    if predicted is None:
        raise UsageError(
            f'{path} is a Stable Diffusion 2, which predicts eps (2-base, at 512 x 512) or v (at 768 x 768), and does '
            "not say which: name it, prediction='eps' or 'v' (--prediction)."
        )
    config = {**SCHEDULERS[found.version], 'prediction_type': _diffusers_prediction(predicted)}
    if found.zero_snr:
        config |= {'rescale_betas_zero_snr': True, 'timestep_spacing': 'trailing'}
        config |= {'_class_name': 'DDIMScheduler', 'clip_sample': False, 'set_alpha_to_one': False}
    return config


def _index_of(found: Contents, scheduler: Mapping[str, Any]) -> dict[str, Any]:
    extra = found.configs['unet']['in_channels'] > found.configs['unet']['out_channels']
    name = CLASSES[found.version]
    index = {
        '_class_name': f'{name.removesuffix("Pipeline")}InpaintPipeline' if extra else name,
        'scheduler': ['diffusers', scheduler['_class_name']],
        'unet': ['diffusers', 'UNet2DConditionModel'],
        'vae': ['diffusers', 'AutoencoderKL'],
        'feature_extractor': [None, None],
    }
    for part in sorted(part for part in found.configs if part.startswith('text_encoder')):
        index[part] = ['transformers', _kind_of(part)]
        index[part.replace('text_encoder', 'tokenizer')] = ['transformers', 'CLIPTokenizer']
    if found.version == 'XL':
        return {**index, 'image_encoder': [None, None], 'force_zeros_for_empty_prompt': True}
    return {**index, 'safety_checker': [None, None], 'requires_safety_checker': False}


def _tokenizers_of(
    found: Contents, like: str | Path | None, tokenizer: str | Path | None, path: Path
) -> tuple[dict[str, ClipTokenizer], dict[str, Path]]:
    """The tokenizers, and the folders of those that are there to be copied as they are."""
    names = sorted(
        part.replace('text_encoder', 'tokenizer') for part in found.configs if part.startswith('text_encoder')
    )
    if tokenizer is None:
        if like is None:
            raise UsageError(
                f'{path} holds no tokenizer. Name a folder with that of CLIP (vocab.json and merges.txt), such as '
                "tokenizer/ of any Stable Diffusion in diffusers' layout: tokenizer (--tokenizer; of main.py, "
                '--config.text.tokenizer); or such a folder as a whole: like (--like).'
            )
        folders = {name: Path(like).expanduser() / name for name in names}
        return {name: ClipTokenizer.from_folder(folder) for name, folder in folders.items()}, folders
    read = ClipTokenizer.from_folder(Path(tokenizer).expanduser())
    end = '<|endoftext|>'
    pads = {name: '!' if name.replace('tokenizer', 'text_encoder') in found.open_clips else end for name in names}
    return {name: read.with_pad(pad) for name, pad in pads.items()}, {}


def write_single_file(path: str | Path, folder: Folder) -> None:
    """Writes Stable Diffusion 1, 2 or XL as one safetensors file with the original code's names, each of its type.

    Of version 2, whose folders have one layer of the text encoder less than OpenCLIP, that layer stays missing: it has
    no part in making images, and other programs' files are so, too.

    Raises:
      UsageError: it is no such model, or there is a file at that path.
    """
    path = Path(path).expanduser()
    if path.suffix != '.safetensors':
        raise UsageError(f'{path} must end in .safetensors.')
    check_new(path)
    parts = folder.parts
    known = {'unet', 'vae', 'text_encoder', 'text_encoder_2'}
    if 'vae' not in parts or parts.keys() - known or any(part.kind != _kind_of(name) for name, part in parts.items()):
        raise UsageError(f'a model of {", ".join(parts)} has no single-file layout: Stable Diffusion 1, 2 and XL have.')
    prefixes = _prefixes_of(parts)
    out: dict[str, np.ndarray] = {}
    for name, part in parts.items():
        tensors = dataclasses.replace(part, dtypes=_usual_types(name, part)).tensors()
        open_clip = prefixes[name].endswith('.model.')
        stored = stored_names(name, part.config, list(tensors), prefixes[name], open_clip)
        thirds: dict[str, dict[int, np.ndarray]] = {}
        for ours, where in stored.items():
            array = tensors[ours].T if where.transposed else tensors[ours]
            if where.convolution:
                array = array[:, :, None, None]
            if where.third is None:
                out[where.name] = array
            else:
                thirds.setdefault(where.name, {})[where.third] = array
        out |= {each: np.concatenate([rows[0], rows[1], rows[2]]) for each, rows in thirds.items()}
    predicts = (folder.scheduler or {}).get('prediction_type')
    said = {'v_prediction': 'v', 'epsilon': 'epsilon'}
    save_tensors(path, out, {'modelspec.prediction_type': said[predicts]} if predicts in said else None)


def _prefixes_of(parts: Mapping[str, Part]) -> dict[str, str]:
    if 'unet' not in parts:
        return dict.fromkeys(parts, '')
    prefixes = {'unet': UNET, 'vae': VAE}
    if 'text_encoder_2' in parts:
        return prefixes | {
            'text_encoder': f'conditioner.embedders.0.transformer.{CLIP_PREFIX}',
            'text_encoder_2': 'conditioner.embedders.1.model.',
        }
    linear = parts['unet'].config.get('use_linear_projection', False)
    clip = f'cond_stage_model.transformer.{CLIP_PREFIX}'
    return prefixes | {'text_encoder': 'cond_stage_model.model.' if linear else clip}


def _usual_types(name: str, part: Part) -> dict[str, str]:
    """Of the part's tensors by the names that are usual now, whatever names its file had."""
    if part.dtypes is None:
        return {}
    # Both lists of names are those of one set of parameters, in one order.
    theirs = KINDS[part.kind].write(part.params, set(part.dtypes))
    rename = _rename_of(name)
    return dict(zip(torch_shapes(part.params, rename), (part.dtypes[key] for key in theirs), strict=True))
