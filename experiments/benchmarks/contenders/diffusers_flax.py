"""The Flax blocks of diffusers 0.35, its last release that had them, put together as the DDPM paper's U-Net.

Its own Flax U-Nets attend to text, so there was none of this architecture; the blocks, the schedulers, the jitted
Linen step and the loop inside jit are as in its Flax examples and pipelines.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from diffusers import FlaxDDIMScheduler, FlaxDDPMScheduler
from diffusers.models.embeddings_flax import FlaxTimestepEmbedding, FlaxTimesteps
from diffusers.models.resnet_flax import FlaxDownsample2D, FlaxResnetBlock2D, FlaxUpsample2D
from diffusers.models.vae_flax import FlaxAttentionBlock
from flax import linen as nn
from serving import peak_host_bytes, serve, timed

WIDTHS = (128, 256, 256, 256)
ATTENDS = 1  # the level of 16x16


class UNet(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, t, train=False):
        embedding = FlaxTimestepEmbedding(512, dtype=self.dtype)(FlaxTimesteps(128)(t).astype(self.dtype))

        def res(x, width):
            return FlaxResnetBlock2D(x.shape[-1], width, 0.1, dtype=self.dtype)(x, embedding, deterministic=not train)

        def attend(x):
            return FlaxAttentionBlock(x.shape[-1], dtype=self.dtype)(x)

        x = nn.Conv(128, (3, 3), dtype=self.dtype)(x)
        skips = [x]
        for level, width in enumerate(WIDTHS):
            for _ in range(2):
                x = res(x, width)
                x = attend(x) if level == ATTENDS else x
                skips.append(x)
            if level < len(WIDTHS) - 1:
                x = FlaxDownsample2D(width, dtype=self.dtype)(x)
                skips.append(x)
        x = res(attend(res(x, WIDTHS[-1])), WIDTHS[-1])
        for level, width in reversed(list(enumerate(WIDTHS))):
            for _ in range(3):
                x = res(jnp.concatenate([x, skips.pop()], -1), width)
                x = attend(x) if level == ATTENDS else x
            if level:
                x = FlaxUpsample2D(width, dtype=self.dtype)(x)
        return nn.Conv(3, (3, 3))(nn.silu(nn.GroupNorm(32)(x)))


@functools.cache
def network(dtype):
    unet = UNet(jnp.dtype(dtype))
    params = jax.jit(lambda key: unet.init(key, jnp.zeros((1, 32, 32, 3)), jnp.zeros(1)))(jax.random.key(0))
    return unet, params


def info(dtype='float32'):
    return {
        'name': 'diffusers 0.35 (Flax)',
        'version': f'JAX {jax.__version__}',
        'device': jax.devices()[0].device_kind,
        'parameters': sum(leaf.size for leaf in jax.tree.leaves(network(dtype)[1])),
    }


@functools.cache
def trainer(batch, dtype):
    unet, params = network(dtype)
    params = jax.tree.map(jnp.copy, params)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-4))
    schedule = FlaxDDPMScheduler(num_train_timesteps=1000)
    noise_levels = schedule.create_state()
    images = np.random.default_rng(0).integers(0, 256, (batch, 32, 32, 3), np.uint8)

    def step(state, images, key):
        params, average, memory = state
        keys = jax.random.split(key, 4)
        x0 = images.astype(jnp.float32) / 127.5 - 1
        mirrored = jax.random.bernoulli(keys[0], shape=(batch,))
        x0 = jnp.where(mirrored[:, None, None, None], x0[:, :, ::-1], x0)
        noise, t = jax.random.normal(keys[1], x0.shape), jax.random.randint(keys[2], (batch,), 0, 1000)
        x = schedule.add_noise(noise_levels, x0, noise, t)

        def loss(params):
            return jnp.square(unet.apply(params, x, t, True, rngs={'dropout': keys[3]}) - noise).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, memory = optimizer.update(grads, memory, params)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, 1e-4)
        return (params, average, memory), value

    state = (params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, images, jax.random.key(0)).compile()
    seconds = time.perf_counter() - began
    holder = {'state': state}

    def run():
        holder['state'], loss = compiled(holder['state'], images, jax.random.key(0))
        jax.block_until_ready(loss)

    return run, seconds


def train(batch, dtype='float32'):
    run, compile_s = trainer(batch, dtype)
    return {'seconds': timed(run), 'compile_s': compile_s}


@functools.cache
def generator(batch, steps, dtype):
    unet, params = network(dtype)
    schedule = FlaxDDIMScheduler(num_train_timesteps=1000)
    state = schedule.set_timesteps(schedule.create_state(), steps, (batch, 32, 32, 3))

    @jax.jit
    def generate(params, key):
        def step(i, x):
            t = state.timesteps[i]
            eps = unet.apply(params, x, jnp.broadcast_to(t, (batch,)))
            return schedule.step(state, eps, t, x).prev_sample

        return jax.lax.fori_loop(0, steps, step, jax.random.normal(key, (batch, 32, 32, 3)))

    began = time.perf_counter()
    compiled = generate.lower(params, jax.random.key(1)).compile()
    return lambda: jax.block_until_ready(compiled(params, jax.random.key(1))), time.perf_counter() - began


def sample(batch, steps, dtype='float32'):
    run, compile_s = generator(batch, steps, dtype)
    return {'seconds': timed(run), 'compile_s': compile_s}


def memory():
    stats = jax.devices()[0].memory_stats() or {}
    return {'host_bytes': peak_host_bytes(), 'device_bytes': stats.get('peak_bytes_in_use')}


if __name__ == '__main__':
    serve({'info': info, 'train': train, 'sample': sample, 'memory': memory})
