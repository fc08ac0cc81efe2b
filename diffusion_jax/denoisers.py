"""A denoiser is any function (x_t, t) -> Prediction: a network, a guided network, a closed form, a user's callable.

x_t is [B, ...] and t a scalar in [0, 1], the same for the batch, or [B].
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
Denoiser = Callable[[Float[Array, 'B ...'], Float[Array, '...']], Prediction]


@dataclasses.dataclass(frozen=True)
class ModelDenoiser:
    """A network as a denoiser, by naming what it predicts.

    Attributes:
      apply: the network's forward, `apply(params, x, t, **conditioning)`.
      params: its parameters.
      schedule: the schedule that it was trained on.
      kind: what it predicts, one of `PREDICTIONS`.
      conditioning: keyword arguments of `apply`, each a pytree of arrays whose leading axis is the batch.
    """

    apply: Apply
    params: Any
    schedule: Schedule
    kind: str
    conditioning: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.kind not in PREDICTIONS:
            raise unknown('prediction', self.kind, PREDICTIONS)

    def __call__(self, x_t: Float[Array, 'B ...'], t: Float[Array, '...']) -> Prediction:
        t = jnp.broadcast_to(jnp.asarray(t), x_t.shape[:1])
        value = self.apply(self.params, x_t, self.schedule.timestep(t), **self.conditioning)
        if value.shape != x_t.shape:
            raise ValueError(f'the network returned shape {value.shape} for x_t of shape {x_t.shape}; they must agree.')
        return Prediction(
            value=value.astype(x_t.dtype),
            kind=self.kind,
            x_t=x_t,
            alpha=expand(self.schedule.alpha(t), x_t),
            sigma=expand(self.schedule.sigma(t), x_t),
        )


def clip_x0(denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """The denoiser with its predicted x0 clipped to the data's range; eps, v and score follow from the clipped x0."""

    def clipped(x_t, t):
        prediction = denoiser(x_t, t)
        return dataclasses.replace(prediction, value=jnp.clip(prediction.x0, low, high), kind='x0')

    return clipped
