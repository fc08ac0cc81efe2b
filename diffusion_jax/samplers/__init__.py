"""Samplers: `plan` puts a solver on a time grid, `sample` runs it from noise under one compiled scan."""

from collections.abc import Callable

from diffusion_jax.registry import build
from diffusion_jax.samplers.ddim import ddim
from diffusion_jax.samplers.ddpm import ddpm
from diffusion_jax.samplers.engine import Carry, Plan, Trajectory, sample, sample_trajectory
from diffusion_jax.samplers.grids import SPACINGS, time_grid, times_of_indices
from diffusion_jax.schedules import Schedule

SOLVERS: dict[str, Callable[..., Plan]] = {
    'ddim': ddim,
    'ddpm': ddpm,
}


def plan(solver: str, schedule: Schedule, steps: int, spacing: str = 'trailing', **options) -> Plan:
    """The named solver on a grid of `steps` model calls; `options` are the solver's own (eta, variance, ...).

    For a grid of your own, call the solver: `ddim(schedule, times_of_indices(schedule, [999, 500, 0]), eta=0.5)`.
    """
    return build('solver', SOLVERS, solver, schedule, time_grid(schedule, steps, spacing), **options)


__all__ = [
    'SOLVERS',
    'SPACINGS',
    'Carry',
    'Plan',
    'Trajectory',
    'ddim',
    'ddpm',
    'plan',
    'sample',
    'sample_trajectory',
    'time_grid',
    'times_of_indices',
]
