"""Compiles a config's training step for a TPU slice that is not there: its collectives, its memory, its FLOPs per chip.

pip install -e '.[tpu]'
python experiments/benchmarks/tpu_compile.py --config configs/cifar10.py --topology v5e:2x4 --mesh fsdp=8
"""

import argparse
import collections
import importlib.util
import os
import re
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from diffusion_jax.experiment import DataInfo, make_experiment
from diffusion_jax.models import convolution
from diffusion_jax.training.inputs import Inputs
from diffusion_jax.training.optimizer import make_optimizer
from diffusion_jax.training.sharding import (
    bytes_per_device,
    make_mesh,
    on_mesh,
    replicated,
    sharded_batch,
    with_shardings,
)
from diffusion_jax.training.step import init_state, make_train_step, state_shardings

COLLECTIVES = r'(reduce-scatter|all-reduce|all-gather|all-to-all|collective-permute)'
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default='configs/cifar10.py')
    parser.add_argument('--topology', default='v5e:2x4')
    parser.add_argument('--mesh', nargs='+', default=['data=8', 'fsdp=8'], help='such as data=2,fsdp=2,tensor=2')
    parser.add_argument('--shape', type=int, nargs=3, default=(32, 32, 3), help='of an image')
    parser.add_argument('--classes', type=int, default=10)
    parser.add_argument('--dtype', default='bfloat16')
    arguments = parser.parse_args()
    convolution.made_for_cpu = lambda: False  # JAX's backend here is

    spec = importlib.util.spec_from_file_location('config', arguments.config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.model.dtype = arguments.dtype
    info = DataInfo(tuple(arguments.shape), tuple(map(str, range(arguments.classes))))
    experiment = make_experiment(config, info)
    optimizer, _ = make_optimizer(**config.optimizer, num_steps=config.train.num_steps)
    devices = topologies.get_topology_desc(arguments.topology, 'tpu').devices
    shapes = jax.eval_shape(lambda: init_state(experiment.init, optimizer, 0))

    for text in arguments.mesh:
        sizes = {'data': 1} | {axis: int(size) for axis, size in (part.split('=') for part in text.split(','))}
        mesh = make_mesh(sizes, devices)
        shardings = state_shardings(shapes, optimizer, config.sharding_rules, mesh)
        state = with_shardings(shapes, shardings)
        step = make_train_step(
            experiment.loss,
            optimizer,
            ema_decay=config.ema_decay,
            inputs=Inputs(config.data.flip, experiment.num_classes, config.label_dropout),
            accumulate=config.train.accumulate,
            param_shardings=shardings.params,
        )
        jitted = jax.jit(on_mesh(mesh, step), donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
        rows, split = config.train.batch_size, sharded_batch(mesh)
        batch = {'image': jax.ShapeDtypeStruct((rows, *arguments.shape), jnp.uint8, sharding=split)}
        if experiment.num_classes:
            batch['label'] = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=split)
        began = time.perf_counter()
        compiled = jitted.lower(state, {}, batch).compile()
        seconds = time.perf_counter() - began
        found = collections.Counter(
            name.removesuffix('-start')
            for name in re.findall(rf'[ %]{COLLECTIVES}(?:-start)?[.\d]*\(', compiled.as_text())
        )
        scatters = len(re.findall(r'%all-reduce-scatter[.\d]* ', compiled.as_text()))
        memory = compiled.memory_analysis()
        print(
            f'{arguments.topology}, {text}: state {bytes_per_device(state) / MIB:.1f} MiB per chip, temporaries '
            f'{memory.temp_size_in_bytes / MIB:.0f} MiB; {dict(found)}, reduce-scatter fusions {scatters}; compiled in '
            f'{seconds:.0f} s',
            flush=True,
        )


if __name__ == '__main__':
    main()
