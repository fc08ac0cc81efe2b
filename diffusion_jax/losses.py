"""The training objective: what is predicted, how t is drawn, and how the error at each t is weighted.

Errors in x0, eps, v and the flow velocity are one error up to a factor: |eps error|^2 = SNR |x0 error|^2,
|v error|^2 = (SNR + 1) |x0 error|^2 and |flow error|^2 = (sqrt(SNR) + 1)^2 |x0 error|^2. So a weighting is written
once, as a weight on the x0 error, and holds for every prediction; `simple` alone is defined as weight 1 on whatever is
predicted.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from diffusion_jax import vlb
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
    'flow': lambda log_snr: 2.0 * jnp.logaddexp(0.5 * log_snr, 0.0),
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


def edm(sigma_data: float = 0.5) -> Weighting:
    """SNR + 1 / sigma_data^2 on the x0 error: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 where alpha = 1.

    Karras et al. 2022, table 1: the error of F in `denoisers.edm_preconditioned` then has weight 1.
    """
    if sigma_data <= 0:
        raise UsageError(f'edm needs sigma_data > 0, got {sigma_data}; the paper uses 0.5.')
    return _on_x0(lambda log_snr: jnp.logaddexp(log_snr, -2.0 * math.log(sigma_data)))


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    'simple': simple,
    'min_snr': min_snr,
    'truncated_snr': truncated_snr,
    'p2': p2,
    'edm': edm,
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


HISTORY_LENGTH = 10
UNIFORM_SHARE = 0.001


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossHistory:
    """The last losses at every index of a chain, which importance sampling of the index goes by.

    Nichol & Dhariwal 2021, section 3.3. Made by `init_history`.

    Attributes:
      values: float32 [T, 10], the last ten losses at each index, in a ring.
      counts: [T], how many losses each index has had since the start.
    """

    values: Float[Array, 'T 10']
    counts: Int[Array, 'T']


def init_history(schedule: Schedule) -> LossHistory:
    """The empty history of a chain; a `UsageError` for a continuous schedule."""
    if schedule.num_timesteps is None:
        raise UsageError(
            "the time_sampler 'loss_history' keeps losses by index of a chain: give the schedule a num_timesteps, or "
            f'take another time_sampler: {", ".join(sorted(TIME_SAMPLERS))}.'
        )
    shape = (schedule.num_timesteps, HISTORY_LENGTH)
    return LossHistory(jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:1], jnp.int32))


def index_probabilities(history: LossHistory) -> Float[Array, 'T']:
    """p_i proportional to sqrt(E[L_i^2]) (Nichol & Dhariwal 2021, eq. 18), mixed with 0.001 of the uniform one.

    Uniform until every index has its ten losses.
    """
    size = jnp.sqrt(jnp.mean(jnp.square(history.values), axis=1))
    total = jnp.sum(size)
    uniform = 1.0 / len(size)
    ready = jnp.all(history.counts >= HISTORY_LENGTH) & (total > 0)
    share = jnp.where(ready, size / jnp.where(total > 0, total, 1.0), uniform)
    return (1.0 - UNIFORM_SHARE) * share + UNIFORM_SHARE * uniform


def draw_indices(
    history: LossHistory, key: PRNGKeyArray, batch: int
) -> tuple[Int[Array, 'B'], Float[Array, 'B'], Float[Array, 'B']]:
    """(indices of the chain, their times, weights) by `index_probabilities`.

    The weights are 1 / (T p_i), 1 on average: the mean of weight times loss estimates the uniform mean of the loss.
    """
    probabilities = index_probabilities(history)
    num_timesteps = len(probabilities)
    indices = jax.random.choice(key, num_timesteps, (batch,), p=probabilities)
    return indices, (indices + 1) / num_timesteps, 1.0 / (num_timesteps * probabilities[indices])


def update_history(history: LossHistory, indices: Int[Array, 'B'], losses: Float[Array, 'B']) -> LossHistory:
    """The history after these losses (without their weights), in the order of the batch."""
    num_timesteps = len(history.counts)
    order = jnp.argsort(indices, stable=True)
    indices, losses = indices[order], losses[order]
    first = jnp.searchsorted(indices, indices, side='left')
    after = jnp.searchsorted(indices, indices, side='right')
    place = jnp.arange(len(indices))
    slot = (history.counts[indices] + place - first) % HISTORY_LENGTH
    # Of more than ten losses at one index the last ten count. So no slot is written twice, in whichever order.
    row = jnp.where(after - place > HISTORY_LENGTH, num_timesteps, indices)
    values = history.values.at[row, slot].set(losses.astype(jnp.float32), mode='drop')
    return LossHistory(values, history.counts.at[indices].add(1))


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
    t: Float[Array, 'B'] | None = None,
    vlb_weight: float = 0.0,
    **conditioning: Any,
) -> Float[Array, 'B']:
    """The weighted squared error of each image at a random t: weight(t) * mean over its pixels of error^2.

    With a `vlb_weight`, the hybrid objective L_simple + vlb_weight L_vlb (Nichol & Dhariwal 2021, section 3.1), which
    trains the reverse process's variance: each image has T times its term of the bound added, in bits per dimension,
    so that the mean over t is L_vlb, the sum of the terms. The published weight is 0.001 in these units. Of the term no
    gradient goes to the predicted mean. Its decoder is the exact one for data of 256 levels.

    Args:
      apply: `apply(params, x_t, timestep, **conditioning)` -> [B, ...], of twice the channels with a `vlb_weight`: the
        prediction's, and then the variance's as in `ModelDenoiser(learned_variance=True)`.
      x0: data in [-1, 1].
      key: for t and the noise.
      prediction: 'eps', 'x0', 'v' or 'flow'.
      weighting: of the squared error; `simple()` by default.
      time_sampler: one of `TIME_SAMPLERS`' functions.
      t: the times, where they are not for `time_sampler` to draw (`draw_indices`).
      vlb_weight: 0 for no bound and no learned variance.
      conditioning: goes to `apply` as it is.

    Returns:
      [B]; its mean is the training loss.

    Raises:
      UsageError: for an unknown prediction, a negative `vlb_weight`, or one on a continuous schedule.
    """
    lookup('prediction to train on', LOG_ERROR_SCALE, prediction)
    check_vlb_weight(vlb_weight, schedule)
    key_t, key_eps = jax.random.split(key)
    if t is None:
        t = to_times(schedule, time_sampler(key_t, x0.shape[0]))
    eps = jax.random.normal(key_eps, x0.shape, x0.dtype)
    x_t = q_sample(schedule, x0, t, eps)
    learned = vlb_weight > 0
    predicted = ModelDenoiser(apply, params, schedule, prediction, conditioning, learned)(x_t, t)
    # `Prediction` would read eps off x_t and x0, and lose digits of it where sigma is small.
    truth = {
        'eps': eps,
        'x0': x0,
        'v': (predicted.alpha * eps - predicted.sigma * x0) / predicted.norm,
        'flow': eps - x0,
    }[prediction]
    error = jnp.mean(jnp.square(predicted.value - truth), axis=tuple(range(1, x0.ndim)))
    loss = (weighting or simple())(schedule.log_snr(t), prediction) * error
    if not learned:
        return loss
    fixed_mean = dataclasses.replace(predicted, value=jax.lax.stop_gradient(predicted.value))
    bits = vlb.term(fixed_mean, schedule, x0, t, variance='learned') / math.log(2)
    return loss + vlb_weight * schedule.num_timesteps * bits


def check_vlb_weight(vlb_weight: float, schedule: Schedule) -> None:
    """A `UsageError` unless the objective can be trained with that weight of the bound on that schedule."""
    if not (math.isfinite(vlb_weight) and vlb_weight >= 0):
        raise UsageError(f'vlb_weight must be 0 or more, got {vlb_weight}; improved DDPM uses 0.001.')
    if vlb_weight > 0 and schedule.num_timesteps is None:
        raise UsageError(
            f'vlb_weight={vlb_weight} weighs the bound of a chain: give the schedule a num_timesteps, or set '
            'vlb_weight=0.'
        )
