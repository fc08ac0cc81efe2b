"""Quality against model calls and seconds, with the pretrained model: DDPM, DDIM, DPM-Solver++, UniPC, Heun.

python experiments/few_steps/run.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from study import Study, arguments, fill, percent, table

from diffusion_jax.images import grid, save_png

HERE = Path(__file__).parent
FEW = (5, 10, 15, 20, 25)
SOLVERS = {
    'DDIM': [{'solver': 'ddim', 'steps': steps} for steps in (5, 10, 15, 20, 25, 50, 100, 1000)],
    'DPM-Solver++ 2M': [{'solver': 'dpmpp_2m', 'steps': steps} for steps in FEW],
    'UniPC': [{'solver': 'unipc', 'steps': steps} for steps in FEW],
    'Heun': [{'solver': 'heun', 'steps': steps, 'spacing': 'karras'} for steps in (3, 5, 8, 10, 13)],
    'DDPM': [{'solver': 'ddpm', 'steps': steps} for steps in (50, 100, 1000)],
}


def main() -> None:
    options = arguments(__doc__, num=1000)
    study = Study(options.runs, options.num)
    rows, points, pictures = [], {}, []
    for name, settings in SOLVERS.items():
        for each in settings:
            scores, samples = study.scores(None, **each)
            calls, seconds = study.calls(**each), study.seconds_per_image(**each)
            points.setdefault(name, []).append((calls, seconds, scores))
            rows.append(
                [
                    name,
                    each['steps'],
                    calls,
                    round(1000 * seconds, 1),
                    scores['frechet_distance'],
                    scores['precision'],
                    scores['recall'],
                    percent(scores['class_agreement']),
                ]
            )
            print(rows[-1], flush=True)
            pictures.append(samples.images[:20])
    real = study.real()
    shares = (real['precision'], real['recall'], percent(real['class_agreement']))
    rows.append(['real training images', '', '', '', real['frechet_distance'], *shares])
    heads = [
        'solver',
        'steps',
        'model calls',
        'ms an image',
        'Frechet distance',
        'precision',
        'recall',
        'class agreement',
    ]
    fill(HERE / 'README.md', scores=table(heads, rows))
    save_png(HERE / 'samples.png', grid(np.concatenate(pictures), columns=20, min_side=28))
    draw(points, real['frechet_distance'])


def draw(points: dict, real: float) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout='constrained')
    FigureCanvasAgg(figure)
    for axes, of in zip(figure.subplots(1, 2, sharey=True), ('model calls', 'seconds per 1000 images'), strict=True):
        for name, each in points.items():
            x = [calls if of == 'model calls' else 1000 * seconds for calls, seconds, _ in each]
            axes.plot(x, [scores['frechet_distance'] for *_, scores in each], 'o-', label=name, markersize=4)
        axes.axhline(real, color='gray', linestyle=':', label='as many real images')
        axes.set(xlabel=of, xscale='log', yscale='log')
        axes.grid(alpha=0.3, which='both')
    figure.axes[0].set_ylabel('Frechet distance to the test set')
    figure.axes[0].legend()
    figure.savefig(HERE / 'curves.png', dpi=110)


if __name__ == '__main__':
    main()
