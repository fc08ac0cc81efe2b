"""Error against model calls of every solver, from pure noise to the data, on a mixture whose answer is known.

    python experiments/solvers/run.py

Deterministic solvers are held to the exact probability flow from the same noise; all of them, and so those that draw
noise, to exact draws of the data. Writes table.md and errors.png beside this file.
"""

import argparse
from pathlib import Path

import jax
import matplotlib
import numpy as np
from tqdm import tqdm

from diffusion_jax import samplers, schedules
from diffusion_jax.evaluation.solver_errors import DATA_LOG_SNR, distance, plan_within
from diffusion_jax.evaluation.solver_errors import EXAMPLE as MIXTURE
from diffusion_jax.samplers import DESCRIPTIONS, SOLVERS

matplotlib.use('Agg')
import matplotlib.pyplot as plt

BUDGETS = (5, 8, 10, 15, 20, 25, 50, 100, 250)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--spacing', default='log_snr', choices=('log_snr', 'karras', 'trailing', 'uniform'))
    parser.add_argument('--num', type=int, default=20_000, help='samples for the distance between distributions')
    arguments = parser.parse_args()
    schedule = schedules.linear(1000)
    denoiser = MIXTURE.denoiser(schedule, 'eps')
    sample = jax.jit(lambda plan, x: samplers.sample(denoiser, plan, x, jax.random.key(2)))
    truth = np.asarray(MIXTURE.sample(jax.random.key(3), arguments.num))
    exact = {}
    flow_error, distances = {}, {}
    for solver in tqdm(SOLVERS, desc='solvers'):
        for calls in BUDGETS:
            found = plan_within(solver, schedule, calls, arguments.spacing)
            if found is None:
                continue
            plan, _ = found
            x = samplers.prior(plan, jax.random.key(1), (arguments.num, 2))
            out = np.asarray(sample(plan, x))
            distances[solver, calls] = distance(out, truth)
            if not DESCRIPTIONS[solver].stochastic:
                start = float(schedule.log_snr(plan.times[0]))
                if start not in exact:
                    noise = np.asarray(x[:500], np.float64) / plan.alpha[0]
                    exact[start] = MIXTURE.probability_flow(noise, [start, DATA_LOG_SNR])[-1]
                flow_error[solver, calls] = float(np.sqrt(np.mean((out[:500] - exact[start]) ** 2)))
    draws = (np.asarray(MIXTURE.sample(jax.random.key(seed), arguments.num)) for seed in range(4, 8))
    floor = float(np.mean([distance(draw, truth) for draw in draws]))
    folder = Path(__file__).parent
    (folder / 'table.md').write_text(
        f'Schedule linear (T = 1000), spacing `{arguments.spacing}`, prediction eps, float32.\n\n'
        'Root mean square distance to the exact probability flow from the same noise, deterministic solvers:\n\n'
        + _table(flow_error, [name for name in SOLVERS if not DESCRIPTIONS[name].stochastic])
        + f'\nDistance to the data: the largest Kolmogorov-Smirnov statistic over four projections, {arguments.num} '
        f'samples; {floor:.3f} is that of exact draws:\n\n' + _table(distances, list(SOLVERS))
    )
    print((folder / 'table.md').read_text())
    _plot(folder / 'errors.png', flow_error, distances, floor, arguments.spacing)


def _table(values: dict, names: list[str]) -> str:
    lines = [f'| solver | {" | ".join(f"{calls} calls" for calls in BUDGETS)} |', '| --- ' * (len(BUDGETS) + 1) + '|']
    for name in names:
        cells = [f'{values[name, calls]:.1e}' if (name, calls) in values else '' for calls in BUDGETS]
        lines.append(f'| {name} | {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def _plot(path: Path, flow_error: dict, distance: dict, floor: float, spacing: str) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), constrained_layout=True)
    colours = plt.get_cmap('tab20')
    marks = 'osv^D*XP<>dhp8'
    for i, name in enumerate(SOLVERS):
        for axis, values in zip(axes, (flow_error, distance), strict=True):
            points = [(calls, values[name, calls]) for calls in BUDGETS if (name, calls) in values]
            if points:
                bold = name in ('ddim', 'dpmpp_2m')
                axis.loglog(
                    *np.transpose(points),
                    label=name,
                    color='black' if name == 'ddim' else 'red' if name == 'dpmpp_2m' else colours(i % 20),
                    marker=marks[i % len(marks)],
                    markersize=4,
                    linewidth=2.5 if bold else 1,
                    linestyle='--' if DESCRIPTIONS[name].stochastic else '-',
                    zorder=3 if bold else 2,
                )
    axes[1].axhline(floor, color='grey', linestyle=':', label='exact draws')
    axes[0].set_ylim(5e-5, 10)  # PNDM's Runge-Kutta steps from pure noise would hide the rest
    axes[0].set_title('distance to the exact probability flow')
    axes[1].set_title('distance to the data (dashed: solvers that draw noise)')
    for axis in axes:
        axis.set_xlabel(f'model calls (spacing {spacing})')
        axis.set_xticks(BUDGETS, [str(calls) for calls in BUDGETS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7, ncol=2, loc='upper right')
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == '__main__':
    main()
