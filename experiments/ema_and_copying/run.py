"""What averaging the weights is worth along training, and when a model copies: training-set size against near copies.

python experiments/ema_and_copying/run.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from study import Study, arguments, fill, percent, table, trained

from diffusion_jax import data
from diffusion_jax.data import Splits
from diffusion_jax.evaluation import score
from diffusion_jax.images import save_png
from diffusion_jax.pipelines import load_pipeline

HERE = Path(__file__).parent
STEPS = (300, 600, 900, 1200)
SIZES = (100, 1000, 10_000, 60_000)
COPYING = ('frechet_distance', 'nearest_neighbour')


def subset(folder: Path, size: int) -> Path:
    """A folder for the data set npz: the first images of the training set, and the whole test set."""
    train, test = data.load('fashion_mnist')
    folder.mkdir(parents=True, exist_ok=True)
    for name, part, count in (('train', train, size), ('test', test, len(test))):
        path = folder / f'{name}.npz'
        if not path.exists():
            names = np.array(part.class_names)
            np.savez(path, images=part.images[:count], labels=part.labels[:count], class_names=names)
    return folder


def main() -> None:
    options = arguments(__doc__, num=1000)
    study = Study(options.runs, options.num)
    averages = []
    # A learning rate that stays keeps the weights moving about; one that decays averages them, too.
    workdir = trained('constant_rate', options.runs, optimizer__decay='constant', train__keep_checkpoints=9)
    for steps in STEPS:
        scores = [study.scores(workdir, at=steps, ema=ema, solver='ddim', steps=25)[0] for ema in (False, True)]
        averages.append(
            [steps, *(each['frechet_distance'] for each in scores), *(each['precision'] for each in scores)]
        )
        print(averages[-1], flush=True)

    sizes, pictures = [], []
    for size in SIZES:
        changes = {}
        if size < 60_000:
            folder = subset(options.runs / f'first{size}' / 'data', size)
            changes = {'data__name': 'npz', 'data__dir': str(folder)}
        workdir = trained('base' if not changes else f'first{size}', options.runs, **changes)
        scores, samples = study.scores(workdir, ('frechet_distance',), solver='ddim', steps=25)
        setting = study.setting(load_pipeline(workdir)[0])
        setting.splits = Splits(study.splits.train.load(np.arange(size)), study.splits.test)
        result = score(samples, setting, ['nearest_neighbour'])
        pictures.append(result.pictures['nearest'])
        copying = result.scores
        distances = (copying['median_distance_to_training_set'], copying['median_distance_of_real_test_images'])
        sizes.append(
            [size, round(1200 * 64 / size, 1), percent(copying['near_copies']), *distances, scores['frechet_distance']]
        )
        print(sizes[-1], flush=True)
    fill(
        HERE / 'README.md',
        averages=table(['step', 'Frechet distance, raw', 'averaged', 'precision, raw', 'averaged'], averages),
        sizes=table(
            [
                'training images',
                'times seen',
                'near copies',
                'median distance to them',
                'of test images',
                'Frechet distance',
            ],
            sizes,
        ),
    )
    save_png(HERE / 'nearest.png', np.concatenate(pictures))


if __name__ == '__main__':
    main()
