"""Configs of diffusers' schedulers: each gives the plan whose states are known, by test_parity, to be diffusers'."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from samplers.test_parity import CASES, DIFFERENT, FIXTURE, grid_of, plan_of, schedule_of

from diffusion_jax import schedules
from diffusion_jax.errors import UsageError
from diffusion_jax.interop import schedulers

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'interop'

# Of the singlestep solvers, those that end with orders of ours; grids that diffusers makes of sigmas are not ours to
# the last digit, and of order 1 all solvers are DDIM.
NAMES = [
    name
    for name, case in CASES.items()
    if name not in DIFFERENT
    and case['scheduler'] in schedulers.OF_CLASS
    and 'lambda_min_clipped' not in case['config']
    and not case['config'].get('use_karras_sigmas')
    and case['config'].get('solver_order') != 1
    and (case['scheduler'] != 'DPMSolverSinglestepScheduler' or case['orders'][-2:] == [1, 1])
]


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.usefixtures('x64')
def test_a_config_gives_the_plan_of_its_scheduler(name):
    case = CASES[name]
    config = {'_class_name': case['scheduler'], **case['config']}
    _, schedule = schedule_of(case)
    ours_schedule = schedulers.schedule_of(config)
    np.testing.assert_allclose(ours_schedule.log_snrs, schedule.log_snrs, rtol=1e-12)
    sampling = schedulers.sampling_of(config)
    options = {'eta': case['step']['eta']} if case['step'].get('eta') else {}
    ours = sampling.plan(ours_schedule, case['steps'], **options)
    theirs = plan_of(case, schedule, grid_of(case, schedule, FIXTURE[f'{name}/timesteps']))
    np.testing.assert_allclose(ours.times, theirs.times, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), ours.coefficients, theirs.coefficients)


def stable_diffusion(name, **changes):
    return json.loads((FIXTURES / name / 'scheduler' / 'scheduler_config.json').read_text()) | changes


@pytest.mark.parametrize(
    ('solver', 'first', 'last'),
    [
        (None, [901, 801], 1),
        ('ddim', [901, 801], 1),
        ('euler', [901, 801], 1),
        ('dpmpp_2m', [901, 811], 91),
        ('unipc', [901, 811], 91),
    ],
)
def test_another_solver_has_its_own_classes_grid(solver, first, last):
    """'leading' with an offset of 1, which diffusers reads otherwise for DPM-Solver and UniPC."""
    config = stable_diffusion('sd1')
    schedule = schedulers.schedule_of(config)
    plan = schedulers.sampling_of(config, solver).plan(schedule, 10)
    timesteps = list(dict.fromkeys(np.round(schedule.timestep(plan.times[:-1])).astype(int).tolist()))
    assert timesteps[0] == first[0]
    assert timesteps[-1] == last
    assert first[1] in timesteps


def test_absent_keys_have_the_defaults_of_their_class():
    def sampling(name, **config):
        return schedulers.sampling_of({'_class_name': name, **config})

    assert sampling('PNDMScheduler').spacing == 'leading'
    assert sampling('PNDMScheduler').solver == 'pndm'
    assert sampling('PNDMScheduler').last_call_is_idle  # set_alpha_to_one is false by default, and only there
    assert not sampling('DDIMScheduler').last_call_is_idle
    assert sampling('EulerDiscreteScheduler').spacing == 'linspace'
    assert sampling('DPMSolverMultistepScheduler').spacing == 'dpm_linspace'
    assert sampling('DDIMScheduler').clip
    assert not sampling('EulerDiscreteScheduler').clip
    # A key that another class left in the config counts where it means something.
    assert not schedulers.sampling_of({'_class_name': 'PNDMScheduler', 'clip_sample': False}, 'ddim').clip
    assert schedulers.sampling_of({'_class_name': 'PNDMScheduler'}, 'ddim').clip


def test_one_step_that_changes_nothing_is_no_grid():
    sampling = schedulers.sampling_of({'_class_name': 'PNDMScheduler', 'skip_prk_steps': True})
    with pytest.raises(UsageError, match='no grid of 1 step'):
        sampling.plan(schedulers.schedule_of({}), 1)


def test_karras_grids_are_taken():
    config = {'_class_name': 'DPMSolverMultistepScheduler', 'use_karras_sigmas': True}
    assert schedulers.sampling_of(config).spacing == 'karras'


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ({'_class_name': 'DDIMSchedulr'}, "unknown scheduler 'DDIMSchedulr'. Did you mean 'DDIMScheduler'"),
        ({'_class_name': 'DDIMScheduler', 'timestep_spacing': 'odd'}, "timestep_spacing='odd'"),
        ({'_class_name': 'DDIMScheduler', 'steps_offset': 3}, 'steps_offset=3'),
        ({'_class_name': 'DDIMScheduler', 'thresholding': True}, 'thresholding'),
        ({'_class_name': 'DDIMScheduler', 'clip_sample_range': 2.0}, 'clip_sample_range'),
        ({'_class_name': 'EulerDiscreteScheduler', 'use_beta_sigmas': True}, 'use_beta_sigmas'),
        ({'_class_name': 'DPMSolverMultistepScheduler', 'algorithm_type': 'sde-dpmsolver'}, 'sde-dpmsolver'),
        ({'_class_name': 'DPMSolverSinglestepScheduler', 'solver_order': 1}, 'order 1'),
    ],
)
def test_what_we_do_not_compute_is_refused(config, message):
    with pytest.raises(UsageError, match=message):
        schedulers.sampling_of(config)


def test_schedules_that_we_have_not_are_refused():
    with pytest.raises(UsageError, match="beta_schedule='sigmoid'"):
        schedulers.schedule_of({'beta_schedule': 'sigmoid'})
    with pytest.raises(UsageError, match="unknown prediction_type 'flow'"):
        schedulers.prediction_of({'prediction_type': 'flow'})


def test_trained_betas_are_the_schedule():
    betas = [0.1, 0.2, 0.3]
    np.testing.assert_allclose(schedulers.schedule_of({'trained_betas': betas}).betas, betas)


@pytest.mark.parametrize(
    ('schedule', 'prediction'),
    [
        ({'name': 'cosine', 'num_timesteps': 100}, 'v'),
        ({'name': 'linear', 'num_timesteps': 500}, 'eps'),
        ({'name': 'scaled_linear', 'num_timesteps': 1000, 'zero_terminal_snr': True}, 'x0'),
        ({'name': 'linear', 'num_timesteps': 50, 'beta_start': 0.01, 'beta_end': 0.1}, 'eps'),
    ],
)
def test_a_schedule_of_ours_survives_the_way_there_and_back(schedule, prediction):
    config = json.loads(json.dumps(schedulers.scheduler_config(schedule, prediction)))
    options = dict(schedule)
    ours = schedules.SCHEDULES[options.pop('name')](**options)
    np.testing.assert_allclose(schedulers.schedule_of(config).log_snrs, ours.log_snrs, rtol=1e-9)
    assert schedulers.prediction_of(config) == prediction
    sampling = schedulers.sampling_of(config)
    assert (sampling.solver, sampling.spacing, sampling.final, sampling.clip) == ('ddim', 'trailing', 'zero', False)


@pytest.mark.parametrize(
    'schedule', [{'name': 'flow'}, {'name': 'sigmoid', 'num_timesteps': 10}, {'name': 'cosine', 'num_timesteps': None}]
)
def test_a_schedule_that_diffusers_has_not_is_refused(schedule):
    with pytest.raises(UsageError, match='diffusers has no schedule'):
        schedulers.scheduler_config(schedule, 'eps')
