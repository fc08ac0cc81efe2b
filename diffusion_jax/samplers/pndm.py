"""Pseudo numerical methods (Liu et al. 2022, "PNDM"): classical weights on eps, DDIM's transfer from level to level."""

import numpy as np

from diffusion_jax.registry import lookup
from diffusion_jax.samplers.engine import Plan
from diffusion_jax.samplers.linear import levels, levels_at, linear_plan
from diffusion_jax.schedules import Schedule

COMBINED = ('eps', 'v')

# Adams-Bashforth on an even grid, newest first (eq. 12 and its lower orders).
WEIGHTS = {1: [1.0], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}


def _pseudo_numerical(schedule: Schedule, times, start: str, combined: str) -> Plan:
    lookup('quantity to combine', dict.fromkeys(COMBINED), combined)
    grid = levels(schedule, times)
    num = grid.num_steps
    x, base, total, *previous, x0 = np.eye(7)  # total: the weighted sum within a Runge-Kutta step
    calls, matrices = [], []

    def output(grid, i):
        """What is combined, of a call at level i."""
        eps = grid.eps(i, x, x0)
        return eps if combined == 'eps' else grid.alpha[i] * eps - grid.sigma[i] * x0

    def transfer(t, s, x, slope):
        """DDIM's step (eq. 11) from one (alpha, sigma) to another."""
        eps = slope if combined == 'eps' else t[0] * slope + t[1] * x
        ratio = s[0] / t[0]
        return ratio * x + (s[1] - ratio * t[1]) * eps

    def call(time, to, base=base, total=total, previous=previous):
        calls.append(time)
        matrices.append([to, base, total, *previous[:3]])

    history = 0
    for i in range(num):
        t, s = ((grid.alpha[j], grid.sigma[j]) for j in (i, i + 1))
        time, next_time = grid.times[i : i + 2]
        newest = output(grid, i)
        remembered = [newest, *previous]
        if t[0] == 0:  # from zero signal only x0 says where to go
            call(time, s[0] * x0 + s[1] * grid.eps(i, x, x0))
            continue
        last = s[1] == 0  # eps is not defined at the data, where a step's later calls would be
        if start == 'runge_kutta' and history < 3 and not last:
            middle = levels_at(schedule, [(time + next_time) / 2])
            half = (middle.alpha[0], middle.sigma[0])
            at_half = output(middle, 0)
            call(time, transfer(t, half, x, newest), base=x, total=newest / 6, previous=remembered)
            call(middle.times[0], transfer(t, half, base, at_half), total=total + at_half / 3)
            call(middle.times[0], transfer(t, s, base, at_half), total=total + at_half / 3)
            call(next_time, transfer(t, s, base, total + output(grid, i + 1) / 6))
            history += 1
            continue
        if start == 'average' and history == 0 and not last:
            call(time, transfer(t, s, x, newest), base=x, previous=remembered)
            call(next_time, transfer(t, s, base, (output(grid, i + 1) + previous[0]) / 2))
            history += 1
            continue
        history = min(history + 1, 4)
        slope = sum(w * e for w, e in zip(WEIGHTS[history], remembered, strict=False))
        call(time, transfer(t, s, x, slope), previous=remembered)
    return linear_plan(schedule, np.append(calls, grid.times[-1]), matrices)


def plms(schedule: Schedule, times, combined: str = 'eps') -> Plan:
    """Pseudo linear multistep through `times`, decreasing [N + 1]: N + 1 calls, as in Stable Diffusion.

    The first step is repeated with the average of eps at both its ends; after it, eps of up to four calls is combined
    by Adams-Bashforth's weights for an even grid, which `times` should be.

    Args:
      combined: 'eps', as in the paper; or 'v', as diffusers does with models that predict it.
    """
    return _pseudo_numerical(schedule, times, 'average', combined)


def pndm(schedule: Schedule, times, combined: str = 'eps') -> Plan:
    """PNDM through `times`, decreasing [N + 1]: three pseudo Runge-Kutta steps of four calls, then `plms`: N + 9 calls.

    The calls within a step are half-way in t (eq. 13). A step to the data is always of one call.
    """
    return _pseudo_numerical(schedule, times, 'runge_kutta', combined)
