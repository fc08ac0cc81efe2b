"""UniPC (Zhao et al. 2023): a multistep predictor, and a corrector that uses the same call. One call a step."""

import math

import numpy as np

from diffusion_jax.samplers.dpm_solver import FORMS, Exponential, integral
from diffusion_jax.samplers.engine import Plan
from diffusion_jax.samplers.linear import check_choices, check_order, levels, linear_plan, multistep_orders
from diffusion_jax.schedules import Schedule

VARIANTS = ('bh1', 'bh2')


def _weights(step: Exponential, points: list[float], variant: str) -> np.ndarray:
    """Of the differences (f(point) - f(0)) / point, with points in units of h (theorem 3.1 and algorithm 1)."""
    num = len(points)
    # Of one point the paper takes 1/2, which the equations below tend to.
    if num == 1:
        return np.array([0.5]) * _b(step, variant)
    hh = -step.exponent
    phi = np.expm1(hh) / hh - 1
    right, factorial = [], 1
    for k in range(1, num + 1):
        factorial *= k
        right.append(phi * factorial)
        phi = phi / hh - 1 / (factorial * (k + 1))
    return np.linalg.solve(np.vander(points, increasing=True).T, right)


def _b(step: Exponential, variant: str) -> float:
    return -step.exponent if variant == 'bh1' else math.expm1(-step.exponent)


def unipc(
    schedule: Schedule,
    times,
    order: int = 2,
    form: str = 'x0',
    variant: str = 'bh2',
    corrector: bool = True,
    lower_order_final: bool = True,
) -> Plan:
    """UniPC-p through `times`, decreasing [N + 1]: order p + 1 with the corrector, p without (UniP).

    Args:
      order: p, 1 to 3.
      form: what is integrated, 'x0' (as in DPM-Solver++) or 'eps'.
      variant: B(h) of the paper, which matters where there is one difference only: 'bh1' is h, 'bh2' is e^h - 1.
      corrector: refine each x with the call that was made at it.
      lower_order_final: end with orders .., 2, 1.
    """
    check_order('unipc', order, 3)
    check_choices('unipc', form=(form, FORMS), variant=(variant, VARIANTS))
    grid = levels(schedule, times)
    # `base`: the last corrected x; previous[0]: the output of the last call.
    x, base, *previous, x0 = np.eye(3 + order)
    orders = multistep_orders(grid.lam, order, lower_order_final)

    def update(i, x, values, points):
        """x at level i + 1 from x at i, values[0] = f there, and f at the points, in units of that step."""
        step = integral(grid, i, i + 1, form)
        result = step.decay * x + step.first * (values[0] if step.form == form else x0)
        if points:
            weights = _weights(step, points, variant)
            differences = [(f - values[0]) / point for f, point in zip(values[1:], points, strict=True)]
            result = result - step.scale * sum(w * d for w, d in zip(weights, differences, strict=True))
        return result

    def back(i, start, count):
        """Levels start - 1, start - 2, .. as points of the step i -> i + 1."""
        h = grid.lam[i + 1] - grid.lam[i]
        return [(grid.lam[start - k] - grid.lam[i]) / h for k in range(1, count + 1)]

    matrices = []
    for i, current in enumerate(orders):
        # The slots hold f of earlier calls, at the x that was predicted, not corrected: as the paper's code has it.
        f = x0 if form == 'x0' else grid.eps(i, x, x0)
        here = x
        if corrector and i and np.isfinite(grid.lam[i - 1]):
            p = orders[i - 1]
            here = update(i - 1, base, [*previous[:p], f], [*back(i - 1, i - 1, p - 1), 1.0])
        ahead = update(i, here, [f, *previous[: current - 1]], back(i, i, current - 1))
        matrices.append([ahead, here, *[f, *previous][:order]])
    return linear_plan(schedule, grid.times, matrices)
