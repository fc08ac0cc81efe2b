"""The measured order of convergence of every deterministic solver, in float64, to the probability-flow ODE.

The data are a mixture in two dimensions, the interval log-SNR -3 to 5, the grids uniform in log-SNR. Solvers with a
history start from an exact one: what a lower-order start costs is not what is measured here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plans import SLOTS, replay, widened

from diffusion_jax import oracles, samplers, schedules
from diffusion_jax.samplers import DESCRIPTIONS, SOLVERS

LOW, HIGH = -3.0, 5.0
STEPS = (96, 192)
CALLS = 2 * STEPS[-1]
MIXTURE = oracles.gaussian_mixture([0.3, 0.5, 0.2], [[-0.7, 0.3], [0.2, -0.4], [0.9, 0.5]], [0.3, 0.4, 0.25])
START = np.random.default_rng(0).normal(size=(6, 2)) * np.sqrt(1 + np.exp(-LOW))
SCHEDULES = {
    'linear': schedules.linear(None),
    'cosine': schedules.cosine(None),
    'edm': schedules.edm(),
    'flow': schedules.flow(shift=3.0),
    'chain': schedules.linear(1000),
}
FULL = {'lower_order_final': False}


def multistep(**options):
    return functools.partial(samplers.multistep, **options, **FULL)


def singlestep(**options):
    return functools.partial(samplers.singlestep, **options, **FULL)


def unipc(**options):
    return functools.partial(samplers.unipc, **options, **FULL)


# name -> (solver, order, what its slots hold: outputs in this form, newest first; None for no history).
CASES = {
    'ddim': (samplers.ddim, 1, None),
    'euler': (samplers.euler, 1, None),
    'multistep 1 eps': (multistep(order=1, form='eps'), 1, None),
    'singlestep 1': (singlestep(order=1), 1, None),
    'heun': (samplers.heun, 2, None),
    'heun flow': (functools.partial(samplers.heun, coordinate='flow'), 2, None),
    'dpm_2': (singlestep(order=2, form='eps'), 2, None),
    'dpmpp_2s': (singlestep(order=2), 2, None),
    'dpmpp_2s heun': (singlestep(order=2, method='heun'), 2, None),
    'dpmpp_2s grid': (singlestep(order=2, stages='grid'), 2, None),
    'dpm_3': (singlestep(order=3, form='eps'), 3, None),
    'dpmpp_3s': (singlestep(order=3), 3, None),
    'dpmpp_3s heun': (singlestep(order=3, method='heun'), 3, None),
    'dpmpp_2m': (multistep(order=2), 2, 'x0'),
    'dpmpp_2m heun': (multistep(order=2, method='heun'), 2, 'x0'),
    'dpm_2m': (multistep(order=2, form='eps'), 2, 'eps'),
    'dpmpp_3m published': (multistep(order=3, second_difference='published'), 2, 'x0'),
    'dpm_3m published': (multistep(order=3, form='eps', second_difference='published'), 2, 'eps'),
    'dpmpp_3m': (multistep(order=3), 3, 'x0'),
    'dpm_3m': (multistep(order=3, form='eps'), 3, 'eps'),
    'plms': (samplers.plms, 2, None),
    'pndm': (samplers.pndm, 2, None),
    'lms 2': (functools.partial(samplers.lms, order=2), 2, 'eps'),
    'lms 4': (functools.partial(samplers.lms, order=4), 4, 'eps'),
}
# At least p without the corrector and p + 1 with it.
AT_LEAST = {
    f'unipc {order} {form} {variant} {corrector}': (
        unipc(order=order, form=form, variant=variant, corrector=corrector),
        order + corrector,
        f'{form} after base',
    )
    for order in (1, 2, 3)
    for form in ('x0', 'eps')
    for variant in ('bh1', 'bh2')
    for corrector in (False, True)
}
PAST = 3  # exact points before the interval


@functools.cache
def exact(steps):
    """x / alpha at PAST levels before the interval, at its start and at its end."""
    h = (HIGH - LOW) / steps
    before = MIXTURE.probability_flow(START, [LOW, LOW - h, LOW - 2 * h, LOW - 3 * h])
    return [*before[:0:-1], START, MIXTURE.probability_flow(START, [LOW, HIGH])[-1]]


@functools.cache
def programs(schedule, kind):
    denoiser = MIXTURE.denoiser(SCHEDULES[schedule], kind)
    return replay(denoiser), jax.jit(lambda x, t: (denoiser(x, t).x0, denoiser(x, t).eps))


@functools.cache
def planned(case, schedule, steps, past):
    h = (HIGH - LOW) / steps
    log_snrs = np.linspace(LOW - past * h, HIGH, steps + past + 1)
    solver = (CASES | AT_LEAST)[case][0]
    return solver(SCHEDULES[schedule], SCHEDULES[schedule].time_of_log_snr(log_snrs))


def error(case, schedule, kind, steps):
    """Root mean square of x / alpha at the end minus what it should be."""
    holds = (CASES | AT_LEAST)[case][2]
    past = PAST if holds else 0
    plan = planned(case, schedule, steps, past)
    run, outputs = programs(schedule, kind)
    memory = None
    if holds:
        # The newest output comes first; UniPC's first slot is x at the level before.
        states = [jnp.asarray(plan.alpha[i] * exact(steps)[i]) for i in range(past)]
        history = [outputs(states[i], plan.times[i])[holds.startswith('eps')] for i in reversed(range(past))]
        memory = ([states[-1]] if holds.endswith('base') else []) + history
        slots = np.shape(plan.coefficients['matrix'])[1] - 1
        memory = memory[:slots] + [jnp.zeros_like(states[0])] * (SLOTS - min(slots, len(memory)))
        plan = jax.tree.map(lambda leaf: leaf[past:] if np.ndim(leaf) else leaf, plan)
    x = jnp.asarray(plan.alpha[0] * START)
    wide = widened(plan, CALLS)
    zeros = tuple(jnp.zeros_like(x) for _ in range(SLOTS))
    end = run(wide, x, jnp.zeros((CALLS, *x.shape)), tuple(memory) if memory else zeros)[-1]
    return float(np.sqrt(np.mean((end / plan.alpha[-1] - exact(steps)[-1]) ** 2)))


def slope(case, schedule, kind):
    errors = [error(case, schedule, kind, steps) for steps in STEPS]
    return np.log(errors[0] / errors[1]) / np.log(STEPS[1] / STEPS[0])


@pytest.mark.parametrize('kind', ['eps', 'x0', 'v'])
@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('case', CASES)
@pytest.mark.usefixtures('x64')
def test_order(case, schedule, kind):
    expected = CASES[case][1]
    measured = slope(case, schedule, kind)
    if case == 'dpmpp_3s' or case == 'dpmpp_3s heun':
        assert 2.7 <= measured < 3.25  # slow to settle
    elif case == 'lms 4':
        assert 3.75 <= measured < 4.6
    else:
        assert abs(measured - expected) < 0.25


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('case', AT_LEAST)
@pytest.mark.usefixtures('x64')
def test_order_of_unipc(case, schedule):
    expected = AT_LEAST[case][1]
    for kind in ('eps', 'x0', 'v'):
        assert expected - 0.25 < slope(case, schedule, kind) < expected + 1.3


@pytest.mark.parametrize('solver', [name for name, entry in DESCRIPTIONS.items() if entry.order])
@pytest.mark.usefixtures('x64')
def test_the_catalogue_says_the_order(solver):
    assert DESCRIPTIONS[solver].order == ({**CASES, 'unipc': AT_LEAST['unipc 2 x0 bh2 True']})[solver][1]


def test_the_catalogue_describes_every_solver():
    assert set(DESCRIPTIONS) == set(SOLVERS)
