"""Samples of one trained model by DDIM and DDPM at several numbers of steps and guidance scales: a table and a picture.

python experiments/ddim_steps/run.py --workdir=runs/digits
"""

import argparse
import time
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax.evaluation import Setting, score
from diffusion_jax.experiment import load_data, read_record
from diffusion_jax.images import grid, save_png
from diffusion_jax.pipelines import load_pipeline

SETTINGS = [
    *({'solver': 'ddim', 'steps': steps, 'guidance_scale': 2.0} for steps in (2, 5, 10, 25, 50, 100)),
    *({'solver': 'ddim', 'steps': 25, 'guidance_scale': scale} for scale in (None, 1.5, 4.0)),
    {'solver': 'ddim', 'steps': 25, 'guidance_scale': 2.0, 'eta': 1.0},
    {'solver': 'ddpm', 'steps': 100, 'guidance_scale': 2.0, 'variance': 'small'},
    {'solver': 'ddpm', 'steps': 100, 'guidance_scale': 2.0, 'variance': 'large'},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', required=True, help='a finished class-conditional run')
    parser.add_argument('--num', type=int, default=200, help='samples per row of the table')
    arguments = parser.parse_args()
    pipeline, step = load_pipeline(arguments.workdir)
    splits = load_data(ConfigDict(read_record(arguments.workdir)[0]))
    rows, pictures = [], []
    for settings in SETTINGS:
        pipeline(min(arguments.num, 100), **settings)  # compiles
        began = time.perf_counter()
        samples = pipeline(arguments.num, **settings)
        seconds = time.perf_counter() - began
        setting = Setting(splits, pipeline.class_names, arguments.num, pipeline=pipeline)
        scores = score(samples, setting, ['class_agreement', 'nearest_neighbour', 'frechet_distance']).scores
        options = ', '.join(f'{name} {settings[name]}' for name in ('eta', 'variance') if name in settings)
        rows.append(
            f'| {settings["solver"]}{", " + options if options else ""} | {settings["steps"]} '
            f'| {settings["guidance_scale"] or "none"} | {100 * scores["class_agreement"]:.1f}% '
            f'| {scores["median_distance_to_training_set"]:.3f} | {100 * scores["near_copies"]:.1f}% '
            f'| {scores["frechet_distance"]:.3f} | {1000 * seconds / arguments.num:.1f} |'
        )
        print(rows[-1], flush=True)
        pictures.append(samples.images[:20])
    folder = Path(__file__).parent
    save_png(folder / 'samples.png', grid(np.concatenate(pictures), columns=20, min_side=24))
    columns = ['solver', 'steps', 'guidance', 'class agreement', 'median distance to training set', 'near copies']
    columns += ['Frechet distance', 'ms each']
    header = (
        f'Step {step} of `{arguments.workdir}`, {arguments.num} samples a row.\n\n'
        f'| {" | ".join(columns)} |\n{"| --- " * len(columns)}|\n'
    )
    (folder / 'table.md').write_text(header + '\n'.join(rows) + '\n')


if __name__ == '__main__':
    main()
