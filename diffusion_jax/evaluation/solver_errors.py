"""What a solver makes of a number of model calls: on a mixture whose answer is known, and on a model.

On the mixture two things are exact: where the probability-flow ODE carries each noise, which deterministic solvers
approximate, and the data's distribution. On a model, many calls of a good solver stand for the first.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax import oracles, samplers
from diffusion_jax.errors import UsageError
from diffusion_jax.oracles import GaussianMixture
from diffusion_jax.pipelines.images import ImagePipeline
from diffusion_jax.pipelines.stepwise import walk
from diffusion_jax.registry import lookup
from diffusion_jax.samplers import DESCRIPTIONS, SOLVERS
from diffusion_jax.schedules import Schedule

EXAMPLE = oracles.gaussian_mixture(
    [0.3, 0.5, 0.2], [[-0.7, 0.3], [0.2, -0.4], [0.9, 0.5]], [[0.1, 0.2], [0.2, 0.1], [0.15, 0.15]]
)
"""Three Gaussians in the plane: what experiments/solvers measures on."""
DIRECTIONS = np.array([[1, 0], [0, 1], [1, 1], [1, -1]]) / np.sqrt([[1], [1], [2], [2]])
DATA_LOG_SNR = 25.0  # where x_t is the data up to 4e-6
FLOW_ROWS = 500  # samples that are held to the flow
MOST_CALLS = 256
REFERENCE = ('dpmpp_3m', 60)
"""Solver and steps that stand for the flow on a model."""


class Measured(NamedTuple):
    """One solver at one number of calls.

    Attributes:
      solver, calls: which.
      flow_error: the root mean square distance to where the flow carries the same noise; NaN for solvers that draw.
      distance: of the samples to the data: the largest Kolmogorov-Smirnov statistic over four projections; NaN on a
        model.
    """

    solver: str
    calls: int
    flow_error: float
    distance: float


def plan_within(solver: str, schedule: Schedule, calls: int, spacing: str) -> tuple[samplers.Plan, int] | None:
    """(plan, steps) of the most steps that make at most `calls` model calls; None if there are none."""
    lookup('solver', SOLVERS, solver)
    for steps in range(calls, 0, -1):
        try:
            plan = samplers.plan(solver, schedule, steps, spacing)
        except UsageError:  # too few indices, or steps, for this one
            continue
        if plan.num_calls <= calls:
            return plan, steps
    return None


def distance(samples: Float[np.ndarray, 'N 2'], truth: Float[np.ndarray, 'M 2']) -> float:
    """The largest Kolmogorov-Smirnov statistic over four projections; 0 for the same points."""
    from scipy import stats  # half a second, which a page that opens need not wait for

    return float(max(stats.ks_2samp(samples @ d, truth @ d).statistic for d in DIRECTIONS))


@functools.lru_cache(maxsize=16)
def _denoiser(mixture: GaussianMixture, schedule: Schedule):
    """The same function for the same mixture and schedule: what was compiled for it is found again."""
    return mixture.denoiser(schedule, 'eps')


@functools.partial(jax.jit, static_argnames=('denoiser', 'solver'))
def _states(rows, num_calls, x, key, *, denoiser, solver) -> Float[Array, 'M B D']:
    """Every state, of a plan that is padded to MOST_CALLS: one program for all numbers of calls."""

    def body(i, carry):
        state, states = carry
        row = jax.tree.map(lambda leaf: leaf[i], rows)
        state, _ = samplers.advance(denoiser, solver, state, row, key)
        return state, states.at[i + 1].set(state.carry.x)

    states = jnp.zeros((MOST_CALLS + 1, *x.shape), x.dtype).at[0].set(x)
    return jax.lax.fori_loop(0, num_calls, body, (samplers.begin(denoiser, solver, x), states))[1]


def states(
    mixture: GaussianMixture, schedule: Schedule, plan: samplers.Plan, num: int, seed: int = 0
) -> Float[np.ndarray, 'N+1 num D']:
    """The states of `num` samples of a mixture, from the noise on: x_t at each of `plan.times`.

    Another number of calls, up to MOST_CALLS, runs the same program.
    """
    if plan.num_calls > MOST_CALLS:
        raise UsageError(f'at most {MOST_CALLS} model calls, got {plan.num_calls}: take fewer steps.')
    padding = MOST_CALLS - plan.num_calls
    rows = jax.tree.map(lambda leaf: np.pad(leaf, [(0, padding)] + [(0, 0)] * (leaf.ndim - 1)), samplers.rows(plan))
    key_noise, key = jax.random.split(jax.random.key(seed))
    x = samplers.prior(plan, key_noise, (num, *mixture.shape))
    made = _states(rows, plan.num_calls, x, key, denoiser=_denoiser(mixture, schedule), solver=plan.solver)
    return np.asarray(made)[: plan.num_calls + 1]


def against_calls(
    schedule: Schedule,
    solvers: Sequence[str],
    budgets: Sequence[int],
    spacing: str = 'log_snr',
    num: int = 2000,
    seed: int = 0,
    mixture: GaussianMixture = EXAMPLE,
) -> Iterator[Measured]:
    """Each solver within each budget of calls on a mixture; budgets that a solver has no plan for are left out.

    Args:
      schedule: variance preserving, or any other.
      budgets: the most calls, up to MOST_CALLS; what is measured is said with the calls that were made.
      spacing: of the grids.
      num: samples; `distance` of exact draws is about 1.6 / sqrt(num).
      seed: of the noise, the same for all.
    """
    truth = np.asarray(mixture.sample(jax.random.key(seed + 1), num))
    carried: dict[float, np.ndarray] = {}
    for solver in solvers:
        for budget in budgets:
            found = plan_within(solver, schedule, budget, spacing)
            if found is None:
                continue
            plan, _ = found
            made = states(mixture, schedule, plan, num, seed)
            error = float('nan')
            if not DESCRIPTIONS[solver].stochastic:
                start = float(schedule.log_snr(plan.times[0]))
                if start not in carried:
                    noise = np.asarray(made[0, :FLOW_ROWS], np.float64) / plan.alpha[0]
                    carried[start] = mixture.probability_flow(noise, [start, DATA_LOG_SNR])[-1]
                error = float(np.sqrt(np.mean((made[-1, :FLOW_ROWS] - carried[start]) ** 2)))
            yield Measured(solver, plan.num_calls, error, distance(made[-1], truth))


def on_model(
    pipeline: ImagePipeline,
    num: int,
    solvers: Sequence[str],
    budgets: Sequence[int],
    spacing: str | None = None,
    **settings,
) -> Iterator[Measured | None]:
    """Each solver that draws no noise, within each budget of calls on a model, against REFERENCE from the same noise.

    Yields None after each model call, so that one can look on or stop.

    Args:
      num: samples.
      spacing: of the grids, those of the reference too.
      settings: of the pipeline: labels, guidance_scale, seed, ...
    """

    def last(solver: str, steps: int):
        x = None
        for call in walk(pipeline, num, solver=solver, steps=steps, spacing=spacing, **settings):
            x = call.x
            yield None
        return x

    reference = yield from last(*REFERENCE)
    for solver in solvers:
        if DESCRIPTIONS[solver].stochastic:
            continue
        for budget in budgets:
            found = plan_within(solver, pipeline.schedule, budget, spacing or 'trailing')
            if found is None:
                continue
            plan, steps = found
            made = yield from last(solver, steps)
            error = float(np.sqrt(np.mean((made - reference) ** 2)))
            yield Measured(solver, plan.num_calls, error, float('nan'))
