"""What the studies on Fashion-MNIST share: models trained once, samples drawn once, and their scores."""

import os

os.environ.setdefault('XLA_FLAGS', f'--xla_force_host_platform_device_count={os.cpu_count()}')  # 1.3 x on two cores

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, pretrained
from diffusion_jax.config import default_config
from diffusion_jax.evaluation import Setting, score
from diffusion_jax.experiment import check_same_run
from diffusion_jax.pipelines import ImagePipeline, Samples, load_pipeline
from diffusion_jax.pipelines.model_file import SHIPPED
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.train import train
from diffusion_jax.weights import sha256_of

RUNS = Path('runs/studies')
EVALUATORS = ('frechet_distance', 'precision_recall', 'class_agreement')
BATCH = 100


def small_config(**changes: Any) -> ConfigDict:
    """Fashion-MNIST, 0.7 M parameters, 1200 steps of 64: three to four minutes on two CPU cores.

    Args:
      changes: 'a.b'=value given as a__b=value.
    """
    config = default_config()
    config.data.name = 'fashion_mnist'
    config.model.patch_size = 2
    config.model.channels = 32
    config.model.channel_multipliers = (1, 2)
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = (7,)
    config.model.time_conditioning = 'scale_shift'
    config.loss.prediction = 'v'
    config.loss.time_sampler = 'stratified'
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.decay = 'cosine'
    config.ema_decay = 0.995
    config.train.num_steps = 1200
    config.train.batch_size = 64
    config.train.eval_every = 300
    config.train.sample_every = 1200
    config.train.checkpoint_every = 300
    config.sample.num = 40
    config.sample.steps = 25
    config.evaluate.after_training = False
    config.update_from_flattened_dict({key.replace('__', '.'): value for key, value in changes.items()})
    return config


def trained(name: str, runs: Path = RUNS, **changes: Any) -> Path:
    """The workdir of a small model with these changes: trained now, gone on with, or, if it is done, as it is."""
    config, workdir = small_config(**changes), runs / name
    if config.train.num_steps not in Checkpoints(workdir, config.train.keep_checkpoints).steps():
        train(config, workdir)
    check_same_run(config, workdir)
    return workdir


def arguments(description: str, num: int) -> argparse.Namespace:
    """What every study can be told: --num and --runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--num', type=int, default=num, help='samples per row of the table')
    parser.add_argument('--runs', type=Path, default=RUNS, help='where models and samples are kept')
    return parser.parse_args()


class Study:
    """Draws and scores samples of Fashion-MNIST models; what was drawn once is kept in `runs`, and not drawn again.

    Args:
      num: samples that each row of a table is computed from.
    """

    def __init__(self, runs: Path, num: int):
        self.runs, self.num = runs, num
        self.splits = data.load('fashion_mnist')

    def scores(
        self,
        model: Path | None,
        evaluators: Sequence[str] = EVALUATORS,
        at: int | None = None,
        ema: bool = True,
        **settings: Any,
    ) -> tuple[dict[str, Any], Samples]:
        """(scores, samples) of a run (None: the pretrained model) sampled with these settings.

        Args:
          at: the step of the checkpoint; the newest by default.
          ema: the averaged parameters, or the raw ones.

        Samples are held against the test set, in the shipped classifier's features.
        """
        num = self.num
        folder = model or self.runs / 'pretrained_fashion_mnist'
        if model is None:
            pipeline, step = pretrained('fashion_mnist'), sha256_of(SHIPPED / 'fashion_mnist.safetensors')
        else:
            pipeline, step = load_pipeline(model, 'newest' if at is None else str(at), ema)
        key = json.dumps([step, ema, num, settings], sort_keys=True, default=str)
        path = folder / 'studied' / f'{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz'
        if not path.exists():
            samples = pipeline(num, **settings, batch_size=BATCH, progress=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix('.part.npz')
            np.savez_compressed(part, images=samples.images, labels=samples.labels, settings=key)
            part.replace(path)
        with np.load(path) as stored:
            samples = Samples(stored['images'], stored['labels'])
        setting = self.setting(pipeline, num)
        return score(samples, setting, evaluators).scores, samples

    def seconds_per_image(self, **settings: Any) -> float:
        """Of the pretrained model, in batches of 100: of two batches the faster, compiled before.

        Of more than 500 steps there is one batch, with the time of compiling, which is a twentieth of it.
        """
        pipeline, times = pretrained('fashion_mnist'), []
        for _ in range(3 if self.calls(**settings) <= 500 else 1):
            began = time.perf_counter()
            pipeline(BATCH, **settings, batch_size=BATCH)
            times.append(time.perf_counter() - began)
        return min(times) / BATCH

    def calls(self, solver: str, steps: int, spacing: str = 'trailing', **options: Any) -> int:
        """How often the pretrained model is called."""
        return pretrained('fashion_mnist').plan(solver, steps, spacing, **options).num_calls

    def setting(self, pipeline: ImagePipeline, num: int | None = None) -> Setting:
        return Setting(
            self.splits,
            pipeline.class_names,
            num or self.num,
            reference_name='test',
            pipeline=pipeline,
            cache=self.runs / 'cache',
        )

    def real(self) -> dict[str, Any]:
        """What as many real training images score against the test set."""
        train = self.splits.train
        rng = np.random.RandomState(0)  # as many of each class, as samples are
        of_class = [np.flatnonzero(train.labels == label) for label in range(train.num_classes)]
        rows = np.concatenate([rng.choice(rows, self.num // len(of_class), replace=False) for rows in of_class])
        setting = Setting(self.splits, train.class_names, self.num, reference_name='test', cache=self.runs / 'cache')
        return score(Samples(train.images[rows], train.labels[rows]), setting, EVALUATORS).scores


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown, numbers to three digits."""

    def cell(value: Any) -> str:
        return f'{value:.3g}' if isinstance(value, float) and abs(value) < 100 else str(value)

    lines = [list(heads), ['---'] * len(heads), *([cell(value) for value in row] for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def fill(page: Path, **tables: str) -> None:
    """Puts each table into a page, between <!-- NAME --> and <!-- /NAME -->."""
    text = page.read_text()
    for name, content in tables.items():
        begin, end = f'<!-- {name} -->', f'<!-- /{name} -->'
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f'{before}{begin}\n\n{content}\n\n{end}{after}'
    page.write_text(text)


def percent(share: float) -> str:
    return f'{100 * share:.1f}%'
