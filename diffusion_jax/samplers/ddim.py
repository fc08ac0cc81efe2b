"""DDIM (Song, Meng & Ermon 2021)."""

import jax

from diffusion_jax.errors import UsageError
from diffusion_jax.process import posterior_coefficients
from diffusion_jax.samplers.engine import Plan
from diffusion_jax.samplers.grids import check_grid
from diffusion_jax.samplers.linear import linear_plan
from diffusion_jax.schedules import Schedule, namespace


def ddim(schedule: Schedule, times, eta: float = 0.0) -> Plan:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z (eq. 12) through `times`, decreasing [N + 1].

    Args:
      eta: in [0, 1]; 0 is deterministic, 1 adds the noise of DDPM's posterior (eq. 16). May be traced.
    """
    if not isinstance(eta, jax.core.Tracer) and not 0 <= eta <= 1:
        raise UsageError(f'eta of ddim must be in [0, 1], got {eta}: 0 is deterministic, 1 is ancestral.')
    times = check_grid(times)
    t, s = times[:-1], times[1:]
    std = eta * posterior_coefficients(schedule, s, t)[2]
    xp = namespace(std)
    # std <= sigma_s: rounding alone could make the difference negative.
    on_eps = xp.sqrt(xp.maximum(schedule.sigma(s) ** 2 - std**2, 0.0))
    on_x = on_eps / schedule.sigma(t)
    on_x0 = schedule.alpha(s) - on_x * schedule.alpha(t)
    return linear_plan(schedule, times, xp.stack([on_x, on_x0], axis=-1)[:, None, :], std)
