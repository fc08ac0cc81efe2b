"""What the studies on Fashion-MNIST share: small models, trained once and kept, that differ in what a study asks."""

import os

os.environ.setdefault('XLA_FLAGS', f'--xla_force_host_platform_device_count={os.cpu_count()}')  # 1.3 x on two cores

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.config import default_config
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.train import train

RUNS = Path('runs/studies')


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
    return workdir
