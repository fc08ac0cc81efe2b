"""Time grids: which N + 1 times, decreasing, N steps go through. N steps are N transitions, the last one to t = 0."""

from collections.abc import Callable

import jax
import numpy as np

from diffusion_jax.errors import UsageError
from diffusion_jax.registry import lookup
from diffusion_jax.schedules import Schedule


def leading(num_timesteps: int, steps: int) -> np.ndarray:
    """k * (T // N): starts below T - 1 (Song et al. 2021, DDIM's uniform sub-sequence)."""
    return np.arange(steps)[::-1] * (num_timesteps // steps)


def trailing(num_timesteps: int, steps: int) -> np.ndarray:
    """round(T - k T / N) - 1: starts at T - 1, where training's noise ends (Lin et al. 2024)."""
    return np.round(num_timesteps - np.arange(steps) * (num_timesteps / steps)).astype(int) - 1


def linspace(num_timesteps: int, steps: int) -> np.ndarray:
    """N indices from T - 1 to 0, both ends included; T - 1 alone for N = 1."""
    return np.round(np.linspace(num_timesteps - 1, 0, steps)).astype(int)


SPACINGS: dict[str, Callable[[int, int], np.ndarray]] = {
    'leading': leading,
    'trailing': trailing,
    'linspace': linspace,
}
"""Name -> the N indices of a chain of T steps that are visited, decreasing."""


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


def time_grid(schedule: Schedule, steps: int, spacing: str = 'trailing') -> np.ndarray:
    """The times [steps + 1], float64, of a sampler that makes `steps` transitions and ends at t = 0.

    On a chain, `spacing` says which of its T indices are visited: 'leading', 'trailing' or 'linspace', steps <= T. In
    continuous time the grid is uniform in t from 1, and `spacing` must be 'trailing', which is just that.
    """
    indices_of = lookup('spacing', SPACINGS, spacing)
    limit = schedule.num_timesteps
    if steps < 1 or (limit is not None and steps > limit):
        raise UsageError(f'steps must be in 1..{limit or "any number"}, got {steps}.')
    if limit is None:
        if spacing != 'trailing':
            raise UsageError(f"spacing {spacing!r} is for chains of T steps; continuous time takes 'trailing'.")
        return np.linspace(1.0, 0.0, steps + 1)
    return times_of_indices(schedule, indices_of(limit, steps))
