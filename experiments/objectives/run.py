"""What is predicted, how the error is weighted, a learned variance: quality and bits per dimension.

python experiments/objectives/run.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from study import Study, arguments, fill, percent, table, trained

from diffusion_jax.images import grid, save_png

HERE = Path(__file__).parent
EVALUATORS = ('frechet_distance', 'precision_recall', 'class_agreement', 'bits_per_dim')


def main() -> None:
    options = arguments(__doc__, num=2000)
    study = Study(options.runs, options.num)
    rows, pictures = [], []
    for prediction in ('eps', 'x0', 'v'):
        for weighting in ('simple', 'min_snr'):
            base = (prediction, weighting) == ('v', 'simple')
            changes = {'loss__prediction': prediction, 'loss__weighting': {'name': weighting}}
            name = 'base' if base else f'{prediction}_{weighting}'
            rows.append(row(study, options.runs, name, changes, pictures, prediction, weighting, 'fixed'))
    changes = {'loss__prediction': 'eps', 'model__learned_variance': True, 'loss__vlb_weight': 0.001}
    learned = ('eps', 'simple + 0.001 VLB', 'learned')
    rows.append(row(study, options.runs, 'eps_simple_learned_variance', changes, pictures, *learned))
    heads = ['predicts', 'weighting', 'variance', 'Frechet distance', 'precision', 'recall', 'class agreement']
    fill(HERE / 'README.md', scores=table([*heads, 'bits/dim (standard error)'], rows))
    save_png(HERE / 'samples.png', grid(np.concatenate(pictures), columns=20, min_side=28))


def row(study: Study, runs: Path, name: str, changes: dict, pictures: list, *words: str) -> list:
    workdir = trained(name, runs, **({} if name == 'base' else changes))
    scores, samples = study.scores(workdir, EVALUATORS, solver='ddim', steps=25, spacing='linspace')
    pictures.append(samples.images[:20])
    shares = [scores['precision'], scores['recall'], percent(scores['class_agreement'])]
    bits = f'{scores["bits_per_dim"]:.2f} ({scores["bits_per_dim_standard_error"]:.2f})'
    print(words, scores['frechet_distance'], bits, flush=True)
    return [*words, scores['frechet_distance'], *shares, bits]


if __name__ == '__main__':
    main()
