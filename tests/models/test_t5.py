"""T5's encoder against transformers' own outputs and files (fixtures/interop/make_text.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_jax.errors import UsageError
from diffusion_jax.interop.names import export_params, import_params
from diffusion_jax.interop.tensors import TensorFiles
from diffusion_jax.interop.text_encoders import T5_IGNORED, T5_RENAME, t5_options
from diffusion_jax.models.functional import functional
from diffusion_jax.models.t5 import T5Encoder, relative_buckets

FIXTURES = Path(__file__).parents[1] / 'fixtures/interop/text'
TOLERANCE = 2e-5
SMALL = {'vocab_size': 10, 'features': 8, 'head_channels': 4, 'inner_features': 16, 'num_layers': 1, 'num_heads': 2}


def load(name, **changes):
    """(apply, tensors, params) of a fixture."""
    options = t5_options(json.loads((FIXTURES / name / 'config.json').read_text())) | changes
    init, apply = functional(lambda rngs: T5Encoder(**options, rngs=rngs))
    file = TensorFiles([FIXTURES / name / 'model.safetensors'])
    tensors = {key: file[key] for key in file}
    # Files may repeat the table.
    repeated = tensors | {'encoder.embed_tokens.weight': tensors['shared.weight']}
    params = import_params(repeated, jax.eval_shape(init, jax.random.key(0)), T5_RENAME, ignored=T5_IGNORED)
    return apply, tensors, params


@pytest.fixture(scope='module')
def reference():
    with np.load(FIXTURES / 'reference.npz') as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope='module', params=['t5', 't5_relu'])
def model(request):
    apply, tensors, params = load(request.param)
    return request.param, jax.jit(apply), tensors, params


def error(found, wanted):
    found = np.asarray(found)
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def test_states_are_those_of_transformers(model, reference):
    name, apply, _, params = model
    ids, mask = reference[f'{name}/ids'], reference[f'{name}/mask']
    with jax.default_matmul_precision('highest'):
        assert error(apply(params, ids, mask), reference[f'{name}/last']) < TOLERANCE
        assert error(apply(params, ids), reference[f'{name}/unmasked']) < TOLERANCE


def test_padding_changes_nothing(model, reference):
    name, apply, _, params = model
    ids, mask = reference[f'{name}/ids'], reference[f'{name}/mask']
    states = apply(params, ids, mask)
    other = apply(params, np.where(mask, ids, 7), mask)
    real = mask.astype(bool)
    np.testing.assert_allclose(other[real], states[real], atol=1e-5)


def test_tensors_survive(model):
    _, _, tensors, params = model
    written = export_params(params, T5_RENAME)
    assert written.keys() == tensors.keys()
    for key, value in written.items():
        assert value.tobytes() == tensors[key].tobytes(), key


def test_buckets():
    """By hand, of 8: 4 for each sign, of which 2 are exact, and the last begins at 8 sqrt(1/4) = 4 of 8."""
    row = relative_buckets(13, 8, 8)[6].tolist()
    assert row == [3, 3, 3, 2, 2, 1, 0, 5, 6, 6, 7, 7, 7]


def test_options_of_published_configs():
    """Of google/t5-v1_1-xxl, which Stable Diffusion 3 has."""
    config = {'d_ff': 10240, 'd_kv': 64, 'd_model': 4096, 'feed_forward_proj': 'gated-gelu', 'model_type': 't5'}
    config |= {'layer_norm_epsilon': 1e-06, 'num_heads': 64, 'num_layers': 24, 'relative_attention_num_buckets': 32}
    assert t5_options(config) == {
        'vocab_size': 32128,
        'features': 4096,
        'head_channels': 64,
        'inner_features': 10240,
        'num_layers': 24,
        'num_heads': 64,
        'num_buckets': 32,
        'max_distance': 128,
        'activation': 'gelu_new',
        'gated': True,
        'epsilon': 1e-6,
    }
    said = {'relu': ('relu', False), 'gelu': ('gelu', False), 'gated-silu': ('silu', True)}
    for name, wanted in said.items():
        options = t5_options({'feed_forward_proj': name})
        assert (options['activation'], options['gated']) == wanted


@pytest.mark.parametrize(
    ('change', 'cause'),
    [
        ({'feed_forward_proj': 'gated-swishy'}, 'feed_forward_proj.*gated-gelu'),
        ({'feed_forward_proj': 'shut-gelu'}, 'feed_forward_proj'),
        ({'feed_forward_proj': 3}, 'feed_forward_proj'),
        ({'model_type': 'umt5'}, "model_type 'umt5'.*'t5'"),
        ({'d_model': -1}, 'd_model'),
        ({'layer_norm_epsilon': 'small'}, 'layer_norm_epsilon'),
    ],
)
def test_configs_that_cannot_be(change, cause):
    with pytest.raises(UsageError, match=cause):
        t5_options(change)


@pytest.mark.parametrize(
    ('change', 'cause'),
    [
        ({'activation': 'no'}, 'activation'),
        ({'dtype': 'float16'}, 'dtype'),
        ({'num_heads': 0}, 'num_heads'),
        ({'num_buckets': 6}, 'num_buckets=6'),
        ({'max_distance': 8}, 'max_distance=8'),
    ],
)
def test_arguments_that_cannot_be(change, cause):
    with pytest.raises(UsageError, match=cause):
        T5Encoder(**SMALL | change, rngs=nnx.Rngs(0))


def test_inputs_that_cannot_be():
    model = T5Encoder(**SMALL, rngs=nnx.Rngs(0))
    with pytest.raises(UsageError, match='ids'):
        model(jnp.zeros(3, jnp.int32))
    with pytest.raises(UsageError, match='mask'):
        model(jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 4)))


def test_half_precision(reference):
    apply, _, params = load('t5', dtype='bfloat16')
    states = jax.jit(apply)(params, reference['t5/ids'], reference['t5/mask'])
    assert 1e-4 < error(states, reference['t5/last']) < 0.1
