"""Pixels, patches of pixels and latents at equal size and quality: how fast each learns, and how fast it draws.

    python main.py --config=configs/fashion_mnist_autoencoder.py --workdir=runs/fashion_mnist_autoencoder
    python main.py --config=configs/fashion_mnist_autoencoder.py --workdir=runs/fashion_mnist_autoencoder --mode=export
    python experiments/latents/run.py

Small networks of Fashion-MNIST (28x28, class-conditional), each trained for some numbers of steps, each with its own
cosine decay; the one on pixels for its speed alone. Quality is the Frechet distance of --num samples of 25 DDIM steps,
in the shipped classifier's features. A step's and an image's seconds are medians of --turns turns that the networks
take one after the other. Models, samples and what was measured are kept in --runs; a second start goes on where the
first one stopped.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from study import RUNS, Study, fill, percent, table, trained

from diffusion_jax.experiment import make_experiment, read_record
from diffusion_jax.images import grid, save_png
from diffusion_jax.models.functional import count_params
from diffusion_jax.pipelines import load_pipeline
from diffusion_jax.training.optimizer import make_optimizer
from diffusion_jax.training.step import init_state

HERE = Path(__file__).parent
BATCH, STEPS = 64, 25
LEVELS = {
    'pixels': {'model__patch_size': 1, 'model__channel_multipliers': (1, 2, 2)},
    'patches of 2x2': {},
    'latents of 4x4': {'model__patch_size': 1, 'model__channel_multipliers': (2,), 'model__channels': 40},
}
"""The networks: pixels at 28, 14 and 7 positions a side; patches at 14 and 7; latents at 7."""


DEFAULT = ('latents of 4x4:300,600', 'patches of 2x2:300,600', 'pixels:150')


def changes_of(kind: str, autoencoder: Path, runs: Path) -> dict:
    latents = {'latents__autoencoder': str(autoencoder), 'latents__cache_dir': str(runs / 'latents_of_images')}
    return LEVELS[kind] | (latents if kind.startswith('latents') else {})


def flops_of(function, *arguments) -> float:
    return jax.jit(function).lower(*jax.eval_shape(lambda: arguments)).cost_analysis()['flops']


class Timed:
    """A model's training step and its sampling, compiled."""

    def __init__(self, workdir: Path):
        record, info = read_record(workdir)
        from ml_collections import ConfigDict

        config = ConfigDict(record)
        experiment = make_experiment(config, info)
        self.pipeline, _ = load_pipeline(workdir)
        x = jnp.zeros((BATCH, *info.model_shape))
        label = jnp.zeros(BATCH, jnp.int32)
        params = self.pipeline.params
        self.parameters = count_params(params)

        def call(params, x, label):
            return experiment.apply(params, x, jnp.ones(len(x)), label=label)

        self.call_flops = flops_of(call, params, x[:1], label[:1])
        space = self.pipeline.latents
        self.decoder_flops = 0.0 if space is None else flops_of(space.decoder, space.params, x[:1])
        optimizer, _ = make_optimizer(**config.optimizer, num_steps=config.train.num_steps)
        state = init_state(experiment.init, optimizer, 0, experiment.loss_history)

        @jax.jit
        def step(params, opt_state, x, label, key):
            def loss(params):
                return experiment.loss(params, x, key, label=label).mean()

            value, gradient = jax.value_and_grad(loss)(params)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return jax.tree.map(jnp.add, params, updates), opt_state, value

        self._step = lambda: jax.block_until_ready(step(state.params, state.opt_state, x, label, jax.random.key(0)))
        self.step_s, self.image_s = [], []

    def turn(self, keep: bool) -> None:
        began = time.perf_counter()
        self._step()
        step = time.perf_counter() - began
        began = time.perf_counter()
        self.pipeline(BATCH, steps=STEPS, batch_size=BATCH)
        image = (time.perf_counter() - began) / BATCH
        if keep:
            self.step_s.append(step)
            self.image_s.append(image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--autoencoder', type=Path, default=Path('runs/fashion_mnist_autoencoder/model.safetensors'))
    parser.add_argument('--num', type=int, default=1000, help='samples per row of the table')
    parser.add_argument('--runs', type=Path, default=RUNS, help='where models and samples are kept')
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument(
        '--train',
        nargs='+',
        default=DEFAULT,
        help='network:steps,steps,.. (default: %(default)s)',
        metavar='KIND:STEPS',
    )
    options = parser.parse_args()
    study = Study(options.runs, options.num)
    rows, pictures, newest = [], [], {}
    for kind, numbers in (each.split(':') for each in options.train):
        for number in map(int, numbers.split(',')):
            changes = changes_of(kind, options.autoencoder, options.runs) | {'train__num_steps': number}
            changes['train__sample_every'] = number
            name = f'{kind.split()[0]}_{number}'
            newest[kind] = trained(name, options.runs, **changes)
            if kind == 'pixels':  # for its speed alone: as long a training as the others' would take an hour
                continue
            scores, samples = study.scores(newest[kind], solver='ddim', steps=STEPS)
            rows.append([kind, number, number * BATCH, scores])
            pictures.append(samples.images[:20])
            print(kind, number, scores, flush=True)
    save_png(HERE / 'samples.png', grid(np.concatenate(pictures), columns=20, min_side=28))
    timed = {kind: Timed(workdir) for kind, workdir in newest.items()}
    for turn in range(options.turns + 1):
        for each in timed.values():
            each.turn(keep=turn > 0)
    speed = {kind: (statistics.median(each.step_s), statistics.median(each.image_s)) for kind, each in timed.items()}
    costs = [
        [
            kind,
            f'{each.parameters / 1e6:.2f} M',
            f'{each.call_flops / 1e6:.0f}',
            f'{(STEPS * each.call_flops + each.decoder_flops) / 1e9:.2f}',
            f'{BATCH / speed[kind][0]:.0f}',
            f'{1000 * speed[kind][1]:.1f}',
        ]
        for kind, each in timed.items()
    ]
    quality = [
        [
            kind,
            number,
            f'{images:,}',
            f'{number * speed[kind][0] / 60:.1f}',
            scores['frechet_distance'],
            scores['precision'],
            scores['recall'],
            percent(scores['class_agreement']),
        ]
        for kind, number, images, scores in rows
    ]
    heads = ['network on', 'parameters', 'MFLOP a call', f'GFLOP an image ({STEPS} calls)', 'training images/s']
    fill(
        HERE / 'README.md',
        costs=table([*heads, 'ms an image'], costs),
        quality=table(
            [
                'network on',
                'steps',
                'training images',
                'minutes',
                'Frechet distance',
                'precision',
                'recall',
                'class agreement',
            ],
            quality,
        ),
    )


if __name__ == '__main__':
    main()
