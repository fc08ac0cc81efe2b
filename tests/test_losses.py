import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import UsageError, losses, schedules
from diffusion_jax.process import Prediction, expand

CHAIN = schedules.cosine(1000)
LOG_SNR = jnp.linspace(-9, 9, 37)
SNR = np.exp(np.asarray(LOG_SNR, np.float64))


@pytest.mark.parametrize(
    ('weighting', 'prediction', 'expected'),
    [
        (losses.simple(), 'eps', np.ones_like(SNR)),
        (losses.simple(), 'x0', np.ones_like(SNR)),
        (losses.simple(), 'v', np.ones_like(SNR)),
        (losses.min_snr(5.0), 'eps', np.minimum(SNR, 5) / SNR),
        (losses.min_snr(5.0), 'x0', np.minimum(SNR, 5)),
        (losses.min_snr(5.0), 'v', np.minimum(SNR, 5) / (SNR + 1)),
        (losses.truncated_snr(), 'eps', np.maximum(SNR, 1) / SNR),
        (losses.truncated_snr(), 'x0', np.maximum(SNR, 1)),
        (losses.truncated_snr(), 'v', np.maximum(SNR, 1) / (SNR + 1)),
        (losses.p2(1.0, 1.0), 'eps', 1 / (1 + SNR)),
        (losses.p2(0.5, 2.0), 'eps', 1 / (2 + SNR) ** 0.5),
        (losses.p2(0.5, 2.0), 'x0', SNR / (2 + SNR) ** 0.5),
    ],
)
def test_weights_are_those_of_the_papers(weighting, prediction, expected):
    np.testing.assert_allclose(weighting(LOG_SNR, prediction), expected, rtol=1e-4)


@pytest.mark.parametrize('name', ['min_snr', 'truncated_snr', 'p2'])
def test_weights_are_finite_at_zero_snr(name):
    """A chain that ends in pure noise: weights of v and x0 stay finite. (For eps they may rightly be infinite.)"""
    weighting = losses.WEIGHTINGS[name]()
    for prediction in ('x0', 'v'):
        assert jnp.isfinite(weighting(jnp.array([-jnp.inf]), prediction)).all()


def loss_of(network_kind, weighting, key, prediction=None, x0_hat=0.2, size=64):
    """The loss of a network whose x0 is always `x0_hat`, told in `network_kind`."""
    x0 = jnp.full((size, 2, 2, 1), 0.5)

    def apply(params, x_t, timestep):
        t = (timestep + 1) / 1000
        alpha, sigma = expand(CHAIN.alpha(t), x_t), expand(CHAIN.sigma(t), x_t)
        return Prediction(jnp.full_like(x_t, x0_hat), 'x0', x_t, alpha, sigma).read(network_kind)

    return losses.diffusion_loss(
        apply, None, x0, key, schedule=CHAIN, prediction=prediction or network_kind, weighting=weighting
    )


@pytest.mark.parametrize('kind', ['eps', 'x0', 'v'])
def test_a_perfect_network_has_no_loss(kind, key):
    np.testing.assert_allclose(loss_of(kind, losses.simple(), key, x0_hat=0.5), 0, atol=1e-5)
    assert loss_of(kind, losses.simple(), key, x0_hat=0.2).mean() > 1e-3


@pytest.mark.parametrize('weighting', [losses.min_snr(), losses.truncated_snr(), losses.p2()])
def test_one_error_weighs_the_same_in_whatever_it_is_told(weighting, key):
    expected = loss_of('x0', weighting, key)
    np.testing.assert_allclose(loss_of('v', weighting, key), expected, rtol=1e-3)
    np.testing.assert_allclose(loss_of('eps', weighting, key), expected, rtol=1e-2)


def test_the_simple_x0_loss_is_the_squared_error(key):
    np.testing.assert_allclose(loss_of('x0', None, key), 0.3**2, rtol=1e-5)


def test_indices_of_a_chain_are_drawn_alike(key):
    for sampler in (losses.uniform, losses.stratified):
        t = losses.to_times(schedules.linear(4), sampler(key, 40_000))
        values, counts = np.unique(np.asarray(t), return_counts=True)
        np.testing.assert_allclose(values, [0.25, 0.5, 0.75, 1.0])
        np.testing.assert_allclose(counts, 10_000, rtol=0.05)


def test_continuous_times_never_reach_the_data():
    t = losses.to_times(schedules.linear(None), jnp.array([0.0, 0.5, 1 - 2.0**-24]))
    assert t[0] == pytest.approx(1e-5)
    assert t[2] <= 1


def test_stratified_times_fall_one_in_each_interval_in_random_order(key):
    u = np.asarray(losses.stratified(key, 100))
    np.testing.assert_array_equal(np.sort(np.floor(u * 100)), np.arange(100))
    assert (np.floor(u * 100) != np.arange(100)).mean() > 0.9
    assert u.max() < 1


def test_stratified_times_lower_the_variance_of_the_loss(key):
    def mean_loss(sampler, key):
        return jnp.mean(sampler(key, 32) ** 2)

    spread = [
        float(jnp.std(jax.vmap(lambda k, s=s: mean_loss(s, k))(jax.random.split(key, 200))))
        for s in (losses.stratified, losses.uniform)
    ]
    assert spread[0] < spread[1] / 5


def test_the_condition_is_dropped_as_often_as_asked(key):
    labels = jnp.arange(40_000) % 10
    dropped = losses.drop_condition(key, labels, 10, 0.1)
    assert float((dropped == 10).mean()) == pytest.approx(0.1, abs=0.006)
    assert ((dropped == labels) | (dropped == 10)).all()
    np.testing.assert_array_equal(losses.drop_condition(key, labels, 10, 0.0), labels)
    assert (losses.drop_condition(key, labels, 10, 1.0) == 10).all()


def test_conditioning_reaches_the_network(key):
    def apply(params, x, t, label):
        return x * label[:, None]

    x0 = jnp.ones((2, 3))
    kwargs = {'schedule': CHAIN, 'prediction': 'eps'}
    zero = losses.diffusion_loss(apply, None, x0, key, label=jnp.zeros(2), **kwargs)
    one = losses.diffusion_loss(apply, None, x0, key, label=jnp.ones(2), **kwargs)
    assert not jnp.allclose(zero, one)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: losses.min_snr(0), 'gamma > 0'),
        (lambda: losses.p2(k=0), 'k > 0'),
        (
            lambda: losses.diffusion_loss(None, None, jnp.ones((1, 1)), None, schedule=CHAIN, prediction='score'),
            'Valid choices: eps, v, x0',
        ),
    ],
)
def test_impossible_objectives_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
