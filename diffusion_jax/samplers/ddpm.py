"""DDPM's ancestral sampling (Ho, Jain & Abbeel 2020, algorithm 2), on any sub-sequence of the chain."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import UsageError
from diffusion_jax.process import posterior_coefficients, transition
from diffusion_jax.registry import unknown
from diffusion_jax.samplers.engine import Carry, Plan, make_plan
from diffusion_jax.samplers.grids import check_grid
from diffusion_jax.samplers.linear import linear_plan
from diffusion_jax.schedules import Schedule, namespace

VARIANCES = ('small', 'large', 'learned')


@dataclasses.dataclass(frozen=True)
class LearnedVariance:
    """x_s = a x0 + b x_t + std z, with log std^2 where the network puts it between its two extremes."""

    def empty_memory(self, x):
        return ()

    def step(self, carry: Carry, t, c, denoiser, noise):
        prediction = denoiser(carry.x, t)
        fraction = prediction.variance_fraction
        if fraction is None:
            raise UsageError(
                "variance='learned' needs a network that learned it (ModelDenoiser(learned_variance=True)); "
                "take 'small' or 'large'."
            )
        log_std = fraction * c['log_large'] + (1 - fraction) * c['log_small']
        x0 = prediction.x0
        return Carry(c['x0'] * x0 + c['x_t'] * carry.x + c['noise'] * jnp.exp(log_std) * noise()), x0


def ddpm(schedule: Schedule, times, variance: str = 'large') -> Plan:
    """x_s = a x0 + b x_t + std z, (a, b) those of q(x_s | x_t, x0), through `times`, decreasing [N + 1].

    Args:
      variance: 'large' is beta_t, right for data ~ N(0, I) and what DDPM's CIFAR-10 results use; 'small' is the
        posterior's beta-tilde_t, right for a single point (section 3.2); 'learned' is where the network puts it between
        the two, in logarithms (Nichol & Dhariwal 2021, eq. 15). On a sub-sequence all are those of the strided chain.
        No noise is added by a step to t = 0.
    """
    if variance not in VARIANCES:
        raise unknown('variance of ddpm', variance, VARIANCES)
    times = check_grid(times)
    xp = namespace(times)
    t, s = times[:-1], times[1:]
    a, b, small = posterior_coefficients(schedule, s, t)
    large = transition(schedule, s, t)[1]
    if variance != 'learned':
        std = xp.where(s > 0, small if variance == 'small' else large, 0.0)
        return linear_plan(schedule, times, xp.stack([b, a], axis=-1)[:, None, :], std)
    with np.errstate(divide='ignore'):
        log_small = xp.where(s > 0, xp.log(small), 0.0)
    coefficients = {
        'x0': a,
        'x_t': b,
        'log_small': log_small,
        'log_large': xp.log(large),
        'noise': xp.where(s > 0, 1.0, 0.0),
    }
    return make_plan(LearnedVariance(), coefficients, schedule, times)
