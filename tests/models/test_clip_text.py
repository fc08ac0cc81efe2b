"""CLIP's text transformer against transformers' own outputs and files (fixtures/interop/make_text.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_jax.errors import UsageError
from diffusion_jax.interop.names import export_params, import_params
from diffusion_jax.interop.tensors import TensorFiles, save_tensors
from diffusion_jax.interop.text_encoders import CLIP_IGNORED, CLIP_PREFIX, clip_config, clip_options, clip_rename
from diffusion_jax.models.clip_text import ClipText
from diffusion_jax.models.functional import functional

FIXTURES = Path(__file__).parents[1] / 'fixtures/interop/text'
TOLERANCE = 2e-5
SMALL = {'vocab_size': 10, 'length': 6, 'features': 8, 'inner_features': 16, 'num_layers': 1, 'num_heads': 2}


def load(name, **changes):
    """(shapes, apply, tensors, params, arguments) of a fixture."""
    options = clip_options(json.loads((FIXTURES / name / 'config.json').read_text())) | changes
    init, apply = functional(lambda rngs: ClipText(**options, rngs=rngs))
    shapes = jax.eval_shape(init, jax.random.key(0))
    tensors = TensorFiles([FIXTURES / name / 'model.safetensors'])
    params = import_params(tensors, shapes, clip_rename(tensors), ignored=CLIP_IGNORED)
    return shapes, apply, tensors, params, options


@pytest.fixture(scope='module')
def reference():
    with np.load(FIXTURES / 'reference.npz') as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope='module', params=['clip', 'clip_projection'])
def model(request, reference):
    name = request.param
    shapes, apply, tensors, params, options = load(name)
    with jax.default_matmul_precision('highest'):
        output = jax.jit(apply)(params, reference[f'{name}/ids'])
    return name, shapes, apply, tensors, params, options, output


def error(found, wanted):
    found = np.asarray(found)
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def test_outputs_are_those_of_transformers(model, reference):
    name, output = model[0], model[-1]
    assert len(output.hidden) == 4
    for layer, (found, wanted) in enumerate(zip(output.hidden, reference[f'{name}/hidden'], strict=True)):
        assert error(found, wanted) < TOLERANCE, layer
    assert error(output.last, reference[f'{name}/last']) < TOLERANCE
    assert error(output.pooled, reference[f'{name}/pooled']) < TOLERANCE


def test_what_follows_changes_nothing_before(model, reference):
    name, _, apply, _, params, _, output = model
    ids = reference[f'{name}/ids'].copy()
    ids[:, 9:] = 5
    changed = apply(params, ids)
    np.testing.assert_allclose(changed.last[:, :9], output.last[:, :9], atol=1e-4)
    assert np.abs(changed.last[:, 9:] - output.last[:, 9:]).max() > 0.1


def test_shorter_texts(model, reference):
    name, _, apply, _, params, _, output = model
    np.testing.assert_allclose(apply(params, reference[f'{name}/ids'][:, :7]).last, output.last[:, :7], atol=1e-4)


def test_tensors_survive(model, tmp_path):
    """Byte for byte, with and without the prefix, and with the buffer of old files."""
    name, shapes, _, tensors, params, _, _ = model
    stored = {key: tensors[key] for key in tensors}
    for prefix in (CLIP_PREFIX, ''):
        written = export_params(params, clip_rename((), prefix))
        if prefix == (CLIP_PREFIX if name == 'clip_projection' else ''):
            assert written.keys() == stored.keys()
        path = tmp_path / f'{prefix}model.safetensors'
        save_tensors(path, written | {f'{prefix}embeddings.position_ids': np.arange(16)[None]})
        files = TensorFiles([path])
        again = import_params(files, shapes, clip_rename(files), ignored=CLIP_IGNORED)
        for key, value in export_params(again, clip_rename(stored)).items():
            assert value.dtype == stored[key].dtype
            assert value.tobytes() == stored[key].tobytes(), key


def test_prefixes():
    """As transformers wrote it in 5.23: of the plain model without, of that with a projection with it."""
    plain = TensorFiles([FIXTURES / 'clip/model.safetensors'])
    projected = TensorFiles([FIXTURES / 'clip_projection/model.safetensors'])
    assert 'final_layer_norm.weight' in plain
    assert {'text_model.final_layer_norm.weight', 'text_projection.weight'} <= set(projected)
    assert clip_rename(projected)('text_projection.weight') == 'text_projection.weight'
    assert clip_rename(projected)('final_layer_norm.weight') == 'text_model.final_layer_norm.weight'
    assert clip_rename(plain)('final_layer_norm.weight') == 'final_layer_norm.weight'


@pytest.mark.parametrize('name', ['clip', 'clip_projection'])
def test_configs_survive(name):
    config = json.loads((FIXTURES / name / 'config.json').read_text())
    options = clip_options(config)
    written = clip_config(options)
    assert clip_options(written) == options
    assert {key: config[key] for key in written} == written
    assert json.loads(json.dumps(written)) == written


def test_options_of_published_configs():
    """Of Stable Diffusion 1.5, and of the second encoder of XL, as far as they matter."""
    first = {'_name_or_path': 'openai/clip-vit-large-patch14', 'architectures': ['CLIPTextModel'], 'eos_token_id': 2}
    first |= {'hidden_act': 'quick_gelu', 'hidden_size': 768, 'intermediate_size': 3072, 'num_attention_heads': 12}
    first |= {'num_hidden_layers': 12, 'model_type': 'clip_text_model', 'projection_dim': 768}
    assert clip_options(first) == {
        'vocab_size': 49408,
        'length': 77,
        'features': 768,
        'inner_features': 3072,
        'num_layers': 12,
        'num_heads': 12,
        'activation': 'quick_gelu',
        'epsilon': 1e-5,
        'projection_features': 0,
        'pool': 'last',
    }
    assert clip_options(first, projection=True)['projection_features'] == 768
    second = {'architectures': ['CLIPTextModelWithProjection'], 'hidden_act': 'gelu', 'projection_dim': 1280}
    options = clip_options(second)
    assert (options['activation'], options['projection_features']) == ('gelu', 1280)
    assert (options['pool'], options['end_id'], options['features']) == ('first_end', 49407, 512)


@pytest.mark.parametrize(
    ('change', 'cause'),
    [
        ({'hidden_act': 'swishy'}, 'hidden_act.*gelu.*quick_gelu'),
        ({'hidden_act': None}, 'hidden_act'),
        ({'model_type': 't5'}, "model_type 't5'.*clip_text_model"),
        ({'hidden_size': '32'}, 'hidden_size'),
        ({'num_hidden_layers': 0}, 'num_hidden_layers'),
        ({'vocab_size': True}, 'vocab_size'),
        ({'layer_norm_eps': 0}, 'layer_norm_eps'),
        ({'layer_norm_eps': float('nan')}, 'layer_norm_eps'),
        ({'eos_token_id': [2]}, 'eos_token_id'),
        ({'eos_token_id': None}, 'eos_token_id'),
    ],
)
def test_configs_that_cannot_be(change, cause):
    with pytest.raises(UsageError, match=cause):
        clip_options({'model_type': 'clip_text_model'} | change)


def test_an_end_that_no_config_can_say():
    with pytest.raises(UsageError, match='end_id of 2'):
        clip_config(SMALL | {'pool': 'first_end', 'end_id': 2})


@pytest.mark.parametrize(
    ('change', 'cause'),
    [
        ({'num_heads': 3}, 'num_heads=3'),
        ({'activation': 'no'}, 'activation'),
        ({'pool': 'no'}, 'pool'),
        ({'dtype': 'float16'}, 'dtype'),
        ({'num_layers': 0}, 'num_layers'),
        ({'projection_features': -1}, 'projection_features'),
        ({'pool': 'first_end', 'end_id': 10}, 'end_id'),
    ],
)
def test_arguments_that_cannot_be(change, cause):
    with pytest.raises(UsageError, match=cause):
        ClipText(**SMALL | change, rngs=nnx.Rngs(0))


@pytest.mark.parametrize('shape', [(7,), (1, 7), (1, 0), (1, 2, 3)])
def test_ids_that_cannot_be(shape):
    with pytest.raises(UsageError, match='at most 6 tokens'):
        ClipText(**SMALL, rngs=nnx.Rngs(0))(jnp.zeros(shape, jnp.int32))


def test_half_precision(reference):
    """Near float32, not it; float32 comes out."""
    _, apply, _, params, _ = load('clip_projection', dtype='bfloat16')
    output = jax.jit(apply)(params, reference['clip_projection/ids'])
    for found, key in ((output.last, 'last'), (output.pooled, 'pooled'), (output.hidden[1], 'hidden')):
        wanted = reference[f'clip_projection/{key}']
        assert 1e-4 < error(found, wanted[1] if key == 'hidden' else wanted) < 0.05


def test_first_parameters():
    model = ClipText(**SMALL | {'vocab_size': 1000, 'features': 64, 'length': 77}, rngs=nnx.Rngs(0))
    assert float(model.embeddings.token_embedding.embedding.std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.embeddings.position_embedding.embedding.std()) == pytest.approx(0.01, rel=0.05)
    assert float(model.encoder.layers[0].self_attn.q_proj.kernel.std()) == pytest.approx(0.02, rel=0.05)
    assert model.text_projection is None
