"""Stochastic solvers against exact draws of a correlated mixture: mean, covariance, and a two-sample test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import oracles, samplers, schedules
from experiments.solvers.convergence import widened

MIXTURE = oracles.gaussian_mixture(
    [0.6, 0.4], [[-0.6, 0.4], [0.7, -0.3]], [[[0.1, 0.06], [0.06, 0.08]], [[0.04, -0.03], [-0.03, 0.09]]]
)
NUM = 20_000
SCHEDULES = {'linear': schedules.linear(1000), 'edm': schedules.edm()}
DIRECTIONS = np.array([[1, 0], [0, 1], [1, 1], [1, -1]]) / np.sqrt([[1], [1], [2], [2]])
CALLS = (16, 250)  # two compiled programs a schedule
CASES = {
    'ddim 0': ('ddim', {'eta': 0.0}),
    'ddim 0.3': ('ddim', {'eta': 0.3}),
    'ddim 1': ('ddim', {'eta': 1.0}),
    'ddpm small': ('ddpm', {'variance': 'small'}),
    'ddpm large': ('ddpm', {'variance': 'large'}),
    'euler_ancestral': ('euler_ancestral', {}),
    'edm': ('edm', {'churn_noise': 1.0, 'churn_max': float('inf')}),
    'dpmpp_sde 0.5': ('dpmpp_sde', {'eta': 0.5}),
    'dpmpp_2m_sde': ('dpmpp_2m_sde', {}),
    'dpmpp_3m_sde': ('dpmpp_3m_sde', {}),
}


@pytest.fixture(scope='module')
def truth():
    return np.asarray(MIXTURE.sample(jax.random.key(7), NUM))


@pytest.fixture(scope='module')
def programs():
    def program(schedule):
        denoiser = MIXTURE.denoiser(schedule)
        return jax.jit(lambda plan, x, key: samplers.sample(denoiser, plan, x, key))

    return {name: program(schedule) for name, schedule in SCHEDULES.items()}


def draw(program, schedule, solver, steps, options):
    plan = samplers.plan(solver, schedule, steps, 'karras', **options)
    x = samplers.prior(plan, jax.random.key(1), (NUM, 2))
    calls = next(calls for calls in CALLS if calls >= plan.num_calls)
    return np.asarray(program(widened(plan, calls), x, jax.random.key(2)))


def distance(x, truth):
    """The largest Kolmogorov-Smirnov statistic over four projections, and the least p-value."""
    tests = [stats.ks_2samp(x @ direction, truth @ direction) for direction in DIRECTIONS]
    return max(test.statistic for test in tests), min(test.pvalue for test in tests)


@pytest.mark.parametrize(
    ('case', 'name'),
    [(case, 'linear') for case in CASES] + [(case, 'edm') for case in ('ddim 1', 'ddpm large', 'edm', 'dpmpp_2m_sde')],
)
def test_samples_are_draws_of_the_data(case, name, programs, truth):
    solver, options = CASES[case]
    many = 125 if solver == 'edm' else 250
    coarse, fine = (draw(programs[name], SCHEDULES[name], solver, steps, options) for steps in (5, many))
    statistic, p = distance(fine, truth)
    slack = 5 / np.sqrt(NUM)
    np.testing.assert_allclose(fine.mean(axis=0), truth.mean(axis=0), atol=slack)
    np.testing.assert_allclose(np.cov(fine.T), np.cov(truth.T), atol=slack)
    assert p > 1e-3
    assert distance(coarse, truth)[0] > 1.5 * statistic


def test_the_two_sample_test_can_tell(truth):
    assert distance(1.05 * truth, np.asarray(MIXTURE.sample(jax.random.key(8), NUM)))[1] < 1e-3


def test_eta_is_how_much_noise_is_fresh(programs):
    """From one x, samples spread with eta: not at all at 0, and more the larger it is."""
    spread = []
    for eta in (0.0, 0.3, 1.0):
        plan = samplers.plan('ddim', SCHEDULES['linear'], 50, eta=eta)
        x = jnp.full((NUM, 2), 0.3)
        spread.append(programs['linear'](widened(plan, 250), x, jax.random.key(0)).std(axis=0).max())
    assert spread[0] < 1e-5
    assert 0.01 < spread[1] < 0.95 * spread[2]
