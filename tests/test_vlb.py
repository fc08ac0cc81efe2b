import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import UsageError, schedules, vlb
from diffusion_jax.process import Prediction

LENGTH = 50
CHAIN = schedules.cosine(LENGTH)
TIMES = (jnp.arange(LENGTH) + 1) / LENGTH
BETAS = CHAIN.betas
ALPHA_BAR = np.cumprod(1 - BETAS)
BEFORE = np.append(1.0, ALPHA_BAR[:-1])
POSTERIOR = BETAS * (1 - BEFORE) / (1 - ALPHA_BAR)
POSTERIOR[0] = POSTERIOR[1]
ON_X0 = np.sqrt(BEFORE) * BETAS / (1 - ALPHA_BAR)


def terms_of(error, fraction=None, **options):
    """The terms, [T], of a prediction of x0 that is off by `error`, [T] or a number."""
    x0 = jnp.zeros((LENGTH, 3, 2))
    value = jnp.broadcast_to(jnp.asarray(error, jnp.float32), (LENGTH,))[:, None, None] * jnp.ones_like(x0)
    if fraction is not None:
        fraction = jnp.broadcast_to(jnp.asarray(fraction, jnp.float32), (LENGTH,))[:, None, None] * jnp.ones_like(x0)
    prediction = Prediction(value, 'x0', jnp.full_like(x0, 7.0), jnp.float32(1), jnp.float32(1), fraction)
    return vlb.term(prediction, CHAIN, x0, TIMES, **options)


def closed_form(error, variance):
    """KL of N(mean + on_x0 error, variance) from the posterior, and -log N(0; error, variance) at index 0."""
    kl = 0.5 * (np.log(variance / POSTERIOR) + POSTERIOR / variance - 1 + (ON_X0 * error) ** 2 / variance)
    kl[0] = 0.5 * (np.log(2 * np.pi * variance[0]) + error**2 / variance[0])
    return kl


@pytest.mark.parametrize(
    ('variance', 'fraction', 'expected'),
    [
        ('small', None, POSTERIOR),
        ('large', None, np.append(POSTERIOR[0], BETAS[1:])),
        ('learned', 0.0, POSTERIOR),
        ('learned', 1.0, BETAS),
        ('learned', 0.3, BETAS**0.3 * POSTERIOR**0.7),
    ],
)
def test_terms_are_kls_between_normal_distributions(variance, fraction, expected):
    got = terms_of(0.01, fraction, variance=variance, decoder='gaussian')
    np.testing.assert_allclose(got, closed_form(0.01, expected), rtol=2e-4, atol=1e-7)


def test_a_perfect_prediction_of_small_variance_costs_only_the_decoder():
    got = terms_of(0.0)
    np.testing.assert_array_equal(got[1:], 0)
    assert got[0] > 0


def test_the_small_variance_of_a_long_chain_keeps_single_precision():
    """The terms' gain is a difference of neighbouring log-SNRs: in float32 it would be off by 1e-3 or so."""
    chain = schedules.linear(4000)
    index = np.arange(1, 4000, 37)
    x0 = jnp.zeros((len(index), 1))
    prediction = Prediction(jnp.full_like(x0, 0.1), 'x0', x0, jnp.float32(1), jnp.float32(1))
    alpha_bar = chain.alphas_cumprod
    expected = 0.5 * 0.1**2 * (1 / (1 / alpha_bar - 1)[index - 1] - 1 / (1 / alpha_bar - 1)[index])
    got = vlb.term(prediction, chain, x0, jnp.asarray((index + 1) / 4000, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-6)  # half the lost SNR times the squared error


def test_the_best_learned_variance_is_that_of_the_reverse_process():
    """For N(0, s^2) data and the true mean: the posterior's, and what x_i leaves open of x0."""
    data_variance = 0.3
    left = data_variance * (1 - ALPHA_BAR) / (ALPHA_BAR * data_variance + 1 - ALPHA_BAR)
    best = POSTERIOR + ON_X0**2 * left
    best[0] = left[0]
    fraction = np.log(best / POSTERIOR) / np.log(BETAS / POSTERIOR)
    assert ((fraction > 0) & (fraction < 1)).sum() >= LENGTH - 1
    # The expected term depends on the mean square of the error of x0 alone, which is `left`.
    error = np.sqrt(left)

    def slope(fraction):
        return jax.grad(lambda f: jnp.sum(terms_of(error, f, variance='learned', decoder='gaussian')))(
            jnp.asarray(fraction, jnp.float32)
        )

    curvature = np.asarray(slope(fraction + 0.01) - slope(fraction - 0.01)) / 0.02
    assert (curvature > 0).all()
    newton = fraction - np.asarray(slope(fraction)) / curvature
    np.testing.assert_allclose(newton, fraction, atol=2e-3)
    assert (slope(fraction - 0.05) < 0).all()
    assert (slope(fraction + 0.05) > 0).all()


LEVELS = jnp.arange(256) / 127.5 - 1


@pytest.mark.parametrize('std', [1e-3, 0.01, 0.1, 1.0])
@pytest.mark.parametrize('mean', [-1.3, -1.0, 0.003, 0.9, 1.0])
def test_the_decoder_is_a_distribution_over_256_levels(std, mean):
    nll = np.asarray(vlb.DECODERS['exact'](LEVELS, mean, jnp.log(std)), np.float64)
    assert np.isfinite(nll).all()
    assert np.exp(-nll).sum() == pytest.approx(1.0, abs=2e-5)
    approximate = np.asarray(vlb.DECODERS['tanh'](LEVELS, mean, jnp.log(std)), np.float64)
    assert np.abs(np.exp(-approximate) - np.exp(-nll)).max() < 3e-3
    assert not np.array_equal(approximate, nll)
    assert approximate.max() <= -np.log(1e-12) + 1e-4


def test_the_exact_decoder_is_that_of_double_precision_far_into_the_tails():
    with jax.enable_x64(True):
        for mean in (-0.9, 0.0, 0.7):
            low = vlb.DECODERS['exact'](LEVELS.astype(jnp.float32), jnp.float32(mean), jnp.log(jnp.float32(0.01)))
            high = vlb.DECODERS['exact'](jnp.arange(256.0) / 127.5 - 1, mean, jnp.log(0.01))
            assert high.dtype == jnp.float64
            assert low.dtype == jnp.float32
            assert high.max() > 4000
            np.testing.assert_allclose(low, high, rtol=2e-4, atol=1e-6)


def test_a_wide_decoder_is_the_density_times_the_level():
    for mean in (-0.5, 0.2):
        exact = vlb.DECODERS['exact'](LEVELS[1:-1], mean, jnp.log(0.5))
        density = vlb.DECODERS['gaussian'](LEVELS[1:-1], mean, jnp.log(0.5))
        np.testing.assert_allclose(exact, density + np.log(127.5), atol=5e-4)


@pytest.mark.parametrize('decoder', vlb.DECODERS)
def test_the_decoders_gradients_are_finite(decoder):
    def total(mean, log_std):
        return jnp.sum(vlb.DECODERS[decoder](LEVELS, mean, log_std))

    for mean in (0.0, 3.0, 1e4):
        for log_std in (-6.0, 0.0):
            assert np.isfinite(jax.grad(total, (0, 1))(mean, log_std)).all()


def test_the_prior_term_is_a_kl():
    x0 = jnp.array([[0.5, -0.5], [1.0, 0.0]])
    for chain in (schedules.linear(1000), schedules.linear(10)):
        last = chain.alphas_cumprod[-1]
        expected = 0.5 * (last * np.array([0.25, 0.5]) - last - np.log1p(-last))
        np.testing.assert_allclose(vlb.prior_term(chain, x0), expected, rtol=1e-5)
    np.testing.assert_array_equal(vlb.prior_term(schedules.linear(10, zero_terminal_snr=True), x0), 0)
    with pytest.raises(UsageError, match='num_timesteps'):
        vlb.prior_term(schedules.linear(None), x0)


def test_a_chain_of_one_step_is_its_decoder():
    chain = schedules.Chain([0.2])
    x0 = jnp.zeros((1, 1))
    prediction = Prediction(x0, 'x0', x0, jnp.float32(1), jnp.float32(1))
    got = vlb.term(prediction, chain, x0, 1.0, decoder='gaussian')
    np.testing.assert_allclose(got, 0.5 * np.log(2 * np.pi * 0.2), rtol=1e-5)
