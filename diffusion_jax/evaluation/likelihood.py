"""How probable a model holds given data to be, in bits per dimension: less is better.

`vlb_bits_per_dim` bounds it, for the discrete chain that DDPM samples; `ode_bits_per_dim` computes it, for the
probability-flow ODE that DDIM and its kin sample.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from diffusion_jax import vlb
from diffusion_jax.denoisers import Denoiser, Stateful
from diffusion_jax.errors import UsageError
from diffusion_jax.process import q_sample
from diffusion_jax.registry import unknown
from diffusion_jax.schedules import Schedule

DIVERGENCES = ('hutchinson', 'exact')
LOG_SNR_MIN = -20.0
"""Where the ODE ends on a continuous schedule that ends in pure noise: alpha / sigma is 4.5e-5 there."""

DEQUANTIZED_BITS = math.log2(127.5)
"""What an image of 256 levels adds to the bits per dimension of its `dequantize`d self: a level is 1 / 127.5 wide."""


class Bound(NamedTuple):
    """An upper bound of the negative log-likelihood, in bits per dimension.

    Attributes:
      total: [B], the sum of the rest.
      terms: [B, T], of the indices 0 (the decoder's) to T - 1 of the chain.
      prior: [B].
    """

    total: Float[Array, 'B']
    terms: Float[Array, 'B T']
    prior: Float[Array, 'B']


def _check(denoiser: Denoiser) -> None:
    if isinstance(denoiser, Stateful):
        raise UsageError('a denoiser that remembers earlier calls has no likelihood: take the plain one.')


def vlb_bits_per_dim(
    denoiser: Denoiser,
    schedule: Schedule,
    x0: Float[Array, 'B ...'],
    key: PRNGKeyArray,
    *,
    variance: str = 'small',
    decoder: str = 'exact',
) -> Bound:
    """The variational bound on -log p(x0): all T terms, each at one draw of x_t, and the prior's.

    It is unbiased, and differs from key to key; the noise of index i is drawn from fold_in(key, i). One model call an
    index, in one scan.

    Args:
      denoiser: clip its x0 (`denoisers.clip_x0`) to bound what a clipping sampler draws, as published numbers do.
      schedule: a chain of T steps.
      x0: in [-1, 1], with 256 levels unless the decoder is 'gaussian'.
      variance, decoder: as in `vlb.term`.

    Raises:
      UsageError: for a continuous schedule, an unknown name, or 'learned' without a learned variance.
    """
    _check(denoiser)
    vlb.check_chain(schedule)

    def one(_, index):
        t = ((index + 1) / schedule.num_timesteps).astype(x0.dtype)
        eps = jax.random.normal(jax.random.fold_in(key, index), x0.shape, x0.dtype)
        prediction = denoiser(q_sample(schedule, x0, t, eps), t)
        return None, vlb.term(prediction, schedule, x0, t, variance=variance, decoder=decoder)

    _, nats = jax.lax.scan(one, None, jnp.arange(schedule.num_timesteps))
    terms, prior = nats.T / math.log(2), vlb.prior_term(schedule, x0) / math.log(2)
    return Bound(prior + jnp.sum(terms, axis=1), terms, prior)


def _ends(schedule: Schedule, t_min: float | None) -> tuple[float, float]:
    """log-SNR where the ODE begins and where it ends, both finite."""
    t_min = schedule.t_min if t_min is None else t_min
    if not 0 < t_min < 1:
        raise UsageError(f't_min must be in (0, 1), got {t_min}: at 0 the data may have no density.')
    last = float(schedule.log_snr(1.0))
    if not math.isfinite(last):
        # In the last step of a chain to zero SNR there is nothing between its ends to integrate over.
        last = (
            LOG_SNR_MIN if schedule.num_timesteps is None else float(schedule.log_snr(1 - 1 / schedule.num_timesteps))
        )
    return float(schedule.log_snr(t_min)), last


def ode_bits_per_dim(
    denoiser: Denoiser,
    schedule: Schedule,
    x0: Float[Array, 'B ...'],
    key: PRNGKeyArray,
    *,
    steps: int,
    divergence: str = 'hutchinson',
    probes: int = 1,
    t_min: float | None = None,
) -> Float[Array, 'B']:
    """-log2 of the density of x0 per dimension, by the probability-flow ODE (Song et al. 2021, eq. 39-40).

    In the coordinate y = x / (alpha + sigma) with tau = sigma / (alpha + sigma), the ODE of every schedule is
    dy/dtau = eps - x0 (`Prediction.flow`), and d log p(y)/dtau is minus its divergence. Classical Runge-Kutta of order
    four takes `steps` steps, uniform in log-SNR, each of four model calls.

    The ODE begins at `t_min`, at x = alpha x0: what is measured is the density of the data blurred by
    sigma / alpha (t_min), which tends to that of the data themselves where they have one. It ends at t = 1, or at
    log-SNR -20 on a continuous schedule without signal there, or one step before the end of such a chain; there the
    density is N(0, prior_std^2 I), which samplers start from.

    For images of 256 levels pass `dequantize(x0, key)` and add `DEQUANTIZED_BITS`: on average over the noise that
    bounds the image's bits per dimension from above (Theis et al. 2016, eq. 10-13).

    Args:
      denoiser: of samples that do not mix, at any t in [t_min, 1] (between a chain's, too).
      schedule: any.
      x0: continuous data.
      key: of the probes.
      divergence: 'exact' takes D derivatives a model call, for data of D dimensions; 'hutchinson' is unbiased, v^T J v
        for random signs v, the same v all along the path (eq. 40).
      probes: how many v a sample, for 'hutchinson'.
      t_min: `schedule.t_min` by default.

    Returns:
      [B].

    Raises:
      UsageError: for options out of range.
    """
    _check(denoiser)
    if divergence not in DIVERGENCES:
        raise unknown('divergence', divergence, DIVERGENCES)
    if steps < 1 or probes < 1:
        raise UsageError(f'steps and probes must be at least 1, got {steps} and {probes}.')
    if divergence == 'exact' and probes != 1:
        raise UsageError(f"probes={probes} are of divergence='hutchinson'; 'exact' has none.")
    shape, dtype = x0.shape, x0.dtype
    dimensions = math.prod(shape[1:])

    # --- the grid, float64 on the host: tau at the ends of each step and in their middle -------------------------
    ends = 1 / (1 + np.exp(0.5 * np.linspace(*_ends(schedule, t_min), steps + 1)))
    tau = np.stack([ends[:-1], 0.5 * (ends[:-1] + ends[1:]), ends[1:]], axis=1)
    t = schedule.time_of_log_snr(2 * (np.log1p(-tau) - np.log(tau)))
    total = schedule.alpha(t) + schedule.sigma(t)
    grid = {'t': t, 'total': total, 'h': np.diff(ends)}
    grid = {name: jnp.asarray(value, dtype) for name, value in grid.items()}

    # --- directions, [P, B, ...], along which the derivatives are taken ------------------------------------------
    if divergence == 'exact':
        directions = jnp.broadcast_to(jnp.eye(dimensions, dtype=dtype)[:, None], (dimensions, shape[0], dimensions))
        directions = directions.reshape(dimensions, *shape)
    else:
        directions = jax.random.rademacher(key, (probes, *shape), dtype)

    def velocity(y, t, total):
        value, derivative = jax.linearize(lambda y: denoiser(total * y, t).flow, y)

        def along(v):
            return jnp.sum((v * derivative(v)).reshape(shape[0], -1), axis=1)

        return value, jnp.sum(jax.lax.map(along, directions), axis=0) / (1 if divergence == 'exact' else probes)

    def step(carry, c):
        y, integral = carry
        k1, d1 = velocity(y, c['t'][0], c['total'][0])
        k2, d2 = velocity(y + 0.5 * c['h'] * k1, c['t'][1], c['total'][1])
        k3, d3 = velocity(y + 0.5 * c['h'] * k2, c['t'][1], c['total'][1])
        k4, d4 = velocity(y + c['h'] * k3, c['t'][2], c['total'][2])
        y = y + c['h'] / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return (y, integral + c['h'] / 6 * (d1 + 2 * d2 + 2 * d3 + d4)), None

    start = (x0 * (1 - tau[0, 0]).astype(dtype), jnp.zeros(shape[0], dtype))
    (y, integral), _ = jax.lax.scan(step, start, grid)

    # --- from the density at the end to that of x0; y = (1 - tau) x0 at the beginning ----------------------------
    prior_std = float(schedule.prior_std(t[-1, 2]) / total[-1, 2])
    constant = 0.5 * math.log(2 * math.pi) + math.log(prior_std) - math.log1p(-tau[0, 0])
    log_density = -0.5 * jnp.sum((y / prior_std).reshape(shape[0], -1) ** 2, axis=1) + integral
    return (constant - log_density / dimensions) / math.log(2)


def dequantize(x0: Float[Array, 'B ...'], key: PRNGKeyArray) -> Float[Array, 'B ...']:
    """Images of 256 levels in [-1, 1] with noise as wide as a level added, uniform in [-1/255, 1/255]."""
    return x0 + jax.random.uniform(key, x0.shape, x0.dtype, -vlb.HALF_BIN, vlb.HALF_BIN)
