"""Linear, scaled linear, sigmoid and cosine schedules: curves, what each step is worth, quality at equal training.

python experiments/noise_schedules/run.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np
from study import Study, arguments, fill, percent, table, trained

from diffusion_jax import samplers, schedules
from diffusion_jax.denoisers import clip_x0
from diffusion_jax.evaluation import score
from diffusion_jax.evaluation.likelihood import vlb_bits_per_dim
from diffusion_jax.evaluation.result import evenly
from diffusion_jax.images import grid, save_png, to_float, to_uint8
from diffusion_jax.pipelines import Samples, load_pipeline

HERE = Path(__file__).parent
NAMES = ('linear', 'scaled_linear', 'sigmoid', 'cosine')
SKIPPED = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
LIKELIHOODS = 32  # test images


def per_step(study: Study, workdir: Path) -> tuple[np.ndarray, float]:
    """(bits per dimension of each index of the chain [T], their sum with the prior's) over some test images."""
    pipeline, _ = load_pipeline(workdir)
    test = study.splits.test.load(evenly(len(study.splits.test), LIKELIHOODS))

    @jax.jit
    def bits(params, images, labels, key):
        denoiser = clip_x0(pipeline.denoiser_of(params, labels))
        return vlb_bits_per_dim(denoiser, pipeline.schedule, to_float(images), key, variance='large')

    bound = bits(pipeline.params, test.images, test.labels, jax.random.key(0))
    return np.asarray(bound.terms).mean(axis=0), float(bound.total.mean())


def without_the_noisiest(study: Study, workdir: Path, fraction: float, num: int) -> dict:
    """Scores of 40 DDIM steps but the first, from pure noise as if it were x_t (Nichol & Dhariwal 2021, fig. 4)."""
    pipeline, _ = load_pipeline(workdir)
    plan = pipeline.plan('ddim', 40, 'trailing', strength=1 - fraction)

    @jax.jit
    def draw(params, labels, key):
        denoiser = pipeline.denoiser_of(params, labels)
        noise = jax.random.normal(key, (len(labels), *pipeline.image_shape))
        return to_uint8(samplers.sample(denoiser, plan, noise, key, clip=True))

    labels = np.resize(np.arange(10), num)
    images = [draw(pipeline.params, labels[i : i + 250], jax.random.key(i)) for i in range(0, num, 250)]
    samples = Samples(np.concatenate([np.asarray(each) for each in images]), labels)
    return score(samples, study.setting(pipeline, num), ['frechet_distance']).scores


def main() -> None:
    options = arguments(__doc__, num=2000)
    study = Study(options.runs, options.num)
    rows, usefulness, skipped, pictures = [], {}, {}, []
    for name in NAMES:
        workdir = trained('base' if name == 'cosine' else f'schedule_{name}', options.runs, schedule__name=name)
        scores, samples = study.scores(workdir, solver='ddim', steps=25)
        many, _ = study.scores(workdir, solver='ddim', steps=100)
        usefulness[name], total = per_step(study, workdir)
        shares = [scores['precision'], scores['recall'], percent(scores['class_agreement'])]
        rows.append([name, scores['frechet_distance'], many['frechet_distance'], *shares, total])
        print(rows[-1], flush=True)
        pictures.append(samples.images[:20])
        skipped[name] = [
            without_the_noisiest(study, workdir, fraction, options.num // 2)['frechet_distance'] for fraction in SKIPPED
        ]
        print(skipped[name], flush=True)
    heads = ['schedule', 'Frechet distance, DDIM-25', 'DDIM-100', 'precision', 'recall', 'class agreement', 'bits/dim']
    fill(
        HERE / 'README.md',
        scores=table(heads, rows),
        skipped=table(
            ['schedule', *(f'{100 * fraction:g}%' for fraction in SKIPPED)],
            [[name, *values] for name, values in skipped.items()],
        ),
    )
    save_png(HERE / 'samples.png', grid(np.concatenate(pictures), columns=20, min_side=28))
    draw(usefulness, skipped)


def draw(usefulness: dict, skipped: dict) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout='constrained')
    FigureCanvasAgg(figure)
    (alphas, log_snrs), (bits, skips) = figure.subplots(2, 2)
    t = np.arange(1, 1001) / 1000
    for name in NAMES:
        schedule = schedules.SCHEDULES[name](1000)
        alphas.plot(t, np.asarray(schedule.alpha(t)) ** 2, label=name)
        log_snrs.plot(t, np.asarray(schedule.log_snr(t)), label=name)
        bits.plot(t, np.maximum(usefulness[name], 1e-8), label=name, linewidth=0.8)
        skips.plot(SKIPPED, skipped[name], 'o-', label=name, markersize=4)
    alphas.set(xlabel='t / T', ylabel='alpha-bar')
    log_snrs.set(xlabel='t / T', ylabel='log-SNR')
    bits.set(xlabel='t / T', ylabel='bits per dimension of the step', yscale='log')
    skips.set(xlabel='share of the noisiest steps left out', ylabel='Frechet distance', yscale='log')
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    alphas.legend()
    figure.savefig(HERE / 'curves.png', dpi=110)


if __name__ == '__main__':
    main()
