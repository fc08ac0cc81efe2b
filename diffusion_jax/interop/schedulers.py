"""A scheduler's config of diffusers -> our schedule, prediction, solver and grid; and back.

A key that is absent means the default of that scheduler's own class, which differs from class to class.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.errors import UsageError
from diffusion_jax.registry import lookup, parameters_of
from diffusion_jax.samplers import SOLVERS, Plan, time_grid
from diffusion_jax.samplers.editing import partial_grid
from diffusion_jax.schedules import SCHEDULES, Chain, Schedule, zero_terminal_snr

PREDICTIONS = {'epsilon': 'eps', 'sample': 'x0', 'v_prediction': 'v'}

COMMON = {
    'num_train_timesteps': 1000,
    'beta_start': 0.0001,
    'beta_end': 0.02,
    'beta_schedule': 'linear',
    'trained_betas': None,
    'prediction_type': 'epsilon',
    'timestep_spacing': 'linspace',
    'steps_offset': 0,
    'rescale_betas_zero_snr': False,
}
OF_CLASS: dict[str, dict[str, Any]] = {
    'DDPMScheduler': {'timestep_spacing': 'leading', 'variance_type': 'fixed_small', 'clip_sample': True},
    'DDIMScheduler': {'timestep_spacing': 'leading', 'set_alpha_to_one': True, 'clip_sample': True},
    'PNDMScheduler': {'timestep_spacing': 'leading', 'set_alpha_to_one': False, 'skip_prk_steps': False},
    'EulerDiscreteScheduler': {'final_sigmas_type': 'zero'},
    'EulerAncestralDiscreteScheduler': {},
    'HeunDiscreteScheduler': {},
    'LMSDiscreteScheduler': {},
    'DPMSolverMultistepScheduler': {
        'solver_order': 2,
        'algorithm_type': 'dpmsolver++',
        'solver_type': 'midpoint',
        'lower_order_final': True,
        'euler_at_final': False,
        'final_sigmas_type': 'zero',
    },
    'DPMSolverSinglestepScheduler': {
        'solver_order': 2,
        'algorithm_type': 'dpmsolver++',
        'solver_type': 'midpoint',
        'lower_order_final': False,
        'final_sigmas_type': 'zero',
    },
    'UniPCMultistepScheduler': {
        'solver_order': 2,
        'solver_type': 'bh2',
        'predict_x0': True,
        'disable_corrector': [],
        'lower_order_final': True,
        'final_sigmas_type': 'zero',
    },
}
"""Class -> defaults of its own, or other than `COMMON`."""

CLASS_OF = {
    'ddpm': 'DDPMScheduler',
    'ddim': 'DDIMScheduler',
    'plms': 'PNDMScheduler',
    'pndm': 'PNDMScheduler',
    'euler': 'EulerDiscreteScheduler',
    'euler_ancestral': 'EulerAncestralDiscreteScheduler',
    'heun': 'HeunDiscreteScheduler',
    'lms': 'LMSDiscreteScheduler',
    'unipc': 'UniPCMultistepScheduler',
    **dict.fromkeys(
        ('dpmpp_2m', 'dpmpp_3m', 'dpm_2m', 'dpm_3m', 'dpmpp_sde', 'dpmpp_2m_sde', 'dpmpp_3m_sde'),
        'DPMSolverMultistepScheduler',
    ),
    **dict.fromkeys(('dpm_2', 'dpm_3', 'dpmpp_2s', 'dpmpp_3s'), 'DPMSolverSinglestepScheduler'),
}
"""Solver -> the class whose grid it would have there."""

CLIPS = ('DDPMScheduler', 'DDIMScheduler')

STEPS_APART = ('DPMSolverMultistepScheduler', 'UniPCMultistepScheduler')
"""Classes whose 'leading' and 'linspace' are those of N + 1 steps."""

UNROUNDED = (
    'EulerDiscreteScheduler',
    'EulerAncestralDiscreteScheduler',
    'HeunDiscreteScheduler',
    'LMSDiscreteScheduler',
)
"""Classes whose 'linspace' falls between the chain's indices."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What a scheduler's config says of sampling.

    Attributes:
      solver, options: for `samplers.SOLVERS`.
      spacing, final: of `samplers.time_grid`.
      last_call_is_idle: the grid's last index is where diffusers ends, too: its last call changes nothing, and we do
        not make it.
      rounded: whether a 'linspace' grid is rounded to the chain's indices.
      clip: whether the predicted x0 is clipped to [-1, 1].
    """

    solver: str
    options: Mapping[str, Any]
    spacing: str
    final: str
    last_call_is_idle: bool
    rounded: bool
    clip: bool

    def plan(self, schedule: Schedule, steps: int, strength: float = 1.0, **options: Any) -> Plan:
        """The plan of `steps` steps of diffusers' scheduler; options replace the config's.

        Raises:
          UsageError: for a number of steps that there is no such grid for.
        """
        if self.spacing == 'linspace' and not self.rounded:
            last = schedule.num_timesteps - 1
            between = np.linspace(last, 0, steps)
            times = np.append((between + 1) / schedule.num_timesteps, [] if self.last_call_is_idle else 0.0)
        elif self.last_call_is_idle:
            times = time_grid(schedule, steps, self.spacing, 'zero')[:-1]
        else:
            times = time_grid(schedule, steps, self.spacing, self.final)
        if len(times) < 2:
            raise UsageError(f'this scheduler has no grid of {steps} step: its one call changes nothing.')
        function = lookup('solver', SOLVERS, self.solver)
        return function(schedule, partial_grid(times, strength), **{**self.options, **options})


def completed(config: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
    """A config with every default of its class (or of the class `name`, as diffusers' `from_config` would read it)."""
    name = name or config.get('_class_name')
    lookup('scheduler', OF_CLASS, name)
    return {**COMMON, **OF_CLASS[name], **config, '_class_name': name}


def schedule_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """name and options for `SCHEDULES`, as our configs hold them; trained betas are not among what those can say."""
    config = {**COMMON, **config}
    num = config['num_train_timesteps']
    match config['beta_schedule']:
        case 'linear' | 'scaled_linear' as name:
            ends = {'beta_start': config['beta_start'], 'beta_end': config['beta_end']}
            zero = {'zero_terminal_snr': True} if config['rescale_betas_zero_snr'] else {}
            return {'name': name, 'num_timesteps': num, **ends, **zero}
        case 'squaredcos_cap_v2' if not config['rescale_betas_zero_snr']:
            return {'name': 'cosine', 'num_timesteps': num}
    raise UsageError(
        f'beta_schedule={config["beta_schedule"]!r} (rescale_betas_zero_snr={config["rescale_betas_zero_snr"]}) is not '
        'supported; supported are linear, scaled_linear and, without rescaling, squaredcos_cap_v2.'
    )


def schedule_of(config: Mapping[str, Any]) -> Schedule:
    """The schedule that a scheduler's config describes.

    Raises:
      UsageError: it is of a kind that we have not.
    """
    config = {**COMMON, **config}
    if config['trained_betas'] is not None:
        chain = Chain(config['trained_betas'])
        return zero_terminal_snr(chain) if config['rescale_betas_zero_snr'] else chain
    options = schedule_options(config)
    return SCHEDULES[options.pop('name')](**options)


def prediction_of(config: Mapping[str, Any]) -> str:
    """'eps', 'x0' or 'v'."""
    return lookup('prediction_type', PREDICTIONS, config.get('prediction_type', 'epsilon'))


def sampling_of(config: Mapping[str, Any], solver: str | None = None) -> Sampling:
    """How diffusers would sample with this config; or with the solver named instead, on the grid of its class.

    Raises:
      UsageError: the scheduler's class or one of its settings is none that we have.
    """
    if solver is not None:
        lookup('solver', SOLVERS, solver)
    config = completed(config, CLASS_OF.get(solver, 'EulerDiscreteScheduler') if solver else None)
    name = config['_class_name']
    own, options = _solver_of(config)
    chosen = solver or own
    if chosen != own and not {chosen, own} <= {'plms', 'pndm'}:
        options = {}
    if 'second_difference' in parameters_of(SOLVERS[chosen]):
        options.setdefault('second_difference', 'published')
    spacing, final, idle = _grid_of(config)
    clip = name in CLIPS and bool(config.get('clip_sample', True))
    if clip and config.get('clip_sample_range', 1.0) != 1.0:
        raise UsageError(f'clip_sample_range={config["clip_sample_range"]} is not supported, only 1.')
    if config.get('thresholding'):
        raise UsageError('thresholding=true of a scheduler is not supported: guidance.dynamic_threshold has it.')
    return Sampling(chosen, options, spacing, final, idle, name not in UNROUNDED, clip)


def _grid_of(config: Mapping[str, Any]) -> tuple[str, str, bool]:
    """(spacing, final, whether the last call is idle)."""
    name, spacing, offset = config['_class_name'], config['timestep_spacing'], config['steps_offset']
    if spacing not in ('leading', 'trailing', 'linspace'):
        raise UsageError(f'timestep_spacing={spacing!r} must be leading, trailing or linspace.')
    if name == 'DPMSolverSinglestepScheduler':  # it has no such setting
        spacing = 'linspace'
    ours = (
        f'dpm_{spacing}'
        if name in (*STEPS_APART, 'DPMSolverSinglestepScheduler') and spacing != 'trailing'
        else spacing
    )
    if spacing == 'leading' and offset:
        if offset != 1:
            raise UsageError(f'steps_offset={offset} is not supported, only 0 and 1.')
        ours = f'{ours}_offset'
    for key, replacement in (
        ('use_karras_sigmas', 'karras'),
        ('use_lu_lambdas', 'log_snr'),
        ('use_exponential_sigmas', 'log_snr'),
    ):
        ours = replacement if config.get(key) else ours
    if config.get('use_beta_sigmas'):
        raise UsageError('use_beta_sigmas=true is not supported; use_karras_sigmas is.')
    # A class heeds the settings that are its own: in files there are also those of the class it was before.
    own = {key: config.get(key) for key in OF_CLASS[name]}
    sigma_min = own.get('final_sigmas_type') == 'sigma_min' or own.get('set_alpha_to_one') is False
    idle = sigma_min and ours in ('leading', 'linspace')
    return ours, 'sigma_min' if sigma_min and not idle else 'zero', idle


def _solver_of(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(solver, options) that compute what the class does."""
    name = config['_class_name']
    match name:
        case 'DDPMScheduler':
            variance = config['variance_type']
            ours = {
                'fixed_small': 'small',
                'fixed_small_log': 'small',
                'fixed_large': 'large',
                'learned_range': 'learned',
            }
            return 'ddpm', {'variance': lookup('variance_type', ours, variance)}
        case 'DDIMScheduler':
            return 'ddim', {}
        case 'PNDMScheduler':
            combined = 'v' if prediction_of(config) == 'v' else 'eps'
            return ('plms' if config['skip_prk_steps'] else 'pndm'), {'combined': combined}
        case 'UniPCMultistepScheduler':
            disabled = config['disable_corrector']
            return 'unipc', {
                'order': config['solver_order'],
                'variant': config['solver_type'],
                'form': 'x0' if config['predict_x0'] else 'eps',
                'corrector': not disabled,
                'lower_order_final': config['lower_order_final'],
            }
        case 'DPMSolverMultistepScheduler':
            return _dpm_multistep(config)
        case 'DPMSolverSinglestepScheduler':
            order, plus = config['solver_order'], config['algorithm_type'].endswith('++')
            names = {(2, True): 'dpmpp_2s', (3, True): 'dpmpp_3s', (2, False): 'dpm_2', (3, False): 'dpm_3'}
            if (order, plus) not in names or config['algorithm_type'].startswith('sde'):
                raise UsageError(
                    f'{name} of order {order} and algorithm {config["algorithm_type"]!r} is not supported.'
                )
            solver = names[order, plus]
            options = {'method': config['solver_type']} if plus else {}
            return solver, {**options, 'stages': 'grid', 'lower_order_final': config['lower_order_final']}
        case _:
            return {cls: solver for solver, cls in CLASS_OF.items()}[name], {}


def _dpm_multistep(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    order, algorithm = config['solver_order'], config['algorithm_type']
    lower = True if config['euler_at_final'] else (None if config['lower_order_final'] else False)
    names = {
        ('dpmsolver++', 1): 'ddim',
        ('dpmsolver', 1): 'ddim',
        ('dpmsolver++', 2): 'dpmpp_2m',
        ('dpmsolver++', 3): 'dpmpp_3m',
        ('dpmsolver', 2): 'dpm_2m',
        ('dpmsolver', 3): 'dpm_3m',
        ('sde-dpmsolver++', 1): 'dpmpp_sde',
        ('sde-dpmsolver++', 2): 'dpmpp_2m_sde',
        ('sde-dpmsolver++', 3): 'dpmpp_3m_sde',
    }
    if (algorithm, order) not in names:
        raise UsageError(
            f'algorithm_type={algorithm!r} of order {order} is not supported; supported are dpmsolver, dpmsolver++ and '
            'sde-dpmsolver++ of orders 1 to 3.'
        )
    solver = names[algorithm, order]
    options: dict[str, Any] = {} if order == 1 else {'lower_order_final': lower}
    if order == 2:
        options['method'] = config['solver_type']
    return solver, options


def scheduler_config(schedule: Mapping[str, Any], prediction: str) -> dict[str, Any]:
    """The config of a DDIM scheduler for a schedule of ours, given as `schedule_options` gives it: for export.

    Raises:
      UsageError: diffusers has no such schedule.
    """
    names = {'linear': 'linear', 'scaled_linear': 'scaled_linear', 'cosine': 'squaredcos_cap_v2'}
    schedule, num = dict(schedule), schedule.get('num_timesteps')
    name = schedule['name']
    if name not in names or num is None or schedule.get('s', 0.008) != 0.008:
        raise UsageError(f'diffusers has no schedule {schedule}: chains of {", ".join(names)} can be exported.')
    theirs = {ours: name for name, ours in PREDICTIONS.items()}
    if prediction not in theirs:
        raise UsageError(f'diffusers has no prediction_type for {prediction!r}; there are {", ".join(theirs)}.')
    betas = {}
    if name != 'cosine':
        start, end = {'linear': (0.1, 20.0), 'scaled_linear': (0.85, 12.0)}[name]
        ends = (schedule.get('beta_start'), schedule.get('beta_end'))
        betas = {
            'beta_start': start / num if ends[0] is None else ends[0],
            'beta_end': min(end / num, 0.999) if ends[1] is None else ends[1],
        }
    return {
        '_class_name': 'DDIMScheduler',
        'num_train_timesteps': num,
        'beta_schedule': names[name],
        **betas,
        'prediction_type': theirs[prediction],
        'timestep_spacing': 'trailing',
        'rescale_betas_zero_snr': bool(schedule.get('zero_terminal_snr')),
        'clip_sample': False,
        'set_alpha_to_one': True,
        'steps_offset': 0,
    }
