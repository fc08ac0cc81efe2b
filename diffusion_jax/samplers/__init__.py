"""Samplers: `plan` puts a solver on a time grid, `sample` runs it from noise under one compiled scan.

`describe()` says which solvers there are, and when to use which.
"""

from diffusion_jax.registry import build
from diffusion_jax.samplers.adaptive import Adaptive, sample_adaptive
from diffusion_jax.samplers.catalogue import DESCRIPTIONS, SOLVERS, describe
from diffusion_jax.samplers.ddim import ddim
from diffusion_jax.samplers.ddpm import ddpm
from diffusion_jax.samplers.dpm_solver import (
    dpm_2m,
    dpm_3m,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_3m,
    dpmpp_3m_sde,
    dpmpp_sde,
    multistep,
)
from diffusion_jax.samplers.dpm_solver_singlestep import dpm_2, dpm_3, dpmpp_2s, dpmpp_3s, singlestep
from diffusion_jax.samplers.editing import ddim_inversion, noised, partial_grid, repaint, slerp
from diffusion_jax.samplers.engine import (
    Carry,
    Known,
    Plan,
    Row,
    Solver,
    State,
    Trajectory,
    advance,
    begin,
    check_finite,
    prior,
    rows,
    sample,
    sample_trajectory,
)
from diffusion_jax.samplers.euler import euler, euler_ancestral
from diffusion_jax.samplers.grids import (
    CONTINUOUS_SPACINGS,
    FINALS,
    SPACINGS,
    TIME_SPACINGS,
    time_grid,
    times_of_indices,
)
from diffusion_jax.samplers.heun import edm, heun
from diffusion_jax.samplers.lms import lms
from diffusion_jax.samplers.pndm import plms, pndm
from diffusion_jax.samplers.unipc import unipc
from diffusion_jax.schedules import Schedule


def plan(
    solver: str,
    schedule: Schedule,
    steps: int,
    spacing: str = 'trailing',
    final: str = 'zero',
    strength: float = 1.0,
    **options,
) -> Plan:
    """The named solver on a grid of `steps` steps; `describe()` says how many model calls that is.

    For a grid of your own, call the solver: `ddim(schedule, times_of_indices(schedule, [999, 500, 0]), eta=0.5)`.

    Args:
      solver: one of `SOLVERS`.
      steps, spacing, final: of `time_grid`.
      strength: of `partial_grid`: below 1, only the last part of the grid, for image to image.
      options: the solver's own (eta, variance, order, ...).
    """
    times = partial_grid(time_grid(schedule, steps, spacing, final), strength)
    return build('solver', SOLVERS, solver, schedule, times, **options)


__all__ = [
    'CONTINUOUS_SPACINGS',
    'DESCRIPTIONS',
    'FINALS',
    'SOLVERS',
    'SPACINGS',
    'TIME_SPACINGS',
    'Adaptive',
    'Carry',
    'Known',
    'Plan',
    'Row',
    'Solver',
    'State',
    'Trajectory',
    'advance',
    'begin',
    'check_finite',
    'ddim',
    'ddim_inversion',
    'ddpm',
    'describe',
    'dpm_2',
    'dpm_2m',
    'dpm_3',
    'dpm_3m',
    'dpmpp_2m',
    'dpmpp_2m_sde',
    'dpmpp_2s',
    'dpmpp_3m',
    'dpmpp_3m_sde',
    'dpmpp_3s',
    'dpmpp_sde',
    'edm',
    'euler',
    'euler_ancestral',
    'heun',
    'lms',
    'multistep',
    'noised',
    'partial_grid',
    'plan',
    'plms',
    'pndm',
    'prior',
    'repaint',
    'rows',
    'sample',
    'sample_adaptive',
    'sample_trajectory',
    'singlestep',
    'slerp',
    'time_grid',
    'times_of_indices',
    'unipc',
]
