"""Solvers whose every update is linear: in x, in what they remember, and in the predicted x0.

That is all of them but a learned variance. Between two model calls such a solver maps the state (x, slot_1 .. slot_M)
and the call's predicted x0 to the next state by one matrix, plus noise in x. So a solver is a list of matrices, derived
on the host in float64, and one step runs them all. In a solver's file the columns are the rows of an identity matrix,

    x, previous, x0 = np.eye(3)

for a solver of one slot, so that `[a * x + b * x0, x0]` reads as: the next x is a x + b x0, the next slot is x0.
"""

import dataclasses
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import UsageError
from diffusion_jax.registry import unknown
from diffusion_jax.samplers.engine import Carry, Plan, make_plan
from diffusion_jax.samplers.grids import check_grid
from diffusion_jax.schedules import Schedule, namespace


@dataclasses.dataclass(frozen=True)
class Linear:
    """The step of every linear solver.

    Attributes:
      used: which entries of the matrices, [1 + M][2 + M], are ever other than 0; the others cost nothing.
      stochastic: whether noise is drawn.
    """

    used: tuple[tuple[bool, ...], ...]
    stochastic: bool

    def empty_memory(self, x):
        return (jnp.zeros_like(x),) * (len(self.used) - 1)

    def step(self, carry: Carry, t, coefficients, denoiser, noise):
        x0 = denoiser(carry.x, t).x0
        state = (carry.x, *carry.memory, x0)
        matrix = coefficients['matrix']
        x, *slots = (
            sum((matrix[i, j] * state[j] for j, used in enumerate(row) if used), jnp.zeros_like(x0))
            for i, row in enumerate(self.used)
        )
        if self.stochastic:
            x = x + coefficients['noise'] * noise()
        return Carry(x, tuple(slots)), x0


def linear_plan(schedule: Schedule, times, matrices, noise=None) -> Plan:
    """The plan of a linear solver.

    Args:
      times: [N + 1], of each call and of the result.
      matrices: [N, 1 + M, 2 + M]: rows are the next x and slots, columns x, the slots and the predicted x0.
      noise: [N], the standard deviation of the noise added to the next x; None for a deterministic solver.
    """
    xp = namespace(*(value for value in (times, matrices, noise) if value is not None))
    matrices = xp.asarray(matrices)
    if xp is np:
        if not np.isfinite(matrices).all():
            raise UsageError(f'this solver is not defined on the grid {times}: take another spacing, or fewer steps.')
        used = (matrices != 0).any(axis=0)
    else:
        used = np.ones(matrices.shape[1:], bool)
    coefficients = {'matrix': matrices} | ({} if noise is None else {'noise': noise})
    solver = Linear(tuple(map(tuple, used.tolist())), noise is not None)
    return make_plan(solver, coefficients, schedule, times)


@dataclasses.dataclass(frozen=True)
class Levels:
    """A concrete grid and the schedule on it, float64 [N + 1]; `lam` = log(alpha / sigma) is half the log-SNR."""

    times: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    lam: np.ndarray

    @property
    def num_steps(self) -> int:
        return len(self.times) - 1

    def eps(self, i: int, x, x0):
        """eps at level i as a combination of x there and the x0 predicted there."""
        return (x - self.alpha[i] * x0) / self.sigma[i]


def levels(schedule: Schedule, times) -> Levels:
    """The levels of a grid of concrete times, N + 1 decreasing ones in [0, 1]."""
    times = check_grid(times)
    if namespace(times) is not np:
        raise UsageError('this solver needs a concrete grid: make the plan outside jit and pass it in as an argument.')
    return levels_at(schedule, times)


def levels_at(schedule: Schedule, times) -> Levels:
    """As `levels`, for times in any order."""
    times = np.asarray(times, np.float64)
    return Levels(times, schedule.alpha(times), schedule.sigma(times), 0.5 * schedule.log_snr(times))


def multistep_orders(lam: np.ndarray, order: int, lower_order_final: bool | None) -> list[int]:
    """The order of each step of a multistep solver: what its history allows.

    A step from zero signal (lam of -inf) or to zero noise (+inf) has order 1, as no finite difference in lam reaches
    there. `lower_order_final` ends with orders .., 2, 1; None means on grids of fewer than 15 steps.
    """
    num = len(lam) - 1
    lower = num < 15 if lower_order_final is None else lower_order_final
    orders = []
    for i in range(num):
        history = max(int(np.isfinite(lam[: i + 1]).sum()), 1)
        reach = 1 if not np.isfinite(lam[i]) or not np.isfinite(lam[i + 1]) else order
        orders.append(min(order, history, reach, num - i if lower else order))
    return orders


def check_choices(solver: str, **options: tuple[str, Iterable[str]]) -> None:
    """A `UsageError` for an option, given as name=(value, choices), that is none of its choices."""
    for name, (value, choices) in options.items():
        if value not in choices:
            raise unknown(f'{name} of {solver}', value, choices)


def check_order(solver: str, order: int, largest: int) -> None:
    """A `UsageError` for an order not in 1 .. largest."""
    if order not in range(1, largest + 1):
        raise UsageError(f'order of {solver} must be in 1..{largest}, got {order}.')
