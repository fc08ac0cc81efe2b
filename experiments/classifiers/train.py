"""Train a small classifier, whose features and readings the evaluators use, and write it as a safetensors file.

python experiments/classifiers/train.py --data=fashion_mnist \
    --out=diffusion_jax/shipped/fashion_mnist_classifier.safetensors

Any labelled data set will do: --data=folder --data_dir=FOLDER --resolution=32 --out=mine.safetensors, and then
--config.evaluate.features=classifier --config.evaluate.weights=mine.safetensors scores with it.
"""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

os.environ.setdefault('XLA_FLAGS', f'--xla_force_host_platform_device_count={os.cpu_count()}')

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import trange

from diffusion_jax import UsageError, data
from diffusion_jax.evaluation.features import CLASSIFIER, check_num, classifier_apply, in_batches
from diffusion_jax.images import to_float
from diffusion_jax.models import count_params
from diffusion_jax.training.sharding import make_mesh, on_mesh, put, replicated, sharded_batch
from diffusion_jax.weights import save_weights

# Per data set, where it is not the default: how often the images are seen, and how they are varied.
RECIPES = {'digits': {'epochs': 120, 'widths': (32, 64)}, 'fashion_mnist': {'epochs': 12, 'flip': True}}


def varied(images: jax.Array, key: jax.Array, shift: int, flip: bool) -> jax.Array:
    """Moved by up to `shift` pixels in each direction, over a border of black, and perhaps mirrored."""
    key_shift, key_flip = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    corners = jax.random.randint(key_shift, (len(images), 2), 0, 2 * shift + 1)
    moved = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:]))(
        padded, corners
    )
    mirrored = jax.random.bernoulli(key_flip, 0.5, (len(images), 1, 1, 1)) & flip
    return jnp.where(mirrored, moved[:, :, ::-1], moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, help=f'one of {", ".join(data.SOURCES)}')
    parser.add_argument('--data_dir', help='where its files are, if not in their usual place')
    parser.add_argument('--resolution', type=int, help="resize to this; the data's own by default")
    parser.add_argument('--out', type=Path, required=True, help='the .safetensors file to write')
    parser.add_argument('--epochs', type=int)
    parser.add_argument('--batch_size', type=int, default=128)
    parser.add_argument('--learning_rate', type=float, default=2e-3)
    parser.add_argument('--shift', type=int, help='pixels, 1/14 of the side by default')
    parser.add_argument('--flip', action='store_true', default=None, help='mirror at random')
    parser.add_argument('--seed', type=int, default=0)
    arguments = parser.parse_args()
    recipe = {'epochs': 20, 'widths': (32, 64, 96), 'flip': False} | RECIPES.get(arguments.data, {})
    recipe |= {key: value for key, value in vars(arguments).items() if key in recipe and value is not None}
    chosen = {'data_dir': arguments.data_dir, 'resolution': arguments.resolution}
    splits = data.load(arguments.data, **{key: value for key, value in chosen.items() if value is not None})
    train, test = (part.in_memory() for part in splits)
    if not train.num_classes:
        raise UsageError('a classifier needs labelled images.')
    check_num('training images', len(train), arguments.batch_size)
    resolution = train.image_shape[0]
    shift = round(resolution / 14) if arguments.shift is None else arguments.shift

    architecture = {
        'resolution': resolution,
        'image_channels': train.image_shape[2],
        'num_classes': train.num_classes,
        'widths': recipe['widths'],
    }
    init, apply = classifier_apply(architecture)
    mesh = make_mesh()
    steps_per_epoch = len(train) // arguments.batch_size
    steps = recipe['epochs'] * steps_per_epoch
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, arguments.learning_rate, 0.1), weight_decay=1e-4)
    key_init, key = jax.random.split(jax.random.key(arguments.seed))
    params = put(jax.jit(init)(key_init), replicated(mesh))
    state = (params, put(jax.jit(optimizer.init)(params), replicated(mesh)))

    def step(state, images, labels, key):
        params, moments = state
        key_images, key_dropout = jax.random.split(key)
        x = to_float(varied(images, key_images, shift, recipe['flip']))

        def loss(params):
            _, logits = apply(params, x, dropout_key=key_dropout)
            soft = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), 0.1)
            return optax.softmax_cross_entropy(logits, soft).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    step = jax.jit(on_mesh(mesh, step), donate_argnums=0)
    began = time.perf_counter()
    rng = np.random.default_rng(arguments.seed)
    bar = trange(recipe['epochs'], desc='training', unit='epoch')
    for epoch in bar:
        order = rng.permutation(len(train))[: steps_per_epoch * arguments.batch_size].reshape(steps_per_epoch, -1)
        for index, rows in enumerate(order):
            batch = put((train.images[rows], train.labels[rows]), sharded_batch(mesh))
            state, value = step(state, *batch, jax.random.fold_in(key, epoch * steps_per_epoch + index))
        bar.set_postfix_str(f'loss {float(value):.4f}')
    seconds = time.perf_counter() - began

    params = jax.device_get(state[0])
    accuracies = {}
    for name, part in (('train', train), ('test', test)):
        logits = np.concatenate([out[1] for out in in_batches(apply, params, part.images, mesh=mesh)])
        accuracies[name] = float((logits.argmax(axis=1) == part.labels).mean())
    metadata = {
        'kind': CLASSIFIER,
        'architecture': architecture,
        'image_shape': train.image_shape,
        'class_names': train.class_names,
        'accuracy': accuracies,
        'command': shlex.join(['python', *sys.argv]),
    }
    save_weights(arguments.out, params, metadata, 'float16')
    print(
        f'{arguments.out}: {count_params(params):,} parameters, {arguments.out.stat().st_size / 1000:.0f} kB; '
        f'accuracy {accuracies["train"]:.4f} (train), {accuracies["test"]:.4f} (test); {seconds:.0f} s'
    )


if __name__ == '__main__':
    try:
        main()
    except UsageError as error:
        sys.exit(f'error: {error}')
