"""Compiles a training step of a config in latents, for devices that are only simulated: its memory on each of them.

    python experiments/benchmarks/latent_compile.py --config=configs/ldm_imagenet256.py --devices=8
    python experiments/benchmarks/latent_compile.py --config=configs/stable_diffusion.py --devices=8 --text_features=768

Nothing is trained or held: shapes go in. Batches are latents, and a frozen encoder's states of the texts: what encoders
take themselves comes on top. The compiler is the CPU's, which keeps more temporaries than a TPU's or a GPU's; the state
is the same everywhere.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument('--config', required=True)
PARSER.add_argument('--devices', type=int, default=8)
PARSER.add_argument('--batch_size', type=int, help='of the whole batch; the config has one')
PARSER.add_argument('--classes', type=int, default=1000, help='of a config that is class-conditional')
PARSER.add_argument('--text_features', type=int, default=0, help='of a frozen text encoder, 0 for none')
ARGUMENTS = PARSER.parse_args()
os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={ARGUMENTS.devices}'
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from diffusion_jax.experiment import DataInfo, LatentInfo, TextInfo, make_experiment  # noqa: E402
from diffusion_jax.models import count_params  # noqa: E402
from diffusion_jax.training.inputs import Inputs  # noqa: E402
from diffusion_jax.training.optimizer import make_optimizer  # noqa: E402
from diffusion_jax.training.sharding import make_mesh, on_mesh, replicated, sharded_batch, with_shardings  # noqa: E402
from diffusion_jax.training.step import init_state, make_train_step, state_shardings  # noqa: E402


def load(path: str):
    spec = importlib.util.spec_from_file_location('config', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def main() -> None:
    config = load(ARGUMENTS.config)
    side = config.data.resolution
    classes = tuple(map(str, range(ARGUMENTS.classes))) if config.class_conditional else ()
    text = TextInfo(49_408, 77, ARGUMENTS.text_features) if ARGUMENTS.text_features else None
    info = DataInfo((side, side, 3), classes, LatentInfo(8, 4, 0.18215, 0.0, (0.0,)), text)
    experiment = make_experiment(config, info)
    optimizer, _ = make_optimizer(**config.optimizer, num_steps=config.train.num_steps)
    shapes = jax.eval_shape(lambda: init_state(experiment.init, optimizer, 0))
    mesh = make_mesh(config.mesh)
    shardings = state_shardings(shapes, optimizer, config.sharding_rules, mesh)
    # The context as if it came with the batch: what a frozen encoder adds is its own parameters.
    inputs = Inputs(False, experiment.num_classes, config.label_dropout, latents=info.latents)

    def step(state, batch):
        context = {} if text is None else {'context': batch.pop('context')}

        def loss(params, x0, key, **conditioning):
            return experiment.loss(params, x0, key, **conditioning, **context)

        return make_train_step(
            loss,
            optimizer,
            ema_decay=config.ema_decay,
            inputs=inputs,
            accumulate=config.train.accumulate,
            param_shardings=shardings.params,
        )(state, {}, batch)

    rows, split = ARGUMENTS.batch_size or config.train.batch_size, sharded_batch(mesh)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=split)

    batch = {name: array(info.model_shape, jnp.float16) for name in ('mean', 'log_variance')}
    if classes:
        batch['label'] = array((), jnp.int32)
    if text is not None:
        batch['context'] = array((text.length, text.features), jnp.float32)
    began = time.perf_counter()
    jitted = jax.jit(on_mesh(mesh, step), donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    compiled = jitted.lower(with_shardings(shapes, shardings), batch).compile()
    memory = compiled.memory_analysis()
    row = {
        'config': ARGUMENTS.config,
        'parameters_millions': round(count_params(shapes.params) / 1e6, 1),
        'devices': ARGUMENTS.devices,
        'batch_per_device': rows // ARGUMENTS.devices,
        'state_gib_per_device': round(memory.argument_size_in_bytes / 2**30, 2),
        'temporaries_gib_per_device': round(memory.temp_size_in_bytes / 2**30, 2),
        'compile_seconds': round(time.perf_counter() - began, 1),
    }
    print(json.dumps(row))


if __name__ == '__main__':
    main()
