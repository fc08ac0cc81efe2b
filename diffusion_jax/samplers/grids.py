"""Time grids: which N + 1 times, decreasing, N steps go through. N steps are N transitions."""

from collections.abc import Callable

import jax
import numpy as np

from diffusion_jax.errors import UsageError
from diffusion_jax.registry import unknown
from diffusion_jax.schedules import Schedule


def leading(num_timesteps: int, steps: int) -> np.ndarray:
    """k * (T // N): starts below T - 1 (Song et al. 2021, DDIM's uniform sub-sequence)."""
    return np.arange(steps)[::-1] * (num_timesteps // steps)


def leading_offset(num_timesteps: int, steps: int) -> np.ndarray:
    """k * (T // N) + 1: `leading` as Stable Diffusion has it (steps_offset=1)."""
    return leading(num_timesteps, steps) + 1


def trailing(num_timesteps: int, steps: int) -> np.ndarray:
    """round(T - k T / N) - 1: starts at T - 1, where training's noise ends (Lin et al. 2024)."""
    return np.round(num_timesteps - np.arange(steps) * (num_timesteps / steps)).astype(int) - 1


def linspace(num_timesteps: int, steps: int) -> np.ndarray:
    """N indices from T - 1 to 0, both ends included; T - 1 alone for N = 1."""
    return np.round(np.linspace(num_timesteps - 1, 0, steps)).astype(int)


def dpm_leading(num_timesteps: int, steps: int) -> np.ndarray:
    """k * (T // (N + 1)), k = N .. 1: what diffusers' DPM-Solver and UniPC call leading."""
    return np.arange(1, steps + 1)[::-1] * (num_timesteps // (steps + 1))


def dpm_leading_offset(num_timesteps: int, steps: int) -> np.ndarray:
    """k * (T // (N + 1)) + 1: `dpm_leading` with Stable Diffusion's steps_offset=1."""
    return dpm_leading(num_timesteps, steps) + 1


def dpm_linspace(num_timesteps: int, steps: int) -> np.ndarray:
    """round(linspace(T - 1, 0, N + 1)) without its last: what diffusers' DPM-Solver and UniPC call linspace."""
    return np.round(np.linspace(num_timesteps - 1, 0, steps + 1)).astype(int)[:-1]


def quadratic_indices(num_timesteps: int, steps: int) -> np.ndarray:
    """int(linspace(0, sqrt(0.8 T), N)^2): DDIM's quadratic sub-sequence, dense near the data (section D.2)."""
    return (np.linspace(0, np.sqrt(0.8 * num_timesteps), steps) ** 2).astype(int)[::-1]


INDEX_SPACINGS: dict[str, Callable[[int, int], np.ndarray]] = {
    'leading': leading,
    'leading_offset': leading_offset,
    'trailing': trailing,
    'linspace': linspace,
    'dpm_leading': dpm_leading,
    'dpm_leading_offset': dpm_leading_offset,
    'dpm_linspace': dpm_linspace,
    'quadratic': quadratic_indices,
}
"""Name -> the N indices of a chain of T steps that are visited, decreasing."""

LEAST_LOG_SNR = -10.2
"""Where spacings by noise level start if the schedule ends in less signal still: DPM-Solver clips the cosine schedule
there (Lu et al. 2022: lambda >= -5.1), as otherwise most of the grid would lie in pure noise."""


def _noisiest(schedule: Schedule) -> float:
    return float(np.maximum(schedule.log_snr(1.0), LEAST_LOG_SNR))


def uniform(schedule: Schedule, steps: int) -> np.ndarray:
    """Uniform in t from 1 to 0."""
    return np.linspace(1.0, 0.0, steps + 1)[:-1]


def quadratic(schedule: Schedule, steps: int) -> np.ndarray:
    """Squares of a uniform grid: dense near the data."""
    return uniform(schedule, steps) ** 2


def log_snr(schedule: Schedule, steps: int) -> np.ndarray:
    """Uniform in log-SNR down to `schedule.t_min`, as DPM-Solver (Lu et al. 2022) recommends for small images."""
    levels = np.linspace(_noisiest(schedule), schedule.log_snr(schedule.t_min), steps)
    return schedule.time_of_log_snr(levels)


def karras(schedule: Schedule, steps: int, rho: float = 7.0) -> np.ndarray:
    """sigma / alpha uniform in its power 1 / rho, down to `schedule.t_min` (Karras et al. 2022, eq. 5)."""
    ends = np.exp(-0.5 * np.array([_noisiest(schedule), schedule.log_snr(schedule.t_min)])) ** (1 / rho)
    return schedule.time_of_log_snr(-2.0 * rho * np.log(np.linspace(*ends, steps)))


TIME_SPACINGS: dict[str, Callable[[Schedule, int], np.ndarray]] = {
    'uniform': uniform,
    'log_snr': log_snr,
    'karras': karras,
}
"""Name -> the N noisy times that are visited, decreasing, on any schedule; on a chain they lie between its indices."""

CONTINUOUS_SPACINGS = TIME_SPACINGS | {'trailing': uniform, 'quadratic': quadratic}
"""The names that continuous schedules take."""

SPACINGS = tuple(sorted(INDEX_SPACINGS | TIME_SPACINGS))
FINALS = ('zero', 'sigma_min')


def check_grid(times) -> np.ndarray | jax.Array:
    """Concrete times as float64 [N + 1] on the host, or a `UsageError` unless they fall in [0, 1]. Traced ones pass."""
    if isinstance(times, jax.core.Tracer):
        return times
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or len(times) < 2 or not (np.diff(times) < 0).all() or times[0] > 1 or times[-1] < 0:
        raise UsageError(f'a time grid is N + 1 >= 2 strictly decreasing times in [0, 1], got {times}.')
    return times


def times_of_indices(schedule: Schedule, indices) -> np.ndarray:
    """The time grid [N + 1] through the given decreasing indices of a chain, and then to t = 0."""
    indices = np.asarray(indices)
    if schedule.num_timesteps is None:
        raise UsageError('this schedule is continuous and has no indices: give a time grid instead.')
    if not np.issubdtype(indices.dtype, np.integer) or indices.size == 0 or indices.max() >= schedule.num_timesteps:
        raise UsageError(f'indices must be integers in 0..{schedule.num_timesteps - 1}, got {indices}.')
    return check_grid(np.append((indices + 1) / schedule.num_timesteps, 0.0))


def time_grid(schedule: Schedule, steps: int, spacing: str = 'trailing', final: str = 'zero') -> np.ndarray:
    """The times [steps + 1], float64, of a sampler that makes `steps` transitions.

    Args:
      steps: 1 .. T on a chain of T steps.
      spacing: one of `SPACINGS`. 'uniform', 'log_snr' and 'karras' are times and fit every schedule; the others are
        indices of a chain; in continuous time 'trailing' is uniform, 'quadratic' its squares, and the rest is refused.
      final: 'zero' ends at t = 0, the data: the last transition takes the predicted x0 (denoising to zero); 'sigma_min'
        ends at the last noisy time, `schedule.t_min`, index 0 of a chain (Stable Diffusion's set_alpha_to_one=False).
    """
    limit = schedule.num_timesteps
    if not isinstance(steps, int | np.integer) or steps < 1 or (limit is not None and steps > limit):
        raise UsageError(f'steps must be in 1..{limit or "any number"}, got {steps}.')
    if final not in FINALS:
        raise unknown('final', final, FINALS)
    if spacing not in SPACINGS:
        raise unknown('spacing', spacing, SPACINGS)
    if limit is None or spacing in TIME_SPACINGS:
        if spacing not in CONTINUOUS_SPACINGS:
            raise UsageError(
                f'spacing {spacing!r} is for chains of T steps; continuous time takes {", ".join(CONTINUOUS_SPACINGS)}.'
            )
        times = np.append(CONTINUOUS_SPACINGS[spacing](schedule, steps), 0.0)
    else:
        indices = INDEX_SPACINGS[spacing](limit, steps)
        if len(np.unique(indices)) < steps or indices.max() >= limit or indices.min() < 0:
            raise UsageError(
                f'spacing {spacing!r} has no {steps} distinct indices of {limit}: take fewer steps, or another spacing.'
            )
        times = times_of_indices(schedule, indices)
    if final == 'sigma_min':
        times[-1] = schedule.t_min
        if times[-2] <= times[-1]:
            raise UsageError(
                f"final='sigma_min' ends at t = {schedule.t_min:.3g}, which spacing {spacing!r} visits already: take "
                "final='zero', or another spacing."
            )
    return check_grid(times)
