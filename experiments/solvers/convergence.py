"""How fast every deterministic solver converges to the probability-flow ODE: steps against error, in float64.

    python experiments/solvers/convergence.py

The data are a mixture in two dimensions, the interval log-SNR -3 to 5, the grids uniform in log-SNR. Solvers with a
history start from an exact one: what a lower-order start costs is not what is measured here. The tests of order run
this, and so do all tests of many solvers that share one compiled program.
"""

import argparse
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from diffusion_jax import oracles, samplers, schedules
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


LOW, HIGH = -3.0, 5.0
STEPS = (12, 24, 48, 96, 192)
CALLS = 2 * STEPS[-1]
MIXTURE = oracles.gaussian_mixture([0.3, 0.5, 0.2], [[-0.7, 0.3], [0.2, -0.4], [0.9, 0.5]], [0.3, 0.4, 0.25])
START = np.random.default_rng(0).normal(size=(6, 2)) * np.sqrt(1 + np.exp(-LOW))
SCHEDULES = {
    'linear': schedules.linear(None),
    'cosine': schedules.cosine(None),
    'edm': schedules.edm(),
    'flow': schedules.flow(shift=3.0),
    'chain': schedules.linear(1000),
}
FULL = {'lower_order_final': False}


def multistep(**options):
    return functools.partial(samplers.multistep, **options, **FULL)


def singlestep(**options):
    return functools.partial(samplers.singlestep, **options, **FULL)


def unipc(**options):
    return functools.partial(samplers.unipc, **options, **FULL)


# name -> (solver, order, what its slots hold: outputs in this form, newest first; None for no history).
CASES = {
    'ddim': (samplers.ddim, 1, None),
    'euler': (samplers.euler, 1, None),
    'multistep 1 eps': (multistep(order=1, form='eps'), 1, None),
    'singlestep 1': (singlestep(order=1), 1, None),
    'heun': (samplers.heun, 2, None),
    'heun flow': (functools.partial(samplers.heun, coordinate='flow'), 2, None),
    'dpm_2': (singlestep(order=2, form='eps'), 2, None),
    'dpmpp_2s': (singlestep(order=2), 2, None),
    'dpmpp_2s heun': (singlestep(order=2, method='heun'), 2, None),
    'dpmpp_2s grid': (singlestep(order=2, stages='grid'), 2, None),
    'dpm_3': (singlestep(order=3, form='eps'), 3, None),
    'dpmpp_3s': (singlestep(order=3), 3, None),
    'dpmpp_3s heun': (singlestep(order=3, method='heun'), 3, None),
    'dpmpp_2m': (multistep(order=2), 2, 'x0'),
    'dpmpp_2m heun': (multistep(order=2, method='heun'), 2, 'x0'),
    'dpm_2m': (multistep(order=2, form='eps'), 2, 'eps'),
    'dpmpp_3m published': (multistep(order=3, second_difference='published'), 2, 'x0'),
    'dpm_3m published': (multistep(order=3, form='eps', second_difference='published'), 2, 'eps'),
    'dpmpp_3m': (multistep(order=3), 3, 'x0'),
    'dpm_3m': (multistep(order=3, form='eps'), 3, 'eps'),
    'plms': (samplers.plms, 2, None),
    'pndm': (samplers.pndm, 2, None),
    'lms 2': (functools.partial(samplers.lms, order=2), 2, 'eps'),
    'lms 4': (functools.partial(samplers.lms, order=4), 4, 'eps'),
}
# At least p without the corrector and p + 1 with it.
AT_LEAST = {
    f'unipc {order} {form} {variant} {corrector}': (
        unipc(order=order, form=form, variant=variant, corrector=corrector),
        order + corrector,
        f'{form} after base',
    )
    for order in (1, 2, 3)
    for form in ('x0', 'eps')
    for variant in ('bh1', 'bh2')
    for corrector in (False, True)
}
PAST = 3  # exact points before the interval


@functools.cache
def exact(steps):
    """x / alpha at PAST levels before the interval, at its start and at its end."""
    h = (HIGH - LOW) / steps
    before = MIXTURE.probability_flow(START, [LOW, LOW - h, LOW - 2 * h, LOW - 3 * h])
    return [*before[:0:-1], START, MIXTURE.probability_flow(START, [LOW, HIGH])[-1]]


@functools.cache
def programs(schedule, kind):
    denoiser = MIXTURE.denoiser(SCHEDULES[schedule], kind)
    return replay(denoiser), jax.jit(lambda x, t: (denoiser(x, t).x0, denoiser(x, t).eps))


@functools.cache
def planned(case, schedule, steps, past):
    h = (HIGH - LOW) / steps
    log_snrs = np.linspace(LOW - past * h, HIGH, steps + past + 1)
    solver = (CASES | AT_LEAST)[case][0]
    return solver(SCHEDULES[schedule], SCHEDULES[schedule].time_of_log_snr(log_snrs))


def error(case, schedule, kind, steps):
    """Root mean square of x / alpha at the end minus what it should be."""
    holds = (CASES | AT_LEAST)[case][2]
    past = PAST if holds else 0
    plan = planned(case, schedule, steps, past)
    run, outputs = programs(schedule, kind)
    memory = None
    if holds:
        # The newest output comes first; UniPC's first slot is x at the level before.
        states = [jnp.asarray(plan.alpha[i] * exact(steps)[i]) for i in range(past)]
        history = [outputs(states[i], plan.times[i])[holds.startswith('eps')] for i in reversed(range(past))]
        memory = ([states[-1]] if holds.endswith('base') else []) + history
        slots = np.shape(plan.coefficients['matrix'])[1] - 1
        memory = memory[:slots] + [jnp.zeros_like(states[0])] * (SLOTS - min(slots, len(memory)))
        plan = jax.tree.map(lambda leaf: leaf[past:] if np.ndim(leaf) else leaf, plan)
    x = jnp.asarray(plan.alpha[0] * START)
    wide = widened(plan, CALLS)
    zeros = tuple(jnp.zeros_like(x) for _ in range(SLOTS))
    end = run(wide, x, jnp.zeros((CALLS, *x.shape)), tuple(memory) if memory else zeros)[-1]
    return float(np.sqrt(np.mean((end / plan.alpha[-1] - exact(steps)[-1]) ** 2)))


def slope(case, schedule, kind):
    """The order measured between the two finest grids."""
    errors = [error(case, schedule, kind, steps) for steps in STEPS[-2:]]
    return np.log(errors[0] / errors[1]) / np.log(STEPS[-1] / STEPS[-2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--schedule', default='linear', choices=SCHEDULES)
    parser.add_argument('--prediction', default='eps', choices=('eps', 'x0', 'v', 'flow'))
    arguments = parser.parse_args()
    lines = [
        f'Error (root mean square of x / alpha) against steps, schedule `{arguments.schedule}`, prediction '
        f'`{arguments.prediction}`, float64, log-SNR {LOW:g} to {HIGH:g}, exact history. The slope is that of the two '
        'finest grids.\n',
        f'| solver | order expected | {" | ".join(f"{n} steps" for n in STEPS)} | slope |',
        '| --- ' * (len(STEPS) + 3) + '|',
    ]
    with jax.enable_x64(True):
        for case, (_, order, _) in tqdm((CASES | AT_LEAST).items(), desc='solvers'):
            errors = [error(case, arguments.schedule, arguments.prediction, steps) for steps in STEPS]
            measured = np.log(errors[-2] / errors[-1]) / np.log(STEPS[-1] / STEPS[-2])
            cells = ' | '.join(f'{value:.1e}' for value in errors)
            lines.append(f'| {case} | {order} | {cells} | {measured:.2f} |')
    text = '\n'.join(lines) + '\n'
    print(text)
    (Path(__file__).parent / 'orders.md').write_text(text)


if __name__ == '__main__':
    main()
