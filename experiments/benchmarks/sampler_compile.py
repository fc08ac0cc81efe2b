"""Compile time and memory of sampling against the number of steps: one scan, so neither should grow.

python experiments/benchmarks/sampler_compile.py
"""

import argparse
import time

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax import denoisers, models, samplers, schedules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--solvers', nargs='+', default=['ddim', 'dpmpp_2m', 'unipc'], choices=samplers.SOLVERS)
    parser.add_argument('--steps', nargs='+', type=int, default=[10, 100, 1000])
    parser.add_argument('--batch', type=int, default=4)
    arguments = parser.parse_args()
    schedule = schedules.cosine(1000)
    unet = models.UNet(
        resolution=16, channels=32, channel_multipliers=(1, 2), attention_resolutions=(8,), rngs=nnx.Rngs(0)
    )
    apply, params = models.split(unet)
    x = jnp.zeros((arguments.batch, 16, 16, 3))

    def run(params, plan, x, key):
        return samplers.sample(denoisers.ModelDenoiser(apply, params, schedule, 'v'), plan, x, key)

    print(f'{jax.devices()[0].device_kind}, JAX {jax.__version__}: U-Net of {models.count_params(params):,} parameters')
    for solver in arguments.solvers:
        for steps in arguments.steps:
            plan = samplers.plan(solver, schedule, steps)
            jax.clear_caches()
            began = time.perf_counter()
            compiled = jax.jit(run).lower(params, plan, x, jax.random.key(0)).compile()
            seconds = time.perf_counter() - began
            memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
            print(
                f'{solver:10} {steps:5} steps: compiled in {seconds:5.2f} s, {memory:6.2f} MiB of temporaries',
                flush=True,
            )


if __name__ == '__main__':
    main()
