"""The oracles themselves: against sums over many draws, the score of the density, and closed forms of one Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import UsageError, oracles, process, schedules

COVARIANCES = np.array([[[0.3, 0.1], [0.1, 0.2]], [[0.1, -0.05], [-0.05, 0.4]]])
MIXTURE = oracles.gaussian_mixture([3.0, 1.0], [[-0.6, 0.4], [0.7, -0.3]], COVARIANCES)
SCHEDULES = {'cosine': schedules.cosine(1000), 'edm': schedules.edm(), 'flow': schedules.flow()}


def test_the_density_is_that_of_the_mixture():
    x = np.random.default_rng(0).normal(size=(7, 2))
    expected = sum(
        w * stats.multivariate_normal(m, c).pdf(x)
        for w, m, c in zip([0.75, 0.25], [[-0.6, 0.4], [0.7, -0.3]], COVARIANCES, strict=True)
    )
    np.testing.assert_allclose(MIXTURE.log_density(jnp.asarray(x)), np.log(expected), rtol=1e-4, atol=1e-5)


def test_draws_have_its_moments(key):
    x = np.asarray(MIXTURE.sample(key, 40_000))
    mean = 0.75 * np.array([-0.6, 0.4]) + 0.25 * np.array([0.7, -0.3])
    second = sum(
        w * (c + np.outer(m, m))
        for w, m, c in zip([0.75, 0.25], np.array([[-0.6, 0.4], [0.7, -0.3]]), COVARIANCES, strict=True)
    )
    np.testing.assert_allclose(x.mean(axis=0), mean, atol=0.02)
    np.testing.assert_allclose(np.cov(x.T), second - np.outer(mean, mean), atol=0.02)


@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('kind', process.PREDICTIONS)
@pytest.mark.usefixtures('x64')
def test_the_denoiser_is_the_score_of_the_density(name, kind, key):
    schedule = SCHEDULES[name]
    x = jax.random.normal(key, (5, 2))
    for t in (0.01, 0.4, 0.9):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        prediction = MIXTURE.denoiser(schedule, kind)(x, jnp.float64(t))
        assert prediction.kind == kind
        score = jax.grad(lambda x, a=alpha, s=sigma: MIXTURE.log_density(x, a, s).sum())(x)
        np.testing.assert_allclose(prediction.score, score, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures('x64')
def test_the_denoiser_is_the_mean_of_what_may_have_been(key):
    """E[x_0 | x_t] by weighting many draws of x_0 with how well they explain x_t."""
    draws = MIXTURE.sample(key, 400_000)
    schedule, t = SCHEDULES['cosine'], 0.5
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    for x in ([0.2, 0.3], [-1.0, 0.5]):
        weights = jax.nn.softmax(-0.5 * jnp.sum((jnp.array(x) - alpha * draws) ** 2, axis=1) / sigma**2)
        expected = weights @ draws
        got = MIXTURE.denoiser(schedule)(jnp.array([x]), jnp.float64(t)).x0[0]
        np.testing.assert_allclose(got, expected, atol=5e-3)


def test_a_scalar_mixture_holds_for_each_element_by_itself(key):
    scalar = oracles.gaussian_mixture([0.5, 0.5], [-0.5, 0.6], [0.1, 0.3])
    x = jax.random.normal(key, (3, 4, 2))
    together = scalar.denoiser(SCHEDULES['flow'])(x, jnp.array([0.2, 0.5, 0.8])).x0
    alone = scalar.denoiser(SCHEDULES['flow'])(x[1:2, 3:, 1:], 0.5).x0
    np.testing.assert_allclose(together[1, 3, 1], alone[0, 0, 0], rtol=1e-6)
    density = scalar.log_density(x)
    each = scalar.log_density(x.reshape(-1, 1)).reshape(3, -1).sum(axis=1)
    np.testing.assert_allclose(density, each, rtol=1e-5)


def test_standard_deviations_of_any_shape_are_diagonal_covariances(key):
    std = np.array([[0.2, 0.5], [0.3, 0.1]])
    by_std = oracles.gaussian(np.ones((2, 2)), std)
    by_matrix = oracles.gaussian(np.ones((2, 2)), np.diag(std.ravel() ** 2))
    x = jax.random.normal(key, (3, 2, 2))
    ours, theirs = (g.denoiser(SCHEDULES['edm'])(x, 0.01).x0 for g in (by_std, by_matrix))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert by_std.sample(key, 5).shape == (5, 2, 2)


def test_the_flow_of_a_gaussian_is_linear_and_goes_both_ways():
    """x / alpha - mean is carried in proportion to its standard deviation, axis by axis."""
    covariance = COVARIANCES[0]
    gaussian = oracles.gaussian([0.2, -0.1], covariance)
    start = np.random.default_rng(0).normal(size=(4, 2)) * 10
    log_snrs = np.array([-4.0, 0.0, 6.0])
    path = gaussian.probability_flow(start, log_snrs)
    variances, axes = np.linalg.eigh(covariance)
    spread = np.sqrt(variances + np.exp(-log_snrs)[:, None])
    inside = (start - [0.2, -0.1]) @ axes
    for i in range(3):
        np.testing.assert_allclose((path[i] - [0.2, -0.1]) @ axes, inside * spread[i] / spread[0], rtol=1e-9)
    back = gaussian.probability_flow(path[2], log_snrs[::-1])
    np.testing.assert_allclose(back[2], start, rtol=1e-8)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: oracles.gaussian_mixture([1.0, -1.0], [0.0, 1.0], [1.0, 1.0]), 'K positive weights'),
        (lambda: oracles.gaussian_mixture([1.0], [0.0, 1.0], [1.0, 1.0]), 'K means'),
        (lambda: oracles.gaussian([0.0, 0.0], [[1.0, 0.5], [0.2, 1.0]]), 'symmetric'),
        (lambda: oracles.gaussian([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]), 'positive semi-definite'),
        (lambda: oracles.gaussian([0.0, 0.0], [1.0, 1.0, 1.0]), 'standard deviations'),
        (lambda: MIXTURE.denoiser(SCHEDULES['edm'], 'noise'), "unknown prediction 'noise'"),
    ],
)
def test_what_is_no_mixture_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
