"""Stable Diffusion in one file: names against diffusers' converters, configs against published ones, bad files."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_jax.errors import UsageError
from diffusion_jax.interop.folders import KINDS, make_network, read_folder
from diffusion_jax.interop.ldm_names import averaged
from diffusion_jax.interop.load import load, pipeline_of
from diffusion_jax.interop.names import torch_shapes
from diffusion_jax.interop.single_file import (
    CLIP,
    OPEN_CLIP,
    TEXT_ENCODERS,
    contents_of,
    is_single_file,
    read_single_file,
    stored_names,
    write_single_file,
)
from diffusion_jax.interop.text_encoders import CLIP_PREFIX, clip_rename

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'interop'
FAMILIES = ('sd1', 'sd2', 'sdxl')
PAIRS = json.loads((FIXTURES / 'single_file.json').read_text())


@pytest.fixture(scope='module', params=FAMILIES)
def written(request, tmp_path_factory):
    """(family, folder, file) of the same model."""
    folder = read_folder(FIXTURES / request.param)
    path = tmp_path_factory.mktemp(request.param) / 'model.safetensors'
    write_single_file(path, folder)
    return request.param, folder, path


@pytest.fixture(scope='module')
def sd1(tmp_path_factory):
    """(tensors of a single file of version 1, where to write a changed one)."""
    path = tmp_path_factory.mktemp('sd1') / 'model.safetensors'
    write_single_file(path, read_folder(FIXTURES / 'sd1'))
    return load_file(path), path.with_name('changed.safetensors')


def read(path, family='sd1', **options):
    return read_single_file(path, like=FIXTURES / family, **options)


def test_each_tensor_is_where_diffusers_converters_read_it(written):
    family, folder, path = written
    file = load_file(path)
    prefixes = contents_of(Shapes({name: array.shape for name, array in file.items()})).prefixes
    for part, pairs in PAIRS[family].items():
        theirs = {name.removeprefix(CLIP_PREFIX): found for name, found in pairs.items()}
        names = list(folder.parts[part].tensors())
        open_clip = prefixes[part].endswith('.model.')
        stored = stored_names(part, folder.parts[part].config, names, prefixes[part], open_clip)
        assert {name.removeprefix(CLIP_PREFIX) for name in names} == theirs.keys()
        for name, ours in stored.items():
            there, offset, stride = theirs[name.removeprefix(CLIP_PREFIX)]
            shape = file[there].shape
            assert ours.name == there
            assert (ours.third or 0) * (file[there].size // 3) == offset
            assert ours.transposed == (stride > 1)
            assert not ours.transposed or stride == shape[1]


def test_the_same_model_from_one_file_as_from_the_folder(written):
    family, folder, path = written
    ours = read(path, family)
    for name, part in folder.parts.items():
        jax.tree.map(np.testing.assert_array_equal, part.params, ours.parts[name].params)
        assert set(ours.parts[name].dtypes.values()) == {'float16'}
    assert ours.scheduler == {**folder.scheduler}
    assert (
        ours.tokenizers['tokenizer'](['a red heart']).tolist()
        == folder.tokenizers['tokenizer'](['a red heart']).tolist()
    )
    assert is_single_file(path)


def test_images_from_one_file_are_those_from_the_folder(written):
    family, folder, path = written
    settings = {'prompts': 'a red heart', 'steps': 2, 'batch_size': 8, 'seed': 3}
    theirs = pipeline_of(folder)(1, **settings).images
    np.testing.assert_array_equal(load(path, like=FIXTURES / family)(1, **settings).images, theirs)


def test_what_is_read_is_written_back_equal(written, tmp_path):
    family, _, path = written
    write_single_file(tmp_path / 'again.safetensors', read(path, family))
    ours, theirs = load_file(tmp_path / 'again.safetensors'), load_file(path)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert all(ours[name].dtype == theirs[name].dtype == np.float16 for name in theirs)
    with pytest.raises(UsageError, match='is there already: nothing was written'):
        write_single_file(path, read(path, family))


class Shapes(dict):
    """Names and shapes, as of a file."""

    source = 'model.safetensors'

    def shape(self, name):
        return tuple(self[name])


def single_file_of(configs, kinds, prefixes):
    """The shapes of a file with networks of such configs."""
    shapes = Shapes()
    for part, config in configs.items():
        kind = kinds.get(part, part)
        parameters, _ = make_network(kind, config)
        rename = clip_rename((), CLIP_PREFIX) if part.startswith('text') else None
        if rename is None:
            from diffusion_jax.interop import autoencoders
            from diffusion_jax.interop.unets import UNET_RENAME

            rename = UNET_RENAME if part == 'unet' else autoencoders.NEW
        named = torch_shapes(parameters, rename)
        prefix = prefixes[part]
        for name, stored in stored_names(part, config, list(named), prefix, prefix.endswith('.model.')).items():
            shape = named[name]
            if stored.third is not None:
                shape = (shape[0] * 3, *shape[1:])
            shapes[stored.name] = tuple(reversed(shape)) if stored.transposed else shape
    return shapes


VAE = {
    'block_out_channels': [128, 256, 512, 512],
    'down_block_types': ['DownEncoderBlock2D'] * 4,
    'up_block_types': ['UpDecoderBlock2D'] * 4,
    'layers_per_block': 2,
    'latent_channels': 4,
}
CLIP_L = {
    'hidden_size': 768,
    'intermediate_size': 3072,
    'num_attention_heads': 12,
    'num_hidden_layers': 12,
    'projection_dim': 768,
    'eos_token_id': 2,
}
# Keys of the published configs that decide what a network is.
PUBLISHED = {
    1: {
        'unet': {'cross_attention_dim': 768, 'attention_head_dim': 8, 'sample_size': 64},
        'vae': VAE,
        'text_encoder': CLIP_L,
    },
    2: {
        'unet': {
            'cross_attention_dim': 1024,
            'attention_head_dim': [5, 10, 20, 20],
            'use_linear_projection': True,
            'sample_size': 64,
        },
        'vae': VAE,
        'text_encoder': {
            'hidden_size': 1024,
            'intermediate_size': 4096,
            'num_attention_heads': 16,
            'num_hidden_layers': 23,
            'hidden_act': 'gelu',
            'projection_dim': 512,
            'eos_token_id': 2,
        },
    },
    'XL': {
        'unet': {
            'cross_attention_dim': 2048,
            'attention_head_dim': [5, 10, 20],
            'use_linear_projection': True,
            'block_out_channels': [320, 640, 1280],
            'down_block_types': ['DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'],
            'up_block_types': ['CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'],
            'transformer_layers_per_block': [1, 2, 10],
            'addition_embed_type': 'text_time',
            'addition_time_embed_dim': 256,
            'projection_class_embeddings_input_dim': 2816,
            'sample_size': 128,
        },
        'vae': {**VAE, 'scaling_factor': 0.13025},
        'text_encoder': CLIP_L,
        'text_encoder_2': {
            'hidden_size': 1280,
            'intermediate_size': 5120,
            'num_attention_heads': 20,
            'num_hidden_layers': 32,
            'hidden_act': 'gelu',
            'projection_dim': 1280,
            'eos_token_id': 2,
        },
    },
}
KINDS_OF = {'unet': 'UNet2DConditionModel', 'vae': 'AutoencoderKL', 'text_encoder': CLIP, 'text_encoder_2': OPEN_CLIP}
PREFIXES = {
    1: {'text_encoder': 'cond_stage_model.transformer.text_model.'},
    2: {'text_encoder': 'cond_stage_model.model.'},
    'XL': {
        'text_encoder': 'conditioner.embedders.0.transformer.text_model.',
        'text_encoder_2': 'conditioner.embedders.1.model.',
    },
}


@pytest.mark.parametrize('version', PUBLISHED)
def test_the_configs_told_from_shapes_are_the_published_ones(version):
    configs = PUBLISHED[version]
    prefixes = {'unet': 'model.diffusion_model.', 'vae': 'first_stage_model.', **PREFIXES[version]}
    shapes = single_file_of(configs, KINDS_OF, prefixes)
    if version == 2:  # as published: with the layer that is not used, and the projection
        last = {name: shape for name, shape in shapes.items() if '.resblocks.22.' in name}
        shapes |= {name.replace('.22.', '.23.'): shape for name, shape in last.items()}
        shapes['cond_stage_model.model.text_projection'] = (1024, 1024)
        shapes = Shapes(shapes)
    found = contents_of(shapes)
    assert found.version == version
    assert found.prediction == (None if version == 2 else 'eps')
    for part, config in configs.items():
        options = KINDS[KINDS_OF[part]].options
        assert options(found.configs[part]) == options(config), part
    assert found.configs['vae']['scaling_factor'] == configs['vae'].get('scaling_factor', 0.18215)


def test_a_file_of_version_2_has_one_layer_more_and_must_be_told_its_prediction(tmp_path):
    folder = read_folder(FIXTURES / 'sd2')
    write_single_file(tmp_path / 'short.safetensors', folder)
    tensors = load_file(tmp_path / 'short.safetensors')
    last = {name: array + 1 for name, array in tensors.items() if '.resblocks.2.' in name}
    tensors |= {name.replace('.2.', '.3.', 1): array for name, array in last.items()}
    tensors |= {'cond_stage_model.model.text_projection': np.zeros((16, 16), np.float16)}
    tensors |= {'cond_stage_model.model.logit_scale': np.zeros((), np.float16)}
    save_file(tensors, tmp_path / 'whole.safetensors')
    whole = read(tmp_path / 'whole.safetensors', 'sd2')
    jax.tree.map(np.testing.assert_array_equal, whole.parts['text_encoder'].params, folder.parts['text_encoder'].params)
    with pytest.raises(UsageError, match=r"does\s+not say which: name it, prediction='eps' or 'v'"):
        read_single_file(tmp_path / 'whole.safetensors', tokenizer=FIXTURES / 'sd2' / 'tokenizer')
    with pytest.raises(UsageError, match="unknown prediction 'x0' of a single file"):
        read(tmp_path / 'whole.safetensors', 'sd2', prediction='x0')
    said = read(tmp_path / 'whole.safetensors', 'sd2', prediction='eps')
    assert said.scheduler['prediction_type'] == 'epsilon'


def test_averaged_weights_are_read_when_they_are_asked_for(sd1):
    tensors, path = sd1
    flat = {
        name: f'model_ema.{name.removeprefix("model.").replace(".", "")}'
        for name in tensors
        if name.startswith('model.diffusion_model.')
    }
    more = {flat[name]: tensors[name] + np.float16(1) for name in flat}
    extra = {'model_ema.decay': np.zeros((), np.float32), 'model_ema.num_updates': np.zeros((), np.int32)}
    save_file({**tensors, **more, **extra, 'betas': np.zeros(1000, np.float32)}, path)
    plain, mean = read(path), read(path, ema=True)
    difference = jax.tree.map(
        lambda a, b: float(np.median(a - b)), mean.parts['unet'].params, plain.parts['unet'].params
    )
    assert all(abs(value - 1) < 1e-2 for value in jax.tree.leaves(difference))
    jax.tree.map(np.testing.assert_array_equal, mean.parts['vae'].params, plain.parts['vae'].params)
    broken = {name: array for name, array in {**tensors, **more}.items() if name != next(iter(more))}
    save_file(broken, path)
    with pytest.raises(UsageError, match=rf'{next(iter(more))} is missing'):
        read(path)
    save_file(tensors, path)
    with pytest.raises(UsageError, match='holds no averaged weights'):
        read(path, ema=True)
    assert averaged({}) == {}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda t: t.pop('model.diffusion_model.out.2.bias'), r'model.diffusion_model.out.2.bias is missing'),
        (lambda t: t.update({'model.diffusion_model.out.3.bias': t['betas_']}), r'out.3.bias is of no part'),
        (lambda t: t.update({'control_model.x': t['betas_']}), r'control_model.x is of no part'),
        (
            lambda t: t.update({'model.diffusion_model.time_embed.0.bias': t['betas_']}),
            r'time_embedding.linear_1.bias is \(3,\), not \(64,\)',
        ),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith('cond_stage')], 'it holds unet, vae'),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith('first_stage')], 'it holds unet, text_encoder'),
        (lambda t: [t.pop(n) for n in list(t) if '.mid.' in n or 'middle' in n], 'does not hold'),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith(('model', 'cond', 'first'))], 'it holds none of them'),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(sd1, change, message):
    tensors, path = sd1
    changed = {**tensors, 'betas_': np.zeros(3, np.float16)}
    change(changed)
    changed.pop('betas_', None)
    save_file(changed or {'lora.x': np.zeros(3)}, path)
    with pytest.raises(UsageError, match=message):
        read(path)


def test_what_the_file_cannot_say_must_be_named(sd1, tmp_path):
    tensors, path = sd1
    save_file(tensors, path)
    with pytest.raises(UsageError, match='holds no tokenizer'):
        read_single_file(path)
    with pytest.raises(UsageError, match='latent_scale is for an autoencoder alone'):
        read(path, latent_scale=1.0)
    alone = {
        name.removeprefix('first_stage_model.'): array for name, array in tensors.items() if name.startswith('first')
    }
    save_file(alone, tmp_path / 'vae.safetensors')
    with pytest.raises(UsageError, match="cannot say its latents' scale"):
        read_single_file(tmp_path / 'vae.safetensors')
    vae = read_single_file(tmp_path / 'vae.safetensors', like=FIXTURES / 'sd1' / 'vae')
    theirs = read_folder(FIXTURES / 'sd1').parts['vae']
    jax.tree.map(np.testing.assert_array_equal, vae.parts['vae'].params, theirs.params)
    write_single_file(tmp_path / 'again.safetensors', vae)
    assert load_file(tmp_path / 'again.safetensors').keys() == alone.keys()


def test_nothing_pickled_and_no_damaged_file_is_opened(tmp_path):
    for name in ('model.ckpt', 'model.pt'):
        (tmp_path / name).write_bytes(b'\x80\x04.')
        with pytest.raises(UsageError, match='are never opened'):
            load(tmp_path / name)
    (tmp_path / 'huge.safetensors').write_bytes((2**60).to_bytes(8, 'little') + b'{}')
    with pytest.raises(UsageError, match='is no safetensors file, or is damaged'):
        load(tmp_path / 'huge.safetensors', like=FIXTURES / 'sd1')
    with pytest.raises(UsageError, match=r'for one \.safetensors file'):
        load(FIXTURES / 'sd1', prediction='v')


def test_the_prefixes_that_are_read_are_those_that_are_written():
    written = {prefix for prefixes in PREFIXES.values() for prefix in prefixes.values()}
    known = {prefix for prefixes in TEXT_ENCODERS.values() for prefix in prefixes}
    assert {prefix.removesuffix(CLIP_PREFIX) for prefix in written} == known
