"""A sample in the making: the calls of a solver one by one, to look on, or to stop."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffusion_jax import samplers
from diffusion_jax.errors import SamplingDiverged
from diffusion_jax.pipelines.drawing import Batch, Model, denoiser_of, keys_of
from diffusion_jax.pipelines.images import ImagePipeline
from diffusion_jax.process import Prediction
from diffusion_jax.training.sharding import fetch, on_mesh


class Call(NamedTuple):
    """One model call of a run, on the host; arrays [num, h, w, c], as the network has images.

    Attributes:
      index: 0 .. N - 1, of `num_calls` N.
      t: where it was made.
      x_t: what the network saw.
      x0, eps: what it predicted, as the solver took it: with guidance, and clipped if that is on.
      x: what the solver made of it; of the last call, the sample.
    """

    index: int
    num_calls: int
    t: float
    x_t: Float[np.ndarray, 'num h w c']
    x0: Float[np.ndarray, 'num h w c']
    eps: Float[np.ndarray, 'num h w c']
    x: Float[np.ndarray, 'num h w c']


@functools.partial(jax.jit, static_argnames=('solver', 'shape'))
def _begin(batch: Batch, prior_std, *, solver: samplers.Solver, shape: tuple[int, int, int]):
    """(state, keys of the steps)."""
    keys_init, keys_steps = keys_of(batch)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys_init)
    return samplers.begin(None, solver, prior_std * noise), jax.random.key_data(keys_steps)


@functools.partial(jax.jit, static_argnames=('model', 'solver', 'clip', 'mesh'))
def _advance(params, state, row, alpha, sigma, keys, batch: Batch, *, model: Model, solver, clip, mesh):
    """(state, x0, eps) of one call. Its row is traced: however many there are, the program is the same."""

    def call(state):
        denoiser = denoiser_of(model, params, batch.conditioning, batch.null, batch.guidance)
        keys_steps = jax.random.wrap_key_data(keys)
        after, x0 = samplers.advance(denoiser, solver, state, row, keys_steps, clip=clip)
        return after, x0, Prediction(x0, 'x0', state.carry.x, alpha, sigma).eps

    return on_mesh(mesh, call)(state)


def walk(pipeline: ImagePipeline, num: int, **settings: Any) -> Iterator[Call]:
    """The calls that draw what `pipeline(num, ..)` with these settings draws, each as soon as it is made.

    Whoever stops asking stops the work. The program that is compiled is that of one call: another number of steps,
    seed, label or scale compiles nothing, as little as another spacing. For speed alone, call the pipeline.

    Args:
      pipeline: the model.
      settings: as `ImagePipeline.trajectory` takes them.

    Raises:
      UsageError: as the pipeline does, at once.
      SamplingDiverged: the network gave NaN or inf.
    """
    asked = pipeline.asked_from_noise(num, **settings)
    plan = asked.plan

    def calls() -> Iterator[Call]:
        batch = pipeline.batch(asked)
        shape = pipeline.shape_of(asked.size)
        state, keys = _begin(batch, np.float32(plan.prior_std), solver=plan.solver, shape=shape)
        table = samplers.rows(plan)
        x = fetch(state.carry.x)[:num]
        for index in range(plan.num_calls):
            state, x0, eps = _advance(
                pipeline.params,
                state,
                jax.tree.map(lambda leaf, index=index: leaf[index], table),
                np.float32(plan.alpha[index]),
                np.float32(plan.sigma[index]),
                keys,
                batch,
                model=pipeline.model,
                solver=plan.solver,
                clip=asked.clip,
                mesh=pipeline.mesh,
            )
            x_t, (x, x0, eps) = x, (fetch(leaf)[:num] for leaf in (state.carry.x, x0, eps))
            if bad := int((~np.isfinite(x).all(axis=(1, 2, 3))).sum()):
                raise SamplingDiverged(bad, num)
            yield Call(index, plan.num_calls, float(plan.times[index]), x_t, x0, eps, x)

    return calls()
