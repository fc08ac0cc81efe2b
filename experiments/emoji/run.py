"""What a text-to-image model of emoji draws: grids of prompts, and how often a drawing is of the right category.

    python experiments/emoji/run.py --workdir=runs/emoji --data=data/emoji --out=experiments/emoji

For the share, images are drawn for the names of emoji, --num of the training set and --num held out. The nearest real
emoji of the training set to each (least squares over the image at 16x16 pixels) says what it shows: it counts where
that one is of the category, in Unicode's list, of the name. Chance is the share of pairs of emoji of one category.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from diffusion_jax import data
from diffusion_jax.data import formats
from diffusion_jax.images import grid, save_png
from diffusion_jax.pipelines import load_pipeline

NAMES = [
    'red heart',
    'blue heart',
    'grinning face',
    'smiling cat with heart-eyes',
    'flag: Italy',
    'flag: Japan',
    'woman: blond hair',
    'man: beard',
    'thumbs up',
    'thumbs up: dark skin tone',
    'keycap: 7',
    'full moon',
]
UNSEEN = [
    'flag',
    'purple face',
    'green heart: dark skin tone',
    'cat with sunglasses',
    'blue circle face',
    'woman with red hair: dark skin tone',
]
"""Texts that no emoji has."""
COLUMNS = 8


def draw(pipeline, prompts, options, seeds=None):
    return pipeline(
        len(prompts),
        prompts=prompts,
        seed=seeds or options.seed,
        guidance_scale=options.guidance_scale,
        solver='dpmpp_2m',
        steps=options.steps,
        batch_size=64,
        progress=True,
    ).images


def in_rows(pipeline, prompts, options):
    """A row of seeds for each prompt."""
    texts = [prompt for prompt in prompts for _ in range(COLUMNS)]
    return draw(pipeline, texts, options, seeds=[options.seed + i for i in range(COLUMNS)] * len(prompts))


def small(images):
    """[N, 768], of images at 16x16 pixels."""
    return formats.resize(images, 16).reshape(len(images), -1).astype(np.float64)


def nearest(images, real):
    a, b = small(images), small(real)
    return np.argmin((a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)[None], axis=1)


def spread(size, num):
    return np.linspace(0, size - 1, min(num, size)).round().astype(int)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--data', required=True, type=Path, help='the folder that build.py wrote')
    parser.add_argument('--out', required=True, type=Path)
    parser.add_argument('--num', type=int, default=200, help='names of each split (default: %(default)s)')
    parser.add_argument('--guidance_scale', type=float, default=3.0)
    parser.add_argument('--steps', type=int, default=25)
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    pipeline, step = load_pipeline(options.workdir)
    splits = data.load('captioned_folder', data_dir=str(options.data), resolution=64)
    rows = [json.loads(line) for line in (options.data / 'metadata.jsonl').read_text().splitlines()]
    group, subgroup = ({row['text']: row[key] for row in rows} for key in ('group', 'subgroup'))

    for name, prompts in (('prompts', NAMES), ('unseen', UNSEEN)):
        save_png(options.out / f'{name}.png', grid(in_rows(pipeline, prompts, options), columns=COLUMNS))

    train = splits.train
    lines = ['| names | images | category | sub-category | the very name |', '|---|---|---|---|---|']
    for label, images in (('of the training set', train), ('held out', splits.test)):
        texts = [images.captions[row] for row in spread(len(images), options.num)]
        found = [train.captions[row] for row in nearest(draw(pipeline, texts, options), train.images)]
        shares = [
            np.mean([table[a] == table[b] for a, b in zip(texts, found, strict=True)]) for table in (group, subgroup)
        ]
        same = np.mean([a == b for a, b in zip(texts, found, strict=True)])
        lines.append(f'| {label} | {len(texts)} | {shares[0]:.1%} | {shares[1]:.1%} | {same:.1%} |')
    # What the measure itself reaches: real emoji that are held out.
    real = splits.test
    found = [train.captions[row] for row in nearest(real.images, train.images)]
    shares = [np.mean([t[a] == t[b] for a, b in zip(real.captions, found, strict=True)]) for t in (group, subgroup)]
    lines.append(f'| real, held out | {len(real)} | {shares[0]:.1%} | {shares[1]:.1%} | |')
    counts = [np.unique([t[text] for text in train.captions], return_counts=True)[1] for t in (group, subgroup)]
    chance = [float(np.square(count / count.sum()).sum()) for count in counts]
    lines.append(f'| chance | | {chance[0]:.1%} | {chance[1]:.1%} | |')
    settings = f'Step {step}, guidance {options.guidance_scale}, {options.steps} steps of DPM-Solver++ 2M.'
    print('\n'.join([*lines, '', settings]))


if __name__ == '__main__':
    main()
