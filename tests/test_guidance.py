import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import guidance, schedules
from diffusion_jax.denoisers import ModelDenoiser

CHAIN = schedules.cosine(1000)
LABELS = jnp.array([1, 2, 3])
NULL = {'label': jnp.zeros(3, int)}


def apply(params, x, t, label):
    return jnp.tanh(params * x) * label[:, None] / 7 + 0.1 * x + 0.3


def conditional(kind='eps'):
    return ModelDenoiser(apply, jnp.float32(0.7), CHAIN, kind, {'label': LABELS})


@pytest.mark.parametrize('kind', ['eps', 'x0', 'v'])
def test_scale_one_is_exactly_the_conditional_model_and_zero_the_unconditional(kind, key):
    x = jax.random.normal(key, (3, 5))
    unconditional = ModelDenoiser(apply, jnp.float32(0.7), CHAIN, kind, NULL)
    for scale, expected in ((1.0, conditional(kind)), (0.0, unconditional)):
        guided = guidance.classifier_free(conditional(kind), NULL, jnp.float32(scale))(x, 0.5)
        np.testing.assert_array_equal(guided.value, expected(x, 0.5).value)
        np.testing.assert_array_equal(guided.x0, expected(x, 0.5).x0)


@pytest.mark.parametrize('field', ['eps', 'x0', 'v', 'score'])
def test_guidance_extrapolates_every_prediction_alike(field, key):
    x = jax.random.normal(key, (3, 5))
    guided = guidance.classifier_free(conditional(), NULL, 3.0)(x, 0.5).read(field)
    cond = conditional()(x, 0.5).read(field)
    uncond = ModelDenoiser(apply, jnp.float32(0.7), CHAIN, 'eps', NULL)(x, 0.5).read(field)
    np.testing.assert_allclose(guided, uncond + 3 * (cond - uncond), rtol=1e-4, atol=1e-5)


def test_scale_and_time_may_differ_per_sample(key):
    x = jax.random.normal(key, (3, 5))
    scales, times = jnp.array([0.0, 1.0, 4.0]), jnp.array([0.2, 0.5, 0.9])
    together = guidance.classifier_free(conditional(), NULL, scales)(x, times).x0
    for i in range(3):
        alone = guidance.classifier_free(conditional(), NULL, scales[i])(x, times[i]).x0
        np.testing.assert_allclose(together[i], alone[i], rtol=1e-5)


def test_the_network_runs_once_on_a_doubled_batch(key):
    batches = []

    def counted(params, x, t, label):
        batches.append(x.shape[0])
        return apply(params, x, t, label)

    denoiser = ModelDenoiser(counted, jnp.float32(0.7), CHAIN, 'eps', {'label': LABELS})
    guidance.classifier_free(denoiser, NULL, 2.0)(jnp.ones((3, 5)), 0.5)
    assert batches == [6]


def test_null_conditioning_of_other_keys_is_refused():
    with pytest.raises(ValueError, match=r"keys \['text'\], the conditioning \['label'\]"):
        guidance.classifier_free(conditional(), {'text': jnp.zeros(3)}, 2.0)
