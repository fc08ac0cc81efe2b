"""DDIM (Song, Meng & Ermon 2021)."""

import jax

from diffusion_jax.errors import UsageError
from diffusion_jax.process import posterior_coefficients
from diffusion_jax.samplers.engine import Carry, Plan
from diffusion_jax.samplers.grids import check_grid
from diffusion_jax.schedules import Schedule, namespace


def step(carry: Carry, c, denoiser, noise):
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z (eq. 12)."""
    prediction = denoiser(carry.x, c['t'])
    x0 = prediction.x0
    return Carry(c['x0'] * x0 + c['eps'] * prediction.eps + c['noise'] * noise()), x0


def ddim(schedule: Schedule, times, eta: float = 0.0) -> Plan:
    """DDIM through `times`, decreasing [N + 1].

    Args:
      eta: in [0, 1]; 0 is deterministic, 1 adds the noise of DDPM's posterior (eq. 16). May be traced.
    """
    if not isinstance(eta, jax.core.Tracer) and not 0 <= eta <= 1:
        raise UsageError(f'eta of ddim must be in [0, 1], got {eta}: 0 is deterministic, 1 is ancestral.')
    times = check_grid(times)
    t, s = times[:-1], times[1:]
    std = eta * posterior_coefficients(schedule, s, t)[2]
    # std <= sigma_s: rounding alone could make the difference negative.
    direction = namespace(std).sqrt(namespace(std).maximum(schedule.sigma(s) ** 2 - std**2, 0.0))
    return Plan(step, {'t': t, 'x0': schedule.alpha(s), 'eps': direction, 'noise': std})
