"""Schedules against the published formulas, evaluated here in extended precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import UsageError, schedules

ALL = sorted(schedules.SCHEDULES)
CHAINS = ['cosine', 'linear', 'scaled_linear', 'sigmoid']
GRID = np.arange(1000)


def continuous(name):
    return schedules.SCHEDULES[name](None) if name in CHAINS else schedules.SCHEDULES[name]()


def published_betas(name: str, steps: int) -> np.ndarray:
    """The papers' definitions, in 80-bit floats where the machine has them."""
    real = np.longdouble
    i = np.arange(steps, dtype=real)
    if name == 'linear':
        return real(1e-4) + (real(0.02) - real(1e-4)) * i / (steps - 1)
    if name == 'scaled_linear':
        low, high = np.sqrt(real(0.00085)), np.sqrt(real(0.012))
        return (low + (high - low) * i / (steps - 1)) ** 2
    u = np.arange(steps + 1, dtype=real) / steps
    if name == 'cosine':
        s = real(0.008)
        pi = real('3.14159265358979323846264338327950288')
        alpha_bar = np.cos((u + s) / (1 + s) * pi / 2) ** 2
    else:
        logistic = 1 / (1 + np.exp(-(u * 6 - 3)))
        alpha_bar = (logistic[-1] - logistic) / (logistic[-1] - logistic[0])
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], real(0.999))


@pytest.mark.parametrize('name', CHAINS)
def test_chain_agrees_with_the_published_formula_to_float64(name):
    chain = schedules.SCHEDULES[name](1000)
    betas = published_betas(name, 1000)
    np.testing.assert_allclose(chain.betas, betas.astype(np.float64), rtol=1e-11)
    expected = np.cumprod(1 - betas)
    np.testing.assert_allclose(chain.alphas_cumprod, expected.astype(np.float64), rtol=1e-12)
    assert chain.alphas_cumprod.dtype == np.float64


def test_well_known_values():
    assert schedules.linear().alphas_cumprod[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    assert schedules.scaled_linear().alphas_cumprod[-1] == pytest.approx(0.0046601, rel=1e-4)  # Stable Diffusion's
    assert schedules.cosine().betas[-1] == 0.999


def test_given_betas_are_used_as_they_are_and_others_scale_with_the_length():
    assert schedules.linear(100, 1e-4, 0.02).betas[[0, -1]] == pytest.approx([1e-4, 0.02])
    assert schedules.linear(100).betas[[0, -1]] == pytest.approx([1e-3, 0.2])
    assert schedules.scaled_linear(500).betas[[0, -1]] == pytest.approx([0.0017, 0.024])


@pytest.mark.parametrize('name', CHAINS)
def test_float32_tables_keep_their_relative_precision_at_both_ends(name):
    chain = schedules.SCHEDULES[name](1000)
    t = jnp.asarray(chain.time(GRID), jnp.float32)
    np.testing.assert_allclose(chain.alpha(t), np.sqrt(chain.alphas_cumprod), rtol=1e-6)
    np.testing.assert_allclose(chain.sigma(t), np.sqrt(1 - chain.alphas_cumprod), rtol=1e-6)
    np.testing.assert_array_equal(chain.timestep(t), GRID)


@pytest.mark.parametrize('name', CHAINS)
@pytest.mark.parametrize('steps', [1, 10, 1000, 4000])
def test_host_values_on_the_chain_are_exact(name, steps):
    chain = schedules.SCHEDULES[name](steps)
    t = chain.time(np.arange(steps))
    np.testing.assert_allclose(chain.alpha(t) ** 2, chain.alphas_cumprod, rtol=1e-12)
    np.testing.assert_allclose(chain.timestep(jnp.asarray(t, jnp.float32)), np.arange(steps), atol=0)


@pytest.mark.parametrize('name', CHAINS)
@pytest.mark.parametrize('steps', [None, 1000])
def test_every_schedule_is_variance_preserving_falls_and_starts_at_the_data(name, steps):
    schedule = schedules.SCHEDULES[name](steps)
    t = np.linspace(0, 1, 1237)
    alpha, sigma, log_snr = schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)
    assert (np.diff(log_snr[1:]) < 0).all()
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert log_snr[0] == np.inf
    inner = slice(1, -1)
    np.testing.assert_allclose(log_snr[inner], 2 * np.log(alpha[inner] / sigma[inner]), rtol=1e-9, atol=1e-9)
    on_device = jnp.asarray(t, jnp.float32)
    for values in (schedule.alpha(on_device), schedule.sigma(on_device)):
        assert values.dtype == jnp.float32
        assert jnp.isfinite(values).all()


@pytest.mark.parametrize('name', CHAINS)
def test_chains_converge_to_the_continuous_schedule(name):
    """First order in 1 / T: ten times the steps, a tenth of the distance."""
    limit = schedules.SCHEDULES[name](None)
    t = np.linspace(0.1, 0.9, 9)
    errors = [np.abs(schedules.SCHEDULES[name](steps).log_snr(t) - limit.log_snr(t)).max() for steps in (1000, 10000)]
    assert errors[0] < 0.06
    assert errors[1] < errors[0] / 8 or errors[1] < 1e-6  # cosine and sigmoid chains sample the limit itself


@pytest.mark.parametrize('name', ALL)
@pytest.mark.usefixtures('x64')
def test_drift_and_diffusion_are_those_of_the_sde(name):
    """d(alpha)/dt = f alpha and d(sigma^2)/dt = 2 f sigma^2 + g^2, by finite differences."""
    schedule = continuous(name)
    t, h = np.linspace(0.1, 0.9, 9), 1e-5
    drift, diffusion = schedule.drift(jnp.asarray(t)), schedule.diffusion(jnp.asarray(t))
    slope = (schedule.alpha(t + h) - schedule.alpha(t - h)) / (2 * h)
    np.testing.assert_allclose(drift * schedule.alpha(t), slope, rtol=1e-6)
    slope = (schedule.sigma(t + h) ** 2 - schedule.sigma(t - h) ** 2) / (2 * h)
    np.testing.assert_allclose(2 * drift * schedule.sigma(t) ** 2 + diffusion**2, slope, rtol=1e-6)


def test_drift_of_the_linear_limit_is_that_of_the_vp_sde():
    t = jnp.linspace(0.1, 0.9, 5)
    beta = 0.1 + (20 - 0.1) * t
    np.testing.assert_allclose(schedules.linear(None).drift(t), -beta / 2, rtol=1e-4)
    np.testing.assert_allclose(schedules.linear(None).diffusion(t) ** 2, beta, rtol=1e-4)


def test_diffusion_of_a_chain_is_that_of_its_interpolation_on_the_grid_too():
    on_grid, off_grid = jnp.array([0.5, 0.9]), jnp.array([0.5004, 0.9004])
    chain = schedules.linear(1000)
    np.testing.assert_allclose(chain.diffusion(on_grid), chain.diffusion(off_grid), rtol=1e-3)
    np.testing.assert_allclose(chain.diffusion(on_grid), schedules.linear(None).diffusion(on_grid), rtol=1e-2)


def test_zero_terminal_snr_is_pure_noise():
    chain = schedules.Chain([0.1, 0.5, 1.0])
    assert chain.log_snr(1.0) == -np.inf
    assert chain.alpha(jnp.float32(1.0)) == 0
    assert chain.sigma(jnp.float32(1.0)) == 1
    assert np.isfinite(chain.log_snr(2 / 3))
    assert not np.isnan(chain.log_snr(np.linspace(0, 1, 100))).any()


def test_between_the_data_and_the_first_step_the_variance_grows_linearly():
    chain = schedules.linear(1000)
    assert chain.sigma(0.0005) ** 2 == pytest.approx(chain.betas[0] / 2)


def test_published_exploding_and_flow_schedules():
    t = np.linspace(0, 1, 11)
    edm, ve, flow = schedules.edm(), schedules.ve(0.02, 40), schedules.flow(shift=3.0)
    np.testing.assert_allclose(edm.sigma(t), 80 * t, rtol=1e-12)
    np.testing.assert_allclose(edm.timestep(t[1:]), np.log(80 * t[1:]) / 4, rtol=1e-12)
    # p(x_t | x_0) of the VE SDE has variance sigma(t)^2 - sigma(0)^2, sigma(t) = sigma_min (sigma_max / sigma_min)^t.
    np.testing.assert_allclose(ve.sigma(t) ** 2, (0.02 * 2000**t) ** 2 - 0.02**2, rtol=1e-10, atol=1e-18)
    np.testing.assert_allclose(flow.sigma(t), 3 * t / (1 + 2 * t), rtol=1e-12)
    np.testing.assert_allclose(flow.alpha(t) + flow.sigma(t), 1, rtol=1e-12)
    np.testing.assert_allclose(flow.timestep(t), 1000 * flow.sigma(t))
    for schedule in (edm, ve):
        np.testing.assert_array_equal(schedule.alpha(t), np.ones(11))
        np.testing.assert_array_equal(schedule.prior_std(t), schedule.sigma(t))
    assert schedules.resolution_shift(1024**2, 256**2) == 4
    assert schedules.cosine().prior_std(0.7) == 1


@pytest.mark.parametrize('name', ALL)
def test_time_of_log_snr_inverts_it_on_the_host_and_on_the_device(name):
    both = [continuous(name)] + ([schedules.SCHEDULES[name](1000)] if name in CHAINS else [])
    for schedule in both:
        t = np.array([schedule.t_min, 0.004, 0.1, 0.5, 0.9, 0.9995])
        np.testing.assert_allclose(schedule.time_of_log_snr(schedule.log_snr(t)), t, rtol=1e-9)
        on_device = jnp.asarray(t, jnp.float32)
        found = jax.jit(schedule.time_of_log_snr)(schedule.log_snr(on_device))
        assert found.dtype == jnp.float32
        # In float32 a chain's times within 2e-6 of an index are that index.
        np.testing.assert_allclose(schedule.log_snr(found), schedule.log_snr(on_device), rtol=3e-5, atol=2e-3)
        np.testing.assert_array_equal(schedule.time_of_log_snr(np.array([np.inf, -np.inf])), [0, 1])


def test_zero_terminal_snr_is_the_published_rescaling():
    chain = schedules.scaled_linear(1000)
    rescaled = schedules.scaled_linear(1000, zero_terminal_snr=True)
    root = np.sqrt(chain.alphas_cumprod)
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    np.testing.assert_allclose(rescaled.alphas_cumprod, expected**2, rtol=1e-9, atol=1e-15)
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.log_snr(1.0) == -np.inf
    assert rescaled.betas[0] == pytest.approx(chain.betas[0])


@pytest.mark.parametrize('name', CHAINS)
def test_times_may_be_traced(name):
    chain = schedules.SCHEDULES[name](1000)
    t = jnp.asarray(chain.time(np.array([0, 500, 999])), jnp.float32)
    np.testing.assert_allclose(jax.jit(chain.log_snr)(t), chain.log_snr(t), rtol=1e-6)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: schedules.linear(0), 'num_timesteps must be at least 1'),
        (lambda: schedules.linear(10, 0.1, 1.5), r'betas must be .* in \(0, 1\]'),
        (lambda: schedules.Chain([]), 'non-empty'),
        (lambda: schedules.edm(sigma_min=100), '0 < sigma_min < sigma_max'),
        (lambda: schedules.ve(sigma_min=0), '0 < sigma_min < sigma_max'),
        (lambda: schedules.flow(shift=0), 'shift > 0'),
        (lambda: schedules.linear(None, zero_terminal_snr=True), 'give num_timesteps'),
        (lambda: schedules.zero_terminal_snr(schedules.linear(1)), 'two steps or more'),
        (lambda: schedules.sigmoid(10, start=3, end=-3), 'start < end'),
    ],
)
def test_impossible_schedules_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize('name', schedules.SCHEDULES)
def test_levels_are_what_x_t_is_made_of(name):
    schedule = schedules.SCHEDULES[name]()
    t = np.array([0.0, 0.25, 0.5, 1.0])
    levels = schedules.levels(schedule, t)
    np.testing.assert_array_equal(levels.alpha, schedule.alpha(t))
    np.testing.assert_array_equal(levels.sigma, schedule.sigma(t))
    total = levels.alpha**2 + levels.sigma**2
    np.testing.assert_allclose(levels.signal, levels.alpha**2 / total, atol=1e-12)
    np.testing.assert_allclose(levels.noise, levels.sigma**2 / total, atol=1e-12)
    np.testing.assert_allclose(levels.snr[1:], (levels.alpha[1:] / levels.sigma[1:]) ** 2, rtol=1e-9)
    np.testing.assert_allclose(levels.log_snr[1:3], np.log(levels.snr[1:3]))
    assert schedules.levels(schedule, 0.5).signal == levels.signal[2]
