"""Euler's method in sigma / alpha, and its ancestral form, as k-diffusion names them (Karras et al. 2022, algorithm 1).

In x / alpha the probability-flow ODE is dx = eps d(sigma / alpha), and Euler's step of it is DDIM's, on every schedule;
on a rectified flow it is also Euler's step in t. The ancestral form splits a step into one down to a smaller sigma and
fresh noise up again, which is DDIM with eta = 1. Both names are kept because users look for them.
"""

from diffusion_jax.samplers.ddim import ddim
from diffusion_jax.samplers.engine import Plan
from diffusion_jax.schedules import Schedule


def euler(schedule: Schedule, times) -> Plan:
    """Euler's method through `times`, decreasing [N + 1]: DDIM without noise."""
    return ddim(schedule, times, eta=0.0)


def euler_ancestral(schedule: Schedule, times, eta: float = 1.0) -> Plan:
    """Euler's ancestral method through `times`, decreasing [N + 1]: DDIM with noise; eta is in [0, 1]."""
    return ddim(schedule, times, eta=eta)
