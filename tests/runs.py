"""What tests of whole runs share."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from diffusion_jax.experiment import make_experiment, read_record
from diffusion_jax.training.checkpoints import Checkpoints, abstract
from diffusion_jax.training.optimizer import make_optimizer
from diffusion_jax.training.sharding import make_mesh, replicated
from diffusion_jax.training.step import init_state

ROOT = Path(__file__).parent.parent
TINY = Path(__file__).parent / 'fixtures' / 'tiny_config.py'


def load_config(path: Path = TINY, **changes) -> ConfigDict:
    """The config of a file, with 'a.b'=value changes given as a__b=value."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.update_from_flattened_dict({key.replace('__', '.'): value for key, value in changes.items()})
    return config


def start(*arguments: str, devices: int = 1, config: Path = TINY) -> subprocess.Popen:
    """`python main.py` on that many simulated devices, as a user's shell would start it."""
    flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'  # the last one holds
    return subprocess.Popen(
        [sys.executable, 'main.py', f'--config={config}', *arguments],
        cwd=ROOT,
        env=os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*arguments: str, **options) -> tuple[int, str]:
    """(exit status, output) of `python main.py`."""
    process = start(*arguments, **options)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def newest_state(workdir: Path):
    """The training state of a workdir's newest checkpoint."""
    record, info = read_record(workdir)
    config = ConfigDict(record)
    experiment = make_experiment(config, info)
    optimizer, _ = make_optimizer(**config.optimizer, num_steps=config.train.num_steps)
    shapes = jax.eval_shape(lambda: init_state(experiment.init, optimizer, config.seed, experiment.loss_history))
    return Checkpoints(workdir).restore(abstract(shapes, replicated(make_mesh()))).state


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob('*')}
