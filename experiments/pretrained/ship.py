"""Puts a finished run into the package: its averaged parameters in float16, and a card that says how it was made.

python experiments/pretrained/ship.py --config=fashion_mnist --workdir=runs/fashion_mnist \
    --evaluation=runs/pretrained_fashion_mnist/evaluation.json
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax.experiment import read_record
from diffusion_jax.models import count_params
from diffusion_jax.pipelines import load_pipeline
from diffusion_jax.pipelines.model_file import SHIPPED, save_model
from diffusion_jax.training.metrics import read_metrics

SCORES = ('frechet_distance', 'precision', 'recall', 'density', 'coverage', 'class_agreement', 'near_copies')


def minutes(rows: list[dict]) -> float:
    """Time spent in training steps."""
    speeds = [row for row in rows if 'steps_per_second' in row]
    before = [0, *(row['step'] for row in speeds)]
    return sum((row['step'] - b) / row['steps_per_second'] for row, b in zip(speeds, before, strict=False)) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', required=True, help='its name in configs/')
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--evaluation', required=True, help='the evaluation.json of --mode=evaluate')
    parser.add_argument('--hardware', default='two shared CPU cores')
    arguments = parser.parse_args()
    record, info = read_record(arguments.workdir)
    pipeline, step = load_pipeline(arguments.workdir)
    params = jax.tree.map(np.asarray, pipeline.params)
    path = SHIPPED / f'{arguments.config}.safetensors'
    save_model(path, params, ConfigDict(record), info, step, ema=True, dtype='float16')

    told = json.loads(Path(arguments.evaluation).read_text())
    scores, sample = told['scores'], told['sample']
    rows = '\n'.join(
        f'| {name.replace("_", " ").capitalize()} | {scores[name]:.4g} | {scores[real]:.4g} |'
        if (real := f'{name}_of_real_images') in scores
        else f'| {name.replace("_", " ").capitalize()} | {scores[name]:.4g} | |'
        for name in SCORES
        if name in scores
    )
    reference = told['reference']
    which = {'train': 'training', 'test': 'test'}[reference['name']]
    shape = 'x'.join(map(str, info.image_shape))
    card = f"""# {arguments.config}

{shape} images of {', '.join(info.class_names)}: a U-Net of {count_params(params) / 1e6:.2f} M
parameters, conditioned on the class, with guidance; averaged parameters of step {step:,}, stored in float16
({path.stat().st_size / 1e6:.1f} MB).

```python
import diffusion_jax as dj

images = dj.pretrained('{arguments.config}')(16, guidance_scale={sample['guidance_scale']}).images  # uint8
```

Made with `python main.py --config=configs/{arguments.config}.py --workdir=runs/{arguments.config}`, in
{minutes(read_metrics(arguments.workdir)):.0f} minutes of training on {arguments.hardware}
(JAX {told['versions']['jax']}).

Scored with `--mode=evaluate` on {told['num']:,} samples: {sample['solver']}, {sample['steps']} steps, guidance
{sample['guidance_scale']}, seed {sample['seed']}; features of the shipped {told['features']['name']} classifier, held
against the {reference[reference['name']]:,} {which} images. Beside it, what the other split's real images score.

| | samples | real images |
| --- | --- | --- |
{rows}

The classifier reads {100 * scores['classifier_accuracy_on_real_test_images']:.1f}% of unseen real images right.
Near copies is the share of samples nearer to a training image than 99% of unseen real images are: 0.01 for samples as
new as these.
"""
    (SHIPPED / f'{arguments.config}.md').write_text(card)
    print(card)


if __name__ == '__main__':
    main()
