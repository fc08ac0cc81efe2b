"""The training objective: what is predicted, how t is drawn, and how the error at each t is weighted.

Errors in x0, eps and v are one error up to a factor: |eps error|^2 = SNR |x0 error|^2 and, on a variance-preserving
schedule, |v error|^2 = (SNR + 1) |x0 error|^2. So a weighting is written once, as a weight on the x0 error, and holds
for every prediction; `simple` alone is defined as weight 1 on whatever is predicted.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from diffusion_jax.denoisers import Apply, ModelDenoiser
from diffusion_jax.errors import UsageError
from diffusion_jax.process import q_sample
from diffusion_jax.registry import lookup
from diffusion_jax.schedules import Schedule

LogSNR = Float[Array, 'B']

LOG_ERROR_SCALE: dict[str, Callable[[LogSNR], LogSNR]] = {
    'x0': jnp.zeros_like,
    'eps': lambda log_snr: log_snr,
    'v': lambda log_snr: jnp.logaddexp(log_snr, 0.0),
}
"""log(|error|^2 / |x0 error|^2) of each prediction that a network can be trained on."""

Weighting = Callable[[LogSNR, str], Float[Array, 'B']]
"""(log_snr, prediction) -> the weight of the squared error of that prediction."""


def simple() -> Weighting:
    """Weight 1 on the error of whatever is predicted: L_simple (Ho et al. 2020, eq. 14) when that is eps."""
    return lambda log_snr, prediction: jnp.ones_like(log_snr)


def _on_x0(log_weight: Callable[[LogSNR], LogSNR]) -> Weighting:
    return lambda log_snr, prediction: jnp.exp(log_weight(log_snr) - LOG_ERROR_SCALE[prediction](log_snr))


def min_snr(gamma: float = 5.0) -> Weighting:
    """min(SNR, gamma) on the x0 error (Hang et al. 2023): min(SNR, gamma) / SNR on eps, / (SNR + 1) on v."""
    if gamma <= 0:
        raise UsageError(f'min_snr needs gamma > 0, got {gamma}; the paper uses 5.')
    return _on_x0(lambda log_snr: jnp.minimum(log_snr, jnp.log(gamma)))


def truncated_snr() -> Weighting:
    """max(SNR, 1) on the x0 error (Salimans & Ho 2022, section 4)."""
    return _on_x0(lambda log_snr: jnp.maximum(log_snr, 0.0))


def p2(gamma: float = 1.0, k: float = 1.0) -> Weighting:
    """1 / (k + SNR)^gamma on the eps error (Choi et al. 2022, eq. 8)."""
    if k <= 0:
        raise UsageError(f'p2 needs k > 0, got {k}; the paper uses 1.')
    return _on_x0(lambda log_snr: log_snr - gamma * jnp.logaddexp(log_snr, jnp.log(k)))


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    'simple': simple,
    'min_snr': min_snr,
    'truncated_snr': truncated_snr,
    'p2': p2,
}


def uniform(key: PRNGKeyArray, batch: int) -> Float[Array, 'B']:
    """Independent uniform draws in [0, 1)."""
    return jax.random.uniform(key, (batch,))


def stratified(key: PRNGKeyArray, batch: int) -> Float[Array, 'B']:
    """Uniform draws in [0, 1), one in each of `batch` equal intervals in a random order: a loss of lower variance."""
    key_offset, key_order = jax.random.split(key)
    points = (jnp.arange(batch) + jax.random.uniform(key_offset, (batch,))) / batch
    # Rounding can carry the last point to 1.
    return jax.random.permutation(key_order, jnp.minimum(points, jnp.nextafter(jnp.float32(1), jnp.float32(0))))


TIME_SAMPLERS: dict[str, Callable[[PRNGKeyArray, int], Float[Array, 'B']]] = {
    'uniform': uniform,
    'stratified': stratified,
}

CONTINUOUS_T_MIN = 1e-5  # below it float32 no longer tells x_t from x_0 (Song et al. 2021, appendix C)


def to_times(schedule: Schedule, u: Float[Array, 'B']) -> Float[Array, 'B']:
    """Uniform draws u in [0, 1) as training times: the indices of a chain alike, or t in [1e-5, 1)."""
    if schedule.num_timesteps is None:
        return CONTINUOUS_T_MIN + (1 - CONTINUOUS_T_MIN) * u
    return (jnp.floor(u * schedule.num_timesteps) + 1) / schedule.num_timesteps


def drop_condition(key: PRNGKeyArray, labels: Int[Array, 'B'], null_label: int, probability: float) -> Int[Array, 'B']:
    """Labels of which each is replaced by the null label with that probability (Ho & Salimans 2022, algorithm 1)."""
    dropped: Bool[Array, B] = jax.random.bernoulli(key, probability, labels.shape)
    return jnp.where(dropped, null_label, labels)


Loss = Callable[..., Float[Array, 'B']]
"""loss(params, x0, key, **conditioning): `diffusion_loss` with the network, the schedule and the options fixed."""


def diffusion_loss(
    apply: Apply,
    params: Any,
    x0: Float[Array, 'B ...'],
    key: PRNGKeyArray,
    *,
    schedule: Schedule,
    prediction: str = 'eps',
    weighting: Weighting | None = None,
    time_sampler: Callable[[PRNGKeyArray, int], Float[Array, 'B']] = uniform,
    **conditioning: Any,
) -> Float[Array, 'B']:
    """The weighted squared error of each image at a random t: weight(t) * mean over its pixels of error^2.

    Args:
      apply: `apply(params, x_t, timestep, **conditioning)` -> [B, ...].
      x0: data in [-1, 1].
      key: for t and the noise.
      prediction: 'eps', 'x0' or 'v'.
      weighting: `simple()` by default.
      time_sampler: `uniform` or `stratified`.
      conditioning: goes to `apply` as it is.

    Returns:
      [B]; its mean is the training loss.
    """
    lookup('prediction to train on', LOG_ERROR_SCALE, prediction)
    key_t, key_eps = jax.random.split(key)
    t = to_times(schedule, time_sampler(key_t, x0.shape[0]))
    eps = jax.random.normal(key_eps, x0.shape, x0.dtype)
    x_t = q_sample(schedule, x0, t, eps)
    predicted = ModelDenoiser(apply, params, schedule, prediction, conditioning)(x_t, t)
    truth = {'eps': eps, 'x0': x0, 'v': predicted.alpha * eps - predicted.sigma * x0}[prediction]
    error = jnp.mean(jnp.square(predicted.value - truth), axis=tuple(range(1, x0.ndim)))
    return (weighting or simple())(schedule.log_snr(t), prediction) * error
