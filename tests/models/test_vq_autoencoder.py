"""The autoencoder with a codebook against diffusers', with weights and outputs that diffusers wrote."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import UsageError
from diffusion_jax.interop.autoencoders import autoencoder_rename, latent_scale, vq_config, vq_options
from diffusion_jax.interop.names import export_params, import_params
from diffusion_jax.interop.tensors import TensorFiles, find_weights
from diffusion_jax.models import VQAutoencoder, functional
from diffusion_jax.models.autoencoder import decode, encode
from diffusion_jax.models.vq_autoencoder import codebook_use, decode_quantised, quantise

FOLDER = Path(__file__).parents[1] / 'fixtures' / 'interop' / 'autoencoder_vq'


def config():
    return json.loads((FOLDER / 'config.json').read_text())


@pytest.fixture(scope='module')
def loaded():
    """(tensors, apply, params, reference) of a small model that diffusers saved."""
    tensors = TensorFiles(find_weights(FOLDER, 'diffusion_pytorch_model'))
    init, apply = functional(lambda rngs: VQAutoencoder(**vq_options(config()), rngs=rngs))
    params = import_params(tensors, jax.eval_shape(init, jax.random.key(0)), autoencoder_rename(tensors))
    return tensors, apply, params, np.load(FOLDER / 'reference.npz')


def assert_near(ours, theirs):
    assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()


def test_it_computes_what_diffusers_does(loaded):
    _, apply, params, reference = loaded
    with jax.default_matmul_precision('highest'):
        latents = jax.jit(lambda params, x: encode(apply, params, x))(params, reference['x'])
        decoded = jax.jit(lambda params, z: decode(apply, params, z))(params, reference['z'])
        quantised = quantise(apply, params, reference['z'])
    assert_near(latents, reference['latents'])
    assert_near(decoded, reference['decoded'])
    assert_near(quantised.z, reference['quantised'])
    np.testing.assert_array_equal(quantised.indices.reshape(-1), reference['indices'])
    # diffusers multiplies the codebook's part by beta, which the paper does with the other: the numbers are the same.
    loss = quantised.commitment_error.mean() + 0.25 * quantised.codebook_error.mean()
    np.testing.assert_allclose(loss, reference['loss'], rtol=1e-5)


def test_it_is_written_as_it_was_read(loaded):
    tensors, _, params, _ = loaded
    written = export_params(params, autoencoder_rename(tensors), 'float16')
    assert written.keys() == set(tensors)
    assert 'quantize.embedding.weight' in written
    assert all(written[name].tobytes() == tensors[name].tobytes() for name in tensors)


def test_the_config_survives_a_round_trip():
    options = vq_options(config())
    assert options['codebook_size'] == 12
    assert vq_options(json.loads(json.dumps(vq_config(options, 0.2)))) == options
    assert latent_scale(vq_config(options, 0.2)) == (0.2, 0.0)
    with pytest.raises(UsageError, match=r"norm_type='spatial' is not supported"):
        vq_options({**config(), 'norm_type': 'spatial'})


def test_the_gradient_goes_straight_through_and_each_error_moves_its_own_part(loaded):
    _, apply, params, reference = loaded
    z = jnp.asarray(reference['z'])
    weights = jax.random.normal(jax.random.key(0), z.shape)
    through = jax.grad(lambda z: (quantise(apply, params, z).z * weights).sum())(z)
    np.testing.assert_allclose(through, weights, rtol=1e-6)

    def gradients(which):
        return jax.grad(lambda params, z: getattr(quantise(apply, params, z), which).sum(), (0, 1))(params, z)

    of_params, of_z = gradients('codebook_error')
    assert not of_z.any()
    nearest = quantise(apply, params, z)
    used = np.unique(nearest.indices)
    moved = np.flatnonzero(np.abs(of_params['quantize']['embedding']['embedding']).sum(axis=1))
    np.testing.assert_array_equal(moved, used)
    of_params, of_z = gradients('commitment_error')
    assert not any(leaf.any() for leaf in jax.tree.leaves(of_params))
    np.testing.assert_allclose(of_z, 2 * (z - nearest.z) / z[0].size, atol=1e-7)


def test_what_is_decoded_is_what_was_quantised(loaded):
    _, apply, params, reference = loaded
    vectors = quantise(apply, params, reference['z']).z
    np.testing.assert_allclose(
        decode(apply, params, reference['z']), decode_quantised(apply, params, vectors), rtol=1e-4, atol=1e-5
    )


def test_use_of_the_codebook():
    used, perplexity = codebook_use(jnp.array([[0, 1], [2, 2]]), 8)
    assert used == 3 / 8
    np.testing.assert_allclose(perplexity, np.exp(-0.5 * np.log(0.25) - 0.5 * np.log(0.5)), rtol=1e-6)
    used, perplexity = codebook_use(jnp.arange(8), 8)
    assert used == 1
    np.testing.assert_allclose(perplexity, 8, rtol=1e-6)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'codebook_size': 1}, 'two vectors of one number'),
        ({'codebook_channels': 0}, 'two vectors of one number'),
        ({'channels': 0}, 'at least one channel'),
        ({'dtype': 'float16'}, 'bfloat16, float32'),
    ],
)
def test_settings_that_make_no_codebook_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        functional(lambda rngs: VQAutoencoder(**options, rngs=rngs))
