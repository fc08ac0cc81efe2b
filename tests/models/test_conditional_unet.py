"""The conditional U-Net against diffusers', with weights and outputs that diffusers wrote."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_jax.errors import UsageError
from diffusion_jax.interop.names import export_params, import_params
from diffusion_jax.interop.tensors import TensorFiles, find_weights
from diffusion_jax.interop.unets import UNET_RENAME, unet_config, unet_options
from diffusion_jax.models import ConditionalUNet, count_params, functional

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'interop'
FAMILIES = ('sd1', 'sd2', 'sdxl')
STABLE_DIFFUSION = {
    'sd1': {},
    'sd2': {'num_heads': (5, 10, 20, 20), 'context_features': 1024, 'linear_projection': True},
    'sdxl': {
        'channel_multipliers': (1, 2, 4),
        'attention_depths': (0, 2, 10),
        'head_channels': 64,
        'context_features': 2048,
        'pooled_features': 1280,
        'linear_projection': True,
        'resolution': 128,
    },
}


def config_of(family):
    return json.loads((FIXTURES / family / 'unet' / 'config.json').read_text())


def build(**options):
    return functional(lambda rngs: ConditionalUNet(**options, rngs=rngs))


@pytest.fixture(scope='module', params=FAMILIES)
def loaded(request):
    """(family, tensors, apply, params, reference) of a small model that diffusers saved."""
    tensors = TensorFiles(find_weights(FIXTURES / request.param / 'unet', 'diffusion_pytorch_model'))
    init, apply = build(**unet_options(config_of(request.param)))
    params = import_params(tensors, jax.eval_shape(init, jax.random.key(0)), UNET_RENAME)
    return request.param, tensors, apply, params, np.load(FIXTURES / request.param / 'reference.npz')


def test_it_computes_what_diffusers_does(loaded):
    family, _, apply, params, reference = loaded
    given = {'context': reference['unet/context']}
    if family == 'sdxl':
        given |= {'pooled': reference['unet/pooled'], 'sizes': reference['unet/sizes']}
    run = jax.jit(lambda x, t: apply(params, x, t, **{name: jnp.asarray(value) for name, value in given.items()}))
    for i, t in enumerate(reference['unet/t']):
        with jax.default_matmul_precision('highest'):
            ours = run(reference[f'unet/x_{i}'], np.full(2, t))
        theirs = reference[f'unet/y_{i}']
        assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()


def test_it_is_written_as_it_was_read(loaded):
    _, tensors, _, params, _ = loaded
    written = export_params(params, UNET_RENAME, 'float16')
    assert written.keys() == set(tensors)
    assert all(written[name].tobytes() == tensors[name].tobytes() for name in tensors)


@pytest.mark.parametrize('family', FAMILIES)
def test_the_config_survives_a_round_trip(family):
    options = unet_options(config_of(family))
    assert unet_options(json.loads(json.dumps(unet_config(options)))) == options


@pytest.mark.parametrize(
    ('family', 'millions'), [('sd1', 859.52), ('sd2', 865.91), pytest.param('sdxl', 2567.46, marks=pytest.mark.slow)]
)
def test_its_size_is_the_published_one(family, millions):
    init, _ = build(**{'resolution': 64, **STABLE_DIFFUSION[family]})
    assert count_params(jax.eval_shape(init, jax.random.key(0))) / 1e6 == pytest.approx(millions, abs=0.005)


TINY = {
    'resolution': 8,
    'channels': 8,
    'channel_multipliers': (1, 2),
    'num_res_blocks': 1,
    'attention_depths': (1, 1),
    'num_heads': 2,
    'context_features': 6,
    'num_groups': 4,
}


def tiny_inputs(batch=2):
    return jnp.ones((batch, 8, 8, 4)), jnp.arange(batch) * 100.0, {'context': jnp.ones((batch, 3, 6))}


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['convs', 'blocks'])
def test_gradients_do_not_depend_on_what_is_kept(remat):
    x, t, given = tiny_inputs()

    def gradient(remat):
        init, apply = build(**TINY, remat=remat)
        params = jax.tree.map(lambda leaf: leaf + 0.01, init(jax.random.key(0)))
        return jax.jit(jax.grad(lambda params: apply(params, x, t, **given).var()))(params)

    kept, again = gradient('none'), gradient(remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), kept, again)


def test_labels_and_extra_images_condition_it():
    x, t, given = tiny_inputs()
    init, apply = build(**TINY, num_classes=3, extra_channels=5)
    params = jax.tree.map(lambda leaf: leaf + 0.02, init(jax.random.key(0)))
    run = jax.jit(apply)

    def output(label, extra):
        return run(params, x, t, **given, label=jnp.array(label), extra=jnp.full((2, 8, 8, 5), extra))

    first = output([0, 0], 0.0)
    assert not np.allclose(first, output([3, 0], 0.0)[:1], atol=1e-4)
    assert not np.allclose(first, output([0, 0], 1.0), atol=1e-4)
    np.testing.assert_allclose(first[1], output([3, 0], 0.0)[1], atol=1e-5)


def test_conditioning_that_does_not_fit_is_refused():
    x, t, given = tiny_inputs()
    init, apply = build(**TINY)
    params = jax.eval_shape(init, jax.random.key(0))

    def run(**conditioning):
        jax.eval_shape(lambda params: apply(params, x, t, **conditioning), params)

    with pytest.raises(UsageError, match='needs context'):
        run()
    with pytest.raises(UsageError, match='takes no label'):
        run(**given, label=jnp.zeros(2, int))
    with pytest.raises(UsageError, match='takes no pooled'):
        run(**given, pooled=jnp.zeros((2, 3)))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'attention_depths': (1,)}, 'a number, 0 or more, for each of the 2'),
        ({'num_heads': 3}, 'num_heads=3 does not divide a level of 8'),
        ({'num_heads': (2, 2, 2)}, 'one for each of the 2 levels'),
        ({'head_channels': 3}, 'head_channels=3 must divide'),
        ({'channels': 7}, 'an even number of channels'),
        ({'resolution': 1}, 'cannot be halved 1 times'),
        ({'dropout': 1.0}, r'dropout must be in \[0, 1\)'),
        ({'num_groups': 3}, 'num_groups=3 does not divide'),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        nnx.eval_shape(lambda: ConditionalUNet(**{**TINY, **changes}, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'freq_shift': 1}, 'freq_shift=1 is not supported, only 0'),
        ({'act_fn': 'gelu'}, "act_fn='gelu'"),
        ({'only_cross_attention': [True, False]}, 'only_cross_attention'),
        ({'up_block_types': ['UpBlock2D', 'UpBlock2D']}, 'their like in reverse'),
        ({'block_out_channels': [16, 24]}, 'multiples of the first'),
        ({'cross_attention_dim': [16, 24]}, 'one number for all levels'),
    ],
)
def test_configs_that_compute_something_else_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        unet_options({**config_of('sd1'), **change})


def test_tensors_that_do_not_fit_are_named(loaded):
    _, tensors, _, params, _ = loaded
    have = {name: tensors[name] for name in tensors}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    missing = {name: array for name, array in have.items() if name != 'conv_in.weight'}
    with pytest.raises(UsageError, match=r'conv_in\.weight is missing'):
        import_params(missing, shapes, UNET_RENAME)
    with pytest.raises(UsageError, match=r'surplus is no part of this model'):
        import_params({**have, 'surplus': np.zeros(1)}, shapes, UNET_RENAME)
    with pytest.raises(UsageError, match=r'conv_in\.weight is \(1, 1\), not'):
        import_params({**have, 'conv_in.weight': np.zeros((1, 1), np.float32)}, shapes, UNET_RENAME)
    with pytest.raises(UsageError, match=r'conv_in\.weight .* is of int32, and parameters are floats'):
        import_params({**have, 'conv_in.weight': have['conv_in.weight'].astype(np.int32)}, shapes, UNET_RENAME)
