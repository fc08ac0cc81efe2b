"""The autoencoder against diffusers', with weights and outputs that diffusers wrote."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import UsageError
from diffusion_jax.interop.autoencoders import OLD, autoencoder_config, autoencoder_options, autoencoder_rename
from diffusion_jax.interop.names import export_params, import_params
from diffusion_jax.interop.tensors import TensorFiles, find_weights
from diffusion_jax.models import AutoencoderKL, count_params, functional
from diffusion_jax.models.autoencoder import Moments, decode, encode

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'interop'
FAMILIES = ('sd1', 'sd2', 'sdxl')


def config_of(family):
    return json.loads((FIXTURES / family / 'vae' / 'config.json').read_text())


def build(**options):
    return functional(lambda rngs: AutoencoderKL(**options, rngs=rngs))


@pytest.fixture(scope='module', params=FAMILIES)
def loaded(request):
    """(tensors, apply, params, reference) of a small model that diffusers saved."""
    tensors = TensorFiles(find_weights(FIXTURES / request.param / 'vae', 'diffusion_pytorch_model'))
    init, apply = build(**autoencoder_options(config_of(request.param)))
    params = import_params(tensors, jax.eval_shape(init, jax.random.key(0)), autoencoder_rename(tensors))
    return tensors, apply, params, np.load(FIXTURES / request.param / 'reference.npz')


def assert_near(ours, theirs):
    assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()


def test_it_computes_what_diffusers_does(loaded):
    _, apply, params, reference = loaded
    with jax.default_matmul_precision('highest'):
        moments = jax.jit(lambda params, x: encode(apply, params, x))(params, reference['vae/x'])
        decoded = jax.jit(lambda params, z: decode(apply, params, z))(params, reference['vae/z'])
    assert_near(moments.mean, reference['vae/mean'])
    assert_near(moments.log_variance, reference['vae/log_variance'])
    assert_near(decoded, reference['vae/decoded'])


def test_it_is_written_as_it_was_read(loaded):
    tensors, _, params, _ = loaded
    written = export_params(params, autoencoder_rename(tensors), 'float16')
    assert written.keys() == set(tensors)
    assert all(written[name].tobytes() == tensors[name].tobytes() for name in tensors)


def test_old_names_are_read_as_well(loaded):
    tensors, _, params, _ = loaded
    old = export_params(params, OLD)
    assert 'encoder.mid_block.attentions.0.proj_attn.weight' in old
    assert old.keys() != set(tensors)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    again = import_params(old, shapes, autoencoder_rename(old))
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize('family', FAMILIES)
def test_the_config_survives_a_round_trip(family):
    options = autoencoder_options(config_of(family))
    assert autoencoder_options(json.loads(json.dumps(autoencoder_config(options, 0.2)))) == options


def test_its_size_is_the_published_one():
    init, _ = build()
    assert count_params(jax.eval_shape(init, jax.random.key(0))) / 1e6 == pytest.approx(83.65, abs=0.005)


def test_moments_are_those_of_a_gaussian():
    key_mean, key_variance, key_draw = jax.random.split(jax.random.key(0), 3)
    mean, log_variance = (jax.random.normal(key, (1, 1, 1, 3)) for key in (key_mean, key_variance))
    moments = Moments(*(jnp.broadcast_to(leaf, (200_000, 1, 1, 3)) for leaf in (mean, log_variance)))
    draws = moments.sample(key_draw)
    np.testing.assert_allclose(draws.mean(axis=0), mean[0], atol=0.02)
    np.testing.assert_allclose(draws.var(axis=0), np.exp(log_variance[0]), rtol=0.02)
    # log q - log p, averaged over draws of q.
    log_q = -0.5 * (jnp.square(draws - mean) / jnp.exp(log_variance) + log_variance)
    log_p = -0.5 * jnp.square(draws)
    np.testing.assert_allclose((log_q - log_p).sum(axis=(1, 2, 3)).mean(), moments.kl()[0], rtol=0.02)


def test_sizes_that_do_not_divide_are_refused(loaded):
    _, apply, params, _ = loaded
    with pytest.raises(UsageError, match='images of 15x16 cannot be encoded: their sides must be multiples of 2'):
        jax.eval_shape(lambda params: encode(apply, params, jnp.ones((1, 15, 16, 3))), params)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'act_fn': 'gelu'}, "act_fn='gelu'"),
        ({'down_block_types': ['AttnDownEncoderBlock2D', 'DownEncoderBlock2D']}, 'AttnDownEncoderBlock2D'),
        ({'block_out_channels': [8, 12]}, 'multiples of the first'),
        ({'use_quant_conv': False}, 'only one of use_quant_conv'),
        ({'out_channels': 4}, 'other in_channels'),
    ],
)
def test_configs_that_compute_something_else_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        autoencoder_options({**config_of('sd1'), **change})


def test_it_can_do_without_attention_and_mixing():
    init, apply = build(
        channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        num_groups=4,
        image_channels=1,
        latent_channels=2,
        middle_attention=False,
        quant_convs=False,
        remat='blocks',
    )
    params = init(jax.random.key(0))
    assert 'quant_conv' not in params
    x = jnp.ones((1, 4, 4, 1))
    assert decode(apply, params, encode(apply, params, x).mean).shape == x.shape
