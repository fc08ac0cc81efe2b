"""What a trained model does to images that are there already: vary, fill in, invert, interpolate, restore.

    python experiments/editing/run.py --workdir=runs/digits

Unseen test images of ten classes go through each; writes images.png and table.md beside this file.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import guidance, samplers
from diffusion_jax.experiment import load_data, read_record
from diffusion_jax.images import grid, save_png, to_float, to_uint8
from diffusion_jax.pipelines import load_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', required=True, help='a finished class-conditional run')
    parser.add_argument('--steps', type=int, default=100)
    arguments = parser.parse_args()
    pipeline, step = load_pipeline(arguments.workdir)
    test = load_data(ConfigDict(read_record(arguments.workdir)[0])).test
    labels = list(range(pipeline.num_classes))
    images = test.images[[int(np.flatnonzero(test.labels == label)[0]) for label in labels]]
    x0 = jnp.asarray(to_float(images))
    schedule, denoiser = pipeline.schedule, pipeline.denoiser(labels)
    key = jax.random.key(0)
    times = samplers.time_grid(schedule, arguments.steps, 'log_snr')

    def run(denoiser, plan, x, known=None):
        return jax.jit(lambda x: samplers.sample(denoiser, plan, x, key, known=known))(x)

    rows, table = [('test images', images)], []

    def add(name, result, measure, against=x0):
        rows.append((name, np.asarray(to_uint8(result))))
        table.append(f'| {name} | {measure} | {float(jnp.sqrt(jnp.mean((result - against) ** 2))):.3f} |')
        print(table[-1], flush=True)

    for strength in (0.3, 0.6, 0.9):
        plan = samplers.plan('dpmpp_2m', schedule, arguments.steps, 'log_snr', strength=strength)
        add(f'image to image, strength {strength}', run(denoiser, plan, samplers.noised(plan, x0, key)), 'to the image')

    half = jnp.arange(x0.shape[2])[None, :, None] < x0.shape[2] // 2
    known = samplers.Known(x0, half)
    noise = jax.random.normal(key, x0.shape)
    hidden = 2 * jnp.where(half, 0.0, x0)  # the error over the half that was hidden, on the scale of the others
    rows.append(('left half known', np.asarray(to_uint8(jnp.where(half, x0, -1.0)))))
    for name, plan in (
        ('filled in by masking', samplers.ddpm(schedule, times)),
        ('filled in by RePaint', samplers.repaint(schedule, times, resamples=5, jump=5)),
    ):
        filled = run(denoiser, plan, noise, known)
        rows.append((name, np.asarray(to_uint8(filled))))
        error = float(jnp.sqrt(jnp.mean((2 * jnp.where(half, 0.0, filled) - hidden) ** 2) / 2))
        table.append(f'| {name} | to the image, hidden half | {error:.3f} |')
        print(table[-1], flush=True)

    for steps in (20, arguments.steps):
        grid_times = samplers.time_grid(schedule, steps, 'log_snr')
        latent = run(denoiser, samplers.ddim_inversion(schedule, grid_times), x0)
        back = run(denoiser, samplers.ddim(schedule, grid_times), latent)
        add(f'inverted and back, {steps} steps', back, 'to the image')
    fraction = jnp.linspace(0, 1, len(labels))
    start, end = (jnp.repeat(latent[i : i + 1], len(labels), 0) for i in (3, 8))
    mixed = run(
        pipeline.denoiser([3 if f < 0.5 else 8 for f in fraction]),
        samplers.ddim(schedule, times),
        samplers.slerp(start, end, fraction),
    )
    rows.append(('between the noises of 3 and 8', np.asarray(to_uint8(mixed))))

    def blur(x):
        kernel = jnp.array([0.25, 0.5, 0.25])
        for axis in (1, 2):
            x = sum(w * jnp.roll(x, shift, axis) for w, shift in zip(kernel, (-1, 0, 1), strict=True))
        return x

    for name, operator in (('2x super-resolution', guidance.average_pool(2)), ('deblurring', blur)):
        measured = operator(x0) + 0.05 * jax.random.normal(jax.random.key(1), operator(x0).shape)
        shown = jnp.repeat(
            jnp.repeat(measured, x0.shape[1] // measured.shape[1], 1), x0.shape[2] // measured.shape[2], 2
        )
        rows.append((f'{name}: measured', np.asarray(to_uint8(shown))))
        table.append(f'| {name}, measured | to the image | {float(jnp.sqrt(jnp.mean((shown - x0) ** 2))):.3f} |')
        restoring = guidance.reconstruction(denoiser, operator, measured, 0.05, prior_std=0.6)
        plan = samplers.plan('ddpm', schedule, arguments.steps, 'log_snr', variance='small')
        add(f'{name}, restored', run(restoring, plan, noise), 'to the image')

    folder = Path(__file__).parent
    save_png(folder / 'images.png', grid(np.concatenate([row for _, row in rows]), columns=len(labels), min_side=40))
    names = '\n'.join(f'{i + 1}. {name}' for i, (name, _) in enumerate(rows))
    (folder / 'table.md').write_text(
        f'Step {step} of the run, {arguments.steps} steps unless said otherwise, ten unseen images in [-1, 1].\n\n'
        '| what | distance | root mean square |\n| --- | --- | --- |\n'
        + '\n'.join(table)
        + f'\n\nRows of images.png:\n\n{names}\n'
    )


if __name__ == '__main__':
    main()
