"""The linear multistep method in sigma / alpha, as k-diffusion has it (Katherine Crowson; see Karras et al. 2022)."""

import numpy as np
from numpy.polynomial import Polynomial

from diffusion_jax.samplers.engine import Plan
from diffusion_jax.samplers.linear import check_order, levels, linear_plan
from diffusion_jax.schedules import Schedule


def lms(schedule: Schedule, times, order: int = 4) -> Plan:
    """Adams-Bashforth on the grid's own spacing through `times`, decreasing [N + 1].

    In x / alpha the probability-flow ODE is dx = eps d(sigma / alpha): the polynomial through eps at the last `order`
    calls is integrated exactly. No weight is lowered at the end, as sigma = 0 is a point like others here.

    Args:
      order: 1 (Euler) to 4.
    """
    check_order('lms', order, 4)
    grid = levels(schedule, times)
    with np.errstate(over='ignore'):
        ratio = np.exp(-grid.lam)  # sigma / alpha, 0 at the data
    x, *previous, x0 = np.eye(1 + order)
    matrices = []
    for i in range(grid.num_steps):
        outputs = [grid.eps(i, x, x0), *previous]
        if not np.isfinite(ratio[i]):
            update = grid.alpha[i + 1] * x0 + grid.sigma[i + 1] * outputs[0]
        else:
            nodes = [i - k for k in range(min(order, i + 1)) if np.isfinite(ratio[i - k])]
            update = grid.alpha[i + 1] / grid.alpha[i] * x
            for k, node in enumerate(nodes):
                others = ratio[[other for other in nodes if other != node]]
                # Around the step's start: far from it, the powers of sigma would cancel.
                basis = Polynomial([1.0])
                for other in others:
                    basis *= Polynomial([ratio[i] - other, 1.0]) / (ratio[node] - other)
                integral = basis.integ()
                update = update + grid.alpha[i + 1] * integral(ratio[i + 1] - ratio[i]) * outputs[k]
        matrices.append([update, *outputs[: order - 1]])
    return linear_plan(schedule, grid.times, matrices)
