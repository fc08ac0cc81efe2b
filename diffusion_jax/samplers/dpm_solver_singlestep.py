"""Single-step DPM-Solver and DPM-Solver++ (Lu et al. 2022a, algorithms 1, 2; 2022b, algorithm 1): p calls for order p.

No history: each step starts afresh, with calls in between at levels r_1 (and r_2) of the way in lam.
"""

import numpy as np

from diffusion_jax.errors import UsageError
from diffusion_jax.samplers.dpm_solver import FORMS, integral
from diffusion_jax.samplers.engine import Plan
from diffusion_jax.samplers.linear import check_choices, check_order, levels, levels_at, linear_plan
from diffusion_jax.schedules import Schedule

METHODS = ('midpoint', 'heun')
STAGES = ('log_snr', 'grid')


def singlestep_orders(lam: np.ndarray, order: int, lower_order_final: bool) -> list[int]:
    """Orders of steps that together take one call for each of the N intervals of the grid.

    As many of the full order as there may be, and the rest at the end; order 1 from zero signal and to zero noise, and
    with `lower_order_final` whenever a step is the last.
    """
    num = len(lam) - 1
    start = [1] if not np.isfinite(lam[0]) else []
    left = num - len(start)
    end = [1] if left and (lower_order_final or not np.isfinite(lam[-1])) else []
    left -= len(end)
    full, rest = divmod(left, order)
    return start + [order] * full + ([rest] if rest else []) + end


def singlestep(
    schedule: Schedule,
    times,
    order: int = 2,
    form: str = 'x0',
    method: str = 'midpoint',
    stages: str = 'log_snr',
    lower_order_final: bool = True,
) -> Plan:
    """Single-step DPM-Solver (form 'eps') or DPM-Solver++ (form 'x0') of N calls for `times`, decreasing [N + 1].

    A step of order p spans p intervals of the grid, so that a grid of N intervals costs N calls whatever the order.

    Args:
      order: 1 (DDIM), 2 or 3.
      method: 'midpoint' is the papers' combination of the calls; 'heun' integrates the Taylor polynomial exactly.
      stages: where the calls within a step are: 'log_snr', at the published 1/2, or 1/3 and 2/3 of the way in lam;
        'grid', at the points of the grid, as diffusers does.
      lower_order_final: end with a step of order 1; without it the last step is that only if it ends at zero noise.
    """
    check_order('singlestep', order, 3)
    check_choices('singlestep', form=(form, FORMS), method=(method, METHODS), stages=(stages, STAGES))
    grid = levels(schedule, times)
    orders = singlestep_orders(grid.lam, order, lower_order_final)
    at = grid
    if stages == 'log_snr':
        starts = np.cumsum([0, *orders])
        lam = np.concatenate(
            [
                grid.lam[i] + (grid.lam[i + p] - grid.lam[i]) * np.arange(1, p) / p
                for i, p in zip(starts[:-1], orders, strict=True)
            ]
        )
        inner = np.ones(len(grid.times), bool)
        inner[starts] = False
        times = grid.times.copy()
        times[inner] = schedule.time_of_log_snr(2 * lam)
        if not (np.diff(times) < 0).all():
            raise UsageError('calls within a step coincide in time: take fewer steps.')
        at = levels_at(schedule, times)
    x, base, first, second, x0 = np.eye(5)
    matrices = []
    start = 0
    for p in orders:
        h = at.lam[start + p] - at.lam[start]

        def step(i, start=start):
            return integral(at, start, start + i, form)

        def output(i, start=start):
            return x0 if form == 'x0' else at.eps(start + i, x, x0)

        def part(i, start=start, h=h):
            return (at.lam[start + i] - at.lam[start]) / h

        # What a step remembers is x at its start (`base`) and the outputs of its calls (`first`, `second`).
        to = step(1)
        matrices.append([to.decay * x + to.first * (x0 if to.form == 'x0' else output(0)), x, output(0), second])
        if p > 1:
            r_1 = part(1)
            to = step(2)
            rise = output(1) - first
            if p == 2:
                gain = to.phi_1 / (2 * r_1) if method == 'midpoint' else to.phi_2 / r_1
            else:
                r_2 = part(2)
                gain = to.phi_2 * r_2 / r_1
            matrices.append([to.decay * base + to.first * first + to.scale * gain * rise, base, first, output(1)])
        if p > 2:
            to = step(3)
            rise = output(2) - first
            update = to.decay * base + to.first * first
            if method == 'midpoint':
                update = update + to.scale * to.phi_2 / r_2 * rise
            else:
                slope_1, slope_2 = (second - first) / r_1, rise / r_2
                curvature = 2 * (slope_2 - slope_1) / (r_2 - r_1)
                slope = (r_2 * slope_1 - r_1 * slope_2) / (r_2 - r_1)
                update = update + to.scale * (to.phi_2 * slope + to.phi_3 * curvature)
            matrices.append([update, base, first, second])
        start += p
    return linear_plan(schedule, at.times, matrices)


def dpm_2(schedule: Schedule, times, stages: str = 'log_snr', lower_order_final: bool = True) -> Plan:
    """DPM-Solver-2 (Lu et al. 2022a, algorithm 1): `singlestep` of order 2 in eps."""
    return singlestep(schedule, times, 2, 'eps', stages=stages, lower_order_final=lower_order_final)


def dpm_3(schedule: Schedule, times, stages: str = 'log_snr', lower_order_final: bool = True) -> Plan:
    """DPM-Solver-3 (Lu et al. 2022a, algorithm 2): `singlestep` of order 3 in eps."""
    return singlestep(schedule, times, 3, 'eps', stages=stages, lower_order_final=lower_order_final)


def dpmpp_2s(
    schedule: Schedule,
    times,
    method: str = 'midpoint',
    stages: str = 'log_snr',
    lower_order_final: bool = True,
) -> Plan:
    """DPM-Solver++ 2S (Lu et al. 2022b, algorithm 1): `singlestep` of order 2 in x0."""
    return singlestep(schedule, times, 2, 'x0', method, stages, lower_order_final)


def dpmpp_3s(
    schedule: Schedule,
    times,
    method: str = 'midpoint',
    stages: str = 'log_snr',
    lower_order_final: bool = True,
) -> Plan:
    """DPM-Solver++ 3S: `singlestep` of order 3 in x0."""
    return singlestep(schedule, times, 3, 'x0', method, stages, lower_order_final)
