"""Plans of linear solvers brought to one shape, so that tests of many solvers and grids share one compiled program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.samplers import Carry, Plan
from diffusion_jax.samplers.linear import Linear

SLOTS = 6


def widened(plan: Plan, calls: int) -> Plan:
    """The same plan with `SLOTS` slots, noise (of zero), and after its end calls that change nothing."""
    matrix = np.asarray(plan.coefficients['matrix'])
    num, rows, columns = matrix.shape
    slots = rows - 1
    wide = np.zeros((calls, 1 + SLOTS, 2 + SLOTS))
    wide[num:, :, : 1 + SLOTS] = np.eye(1 + SLOTS)
    wide[:num, :rows, :rows] = matrix[:, :, :rows]
    wide[:num, :rows, -1] = matrix[:, :, columns - 1]
    assert slots <= SLOTS
    assert num <= calls
    noise = np.zeros(calls)
    noise[:num] = plan.coefficients.get('noise', 0.0)

    def lengthened(values):
        # The calls that change nothing are made where the last one was: at the data, oracles are not defined.
        return np.concatenate([values[:-1], np.repeat(values[-2:-1], calls - num), values[-1:]])

    return dataclasses.replace(
        plan,
        solver=Linear(((True,) * (2 + SLOTS),) * (1 + SLOTS), True),
        coefficients={'matrix': wide, 'noise': noise},
        times=lengthened(plan.times),
        alpha=lengthened(plan.alpha),
        sigma=lengthened(plan.sigma),
    )


def replay(denoiser):
    """jitted (plan, x, noise [N, ...], memory) -> every state [N + 1, ...]: the steps, with the noise given."""

    @jax.jit
    def run(plan, x, noise, memory=None):
        def body(carry, row):
            t, coefficients, z = row
            carry, _ = plan.solver.step(carry, t, coefficients, denoiser, lambda: z)
            return carry, carry.x

        rows = (jnp.asarray(plan.times[:-1]), jax.tree.map(jnp.asarray, plan.coefficients), noise)
        _, xs = jax.lax.scan(body, Carry(x, memory or plan.solver.empty_memory(x)), rows)
        return jnp.concatenate([x[None], xs])

    return run
