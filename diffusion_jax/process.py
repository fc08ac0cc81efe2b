"""The forward process in closed form, its posterior, and what a prediction of a network means.

Arrays x, x0, eps are [B, ...]; times are scalars or [B], in [0, 1].
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from diffusion_jax.schedules import Chain, Schedule, namespace

Times = Float[Array, ''] | Float[Array, 'B'] | float


def expand(coefficient, x: Float[Array, 'B ...']):
    """A scalar as it is, a [B] as [B, 1, .. 1], to multiply x."""
    shape = jnp.shape(coefficient)
    return coefficient if shape == () else jnp.reshape(coefficient, shape + (1,) * (jnp.ndim(x) - len(shape)))


def divide_or_zero(numerator, denominator):
    """numerator / denominator, and 0 where the denominator is 0, with finite derivatives there too."""
    zero = denominator == 0
    return jnp.where(zero, 0.0, numerator / jnp.where(zero, 1.0, denominator))


def transition(schedule: Schedule, s: Times, t: Times):
    """(alpha_{t|s}, sigma_{t|s}) of q(x_t | x_s) = N(alpha_{t|s} x_s, sigma_{t|s}^2 I), 0 <= s < t <= 1."""
    xp = namespace(s, t)
    ratio = schedule.alpha(t) / schedule.alpha(s)
    return ratio, schedule.sigma(t) * xp.sqrt(-xp.expm1(schedule.log_snr(t) - schedule.log_snr(s)))


def posterior_coefficients(schedule: Schedule, s: Times, t: Times):
    """(a, b, std) of q(x_s | x_t, x_0) = N(a x_0 + b x_t, std^2 I), 0 <= s < t <= 1 (Ho et al. 2020, eq. 6-7)."""
    xp = namespace(s, t)
    lost = -xp.expm1(schedule.log_snr(t) - schedule.log_snr(s))
    ratio = schedule.alpha(t) / schedule.alpha(s)
    on_x_t = ratio * (schedule.sigma(s) / schedule.sigma(t)) ** 2
    return schedule.alpha(s) * lost, on_x_t, schedule.sigma(s) * xp.sqrt(lost)


def q_sample(schedule: Schedule, x0: Float[Array, 'B ...'], t: Times, eps: Float[Array, 'B ...']):
    """x_t = alpha(t) x_0 + sigma(t) eps: a draw of q(x_t | x_0) in one jump, for eps ~ N(0, I)."""
    t = jnp.asarray(t)
    return expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * eps


def q_step(schedule: Schedule, x_s: Float[Array, 'B ...'], s: Times, t: Times, eps: Float[Array, 'B ...']):
    """A draw of q(x_t | x_s), s < t, for eps ~ N(0, I): one step of the chain when s and t are neighbours on it."""
    alpha, sigma = transition(schedule, jnp.asarray(s), jnp.asarray(t))
    return expand(alpha, x_s) * x_s + expand(sigma, x_s) * eps


def q_chain(
    schedule: Schedule, x0: Float[Array, 'B ...'], key: PRNGKeyArray, num_steps: int
) -> Float[Array, 'T+1 B ...']:
    """The chain x_0, x_{1/T}, .. x_1 of T = `num_steps` steps, each made of the one before by `q_step`.

    Step i, from i / T to (i + 1) / T, draws its noise of (key, i). Entry i is distributed as `q_sample` at t = i / T.
    """
    x0 = jnp.asarray(x0)

    def step(x, i):
        eps = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        x = q_step(schedule, x, i / num_steps, (i + 1) / num_steps, eps)
        return x, x

    _, rest = jax.lax.scan(step, x0, jnp.arange(num_steps))
    return jnp.concatenate([x0[None], rest])


def chain_betas(schedule: Schedule, num_steps: int) -> Float[np.ndarray, 'T']:
    """The variance that each of T neighbouring steps adds, sigma_{t|s}^2, float64: the betas of a chain of T steps.

    A step that begins at the data, or ends in no signal, counts in full.
    """
    times = np.arange(num_steps + 1) / num_steps
    if isinstance(schedule, Chain) and schedule.num_timesteps == num_steps:
        return schedule.betas
    with np.errstate(divide='ignore', invalid='ignore'):
        _, sigma = transition(schedule, times[:-1], times[1:])
    return np.square(sigma)


class Gaussian(NamedTuple):
    """A normal distribution with independent components. `variance` broadcasts to `mean`."""

    mean: Float[Array, 'B ...']
    variance: Float[Array, '...']


def q_posterior(schedule: Schedule, x0: Float[Array, 'B ...'], x_t: Float[Array, 'B ...'], s: Times, t: Times):
    """q(x_s | x_t, x_0) for s < t, with its true variance (Ho et al. 2020, eq. 6-7)."""
    on_x0, on_x_t, std = posterior_coefficients(schedule, jnp.asarray(s), jnp.asarray(t))
    return Gaussian(expand(on_x0, x0) * x0 + expand(on_x_t, x_t) * x_t, expand(std**2, x0))


PREDICTIONS = ('eps', 'x0', 'v', 'score', 'flow')
"""What a network can predict: noise, data, v = (alpha eps - sigma x_0) / sqrt(alpha^2 + sigma^2) (Salimans & Ho 2022,
where the root is 1), the score of q(x_t), the velocity eps - x_0 of a rectified flow (Liu et al. 2022)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prediction:
    """A denoiser's answer at x_t, readable as any of `PREDICTIONS`, whichever of them the network gave.

    All are affine in one another given x_t = alpha x0 + sigma eps. What x_t says nothing about (eps at sigma = 0,
    x0 at alpha = 0) reads as 0 when it was not itself predicted.

    Attributes:
      value: [B, ...], what the network predicted.
      kind: which of `PREDICTIONS` it is.
      x_t: [B, ...].
      alpha, sigma: scalars or [B, 1, .. 1].
      variance_fraction: [B, ...], where a learned variance lies between the two of `samplers.ddpm`: 0 at the small, 1
        at the large one, in logarithms (Nichol & Dhariwal 2021, eq. 15). None if it is not learned.
    """

    value: Float[Array, 'B ...']
    kind: str = dataclasses.field(metadata={'static': True})
    x_t: Float[Array, 'B ...']
    alpha: Float[Array, '...']
    sigma: Float[Array, '...']
    variance_fraction: Float[Array, 'B ...'] | None = None

    @property
    def norm(self) -> Float[Array, '...']:
        """sqrt(alpha^2 + sigma^2): 1 for variance-preserving schedules."""
        return jnp.sqrt(self.alpha**2 + self.sigma**2)

    @property
    def eps(self) -> Float[Array, 'B ...']:
        match self.kind:
            case 'eps':
                return self.value
            case 'score':
                return -self.sigma * self.value
            case 'v':
                return (self.sigma * self.x_t + self.alpha * self.norm * self.value) / self.norm**2
            case 'flow':
                return (self.x_t + self.alpha * self.value) / (self.alpha + self.sigma)
        return divide_or_zero(self.x_t - self.alpha * self.value, self.sigma)

    @property
    def x0(self) -> Float[Array, 'B ...']:
        match self.kind:
            case 'x0':
                return self.value
            case 'v':
                return (self.alpha * self.x_t - self.sigma * self.norm * self.value) / self.norm**2
            case 'flow':
                return (self.x_t - self.sigma * self.value) / (self.alpha + self.sigma)
        return divide_or_zero(self.x_t - self.sigma * self.eps, self.alpha)

    @property
    def v(self) -> Float[Array, 'B ...']:
        return self.value if self.kind == 'v' else (self.alpha * self.eps - self.sigma * self.x0) / self.norm

    @property
    def score(self) -> Float[Array, 'B ...']:
        return self.value if self.kind == 'score' else divide_or_zero(-self.eps, self.sigma)

    @property
    def flow(self) -> Float[Array, 'B ...']:
        return self.value if self.kind == 'flow' else self.eps - self.x0

    def read(self, kind: str) -> Float[Array, 'B ...']:
        """The field of that name, one of `PREDICTIONS`."""
        return getattr(self, kind)
