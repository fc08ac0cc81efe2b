"""Likelihoods of data whose density is known in closed form."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import UsageError, oracles, schedules
from diffusion_jax.denoisers import Stateful
from diffusion_jax.evaluation.likelihood import DEQUANTIZED_BITS, dequantize, ode_bits_per_dim, vlb_bits_per_dim

COVARIANCE = np.array([[0.5, 0.3, 0.1], [0.3, 0.4, -0.1], [0.1, -0.1, 0.3]])
CORRELATED = oracles.gaussian([0.0, 0.0, 0.0], COVARIANCE)
# Of mean zero as a whole: another mean would show through where a schedule ends with some signal left. (And the edm
# schedule below ends in more noise than its default of 80, in which the data's variance shows by 3e-4 bits.)
MIXTURE = oracles.gaussian_mixture(
    [0.4, 0.6], [[-0.9, 0.6], [0.6, -0.4]], [[[0.05, 0.02], [0.02, 0.1]], [[0.2, -0.1], [-0.1, 0.1]]]
)
SCHEDULES = {
    'linear': schedules.linear(None),
    'cosine chain': schedules.cosine(1000),
    'cosine': schedules.cosine(None),
    'zero terminal SNR': schedules.linear(1000, zero_terminal_snr=True),
    'edm': schedules.edm(sigma_max=800.0),
    'shifted flow': schedules.flow(3.0),
}


FOUR = ('linear', 'cosine chain', 'edm', 'shifted flow')


def bits(log_density, dimensions):
    return -np.asarray(log_density) / dimensions / math.log(2)


# --- the probability-flow ODE -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
    ('name', 'data'),
    [*((name, MIXTURE) for name in SCHEDULES), *((name, CORRELATED) for name in SCHEDULES if name in FOUR)],
)
def test_the_ode_gives_the_density_of_the_data(name, data, key):
    schedule = SCHEDULES[name]
    x0 = data.sample(key, 16)
    # So early a start that the data are blurred by less than 1e-4: what is measured is their own density.
    t_min = float(schedule.time_of_log_snr(19.0))
    got = ode_bits_per_dim(data.denoiser(schedule, 'v'), schedule, x0, key, steps=100, divergence='exact', t_min=t_min)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, bits(data.log_density(x0), x0.shape[1]), atol=1e-4)


@pytest.mark.usefixtures('x64')
def test_from_t_min_on_it_is_the_density_of_the_blurred_data(key):
    schedule = schedules.cosine(50)
    x0 = MIXTURE.sample(key, 16)
    got = ode_bits_per_dim(MIXTURE.denoiser(schedule), schedule, x0, key, steps=100, divergence='exact')
    blur = schedule.sigma(1 / 50) / schedule.alpha(1 / 50)
    blurred, sharp = bits(MIXTURE.log_density(x0, 1.0, blur), 2), bits(MIXTURE.log_density(x0), 2)
    np.testing.assert_allclose(got, blurred, atol=1e-4)
    assert np.abs(blurred - sharp).max() > 5e-3


@pytest.mark.usefixtures('x64')
def test_the_integrator_is_of_order_four(key):
    schedule = schedules.flow()
    x0 = CORRELATED.sample(key, 16)
    blur = schedule.sigma(schedule.t_min) / schedule.alpha(schedule.t_min)
    truth = bits(CORRELATED.log_density(x0, 1.0, blur), 3)

    def error(steps):
        got = ode_bits_per_dim(CORRELATED.denoiser(schedule), schedule, x0, key, steps=steps, divergence='exact')
        return np.abs(got - truth).max()

    assert math.log2(error(25) / error(50)) == pytest.approx(4.0, abs=0.3)


@pytest.mark.parametrize('probes', [1, 4])
def test_hutchinsons_estimate_is_unbiased_and_better_with_more_probes(probes, key):
    schedule = schedules.flow()
    x0 = jnp.broadcast_to(jnp.array([0.5, -0.3, 0.4]), (2000, 3))
    denoiser = CORRELATED.denoiser(schedule)
    got = np.asarray(ode_bits_per_dim(denoiser, schedule, x0, key, steps=30, probes=probes))
    assert got.dtype == np.float32
    exact = float(ode_bits_per_dim(denoiser, schedule, x0[:1], key, steps=30, divergence='exact')[0])
    spread = got.std()
    assert abs(got.mean() - exact) < 4 * spread / math.sqrt(len(got))
    # The flow maps N(0, C) to N(0, I), so its Jacobian integrates to -log(C) / 2, of which v^T J v has the variance
    # 2 sum of J_ij^2 off the diagonal.
    variances, axes = np.linalg.eigh(COVARIANCE)
    integrated = -0.5 * axes @ np.diag(np.log(variances)) @ axes.T
    off_diagonal = integrated - np.diag(np.diag(integrated))
    assert spread * math.sqrt(probes) == pytest.approx(
        math.sqrt(2 * (off_diagonal**2).sum()) / 3 / math.log(2), rel=0.06
    )


def test_eight_bit_data_are_dequantized_and_the_level_width_added(key):
    """The bits of a quantised normal distribution are those of its density, dequantised, and of the level's width."""
    std = 0.3
    data, schedule = oracles.gaussian(0.0, std), schedules.linear(None)
    levels = jnp.round((std * jax.random.normal(key, (128, 4, 4, 1)) + 1) * 127.5) / 127.5 - 1
    noisy = dequantize(levels, jax.random.key(1))
    assert jnp.abs(noisy - levels).max() <= 1 / 255
    assert jnp.abs(noisy - levels).max() > 0.99 / 255
    density = ode_bits_per_dim(
        data.denoiser(schedule, 'eps'), schedule, noisy, key, steps=40, divergence='exact', t_min=1e-4
    )
    assert density.dtype == jnp.float32
    np.testing.assert_allclose(density, bits(data.log_density(noisy), 16), atol=2e-3)
    cdf = np.vectorize(lambda x: 0.5 * math.erfc(-x / std / math.sqrt(2)))
    x = np.asarray(levels, np.float64)
    discrete = -np.log2(cdf(x + 1 / 255) - cdf(x - 1 / 255)).mean(axis=(1, 2, 3))
    assert discrete.mean() == pytest.approx(7.30, abs=0.1)
    got = np.asarray(density) + DEQUANTIZED_BITS
    np.testing.assert_allclose(got, discrete, atol=2e-2)
    assert got.mean() == pytest.approx(discrete.mean(), abs=3e-3)


# --- the variational bound --------------------------------------------------------------------------------------------


def chain_of(length):
    """(schedule, betas, alpha_bar, alpha_bar of the step before), the latter by their definitions."""
    betas = np.minimum(np.linspace(0.1, 20.0, length) / length, 0.999)
    alpha_bar = np.cumprod(1 - betas)
    return schedules.Chain(betas), betas, alpha_bar, np.append(1.0, alpha_bar[:-1])


def reverse_of(length, variance):
    """For N(0, variance): (schedule, posterior variances, betas, share of x0, E[x0 | x_i] / x_i, Var[x0 | x_i])."""
    schedule, betas, alpha_bar, before = chain_of(length)
    posterior = betas * (1 - before) / (1 - alpha_bar)
    posterior[0] = posterior[1]
    on_x0 = np.sqrt(before) * betas / (1 - alpha_bar)
    marginal = alpha_bar * variance + 1 - alpha_bar
    return (
        schedule,
        posterior,
        betas,
        on_x0,
        np.sqrt(alpha_bar) * variance / marginal,
        variance * (1 - alpha_bar) / marginal,
    )


def with_fraction(denoiser, schedule, fractions):
    """The denoiser with a learned variance, of one fraction an index."""
    fractions = jnp.asarray(fractions, jnp.float32)

    def denoise(x_t, t):
        index = jnp.round(t * schedule.num_timesteps).astype(int) - 1
        return dataclasses.replace(denoiser(x_t, t), variance_fraction=jnp.broadcast_to(fractions[index], x_t.shape))

    return denoise


@pytest.mark.parametrize('variance', ['small', 'large'])
def test_the_bound_is_the_sum_of_the_closed_forms(variance, key):
    length, value, data_variance = 20, 0.4, 0.25
    schedule, posterior, betas, on_x0, k, _ = reverse_of(length, data_variance)
    alpha_bar = schedule.alphas_cumprod
    error = (1 - k * np.sqrt(alpha_bar)) ** 2 * value**2 + k**2 * (1 - alpha_bar)
    p = np.append(posterior[0], betas[1:]) if variance == 'large' else posterior
    terms = 0.5 * (np.log(p / posterior) + posterior / p - 1 + on_x0**2 * error / p)
    terms[0] = 0.5 * (np.log(2 * np.pi * p[0]) + error[0] / p[0])
    last = alpha_bar[-1]
    prior = 0.5 * (last * value**2 + (1 - last) - 1 - np.log(1 - last))

    x0 = jnp.full((400, 8, 8), value)
    denoiser = oracles.gaussian(0.0, math.sqrt(data_variance)).denoiser(schedule)
    bound = vlb_bits_per_dim(denoiser, schedule, x0, key, variance=variance, decoder='gaussian')
    assert bound.terms.shape == (400, length)
    got = np.asarray(bound.terms)
    standard_error = got.std(axis=0) / math.sqrt(len(got))
    assert (np.abs(got.mean(axis=0) - terms / math.log(2)) < 4 * standard_error + 1e-5).all()
    np.testing.assert_allclose(bound.prior, prior / math.log(2), rtol=1e-3, atol=1e-7)
    total = (terms.sum() + prior) / math.log(2)
    assert abs(float(bound.total.mean()) - total) < 4 * float(bound.total.std()) / math.sqrt(len(got))


def test_the_bound_holds_and_tightens_as_the_chain_grows(key):
    """For normal data the reverse of a step is normal: with its variance the bound is exact for a chain of any length.

    With another variance it is above, the less the shorter the steps: by how much, the same noise for both tells.
    """
    data_variance = 0.25
    data = oracles.gaussian(0.0, math.sqrt(data_variance))
    gaps = []
    for length, samples in ((10, 400), (100, 100), (1000, 20)):
        schedule, posterior, betas, on_x0, _, left = reverse_of(length, data_variance)
        best = posterior + on_x0**2 * left
        best[0] = left[0]  # q(x_0 | x_1)
        best = np.log(best / posterior) / np.log(betas / posterior)
        large = np.append(best[0], np.ones(length - 1))
        x0 = math.sqrt(data_variance) * jax.random.normal(jax.random.key(1), (samples, 16, 16))

        @jax.jit
        def total(fraction, schedule=schedule, x0=x0):
            denoiser = with_fraction(data.denoiser(schedule), schedule, fraction)
            return vlb_bits_per_dim(denoiser, schedule, x0, key, variance='learned', decoder='gaussian').total

        exact, above = np.asarray(total(best)), np.asarray(total(large))
        difference = exact - bits(data.log_density(x0), 256)
        assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(samples) < 0.1
        gap = (above - exact).mean()
        assert gap > 3 * (above - exact).std() / math.sqrt(samples)
        gaps.append(gap)
    assert gaps[0] == pytest.approx(0.176, abs=0.01)
    assert gaps[0] > 8 * gaps[1] > 64 * gaps[2]
    assert gaps[2] < 3e-3


def test_the_noise_is_the_keys_and_the_bound_compiles(key):
    schedule = schedules.cosine(8)
    denoiser = oracles.gaussian(0.0, 0.5).denoiser(schedule)
    x0 = jnp.round(jax.random.uniform(key, (2, 4, 4, 1)) * 255) / 127.5 - 1
    bound = jax.jit(lambda k: vlb_bits_per_dim(denoiser, schedule, x0, k))
    np.testing.assert_array_equal(bound(key).total, bound(key).total)
    assert not np.array_equal(bound(key).terms, bound(jax.random.key(3)).terms)
    np.testing.assert_allclose(bound(key).total, bound(key).terms.sum(axis=1) + bound(key).prior, rtol=1e-6)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda d, x, k: ode_bits_per_dim(d, schedules.flow(), x, k, steps=0), 'at least 1'),
        (lambda d, x, k: ode_bits_per_dim(d, schedules.flow(), x, k, steps=2, t_min=0.0), r't_min must be in \(0, 1\)'),
        (lambda d, x, k: ode_bits_per_dim(d, schedules.flow(), x, k, steps=2, divergence='full'), 'exact, hutchinson'),
        (
            lambda d, x, k: ode_bits_per_dim(d, schedules.flow(), x, k, steps=2, divergence='exact', probes=2),
            "'exact' has none",
        ),
        (lambda d, x, k: vlb_bits_per_dim(d, schedules.linear(None), x, k), 'give the schedule a num_timesteps'),
        (lambda d, x, k: vlb_bits_per_dim(d, schedules.linear(4), x, k, variance='learned'), 'needs a network'),
        (lambda d, x, k: vlb_bits_per_dim(d, schedules.linear(4), x, k, variance='huge'), 'large, learned, small'),
        (lambda d, x, k: vlb_bits_per_dim(d, schedules.linear(4), x, k, decoder='none'), 'exact, gaussian, tanh'),
        (lambda d, x, k: vlb_bits_per_dim(Stateful(None, None), schedules.linear(4), x, k), 'take the plain one'),
    ],
)
def test_impossible_likelihoods_are_refused(call, message, key):
    with pytest.raises(UsageError, match=message):
        call(CORRELATED.denoiser(schedules.flow()), jnp.zeros((2, 3)), key)
