"""What the guidance scale does to the pretrained Fashion-MNIST model: fidelity, diversity, distance, saturation.

python experiments/guidance_scale/run.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from study import Study, arguments, fill, percent, table

from diffusion_jax.images import grid, save_png

HERE = Path(__file__).parent
SCALES = (0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 7.5, 12.0)


def saturated(images: np.ndarray) -> float:
    """The share of pixels at the brightest level, 250 and above."""
    return float((images >= 250).mean())


def main() -> None:
    options = arguments(__doc__, num=2000)
    study = Study(options.runs, options.num)
    rows, pictures, points = [], [], []
    for scale in SCALES:
        scores, samples = study.scores(None, guidance_scale=scale, solver='ddim', steps=25)
        points.append((scale, scores))
        rows.append(
            [
                f'{scale:g}',
                percent(scores['class_agreement']),
                scores['precision'],
                scores['density'],
                scores['recall'],
                scores['coverage'],
                scores['frechet_distance'],
                percent(saturated(samples.images)),
            ]
        )
        pictures.append(samples.images[:20])
    real = study.real()
    rows.append(
        [
            'real training images',
            percent(real['class_agreement']),
            *(real[name] for name in ('precision', 'density', 'recall', 'coverage', 'frechet_distance')),
            percent(saturated(study.splits.train.images)),
        ]
    )
    names = ('class agreement', 'precision', 'density', 'recall', 'coverage', 'Frechet distance', 'white pixels')
    heads = ['guidance scale', *names]
    fill(HERE / 'README.md', scores=table(heads, rows))
    save_png(HERE / 'samples.png', grid(np.concatenate(pictures), columns=20, min_side=28))
    draw(points)


def draw(points: list) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout='constrained')
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    scales = [scale for scale, _ in points]
    for name in ('class_agreement', 'precision', 'recall', 'coverage'):
        left.plot(scales, [scores[name] for _, scores in points], 'o-', label=name.replace('_', ' '), markersize=4)
    left.set(xlabel='guidance scale', ylabel='share')
    left.legend()
    right.plot(scales, [scores['frechet_distance'] for _, scores in points], 'o-', markersize=4)
    right.set(xlabel='guidance scale', ylabel='Frechet distance to the test set', yscale='log')
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(HERE / 'curves.png', dpi=110)


if __name__ == '__main__':
    main()
