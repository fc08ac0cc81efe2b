"""diffusion_jax: the training step of configs/cifar10.py as `main.py` runs it, and DDIM as the pipelines run it."""

import functools
import os
import sys
import time
from pathlib import Path

from serving import peak_host_bytes, serve, timed

sys.path.insert(0, str(Path(__file__).parents[3]))


@functools.cache
def modules():
    import jax
    from ml_collections import ConfigDict  # noqa: F401

    from configs import cifar10
    from diffusion_jax import denoisers, samplers
    from diffusion_jax.experiment import DataInfo, make_experiment
    from diffusion_jax.training.inputs import Inputs
    from diffusion_jax.training.optimizer import make_optimizer
    from diffusion_jax.training.step import init_state, make_train_step

    if cache := os.environ.get('BENCHMARK_CACHE'):
        jax.config.update('jax_compilation_cache_dir', cache)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    return (
        jax,
        cifar10,
        denoisers,
        samplers,
        DataInfo,
        make_experiment,
        make_optimizer,
        Inputs,
        init_state,
        make_train_step,
    )


@functools.cache
def experiment(dtype):
    _, cifar10, _, _, DataInfo, make_experiment, *_ = modules()
    config = cifar10.get_config()
    config.model.dtype = dtype
    return config, make_experiment(config, DataInfo((32, 32, 3), ()))


def info(dtype='float32'):
    jax = modules()[0]
    from diffusion_jax.models import count_params

    _, made = experiment(dtype)
    return {
        'name': 'diffusion_jax',
        'version': f'JAX {jax.__version__}',
        'device': jax.devices()[0].device_kind,
        'parameters': count_params(jax.eval_shape(made.init, jax.random.key(0))),
    }


@functools.cache
def trainer(batch, dtype):
    jax, *_, make_optimizer, Inputs, init_state, make_train_step = modules()
    import numpy as np

    config, made = experiment(dtype)
    optimizer, _ = make_optimizer(**config.optimizer, num_steps=config.train.num_steps)
    state = jax.jit(lambda: init_state(made.init, optimizer, 0))()
    step = make_train_step(
        made.loss, optimizer, ema_decay=config.ema_decay, inputs=Inputs(True, 0, config.label_dropout)
    )
    images = {'image': np.random.default_rng(0).integers(0, 256, (batch, 32, 32, 3), np.uint8)}
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, {}, images).compile()
    seconds = time.perf_counter() - began
    x, t = jax.ShapeDtypeStruct((batch, 32, 32, 3), 'float32'), jax.ShapeDtypeStruct((batch,), 'float32')
    forward = jax.jit(made.apply).lower(state.params, x, t).cost_analysis()['flops']
    holder = {'state': state}

    def run():
        holder['state'], metrics = compiled(holder['state'], {}, images)
        return jax.block_until_ready(metrics)

    return run, {
        'compile_s': seconds,
        'model_flops': 3 * forward,  # the gradient's are twice those of the forward pass
        'temporaries_bytes': compiled.memory_analysis().temp_size_in_bytes,
    }


def train(batch, dtype='float32'):
    run, facts = trainer(batch, dtype)
    return {'seconds': timed(run), **facts}


@functools.cache
def generator(batch, steps, dtype):
    jax, _, denoisers, samplers, *_ = modules()
    _, made = experiment(dtype)
    params = jax.jit(made.init)(jax.random.key(0))
    plan = samplers.plan('ddim', made.schedule, steps)

    @jax.jit
    def generate(params, plan, key):
        noise = jax.random.normal(key, (batch, 32, 32, 3))
        denoiser = denoisers.ModelDenoiser(made.apply, params, made.schedule, made.prediction)
        return samplers.sample(denoiser, plan, noise, key, clip=True)

    key = jax.random.key(1)
    began = time.perf_counter()
    compiled = generate.lower(params, plan, key).compile()
    return lambda: jax.block_until_ready(compiled(params, plan, key)), time.perf_counter() - began


def sample(batch, steps, dtype='float32'):
    run, compile_s = generator(batch, steps, dtype)
    return {'seconds': timed(run), 'compile_s': compile_s}


def matmul(size=2048, dtype='float32'):
    """FLOP/s of one large matrix product: what this device can do at most, as far as can be had."""
    jax = modules()[0]
    a = jax.numpy.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    seconds = min(timed(lambda: jax.block_until_ready(product(a))) for _ in range(5))
    return {'flops_per_s': 2 * size**3 / seconds}


def memory():
    jax = modules()[0]
    stats = jax.devices()[0].memory_stats() or {}
    return {'host_bytes': peak_host_bytes(), 'device_bytes': stats.get('peak_bytes_in_use')}


if __name__ == '__main__':
    serve({'info': info, 'train': train, 'sample': sample, 'matmul': matmul, 'memory': memory})
