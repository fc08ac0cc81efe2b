"""The forward process against Gaussian algebra done here, and conversions against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import process, schedules

CHAIN = schedules.cosine(50)


def test_the_chain_and_the_jump_have_the_same_moments_at_every_step():
    """Mean and variance carried step by step through q(x_t | x_{t-1}) are alpha and sigma^2, in float64."""
    for schedule in (schedules.linear(1000), schedules.cosine(1000)):
        mean, variance = 1.0, 0.0
        for index in range(1000):
            alpha, sigma = process.transition(schedule, index / 1000, (index + 1) / 1000)
            mean, variance = alpha * mean, alpha**2 * variance + sigma**2
            assert sigma**2 == pytest.approx(schedule.betas[index], rel=1e-9)
            assert variance == pytest.approx(1 - schedule.alphas_cumprod[index], rel=1e-9)
        assert mean == pytest.approx(np.sqrt(schedule.alphas_cumprod[-1]), rel=1e-9)


def test_the_chain_and_the_jump_agree_in_distribution(key):
    x0 = jnp.where(jnp.arange(20_000) % 2 == 0, -0.7, 0.4)[:, None]
    x = x0
    for index in range(30):
        eps = jax.random.normal(jax.random.fold_in(key, index), x.shape)
        x = process.q_step(CHAIN, x, index / 50, (index + 1) / 50, eps)
    jump = process.q_sample(CHAIN, x0, 30 / 50, jax.random.normal(jax.random.fold_in(key, 99), x.shape))
    assert stats.ks_2samp(np.ravel(x), np.ravel(jump)).pvalue > 0.01
    wrong = process.q_sample(CHAIN, x0, 34 / 50, jax.random.normal(jax.random.fold_in(key, 99), x.shape))
    assert stats.ks_2samp(np.ravel(x), np.ravel(wrong)).pvalue < 0.01  # the test can tell


@pytest.mark.parametrize(('s', 't'), [(0.0, 0.02), (0.02, 0.04), (0.3, 0.32), (0.2, 0.9), (0.98, 1.0)])
@pytest.mark.usefixtures('x64')
def test_posterior_is_bayes_rule(s, t):
    """q(x_s | x_t, x_0) from the product of q(x_t | x_s) and q(x_s | x_0), by precisions."""
    x0, x_t = jnp.array([[0.3]]), jnp.array([[-0.8]])
    alpha, sigma = process.transition(CHAIN, s, t)
    alpha_s, sigma_s = CHAIN.alpha(s), CHAIN.sigma(s)
    gaussian = process.q_posterior(CHAIN, x0, x_t, s, t)
    if s == 0:
        assert gaussian.mean[0, 0] == pytest.approx(0.3)
        assert gaussian.variance == 0
        return
    precision = alpha**2 / sigma**2 + 1 / sigma_s**2
    mean = (alpha * -0.8 / sigma**2 + alpha_s * 0.3 / sigma_s**2) / precision
    assert gaussian.mean[0, 0] == pytest.approx(mean, rel=1e-9)
    assert gaussian.variance == pytest.approx(1 / precision, rel=1e-9)


def test_posterior_of_neighbours_has_the_published_variance():
    chain = schedules.linear(1000)
    for index in (1, 10, 999):
        _, _, std = process.posterior_coefficients(chain, index / 1000, (index + 1) / 1000)
        assert std**2 == pytest.approx(chain.posterior_variances[index], rel=1e-9)
        beta, bar = chain.betas[index], chain.alphas_cumprod
        assert std**2 == pytest.approx(beta * (1 - bar[index - 1]) / (1 - bar[index]), rel=1e-9)


@pytest.mark.parametrize('t', [1e-3, 0.02, 0.5, 0.9, 0.999])
@pytest.mark.parametrize('kind', process.PREDICTIONS)
@pytest.mark.parametrize('schedule', [schedules.linear(None), schedules.edm(), schedules.flow()])
@pytest.mark.usefixtures('x64')
def test_each_prediction_reads_as_the_truth_and_back(schedule, kind, t, key):
    """From the true value of one kind, every other kind is its true value, and reading it back closes the circle."""
    x0 = jax.random.uniform(key, (4, 8), minval=-1)
    eps = jax.random.normal(jax.random.fold_in(key, 1), (4, 8))
    alpha, sigma = schedule.alpha(jnp.float64(t)), schedule.sigma(jnp.float64(t))
    x_t = process.q_sample(schedule, x0, jnp.float64(t), eps)
    v = (alpha * eps - sigma * x0) / jnp.sqrt(alpha**2 + sigma**2)
    truth = {'eps': eps, 'x0': x0, 'v': v, 'score': -eps / sigma, 'flow': eps - x0}
    prediction = process.Prediction(truth[kind], kind, x_t, alpha, sigma)
    for other, value in truth.items():
        np.testing.assert_allclose(prediction.read(other), value, rtol=1e-8, atol=1e-10)
        back = process.Prediction(prediction.read(other), other, x_t, alpha, sigma).read(kind)
        np.testing.assert_allclose(back, truth[kind], rtol=1e-8, atol=1e-10)


def test_in_float32_rounding_is_magnified_by_no_more_than_sigma_and_alpha(key):
    schedule = schedules.linear(None)
    x0 = jax.random.uniform(key, (4, 8), minval=-1)
    eps = jax.random.normal(jax.random.fold_in(key, 1), (4, 8))
    for t in (1e-3, 0.02, 0.5, 0.9, 0.999):
        alpha, sigma = schedule.alpha(jnp.float32(t)), schedule.sigma(jnp.float32(t))
        x_t = process.q_sample(schedule, x0, t, eps)
        truth = {'eps': eps, 'x0': x0, 'v': alpha * eps - sigma * x0, 'score': -eps / sigma}
        slack = {'eps': 1 / sigma, 'x0': 1 / alpha, 'v': 1 / (alpha * sigma), 'score': 1 / sigma**2}
        for kind in truth:
            prediction = process.Prediction(truth[kind], kind, x_t, alpha, sigma)
            for other, value in truth.items():
                np.testing.assert_allclose(prediction.read(other), value, atol=2e-6 * slack[other])


@pytest.mark.parametrize('kind', process.PREDICTIONS)
@pytest.mark.parametrize(('alpha', 'sigma'), [(1.0, 0.0), (0.0, 1.0), (1.0, 1e-6), (1e-6, 1.0)])
def test_conversions_are_finite_at_both_ends_and_so_are_their_derivatives(kind, alpha, sigma):
    def read(value, other):
        return process.Prediction(value, kind, jnp.ones((2, 3)), jnp.float32(alpha), jnp.float32(sigma)).read(other)

    for other in process.PREDICTIONS:
        value, vjp = jax.vjp(lambda v, other=other: read(v, other), jnp.full((2, 3), 0.5))
        assert jnp.isfinite(value).all()
        assert jnp.isfinite(vjp(jnp.ones((2, 3)))[0]).all()


def test_at_the_ends_what_is_known_is_exact():
    x_t = jnp.array([[0.25]])
    at_data = process.Prediction(jnp.array([[9.0]]), 'eps', x_t, jnp.float32(1), jnp.float32(0))
    assert at_data.x0 == x_t
    at_noise = process.Prediction(jnp.array([[9.0]]), 'x0', x_t, jnp.float32(0), jnp.float32(1))
    assert at_noise.eps == x_t
    assert process.Prediction(jnp.array([[0.5]]), 'v', x_t, jnp.float32(0), jnp.float32(1)).x0 == -0.5


def test_times_may_differ_within_a_batch(key):
    x0 = jax.random.normal(key, (3, 2, 2, 1))
    t = jnp.array([0.1, 0.5, 1.0])
    together = process.q_sample(CHAIN, x0, t, jnp.ones_like(x0))
    for i in range(3):
        np.testing.assert_allclose(together[i], process.q_sample(CHAIN, x0[i : i + 1], t[i], 1.0)[0], rtol=1e-5)


@pytest.mark.parametrize('schedule', [schedules.cosine(20), schedules.linear(None), schedules.edm(), schedules.flow()])
def test_a_chain_is_distributed_as_the_jump(schedule, key):
    x0 = jnp.full((20_000,), 0.7)
    chain = process.q_chain(schedule, x0[None], key, 20)
    assert chain.shape == (21, 1, 20_000)
    np.testing.assert_array_equal(chain[0, 0], x0)
    for i in (1, 7, 20):
        alpha, sigma = schedule.alpha(i / 20), schedule.sigma(i / 20)
        assert float(chain[i].mean()) == pytest.approx(0.7 * alpha, abs=5 * sigma / 20_000**0.5 + 1e-6)
        assert float(chain[i].std()) == pytest.approx(sigma, rel=0.03)
    # Neighbours are one step apart: what is not explained by the state before is that step's noise.
    ratio, std = process.transition(schedule, 6 / 20, 7 / 20)
    assert float((chain[7] - ratio * chain[6]).std()) == pytest.approx(std, rel=0.03)


def test_betas_of_a_chain_are_those_of_its_schedule():
    chain = schedules.cosine(1000)
    np.testing.assert_array_equal(process.chain_betas(chain, 1000), chain.betas)
    # The published chain is its continuous limit's, up to the clipped end.
    np.testing.assert_allclose(process.chain_betas(schedules.cosine(None), 1000)[:-1], chain.betas[:-1], atol=1e-12)
    np.testing.assert_allclose(process.chain_betas(schedules.ve(), 10).sum(), schedules.ve().sigma(1.0) ** 2)
