"""Trajectories against those of diffusers' schedulers, from the same noise.

The fixture holds what diffusers 0.42.1 computes in float32 on the exact denoiser of a mixture; ours run in float64.
Cases left out are in `DIFFERENT`, with the reason.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import oracles, samplers, schedules
from experiments.solvers.convergence import replay, widened

FILE = Path(__file__).parents[1] / 'fixtures' / 'diffusers' / 'trajectories.npz'
with np.load(FILE) as archive:
    FIXTURE = {name: archive[name] for name in archive.files}
CASES = json.loads(str(FIXTURE['cases']))

MIXTURE = oracles.gaussian_mixture([0.3, 0.5, 0.2], [-0.7, 0.2, 0.9], [0.1, 0.2, 0.15])
BETAS = {
    'linear': lambda **options: schedules.linear(1000, 1e-4, 0.02, **options),
    'scaled_linear': lambda **options: schedules.scaled_linear(1000, 0.00085, 0.012, **options),
    'squaredcos_cap_v2': lambda: schedules.cosine(1000),
}
KINDS = {'epsilon': 'eps', 'sample': 'x0', 'v_prediction': 'v'}
CALLS = 32

DIFFERENT = {
    'ddpm_large_trailing_10_known_wrong': 'diffusers adds noise on the step to the data unless it starts at index 0',
    'ddim_linspace_known_wrong': 'diffusers steps by t - T // N, not to the next time of the grid',
    'euler_karras_10_churn_known_wrong': 'diffusers asks the model before the churn',
    'pndm_prk_10_v_known_wrong': 'diffusers mixes v of different times as if they were eps',
    'unipc_2_bh2_10_disabled_01': 'the corrector is on or off here, not per step',
    **dict.fromkeys(
        ('dpm_2m_karras_10', 'dpm_3_karras_20_scaled', 'dpm_2m_lu_10'),
        'diffusers tells the model a rounded time that is not that of sigma',
    ),
    **dict.fromkeys(
        [name for name in CASES if name.startswith(('single_3m', 'single_eps_3m'))],
        'in a step of order 3 diffusers takes the midpoint rule for the second call, the papers their own formula',
    ),
}
# Sigma interpolated linearly, where we interpolate the log-SNR: another model of what lies between two indices.
COARSE = {'heun_linspace_5': 2e-3, 'euler_linspace_10': 2e-3, 'ancestral_linspace_10': 2e-3, 'lms_linspace_10': 2e-3}
COARSE |= {'euler_linspace_10_sigma_min': 2e-3}
RUNS = {}


def runner(schedule_name, schedule, kind):
    """One compiled program per schedule and kind of prediction."""
    key = (schedule_name, kind)
    if key not in RUNS:
        RUNS[key] = replay(MIXTURE.denoiser(schedule, kind))
    return RUNS[key]


def spacing_of(case):
    """Our name of the grid; None for the grids that we take from the fixture's own times."""
    config, scheduler = case['config'], case['scheduler']
    if scheduler == 'DPMSolverSinglestepScheduler':
        return 'dpm_linspace'
    if case['space'] != 'vp' or config.get('use_karras_sigmas') or 'lambda_min_clipped' in config:
        return None
    defaults = {'DDPMScheduler': 'leading', 'DDIMScheduler': 'leading', 'PNDMScheduler': 'leading'}
    spacing = config.get('timestep_spacing', defaults.get(scheduler, 'linspace'))
    if scheduler in ('DPMSolverMultistepScheduler', 'UniPCMultistepScheduler') and spacing != 'trailing':
        spacing = f'dpm_{spacing}'
    if config.get('steps_offset'):
        return 'leading_offset' if spacing == 'leading' else None
    return spacing


def grid_of(case, schedule, timesteps):
    config = case['config']
    spacing = spacing_of(case)
    distinct = np.unique(timesteps)[::-1]
    sigma_min = config.get('final_sigmas_type') == 'sigma_min' or config.get('set_alpha_to_one') is False
    final = 'sigma_min' if sigma_min else 'zero'
    if sigma_min and distinct[-1] == 0:
        # The grid's last index is where diffusers ends, too: its last call changes nothing, and we do not make it.
        return samplers.time_grid(schedule, case['steps'], spacing or 'linspace')[:-1]
    if spacing is not None:
        return samplers.time_grid(schedule, case['steps'], spacing, final)
    if case['space'] == 'edm':
        return np.append(np.minimum(np.exp(4 * distinct) / 80, 1.0), 0.0)  # float32's log(80) is above it
    if case['space'] == 'flow':
        return np.append(distinct / 1000, 0.0)
    return np.append((distinct + 1) / 1000, 1 / 1000 if sigma_min else 0.0)


def plan_of(case, schedule, times):
    config, scheduler = case['config'], case['scheduler']
    match scheduler:
        case 'DDPMScheduler':
            return samplers.ddpm(schedule, times, config.get('variance_type', 'fixed_small').removeprefix('fixed_'))
        case 'DDIMScheduler':
            return samplers.ddim(schedule, times, case['step'].get('eta', 0.0))
        case 'EulerDiscreteScheduler' | 'FlowMatchEulerDiscreteScheduler' | 'EDMEulerScheduler':
            return samplers.euler(schedule, times)
        case 'EulerAncestralDiscreteScheduler':
            return samplers.euler_ancestral(schedule, times)
        case 'HeunDiscreteScheduler' | 'FlowMatchHeunDiscreteScheduler':
            return samplers.heun(schedule, times)
        case 'LMSDiscreteScheduler':
            return samplers.lms(schedule, times)
        case 'PNDMScheduler':
            return (samplers.plms if config.get('skip_prk_steps') else samplers.pndm)(schedule, times)
        case 'UniPCMultistepScheduler':
            return samplers.unipc(
                schedule,
                times,
                config.get('solver_order', 2),
                'x0' if config.get('predict_x0', True) else 'eps',
                config.get('solver_type', 'bh2'),
                not config.get('disable_corrector'),
                config.get('lower_order_final', True),
            )
    algorithm = config.get('algorithm_type', 'dpmsolver++')
    order, method = config.get('solver_order', 2), config.get('solver_type', 'midpoint')
    form = 'x0' if algorithm.endswith('++') else 'eps'
    lower = config.get('lower_order_final', True)
    if scheduler == 'DPMSolverSinglestepScheduler':
        # diffusers ends with one of its own orders where ours ends with 1; without lowering they agree.
        lower = lower and case['orders'][-2:] == [1, 1]
        return samplers.singlestep(schedule, times, order, form, method, 'grid', lower)
    eta = 1.0 if algorithm.startswith('sde') else 0.0
    lower = True if config.get('euler_at_final') else (None if lower else False)
    return samplers.multistep(schedule, times, order, form, method, 'published', eta, lower)


def schedule_of(case):
    if case['space'] in ('edm', 'flow'):
        return case['space'], schedules.SCHEDULES[case['space']]()
    options = {'zero_terminal_snr': True} if case['config'].get('rescale_betas_zero_snr') else {}
    return case['betas'] + str(options), BETAS[case['betas']](**options)


@pytest.mark.parametrize('name', [name for name in CASES if name not in DIFFERENT])
@pytest.mark.usefixtures('x64')
def test_every_state_is_that_of_diffusers(name):
    case = CASES[name]
    timesteps, x = FIXTURE[f'{name}/timesteps'], FIXTURE[f'{name}/x'].astype(np.float64)
    schedule_name, schedule = schedule_of(case)
    plan = plan_of(case, schedule, grid_of(case, schedule, timesteps))
    calls = plan.num_calls
    if calls == len(timesteps) - 1:
        np.testing.assert_array_equal(x[-1], x[-2])
        timesteps, x = timesteps[:-1], x[:-1]
    np.testing.assert_allclose(schedule.timestep(plan.times[:-1]), timesteps, atol=2e-3)
    # diffusers' sigma-space schedulers hold x / alpha.
    scale = plan.alpha if case['space'] == 've' else np.ones(calls + 1)
    noise = np.zeros((CALLS, 4, 3))
    noise[:calls] = FIXTURE.get(f'{name}/noise', noise)[:calls]
    run = runner(schedule_name, schedule, KINDS.get(case['prediction'], 'flow'))
    ours = run(widened(plan, CALLS), jnp.asarray(scale[0] * x[0]), jnp.asarray(noise))[: calls + 1]
    theirs = scale[:, None, None] * x
    error = np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))
    assert error.max() < COARSE.get(name, 1e-4)


@pytest.mark.parametrize('name', sorted(DIFFERENT))
def test_what_differs_is_in_the_fixture(name):
    assert name in CASES
