"""The one scan that drives every solver.

A solver is data and one pure step. Its `Plan` holds coefficients with a leading axis of N steps, computed once per grid
(in float64 on the host when the grid is concrete) and traced from there on: another grid, eta, guidance scale, key or
initial noise of the same shapes runs the same compiled program.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffusion_jax.denoisers import Denoiser, clip_x0


class Carry(NamedTuple):
    """What goes from step to step: x and whatever history the solver keeps."""

    x: Float[Array, 'B ...']
    memory: Any = ()


Step = Callable[[Carry, Any, Denoiser, Callable[[], Float[Array, 'B ...']]], tuple[Carry, Float[Array, 'B ...']]]
"""step(carry, coefficients_i, denoiser, noise) -> (carry, predicted x0); noise() draws N(0, I) for this step."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """A solver on a time grid.

    Attributes:
      step: the solver's pure step, a module-level function.
      coefficients: a pytree of [N, ...] arrays, one row a step.
      empty_memory: x -> the solver's history before the first step.
    """

    step: Step = dataclasses.field(metadata={'static': True})
    coefficients: Any
    empty_memory: Callable[[Array], Any] = dataclasses.field(default=lambda x: (), metadata={'static': True})

    @property
    def num_steps(self) -> int:
        return len(jax.tree.leaves(self.coefficients)[0])


class Trajectory(NamedTuple):
    """Every state of a run: `x` [N + 1, B, ...] from the initial noise on, and the predicted `x0` [N, B, ...]."""

    x: Float[Array, 'M B ...']
    x0: Float[Array, 'N B ...']


def _noise(key: PRNGKeyArray, index: Int[Array, ''], x: Array) -> Float[Array, 'B ...']:
    if key.ndim == 0:
        return jax.random.normal(jax.random.fold_in(key, index), x.shape, x.dtype)
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, index), x.shape[1:], x.dtype))(key)


def _run(denoiser: Denoiser, plan: Plan, x, key, clip: bool, on_step, record: bool):
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError('key must be a typed key, as jax.random.key makes it.')
    if key.ndim > 1 or (key.ndim == 1 and key.shape[0] != x.shape[0]):
        raise ValueError(f'key must be one key or one per sample: got shape {key.shape} for {x.shape[0]} samples.')
    if x.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f'x must be float32 or float64, got {x.dtype}; a network may compute in bfloat16 inside.')
    if clip:
        denoiser = clip_x0(denoiser)

    def body(carry, step):
        index, coefficients = step
        carry, x0 = plan.step(carry, coefficients, denoiser, lambda: _noise(key, index, x))
        if on_step is not None:
            jax.debug.callback(on_step, index)
        return carry, (carry.x, x0) if record else None

    coefficients = jax.tree.map(lambda leaf: jnp.asarray(leaf, x.dtype), plan.coefficients)
    return jax.lax.scan(body, Carry(x, plan.empty_memory(x)), (jnp.arange(plan.num_steps), coefficients))


def sample(
    denoiser: Denoiser,
    plan: Plan,
    x: Float[Array, 'B ...'],
    key: PRNGKeyArray,
    *,
    clip: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> Float[Array, 'B ...']:
    """Runs the plan from the initial noise x to a sample. Pure: jit it, differentiate it, shard it.

    Args:
      denoiser: (x_t, t) -> Prediction.
      plan: a solver on a grid, as `plan` makes it.
      x: initial noise, N(0, I).
      key: a typed key for the whole batch, or [B] keys, one per sample: then sample i depends on its own key alone,
        whatever the batch. Step i folds i into it.
      clip: clip the predicted x0 to [-1, 1] at every step.
      on_step: called on the host after each step with its index 0 .. N-1, for progress; left out, it costs nothing.
    """
    return _run(denoiser, plan, x, key, clip, on_step, record=False)[0].x


def sample_trajectory(
    denoiser: Denoiser,
    plan: Plan,
    x: Float[Array, 'B ...'],
    key: PRNGKeyArray,
    *,
    clip: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> Trajectory:
    """As `sample`, and keeps every x_t and every predicted x0: N times the memory. The sample is `trajectory.x[-1]`."""
    _, (xs, x0s) = _run(denoiser, plan, x, key, clip, on_step, record=True)
    return Trajectory(jnp.concatenate([x[None], xs]), x0s)
