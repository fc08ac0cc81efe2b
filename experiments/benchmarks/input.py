"""Images per second that the input side gives, beside those that the training step takes, for each shipped config.

    python experiments/benchmarks/input.py

Data that must be had elsewhere are random images of the right kind: CIFAR-10's binary files; a folder of JPEG files of
320x240 for unet64. The step is that of the config, at a smaller batch where a whole one takes minutes on a CPU: its
time is linear in the batch (run.py --parts scaling).
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from configs import cifar10, digits, fashion_mnist, unet64  # noqa: E402
from diffusion_jax.data.batches import Batches  # noqa: E402
from diffusion_jax.experiment import info_of, load_data, make_experiment  # noqa: E402
from diffusion_jax.training.inputs import Inputs  # noqa: E402
from diffusion_jax.training.optimizer import make_optimizer  # noqa: E402
from diffusion_jax.training.sharding import make_mesh, replicated, sharded_batch  # noqa: E402
from diffusion_jax.training.step import init_state, make_train_step  # noqa: E402


def write_cifar10(folder: Path, rng: np.random.Generator) -> None:
    for name in ('data_batch_1', 'data_batch_2', 'data_batch_3', 'data_batch_4', 'data_batch_5', 'test_batch'):
        records = rng.integers(0, 256, (10_000, 3073), np.uint8)
        records[:, 0] %= 10
        (folder / f'{name}.bin').write_bytes(records.tobytes())


def write_folder(folder: Path, rng: np.random.Generator) -> None:
    for i in range(400):
        smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(
            (320, 240), Image.Resampling.BICUBIC
        )
        smooth.save(folder / f'{i:04}.jpg', quality=90)


def rate_of_input(config, splits, seconds: float) -> float:
    mesh = make_mesh()
    batches = Batches(
        splits.train,
        config.train.batch_size,
        0,
        replicated=replicated(mesh),
        sharded=sharded_batch(mesh),
        placement=config.data.placement,
        workers=config.data.workers,
    )
    with batches.stream(0) as stream:
        for _ in range(4):  # what was read ahead, and the workers' start
            jax.block_until_ready(next(stream))
        began = time.perf_counter()
        for count in itertools.count(1):
            jax.block_until_ready(next(stream))
            if (took := time.perf_counter() - began) > seconds:
                return count * config.train.batch_size / took


def rate_of_step(config, splits, batch: int, steps: int) -> float:
    experiment = make_experiment(config, info_of(splits))
    optimizer, _ = make_optimizer(**config.optimizer, num_steps=config.train.num_steps)
    state = jax.jit(lambda: init_state(experiment.init, optimizer, 0, experiment.loss_history))()
    step = make_train_step(
        experiment.loss,
        optimizer,
        ema_decay=config.ema_decay,
        inputs=Inputs(config.data.flip, experiment.num_classes, config.label_dropout),
    )
    images = {'image': np.zeros((batch, *splits.train.image_shape), np.uint8), 'label': np.zeros(batch, np.int32)}
    compiled = jax.jit(step, donate_argnums=0).lower(state, {}, images).compile()
    state, metrics = compiled(state, {}, images)
    jax.block_until_ready(metrics)
    began = time.perf_counter()
    for _ in range(steps):
        state, metrics = compiled(state, {}, images)
    jax.block_until_ready(metrics)
    return steps * batch / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=float, default=5, help='of reading, for each row')
    parser.add_argument('--step-batch', type=int, default=8, help='of the step of the two large configs')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'input.json')
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in ('cifar10', 'unet64')}
        for name, write in (('cifar10', write_cifar10), ('unet64', write_folder)):
            folders[name].mkdir()
            write(folders[name], rng)
        streamed = [{'data.placement': 'stream', 'data.workers': workers} for workers in (0, 1, 2)]
        for name, module, ways, batch in (
            ('digits', digits, [{}], None),
            ('fashion_mnist', fashion_mnist, [{}], None),
            ('cifar10', cifar10, [{}, {'data.placement': 'host'}], arguments.step_batch),
            ('unet64', unet64, [{}, *streamed], max(1, arguments.step_batch // 4)),
        ):
            need = None
            for way in ways:
                config = module.get_config()
                if name in folders:
                    config.data.dir = str(folders[name])
                config.update_from_flattened_dict(way)
                splits = load_data(config)
                need = need or rate_of_step(config, splits, batch or config.train.batch_size, 3 if batch else 10)
                given = rate_of_input(config, splits, arguments.seconds)
                rows.append({'config': name, 'way': way, 'input': given, 'step': need, 'ratio': given / need})
                print(rows[-1], file=sys.stderr, flush=True)
    device = jax.devices()[0].device_kind
    arguments.out.write_text(json.dumps({'device': device, 'jax': jax.__version__, 'rows': rows}, indent=2) + '\n')
    print('| config | input | images/s read | images/s of the step | ratio |\n| --- | --- | --- | --- | --- |')
    for row in rows:
        way = ', '.join(f'{key.split(".")[1]}={value}' for key, value in row['way'].items()) or 'as shipped'
        print(f'| {row["config"]} | {way} | {row["input"]:,.0f} | {row["step"]:,.3g} | {row["ratio"]:,.0f} |')


if __name__ == '__main__':
    main()
