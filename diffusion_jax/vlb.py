"""The variational bound of a discrete chain, term by term: -log p(x_0) <= prior term + sum over i of the terms.

A term is KL(q(x_{i-1} | x_i, x_0) || p(x_{i-1} | x_i)) for the indices i = 1 .. T-1 of the chain, and the decoder's
-log p(x_0 | x_i) at i = 0 (Ho et al. 2020, eq. 5). All are means over the dimensions, in nats per dimension: divided by
log 2 they are bits per dimension.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float

from diffusion_jax.errors import UsageError
from diffusion_jax.process import Prediction, Times, expand, posterior_coefficients, transition
from diffusion_jax.registry import lookup, unknown
from diffusion_jax.schedules import Schedule

VARIANCES = ('small', 'large', 'learned')
HALF_BIN = 1 / 255
"""Half the distance of two of the 256 levels of [-1, 1]."""
EDGE = 0.999  # of x0: beyond it are the first and the last level


def _in_bin(x0, below, between, above):
    return jnp.where(x0 < -EDGE, below, jnp.where(x0 > EDGE, above, between))


def _exact(x0, mean, log_std):
    scale = jnp.exp(-log_std)
    centre, half = scale * (x0 - mean), scale * HALF_BIN
    # A bin above the mean is mirrored: in the lower tail the logarithm keeps its precision.
    high = log_ndtr(half - jnp.abs(centre))
    width = high - log_ndtr(-half - jnp.abs(centre))
    between = high + jnp.log(-jnp.expm1(-jnp.maximum(width, jnp.finfo(width.dtype).tiny)))
    return -_in_bin(x0, log_ndtr(centre + half), between, log_ndtr(half - centre))


def _tanh(x0, mean, log_std):
    def cdf(x):
        return 0.5 * (1.0 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def log(probability):
        return jnp.log(jnp.maximum(probability, 1e-12))

    scale = jnp.exp(-log_std)
    upper, lower = cdf(scale * (x0 - mean + HALF_BIN)), cdf(scale * (x0 - mean - HALF_BIN))
    return -_in_bin(x0, log(upper), log(upper - lower), log(1.0 - lower))


def _gaussian(x0, mean, log_std):
    return 0.5 * (jnp.exp(-log_std) * (x0 - mean)) ** 2 + log_std + 0.5 * math.log(2 * math.pi)


DECODERS: dict[str, Callable[..., Float[Array, '...']]] = {'exact': _exact, 'tanh': _tanh, 'gaussian': _gaussian}
"""(x0, mean, log_std) -> -log p(x0) of each element, in nats.

'exact' is the probability that N(mean, std^2) gives to the level of x0 among 256 in [-1, 1], the outermost reaching to
infinity (Ho et al. 2020, eq. 13). 'tanh' is the same with the published code's approximation of the normal
distribution function, and its floor of 1e-12 under a probability: for comparison with published numbers. 'gaussian' is
the density, for data that are not quantised.
"""


class _Chain(NamedTuple):
    """[T], float64: q(x_{i-1} | x_i, x_0) and the variances that p(x_{i-1} | x_i) may have."""

    gain: np.ndarray  # |difference of the means|^2 / small variance = gain |x0 - predicted x0|^2
    log_small: np.ndarray
    log_ratio: np.ndarray  # log(large / small)


def check_chain(schedule: Schedule) -> None:
    """A `UsageError` for a continuous schedule."""
    if schedule.num_timesteps is None:
        raise UsageError('the variational bound is one of a discrete chain: give the schedule a num_timesteps.')


def _chain(schedule: Schedule) -> _Chain:
    check_chain(schedule)
    length = schedule.num_timesteps
    grid = np.arange(length + 1) / length
    s, t = grid[:-1], grid[1:]
    on_x0, _, small = posterior_coefficients(schedule, s, t)
    log_large = 2 * np.log(transition(schedule, s, t)[1])
    # The posterior of the last step to the data has no variance; that of the step before stands for it, as published.
    small[0] = small[1] if length > 1 else np.exp(0.5 * log_large[0])
    return _Chain((on_x0 / small) ** 2, 2 * np.log(small), log_large - 2 * np.log(small))


def term(
    prediction: Prediction,
    schedule: Schedule,
    x0: Float[Array, 'B ...'],
    t: Times,
    *,
    variance: str = 'small',
    decoder: str = 'exact',
) -> Float[Array, 'B']:
    """The bound's term at each sample's t, in nats per dimension.

    The mean of p(x_{i-1} | x_i) is that of the posterior with the predicted x0 (Ho et al. 2020, eq. 7).

    Args:
      prediction: the denoiser's at x_t, a draw of q(x_t | x_0).
      schedule: a chain of T steps.
      x0: in [-1, 1], with 256 levels unless the decoder is 'gaussian'.
      t: scalar or [B], times (i + 1) / T of the chain; i = 0 gives the decoder's term.
      variance: of p. 'small' is the posterior's beta-tilde_i, 'large' is beta_i, both that of 'small' at i = 1 where
        i = 0 (section 3.2 and the published code); 'learned' is between beta-tilde_i and beta_i in logarithms, as
        `prediction.variance_fraction` says (Nichol & Dhariwal 2021, eq. 15).
      decoder: one of `DECODERS`.

    Raises:
      UsageError: for a continuous schedule, an unknown name, or 'learned' without a learned variance.
    """
    if variance not in VARIANCES:
        raise unknown('variance', variance, VARIANCES)
    nll = lookup('decoder', DECODERS, decoder)
    chain = _chain(schedule)
    t = jnp.broadcast_to(jnp.asarray(t), x0.shape[:1])
    index = jnp.clip(jnp.round(t * schedule.num_timesteps).astype(int) - 1, 0, schedule.num_timesteps - 1)
    gain, log_small, log_ratio = (expand(jnp.asarray(table, x0.dtype)[index], x0) for table in chain)
    match variance:
        case 'small':
            above_small = jnp.zeros_like(log_ratio)
        case 'large':
            above_small = jnp.where(expand(index, x0) == 0, 0.0, log_ratio)
        case 'learned':
            if prediction.variance_fraction is None:
                raise UsageError(
                    "variance='learned' needs a network that learned it (ModelDenoiser(learned_variance=True)); "
                    "take 'small' or 'large'."
                )
            above_small = prediction.variance_fraction * log_ratio
    mean = prediction.x0
    kl = 0.5 * (above_small + jnp.expm1(-above_small) + jnp.exp(-above_small) * gain * jnp.square(x0 - mean))
    each = jnp.where(expand(index, x0) == 0, nll(x0, mean, 0.5 * (log_small + above_small)), kl)
    return jnp.mean(each, axis=tuple(range(1, x0.ndim)))


def prior_term(schedule: Schedule, x0: Float[Array, 'B ...']) -> Float[Array, 'B']:
    """KL(q(x_T | x_0) || N(0, I)), what the data still say at the chain's end, in nats per dimension."""
    check_chain(schedule)
    variance = schedule.sigma(1.0) ** 2
    constant = 0.5 * (variance - 1 - np.log(variance))
    return float(constant) + 0.5 * float(schedule.alpha(1.0)) ** 2 * jnp.mean(x0**2, axis=tuple(range(1, x0.ndim)))
