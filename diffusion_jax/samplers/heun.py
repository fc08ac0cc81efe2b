"""Heun's method and EDM's stochastic sampler (Karras et al. 2022, algorithms 1 and 2). Order 2, two calls a step."""

import math

import numpy as np

from diffusion_jax.errors import UsageError
from diffusion_jax.samplers.engine import Plan
from diffusion_jax.samplers.linear import check_choices, levels, levels_at, linear_plan
from diffusion_jax.schedules import Flow, Schedule

# y = x / scale moves at the constant rate (on eps, on x0) per unit of sigma / scale.
COORDINATES = {
    'sigma': (lambda alpha, sigma: alpha, 1.0, 0.0),
    'flow': (lambda alpha, sigma: alpha + sigma, 1.0, -1.0),
}
MOST_CHURN = math.sqrt(2.0) - 1.0


def heun(
    schedule: Schedule,
    times,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
    coordinate: str | None = None,
) -> Plan:
    """Heun's method through `times`, decreasing [N + 1]: 2 N calls, or 2 N - 1 where the last step goes to the data.

    A step to zero noise, and one from zero signal in the coordinate 'sigma', is Euler's, of one call.

    Args:
      churn: S_churn of the paper, 0 or more: before a step at sigma / alpha between `churn_min` and `churn_max`, noise
        raises it by the factor 1 + min(churn / N, sqrt(2) - 1), though not beyond the schedule's noisiest level. The
        first step has none: it starts from noise already.
      churn_noise: S_noise, the standard deviation of that noise.
      coordinate: what the trapezoid is uniform in. 'sigma': x / alpha over sigma / alpha, the paper's; 'flow':
        x / (alpha + sigma) over sigma / (alpha + sigma), which on a rectified flow is x over t, and is finite at zero
        signal. None: 'flow' for `schedules.Flow`, else 'sigma'.
    """
    if coordinate is None:
        coordinate = 'flow' if isinstance(schedule, Flow) else 'sigma'
    check_choices('heun', coordinate=(coordinate, COORDINATES))
    if not (churn >= 0 and 0 <= churn_min <= churn_max and churn_noise >= 0):
        raise UsageError(
            'heun needs churn >= 0, 0 <= churn_min <= churn_max and churn_noise >= 0, got '
            f'{churn}, {churn_min}, {churn_max} and {churn_noise}.'
        )
    scale_of, rate_eps, rate_x0 = COORDINATES[coordinate]
    grid = levels(schedule, times)
    num = grid.num_steps
    x, base, slope, x0 = np.eye(4)
    gamma = min(churn / num, MOST_CHURN)
    matrices, call_times, noise = [], [], []
    # Level i of `churned` is level i of the grid after the churn, which multiplies x by `factor` and adds noise.
    with np.errstate(over='ignore'):
        ratio = np.exp(-grid.lam)
    churns = (churn_min <= ratio) & (ratio <= churn_max) & np.isfinite(ratio) & (grid.sigma > 0) & (gamma > 0)
    churns[[0, -1]] = False
    times = grid.times.copy()
    times[churns] = np.maximum(schedule.time_of_log_snr(2 * (grid.lam[churns] - math.log1p(gamma))), times[churns])
    churned = levels_at(schedule, times)
    factor = np.ones(num + 1)
    factor[churns] = churned.alpha[churns] / grid.alpha[churns]
    added = churn_noise * np.sqrt(np.maximum(churned.sigma**2 - (factor * grid.sigma) ** 2, 0.0)) * churns

    def rate(level, i):
        """dy of one unit of sigma / scale, from a call at level i."""
        return rate_eps * level.eps(i, x, x0) + rate_x0 * x0

    for i in range(num):
        scale_t, scale_s = (scale_of(g.alpha[j], g.sigma[j]) for g, j in ((churned, i), (grid, i + 1)))
        call_times.append(churned.times[i])
        if scale_t == 0 or grid.sigma[i + 1] == 0:
            end = grid.sigma[i + 1] * churned.eps(i, x, x0) + grid.alpha[i + 1] * x0
            matrices.append([factor[i + 1] * end, base, slope])
        else:
            span = grid.sigma[i + 1] / scale_s - churned.sigma[i] / scale_t
            d = rate(churned, i)
            matrices.append([scale_s * (x / scale_t + span * d), x / scale_t, d])
            noise.append(0.0)
            end = scale_s * (base + span * (slope + rate(grid, i + 1)) / 2)
            matrices.append([factor[i + 1] * end, base, slope])
            call_times.append(grid.times[i + 1])
        noise.append(added[i + 1])
    return linear_plan(schedule, np.append(call_times, grid.times[-1]), matrices, np.array(noise) if gamma else None)


def edm(
    schedule: Schedule,
    times,
    churn: float = 40.0,
    churn_min: float = 0.05,
    churn_max: float = 50.0,
    churn_noise: float = 1.003,
) -> Plan:
    """EDM's stochastic sampler: `heun` with the churn of the paper's ImageNet-64 results (table 5)."""
    return heun(schedule, times, churn, churn_min, churn_max, churn_noise, 'sigma')
