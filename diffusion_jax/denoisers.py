"""A denoiser is any function (x_t, t) -> Prediction: a network, a guided network, a closed form, a user's callable.

x_t is [B, ...] and t a scalar in [0, 1], the same for the batch, or [B]. One that remembers earlier calls is a
`Stateful`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.process import PREDICTIONS, Prediction, expand
from diffusion_jax.registry import unknown
from diffusion_jax.schedules import Schedule

Apply = Callable[..., Float[Array, 'B ...']]
"""`apply(params, x, t, **conditioning)`: a network's forward, with t as `Schedule.timestep` gives it, [B]."""


@dataclasses.dataclass(frozen=True)
class Stateful:
    """A denoiser with a memory, which the samplers carry from call to call.

    Attributes:
      initial_state: x -> the memory before the first call.
      call: (x_t, t, state) -> (Prediction, state).
    """

    initial_state: Callable[[Float[Array, 'B ...']], Any]
    call: Callable[..., tuple[Prediction, Any]]


Denoiser = Callable[[Float[Array, 'B ...'], Float[Array, '...']], Prediction] | Stateful


@dataclasses.dataclass(frozen=True)
class ModelDenoiser:
    """A network as a denoiser, by naming what it predicts.

    Attributes:
      apply: the network's forward, `apply(params, x, t, **conditioning)`.
      params: its parameters.
      schedule: the schedule that it was trained on.
      kind: what it predicts, one of `PREDICTIONS`.
      conditioning: keyword arguments of `apply`, each a pytree of arrays whose leading axis is the batch.
      learned_variance: the network's channels are twice those of x_t: the prediction's, and then those of
        2 `Prediction.variance_fraction` - 1.
    """

    apply: Apply
    params: Any
    schedule: Schedule
    kind: str
    conditioning: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    learned_variance: bool = False

    def __post_init__(self):
        if self.kind not in PREDICTIONS:
            raise unknown('prediction', self.kind, PREDICTIONS)

    def __call__(self, x_t: Float[Array, 'B ...'], t: Float[Array, '...']) -> Prediction:
        t = jnp.broadcast_to(jnp.asarray(t), x_t.shape[:1])
        value = self.apply(self.params, x_t, self.schedule.timestep(t), **self.conditioning)
        fraction = None
        expected = (*x_t.shape[:-1], x_t.shape[-1] * (1 + self.learned_variance))
        if value.shape != expected:
            twice = ' (twice the channels, for the variance)' if self.learned_variance else ''
            raise ValueError(
                f'the network returned shape {value.shape} for x_t of shape {x_t.shape}; it must be {expected}{twice}.'
            )
        if self.learned_variance:
            value, fraction = jnp.split(value, 2, axis=-1)
            fraction = (fraction.astype(x_t.dtype) + 1) / 2
        return Prediction(
            value=value.astype(x_t.dtype),
            kind=self.kind,
            x_t=x_t,
            alpha=expand(self.schedule.alpha(t), x_t),
            sigma=expand(self.schedule.sigma(t), x_t),
            variance_fraction=fraction,
        )


def map_x0(denoiser: Denoiser, change: Callable[[Float[Array, 'B ...']], Float[Array, 'B ...']]) -> Denoiser:
    """The denoiser with its predicted x0 changed; what else is read of it follows from the changed x0."""

    def changed(prediction):
        return dataclasses.replace(prediction, value=change(prediction.x0), kind='x0')

    if isinstance(denoiser, Stateful):

        def call(x_t, t, state):
            prediction, state = denoiser.call(x_t, t, state)
            return changed(prediction), state

        return Stateful(denoiser.initial_state, call)
    return lambda x_t, t: changed(denoiser(x_t, t))


def clip_x0(denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """The denoiser with its predicted x0 clipped to the data's range. What is not finite becomes NaN, not a limit."""
    return map_x0(denoiser, lambda x0: jnp.where(jnp.isfinite(x0), jnp.clip(x0, low, high), jnp.nan))


@dataclasses.dataclass(frozen=True)
class EdmPreconditioned:
    """A raw network F as one that predicts x0 (`kind='x0'`) on an `edm` or `ve` schedule (Karras et al. 2022, eq. 7).

    x0 = c_skip x + c_out F(c_in x, log(sigma) / 4), with the c of table 1, so that F sees and gives unit variance for
    data of standard deviation `sigma_data`.
    """

    apply: Apply
    sigma_data: float = 0.5

    def __call__(self, params, x, t, **conditioning):
        sigma = expand(jnp.exp(4.0 * t), x)
        total = jnp.sqrt(sigma**2 + self.sigma_data**2)
        raw = self.apply(params, x / total, t, **conditioning)
        return (self.sigma_data / total) ** 2 * x + sigma * self.sigma_data / total * raw


def edm_preconditioned(apply: Apply, sigma_data: float = 0.5) -> Apply:
    """`EdmPreconditioned`: a class, so that one can see what it wraps."""
    return EdmPreconditioned(apply, sigma_data)
