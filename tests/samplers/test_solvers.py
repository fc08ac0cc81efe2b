"""DDIM and DDPM against what is known in closed form of Gaussian data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import UsageError, oracles, samplers, schedules

SCHEDULES = {'linear': schedules.linear(1000), 'cosine': schedules.cosine(1000), 'limit': schedules.linear(None)}
MEAN, STD = 0.3, 0.5


def draw(plan, schedule, count=20_000, mean=MEAN, std=STD, seed=0, kind='x0'):
    x = jax.random.normal(jax.random.key(seed), (count, 1))
    denoiser = oracles.gaussian(mean, std).denoiser(schedule, kind)
    return x, jax.jit(lambda plan, x, key: samplers.sample(denoiser, plan, x, key))(plan, x, jax.random.key(seed + 1))


@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('kind', ['eps', 'x0', 'v', 'score'])
def test_ddim_without_noise_approaches_the_exact_flow_at_first_order(name, kind):
    """Gaussian data: the probability-flow ODE carries x_1 to mean + std (x_1 - alpha mean) / std(x_1)."""
    schedule = SCHEDULES[name]
    alpha, sigma = schedule.alpha(1.0), schedule.sigma(1.0)
    errors = []
    for steps in (20, 80):
        x, out = draw(samplers.plan('ddim', schedule, steps), schedule, count=100, kind=kind)
        exact = MEAN + STD * (x - alpha * MEAN) / np.sqrt(alpha**2 * STD**2 + sigma**2)
        errors.append(float(jnp.abs(out - exact).max()))
    assert errors[0] < 0.3
    assert 2.5 < errors[0] / errors[1] < 6  # four times the steps


@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize(
    ('solver', 'options'),
    [
        ('ddim', {'eta': 0.3}),
        ('ddim', {'eta': 1.0}),
        ('ddpm', {'variance': 'small'}),
        ('ddpm', {'variance': 'large'}),
    ],
)
def test_stochastic_samplers_reach_the_mean_and_variance_of_the_data(name, solver, options):
    schedule = SCHEDULES[name]
    errors = []
    for steps in (20, 500):
        _, out = draw(samplers.plan(solver, schedule, steps, **options), schedule)
        errors.append(abs(float(out.std()) - STD))
    assert abs(float(out.mean()) - MEAN) < 4 * STD / np.sqrt(20_000) + 0.003
    assert errors[1] < 4 * STD / np.sqrt(2 * 20_000) + 0.003
    assert errors[1] < errors[0]


@pytest.mark.parametrize('steps', [5, 50])
def test_ddpm_with_large_variance_is_exact_for_standard_normal_data(steps):
    """Section 3.2 of the paper: beta_t is the reverse variance of N(0, I) data, on any sub-sequence."""
    chain = SCHEDULES['linear']
    plan = samplers.plan('ddpm', chain, steps, variance='large')
    denoiser = oracles.gaussian(0.0, 1.0).denoiser(chain)
    x = jax.random.normal(jax.random.key(0), (40_000, 1))
    xs = samplers.sample_trajectory(denoiser, plan, x, jax.random.key(1)).x[:-1]  # the last step adds no noise
    np.testing.assert_allclose(xs.std(axis=(1, 2)), 1, atol=0.015)


@pytest.mark.parametrize('steps', [5, 50])
def test_ddpm_with_small_variance_is_exact_for_a_single_point(steps):
    """The posterior's variance is the reverse variance of data at one point: every x_t keeps its exact marginal."""
    chain = SCHEDULES['linear']
    times = samplers.time_grid(chain, steps)
    alpha, sigma = chain.alpha(times), chain.sigma(times)
    x = alpha[0] * MEAN + sigma[0] * jax.random.normal(jax.random.key(0), (40_000, 1))
    plan = samplers.ddpm(chain, times, variance='small')
    xs = samplers.sample_trajectory(oracles.gaussian(MEAN, 0.0).denoiser(chain), plan, x, jax.random.key(1)).x
    np.testing.assert_allclose(xs.mean(axis=(1, 2)), alpha * MEAN, atol=0.02)
    np.testing.assert_allclose(xs.std(axis=(1, 2)), sigma, atol=0.015)


@pytest.mark.parametrize('eta', [0.0, 0.3, 1.0])
def test_ddim_keeps_the_exact_marginals_of_a_single_point_for_every_eta(eta):
    """The family of DDIM is built so that q(x_t | x_0) holds whatever eta (Song et al. 2021, lemma 1)."""
    chain = SCHEDULES['cosine']
    times = samplers.time_grid(chain, 10)
    alpha, sigma = chain.alpha(times), chain.sigma(times)
    x = alpha[0] * MEAN + sigma[0] * jax.random.normal(jax.random.key(0), (40_000, 1))
    xs = samplers.sample_trajectory(
        oracles.gaussian(MEAN, 0.0).denoiser(chain), samplers.ddim(chain, times, eta), x, jax.random.key(1)
    ).x
    np.testing.assert_allclose(xs.mean(axis=(1, 2)), alpha * MEAN, atol=0.02)
    np.testing.assert_allclose(xs.std(axis=(1, 2)), sigma, atol=0.015)
    # Eta is how much of the noise is fresh: at 0 none is, and x_0 decides the whole path.
    fresh = jnp.std(xs[5] - (alpha[5] * MEAN + sigma[5] * (xs[0] - alpha[0] * MEAN) / sigma[0]))
    assert (fresh < 1e-3) == (eta == 0)


@pytest.mark.parametrize('spacing', ['leading', 'trailing', 'linspace'])
def test_ddim_at_eta_one_is_ddpm_with_small_variance(spacing):
    chain = SCHEDULES['linear']
    _, a = draw(samplers.plan('ddim', chain, 13, spacing, eta=1.0), chain, count=50)
    _, b = draw(samplers.plan('ddpm', chain, 13, spacing, variance='small'), chain, count=50)
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_one_ddim_step_is_the_published_formula():
    """Equation 12 by hand, at alpha-bars of the chain itself."""
    chain = SCHEDULES['linear']
    bar_t, bar_s = chain.alphas_cumprod[600], chain.alphas_cumprod[300]
    eta, eps, x, z = 0.7, 0.4, 1.3, -0.9
    std = eta * np.sqrt((1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s))
    x0 = (x - np.sqrt(1 - bar_t) * eps) / np.sqrt(bar_t)
    expected = np.sqrt(bar_s) * x0 + np.sqrt(1 - bar_s - std**2) * eps + std * z

    plan = samplers.ddim(chain, samplers.times_of_indices(chain, [600, 300]), eta)
    first = jax.tree.map(lambda leaf: leaf[0], plan.coefficients)

    def denoiser(x_t, t):
        return samplers_prediction(x_t, jnp.full_like(x_t, eps), chain, t)

    carry, predicted = plan.solver.step(
        samplers.Carry(jnp.array([[x]])), plan.times[0], first, denoiser, lambda: jnp.array([[z]])
    )
    assert float(carry.x[0, 0]) == pytest.approx(expected, abs=1e-5)
    assert float(predicted[0, 0]) == pytest.approx(x0, abs=1e-5)


def samplers_prediction(x_t, eps, schedule, t):
    from diffusion_jax.process import Prediction

    return Prediction(eps, 'eps', x_t, schedule.alpha(t), schedule.sigma(t))


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda c: samplers.plan('ddim', c, 10, eta=1.5), r'eta of ddim must be in \[0, 1\], got 1.5'),
        (lambda c: samplers.plan('ddim', c, 10, eta=jnp.float32(-0.1)), r'eta of ddim must be in \[0, 1\], got -0.1'),
        (lambda c: samplers.plan('ddpm', c, 10, variance='medium'), 'Valid choices: large, learned, small'),
        (lambda c: samplers.plan('ddpm', c, 10, eta=0.5), "option of solver 'ddpm'.*'eta'.*Valid choices: variance"),
        (lambda c: samplers.plan('dimm', c, 10), "unknown solver 'dimm'. Did you mean 'ddim'.*ddim, ddpm"),
        (lambda c: samplers.ddim(c, [0.1, 0.5]), 'strictly decreasing'),
        (lambda c: samplers.ddim(c, [0.1]), 'strictly decreasing'),
        (lambda c: samplers.ddim(c, [1.1, 0.5]), r'in \[0, 1\]'),
    ],
)
def test_what_a_solver_cannot_do_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make(SCHEDULES['linear'])


@pytest.mark.parametrize(
    ('solver', 'options'), [('ddpm', {'variance': 'small'}), ('ddpm', {'variance': 'large'}), ('ddim', {'eta': 1.0})]
)
def test_the_step_to_the_data_adds_no_noise_and_those_before_it_do(solver, options):
    noise = samplers.plan(solver, SCHEDULES['linear'], 10, **options).coefficients['noise']
    assert noise[-1] == 0
    assert (noise[:-1] > 0).all()


@pytest.mark.parametrize('fraction', [0.0, 0.5, 1.0])
def test_a_learned_variance_lies_between_the_two_in_logarithms(fraction):
    """At 0 DDPM's 'small', at 1 its 'large', half-way their geometric mean; the same draws of noise."""
    chain = SCHEDULES['linear']
    exact = oracles.gaussian(MEAN, STD).denoiser(chain)

    def denoiser(x_t, t):
        return dataclasses.replace(exact(x_t, t), variance_fraction=jnp.full_like(x_t, fraction))

    x = jax.random.normal(jax.random.key(0), (50, 2))

    def first_steps(denoiser, variance):
        plan = samplers.plan('ddpm', chain, 10, variance=variance)
        return samplers.sample_trajectory(denoiser, plan, x, jax.random.key(1)).x

    small, large = (first_steps(exact, variance) for variance in ('small', 'large'))
    learned = first_steps(denoiser, 'learned')
    if fraction in (0.0, 1.0):
        np.testing.assert_allclose(learned, (small, large)[int(fraction)], atol=2e-5)
    else:
        # After one step all three share a mean, and z is what the others say it is.
        plans = [samplers.plan('ddpm', chain, 10, variance=variance) for variance in ('small', 'large')]
        stds = [plan.coefficients['noise'][0] for plan in plans]
        z = (large[1] - small[1]) / (stds[1] - stds[0])
        np.testing.assert_allclose(learned[1] - small[1], (np.sqrt(stds[0] * stds[1]) - stds[0]) * z, atol=2e-5)


def test_a_variance_that_was_not_learned_is_refused():
    chain = SCHEDULES['linear']
    with pytest.raises(UsageError, match="take 'small' or 'large'"):
        draw(samplers.plan('ddpm', chain, 10, variance='learned'), chain, count=2)
