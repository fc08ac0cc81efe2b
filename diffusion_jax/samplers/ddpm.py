"""DDPM's ancestral sampling (Ho, Jain & Abbeel 2020, algorithm 2), on any sub-sequence of the chain."""

from diffusion_jax.process import posterior_coefficients, transition
from diffusion_jax.registry import lookup
from diffusion_jax.samplers.engine import Carry, Plan
from diffusion_jax.samplers.grids import check_grid
from diffusion_jax.schedules import Schedule, namespace

# (schedule, s, t) -> standard deviation of the noise added on the way from t to s.
VARIANCES = {
    'small': lambda schedule, s, t: posterior_coefficients(schedule, s, t)[2],
    'large': lambda schedule, s, t: transition(schedule, s, t)[1],
}


def step(carry: Carry, c, denoiser, noise):
    """x_s = a x0 + b x_t + std z, with (a, b) those of q(x_s | x_t, x0)."""
    x0 = denoiser(carry.x, c['t']).x0
    return Carry(c['x0'] * x0 + c['x_t'] * carry.x + c['noise'] * noise()), x0


def ddpm(schedule: Schedule, times, variance: str = 'large') -> Plan:
    """The ancestral sampler through `times`, decreasing [N + 1].

    Args:
      variance: 'large' is beta_t, right for data ~ N(0, I) and what DDPM's CIFAR-10 results use; 'small' is the
        posterior's beta-tilde_t, right for a single point (section 3.2). On a sub-sequence both are those of the
        strided chain. No noise is added by a step to t = 0.
    """
    std = lookup('variance of ddpm', VARIANCES, variance)
    times = check_grid(times)
    t, s = times[:-1], times[1:]
    a, b, _ = posterior_coefficients(schedule, s, t)
    noise = namespace(times).where(s > 0, std(schedule, s, t), 0.0)
    return Plan(step, {'t': t, 'x0': a, 'x_t': b, 'noise': noise})
