"""The one scan that drives every solver.

A solver is data and one pure step. Its `Plan` holds coefficients with a leading axis of N model calls, computed once
per grid (in float64 on the host) and traced from there on: another grid, eta, guidance scale, key or initial noise of
the same shapes runs the same compiled program.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffusion_jax.denoisers import Denoiser, Stateful, clip_x0
from diffusion_jax.errors import SamplingDiverged, UsageError
from diffusion_jax.schedules import Schedule


class Carry(NamedTuple):
    """What goes from call to call: x and whatever history the solver keeps."""

    x: Float[Array, 'B ...']
    memory: Any = ()


class Solver(Protocol):
    """What a solver does around one model call. Static under jit: hashable, equal where the program is the same."""

    def empty_memory(self, x: Float[Array, 'B ...']) -> Any:
        """The history before the first call."""

    def step(
        self,
        carry: Carry,
        t: Float[Array, ''],
        coefficients: Any,
        denoiser: Callable[[Array, Array], Any],
        noise: Callable[[], Float[Array, 'B ...']],
    ) -> tuple[Carry, Float[Array, 'B ...']]:
        """(carry, predicted x0) after the call at t; `coefficients` are this call's row, noise() draws N(0, I)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """A solver on a time grid, N model calls.

    Attributes:
      solver: its pure step.
      coefficients: a pytree of [N, ...] arrays, one row a call.
      times: [N + 1], of each call, and then that of the result.
      alpha, sigma: [N + 1], the schedule's at `times`.
      prior_std: what standard normal noise is multiplied by to start from.
    """

    solver: Solver = dataclasses.field(metadata={'static': True})
    coefficients: Any
    times: Float[Array, 'M']
    alpha: Float[Array, 'M']
    sigma: Float[Array, 'M']
    prior_std: Float[Array, '']

    @property
    def num_calls(self) -> int:
        """Model calls per sample, N."""
        return len(self.times) - 1


def make_plan(solver: Solver, coefficients: Any, schedule: Schedule, times: Float[Array, 'M']) -> Plan:
    """The plan of a solver whose calls are at `times` (the last one is the result's) of this schedule."""
    return Plan(solver, coefficients, times, schedule.alpha(times), schedule.sigma(times), schedule.prior_std(times[0]))


class Known(NamedTuple):
    """What inpainting keeps: `x0`, [B, ...], where `mask`, broadcastable to it, is 1 (or True)."""

    x0: Float[Array, 'B ...']
    mask: Float[Array, '...']


class Trajectory(NamedTuple):
    """Every state of a run: `x` [N + 1, B, ...] from the initial noise on, and the predicted `x0` [N, B, ...].

    One entry per model call: for solvers of several calls a step, the states within a step are there too.
    """

    x: Float[Array, 'M B ...']
    x0: Float[Array, 'N B ...']


def _normal(key: PRNGKeyArray, index: Int[Array, ''] | int, shape: tuple[int, ...], dtype) -> Float[Array, 'B ...']:
    if key.ndim == 0:
        return jax.random.normal(jax.random.fold_in(key, index), shape, dtype)
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, index), shape[1:], dtype))(key)


def prior(plan: Plan, key: PRNGKeyArray, shape: tuple[int, ...], dtype=jnp.float32) -> Float[Array, 'B ...']:
    """The noise that a plan starts from: N(0, I), times sigma for schedules that explode.

    Args:
      key: one typed key, or [B] keys, one per sample.
      shape: (B, ...).
    """
    if key.ndim == 0:
        noise = jax.random.normal(key, shape, dtype)
    else:
        noise = jax.vmap(lambda k: jax.random.normal(k, shape[1:], dtype))(key)
    return jnp.asarray(plan.prior_std, dtype) * noise


KNOWN_NOISE = 2**31  # folded into the key, plus the step's index, for the noise of what inpainting keeps


def _check_known(known: Known, shape: tuple[int, ...]) -> None:
    try:
        fits = jnp.broadcast_shapes(jnp.shape(known.mask), jnp.shape(known.x0), shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise UsageError(
            f'known.x0 {jnp.shape(known.x0)} and known.mask {jnp.shape(known.mask)} must broadcast to x, {shape}.'
        )


def _check(plan: Plan, x, key, known: Known | None) -> None:
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise UsageError('key must be a typed key, as jax.random.key makes it.')
    if key.ndim > 1 or (key.ndim == 1 and key.shape[0] != x.shape[0]):
        raise UsageError(f'key must be one key or one per sample: got shape {key.shape} for {x.shape[0]} samples.')
    if x.dtype not in (jnp.float32, jnp.float64):
        raise UsageError(f'x must be float32 or float64, got {x.dtype}; a network may compute in bfloat16 inside.')
    if known is not None:
        _check_known(known, x.shape)


class State(NamedTuple):
    """What a run has come to between two calls: the solver's carry, and the memory of a `Stateful` denoiser."""

    carry: Carry
    memory: Any = ()


class Row(NamedTuple):
    """What a plan says of one call: scalars and the solver's coefficients; or of all, with a leading axis of N."""

    index: Int[Array, '']
    t: Float[Array, '']
    coefficients: Any
    next_alpha: Float[Array, '']
    next_sigma: Float[Array, '']


def rows(plan: Plan, dtype=jnp.float32) -> Row:
    """The plan's calls, [N, ...]. Of a plan that is concrete they are NumPy arrays: taking one compiles nothing."""
    values = (plan.times[:-1], plan.coefficients, plan.alpha[1:], plan.sigma[1:])
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(values)):
        return Row(jnp.arange(plan.num_calls), *jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), values))
    return Row(np.arange(plan.num_calls, dtype=np.int32), *jax.tree.map(lambda leaf: np.asarray(leaf, dtype), values))


def begin(denoiser: Denoiser, solver: Solver, x: Float[Array, 'B ...']) -> State:
    """The state before the first call, at the initial noise x."""
    return State(Carry(x, solver.empty_memory(x)), denoiser.initial_state(x) if isinstance(denoiser, Stateful) else ())


def advance(
    denoiser: Denoiser,
    solver: Solver,
    state: State,
    row: Row,
    key: PRNGKeyArray,
    *,
    clip: bool = False,
    known: Known | None = None,
) -> tuple[State, Float[Array, 'B ...']]:
    """One call of a run, and (state, predicted x0) after it: what `sample` scans over. Pure: jit it.

    To look on while a sample is made, or to stop: jitted once it serves plans of any length, as `row` is traced.

        state = begin(denoiser, plan.solver, x)
        for i in range(plan.num_calls):
            state, x0 = advance(denoiser, plan.solver, state, jax.tree.map(lambda leaf: leaf[i], rows(plan)), key)

    Args:
      solver: the plan's.
      row: this call's, of `rows(plan)`.
      key, clip, known: as in `sample`.
    """
    if clip:
        denoiser = clip_x0(denoiser)
    carry, memory = state
    shape, dtype = carry.x.shape, carry.x.dtype

    def denoise(x_t, t):
        nonlocal memory
        if not isinstance(denoiser, Stateful):
            return denoiser(x_t, t)
        prediction, memory = denoiser.call(x_t, t, memory)
        return prediction

    carry, x0 = solver.step(carry, row.t, row.coefficients, denoise, lambda: _normal(key, row.index, shape, dtype))
    x = _keep_known(carry.x, known, row.index + 1, row.next_alpha, row.next_sigma, key)
    return State(carry._replace(x=x), memory), x0


def _keep_known(x, known: Known | None, index, alpha, sigma, key):
    if known is None:
        return x
    noise = _normal(key, jnp.uint32(KNOWN_NOISE) + jnp.uint32(index), x.shape, x.dtype)
    return jnp.where(jnp.asarray(known.mask) != 0, alpha * jnp.asarray(known.x0, x.dtype) + sigma * noise, x)


def _run(denoiser: Denoiser, plan: Plan, x, key, clip: bool, known: Known | None, on_step, record: bool):
    _check(plan, x, key, known)
    if clip:
        denoiser = clip_x0(denoiser)

    def body(state, row):
        state, x0 = advance(denoiser, plan.solver, state, row, key, known=known)
        if on_step is not None:
            jax.debug.callback(on_step, row.index)
        return state, (state.carry.x, x0) if record else None

    alpha, sigma = (jnp.asarray(value[0], x.dtype) for value in (plan.alpha, plan.sigma))
    x = _keep_known(x, known, 0, alpha, sigma, key)
    state, recorded = jax.lax.scan(body, begin(denoiser, plan.solver, x), rows(plan, x.dtype))
    return x, state.carry.x, recorded


def check_finite(x: Float[Array, 'B ...']) -> None:
    """A `SamplingDiverged` if a concrete x holds NaN or inf; under jit it does nothing."""
    if not isinstance(x, jax.core.Tracer):
        bad = ~jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1)
        if bad.any():
            raise SamplingDiverged(int(bad.sum()), x.shape[0])


def sample(
    denoiser: Denoiser,
    plan: Plan,
    x: Float[Array, 'B ...'],
    key: PRNGKeyArray,
    *,
    clip: bool = False,
    known: Known | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Float[Array, 'B ...']:
    """Runs the plan from the initial noise x to a sample. Pure: jit it, differentiate it, shard it.

    Args:
      denoiser: (x_t, t) -> Prediction.
      plan: a solver on a grid, as `plan` makes it.
      x: the state at `plan.times[0]`: `prior(plan, key, shape)`, which is N(0, I) for variance-preserving schedules.
      key: a typed key for the whole batch, or [B] keys, one per sample: then sample i depends on its own key alone,
        whatever the batch. Call i folds i into it.
      clip: clip the predicted x0 to [-1, 1] at every call.
      known: inpainting: after every call, x is replaced by a fresh draw of q(x_t | known.x0) where known.mask is 1.
      on_step: called on the host after each call with its index 0 .. N-1, for progress; left out, it costs nothing.

    Raises:
      UsageError: x, key or known do not fit.
      SamplingDiverged: the result is not finite. Under jit, where nothing can be raised, such samples are NaN, whether
        or not clipping is on: call `check_finite` on what the compiled function returns.
    """
    _, sample, _ = _run(denoiser, plan, x, key, clip, known, on_step, record=False)
    check_finite(sample)
    return sample


def sample_trajectory(
    denoiser: Denoiser,
    plan: Plan,
    x: Float[Array, 'B ...'],
    key: PRNGKeyArray,
    *,
    clip: bool = False,
    known: Known | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Trajectory:
    """As `sample`, and keeps every x_t and every predicted x0: N times the memory. The sample is `trajectory.x[-1]`."""
    x, sample, (xs, x0s) = _run(denoiser, plan, x, key, clip, known, on_step, record=True)
    check_finite(sample)
    return Trajectory(jnp.concatenate([x[None], xs]), x0s)
