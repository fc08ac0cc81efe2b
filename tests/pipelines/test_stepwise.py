"""A sample call by call: the states of the scan, one program for all numbers of steps, and an end when nobody asks."""

import jax
import numpy as np
import pytest

from diffusion_jax import UsageError, pretrained, samplers, schedules
from diffusion_jax.oracles import gaussian
from diffusion_jax.pipelines import stepwise, walk
from diffusion_jax.process import Prediction


@pytest.fixture(scope='module')
def pipeline():
    return pretrained('digits')


@pytest.mark.parametrize(
    'settings',
    [
        {'solver': 'ddim', 'steps': 6, 'eta': 0.5, 'guidance_scale': 2.0, 'guidance_rescale': 0.5},
        {'solver': 'dpmpp_2m', 'steps': 5, 'spacing': 'log_snr', 'seed': [3, 4, 5]},
        {'solver': 'heun', 'steps': 4, 'guidance_scale': 3.0, 'guidance_interval': (-2.0, 2.0)},
    ],
)
def test_calls_are_those_of_the_trajectory(pipeline, settings):
    whole = pipeline.trajectory(3, labels=[1, 7], **settings)
    calls = list(walk(pipeline, 3, labels=[1, 7], **settings))
    assert [call.index for call in calls] == list(range(calls[0].num_calls))
    np.testing.assert_allclose(np.stack([call.x_t for call in calls]), whole.x[:-1], atol=2e-4)
    np.testing.assert_allclose(np.stack([call.x for call in calls]), whole.x[1:], atol=2e-4)
    np.testing.assert_allclose(np.stack([call.x0 for call in calls]), whole.x0, atol=2e-4)
    for call in calls:
        schedule = pipeline.schedule
        read = Prediction(call.x0, 'x0', call.x_t, np.float32(schedule.alpha(call.t)), schedule.sigma(call.t))
        np.testing.assert_allclose(call.eps, read.eps, atol=1e-3)


def test_other_steps_seeds_and_scales_run_the_same_program(pipeline):
    for steps, seed, scale in ((5, 0, 1.5), (9, 7, 4.0), (20, 2, 0.0)):
        for _ in walk(pipeline, 2, labels=[3], solver='ddim', steps=steps, seed=seed, guidance_scale=scale):
            pass
        if steps == 5:
            compiled = stepwise._advance._cache_size()
    assert stepwise._advance._cache_size() == compiled


def test_who_stops_asking_stops_the_work(pipeline, monkeypatch):
    made = []
    advance = stepwise._advance
    monkeypatch.setattr(stepwise, '_advance', lambda *args, **kwargs: made.append(1) or advance(*args, **kwargs))
    calls = walk(pipeline, 1, labels=[0], steps=50)
    next(calls)
    calls.close()
    assert len(made) == 1


def test_what_does_not_fit_is_refused_before_the_first_call(pipeline):
    for settings, message in (
        ({'labels': [10]}, 'labels must be among'),
        ({'solver': 'dimm'}, 'unknown solver'),
        ({'steps': 0}, 'steps must be'),
        ({'guidance_rescale': 0.5}, 'need a guidance_scale'),
    ):
        with pytest.raises(UsageError, match=message):
            walk(pipeline, 1, **settings)


def test_advance_is_the_body_of_the_scan(key):
    schedule = schedules.cosine(100)
    denoiser = gaussian(0.3, 0.5).denoiser(schedule)
    for solver in ('ddim', 'unipc', 'euler_ancestral'):
        plan = samplers.plan(solver, schedule, 8)
        x = samplers.prior(plan, key, (2, 4))
        step = jax.jit(lambda state, row, solver=plan.solver: samplers.advance(denoiser, solver, state, row, key))
        state = samplers.begin(denoiser, plan.solver, x)
        for index in range(plan.num_calls):
            state, _ = step(state, jax.tree.map(lambda leaf, index=index: leaf[index], samplers.rows(plan)))
        np.testing.assert_allclose(state.carry.x, samplers.sample(denoiser, plan, x, key), atol=1e-5)
