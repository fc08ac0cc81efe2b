"""Tiles against diffusers', and slices against the whole."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import UsageError
from diffusion_jax.interop.autoencoders import autoencoder_config, autoencoder_options, autoencoder_rename, latent_scale
from diffusion_jax.interop.names import import_params
from diffusion_jax.interop.tensors import TensorFiles, find_weights
from diffusion_jax.models import AutoencoderKL, functional
from diffusion_jax.models.autoencoder import decode, encode
from diffusion_jax.models.tiling import Tiled

FOLDER = Path(__file__).parents[1] / 'fixtures' / 'interop' / 'autoencoder_kl'
TILE = 16


@pytest.fixture(scope='module')
def loaded():
    """(encoder, decoder, params, reference) of a small model of factor 4 that diffusers saved."""
    tensors = TensorFiles(find_weights(FOLDER, 'diffusion_pytorch_model'))
    options = autoencoder_options(json.loads((FOLDER / 'config.json').read_text()))
    init, apply = functional(lambda rngs: AutoencoderKL(**options, rngs=rngs))
    params = import_params(tensors, jax.eval_shape(init, jax.random.key(0)), autoencoder_rename(tensors))
    parts = functools.partial(encode, apply), functools.partial(decode, apply)
    return *parts, params, np.load(FOLDER / 'reference.npz')


def assert_near(ours, theirs):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()


def test_a_deep_one_with_small_activations_computes_what_diffusers_does(loaded):
    """Here the epsilon of the norms matters: 1e-5 for 1e-6 is found."""
    encoder, decoder, params, reference = loaded
    with jax.default_matmul_precision('highest'):
        moments = jax.jit(encoder)(params, reference['x'])
        decoded = jax.jit(decoder)(params, reference['z'])
    assert_near(moments.mean, reference['mean'])
    assert_near(moments.log_variance, reference['log_variance'])
    assert_near(decoded, reference['decoded'])


@pytest.mark.parametrize('sliced', [False, True])
def test_tiles_are_those_of_diffusers(loaded, sliced):
    encoder, decoder, params, reference = loaded
    tiled = Tiled(encoder, decoder, factor=4, tile=TILE, sliced=sliced)
    with jax.default_matmul_precision('highest'):
        moments = jax.jit(tiled.encode)(params, reference['large/x'])
        decoded = jax.jit(tiled.decode)(params, reference['large/z'])
    assert_near(moments.mean, reference['large/mean'])
    assert_near(moments.log_variance, reference['large/log_variance'])
    assert_near(decoded, reference['large/decoded'])


def test_without_tiles_and_up_to_one_it_is_the_autoencoder(loaded):
    encoder, decoder, params, reference = loaded
    with jax.default_matmul_precision('highest'):
        for tiled in (Tiled(encoder, decoder, 4, tile=48), Tiled(encoder, decoder, 4, tile=None, sliced=True)):
            assert_near(tiled.decode(params, reference['large/z']), reference['large/decoded_whole'])
            whole = encoder(params, reference['large/x'])
            jax.tree.map(assert_near, tiled.encode(params, reference['large/x']), whole)


def test_of_a_function_of_each_pixel_alone_tiles_leave_no_trace():
    def halve(params, x):
        return x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).mean(axis=(2, 4))

    def double(params, z):
        return jnp.repeat(jnp.repeat(z, 2, axis=1), 2, axis=2)

    x = jax.random.normal(jax.random.key(0), (2, 50, 38, 3))
    for overlap in (0.0, 0.25, 0.5):
        tiled = Tiled(halve, double, factor=2, tile=16, overlap=overlap)
        np.testing.assert_allclose(tiled.encode(None, x), halve(None, x), atol=1e-6)
        np.testing.assert_allclose(tiled.decode(None, x), double(None, x), atol=1e-6)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match=r'tile=20 and overlap=0.25 must be whole numbers.*multiple of 32'):
        Tiled(None, None, factor=8, tile=20)
    with pytest.raises(UsageError, match='multiple of 32'):
        Tiled(None, None, factor=8, tile=40)
    with pytest.raises(UsageError, match=r'overlap must be in \[0, 1\)'):
        Tiled(None, None, factor=8, overlap=1.0)
    with pytest.raises(UsageError, match='15x16 cannot be encoded'):
        Tiled(None, None, factor=8).encode(None, jnp.zeros((1, 15, 16, 3)))


def test_the_scale_of_latents_is_read_and_has_a_default():
    config = json.loads((FOLDER / 'config.json').read_text())
    assert latent_scale(config) == (0.3, 0.1)
    assert latent_scale({}) == (0.18215, 0.0)
    assert latent_scale(autoencoder_config(autoencoder_options(config), 0.5, 0.25)) == (0.5, 0.25)
    with pytest.raises(UsageError, match='latents_mean'):
        autoencoder_options({**config, 'latents_mean': [0.0] * 4})
