"""The schedules tab: its curves are the library's, its marks are a sampler's steps."""

import numpy as np
import pytest
from pages import executed

from diffusion_jax import UsageError, process, samplers, schedules
from diffusion_jax.explorer import schedule_plot
from diffusion_jax.explorer.schedule_choice import OWN


def traces(digits, names, length='1000', zero=False, shift=1.0, solver='none', steps=8, spacing='trailing'):
    figure, call = schedule_plot.figure(digits, names, length, zero, shift, solver, steps, spacing)
    return {(trace['name'], trace['yaxis']): trace for trace in figure['data']}, call


@pytest.mark.parametrize(
    ('name', 'length', 'schedule'),
    [
        ('linear', '1000', schedules.linear(1000)),
        ('cosine', '50', schedules.cosine(50)),
        ('sigmoid', 'continuous', schedules.sigmoid(None)),
        ('ve', '1000', schedules.ve()),
        ('edm', '1000', schedules.edm()),
    ],
)
def test_curves_are_those_of_the_library(digits, name, length, schedule):
    found, call = traces(digits, [name], length)
    levels = schedules.levels(schedule, np.linspace(0, 1, 201))
    for axis, values in (('y', levels.alpha_bar), ('y3', levels.log_snr), ('y4', levels.snr)):
        np.testing.assert_allclose(np.array(found[name, axis]['y'], float)[1:-1], values[1:-1], rtol=1e-12)
    betas = process.chain_betas(schedule, 50 if length == '50' else 1000)
    np.testing.assert_allclose(found[name, 'y2']['y'][-1], betas[-1])
    made = executed(call)
    np.testing.assert_allclose(made['levels'].alpha_bar, levels.alpha_bar)
    np.testing.assert_allclose(made['betas'], betas)


def test_infinities_are_gaps(digits):
    found, _ = traces(digits, ['flow'])
    assert found['flow', 'y3']['y'][0] is None
    assert found['flow', 'y3']['y'][-1] is None


def test_rescaling_and_shift_are_beside_the_plain_ones(digits):
    found, _ = traces(digits, ['linear', 'flow'], zero=True, shift=3.0)
    rescaled = schedules.linear(1000, zero_terminal_snr=True)
    np.testing.assert_allclose(
        found['linear, zero terminal SNR', 'y']['y'], schedules.levels(rescaled, np.linspace(0, 1, 201)).alpha_bar
    )
    np.testing.assert_allclose(
        found['flow, shift 3', 'y']['y'], schedules.levels(schedules.flow(3.0), np.linspace(0, 1, 201)).alpha_bar
    )
    assert ('linear', 'y') in found


@pytest.mark.parametrize(('solver', 'spacing'), [('ddim', 'trailing'), ('heun', 'log_snr'), ('dpm_2', 'karras')])
def test_marks_are_the_steps_of_the_sampler(digits, solver, spacing):
    found, call = traces(digits, ['cosine', OWN], solver=solver, spacing=spacing)
    plan = samplers.plan(solver, schedules.cosine(1000), 8, spacing)
    marked = found[f'{solver}, 8 steps', 'y']
    np.testing.assert_allclose(marked['x'], np.unique(plan.times))
    np.testing.assert_allclose(executed(call)['plan'].num_calls, plan.num_calls)


def test_every_spacing_is_marked_on_every_schedule(digits):
    for spacing in samplers.SPACINGS:
        traces(digits, list(schedules.SCHEDULES), solver='ddim', spacing=spacing)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'names': []}, 'choose 1 to'),
        ({'names': None}, 'choose 1 to'),
        ({'names': ['linear'] * 1000}, 'choose 1 to'),
        ({'names': [{}]}, 'unknown schedules'),
        ({'names': ['cosin']}, "Did you mean 'cosine'"),
        ({'shift': 0}, 'shift must be from 0.1'),
        ({'shift': float('inf')}, 'shift must be a number'),
        ({'steps': 10**6}, 'steps must be from 1 to 100'),
        ({'solver': 'ddim', 'steps': 100, 'length': '50'}, 'steps must be in 1..50'),
        ({'spacing': 'tight'}, 'unknown spacing'),
    ],
)
def test_what_is_out_of_bounds_is_refused(digits, changes, message):
    with pytest.raises(UsageError, match=message):
        traces(digits, **({'names': ['linear']} | changes))
