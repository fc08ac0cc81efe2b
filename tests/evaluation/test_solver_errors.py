"""Errors of solvers against what is exact: they fall as the orders say, and one program serves all numbers of calls."""

import jax
import numpy as np
import pytest

from diffusion_jax import UsageError, pretrained, samplers, schedules
from diffusion_jax.evaluation import solver_errors
from diffusion_jax.evaluation.solver_errors import EXAMPLE, against_calls, on_model, plan_within, states

LINEAR = schedules.linear(1000)


def test_states_are_those_of_the_scan():
    plan = samplers.plan('dpmpp_2m', LINEAR, 7, 'log_snr')
    made = states(EXAMPLE, LINEAR, plan, 5, seed=3)
    key_noise, key = jax.random.split(jax.random.key(3))
    x = samplers.prior(plan, key_noise, (5, 2))
    expected = samplers.sample_trajectory(EXAMPLE.denoiser(LINEAR, 'eps'), plan, x, key)
    np.testing.assert_allclose(made, expected.x, atol=2e-5)


def test_more_calls_run_the_same_program():
    for steps in (5, 17, 100):
        states(EXAMPLE, LINEAR, samplers.plan('ddim', LINEAR, steps, 'log_snr'), 4)
        if steps == 5:
            programs = solver_errors._states._cache_size()
    assert solver_errors._states._cache_size() == programs
    with pytest.raises(UsageError, match='at most 256 model calls'):
        states(EXAMPLE, LINEAR, samplers.plan('ddim', LINEAR, 300, 'log_snr'), 4)


def test_errors_fall_with_the_order_of_the_solver():
    rows = {(row.solver, row.calls): row for row in against_calls(LINEAR, ['ddim', 'dpmpp_2m', 'ddpm'], (20, 40, 80))}
    for solver, order in (('ddim', 1), ('dpmpp_2m', 2)):
        first, second = rows[solver, 40].flow_error, rows[solver, 80].flow_error
        assert np.log2(first / second) == pytest.approx(order, abs=0.45)
        assert rows[solver, 80].distance < 0.06
    assert np.isnan(rows['ddpm', 80].flow_error)
    assert rows['ddpm', 80].distance < rows['ddpm', 20].distance


def test_within_a_budget_of_calls():
    plan, steps = plan_within('heun', LINEAR, 10, 'log_snr')
    assert (plan.num_calls, steps) == (9, 5)
    assert plan_within('heun', LINEAR, 0, 'log_snr') is None
    with pytest.raises(UsageError, match='unknown solver'):
        plan_within('hein', LINEAR, 10, 'log_snr')


def test_on_a_model_more_calls_are_nearer_to_many():
    rows = [row for row in on_model(pretrained('digits'), 2, ['dpmpp_2m', 'ddpm'], (4, 12), 'log_snr', seed=1) if row]
    assert [(row.solver, row.calls) for row in rows] == [('dpmpp_2m', 4), ('dpmpp_2m', 12)]
    assert rows[1].flow_error < rows[0].flow_error / 2
