"""A sample in the making: the calls of a solver one by one, to look on, or to stop."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffusion_jax import samplers
from diffusion_jax.errors import SamplingDiverged
from diffusion_jax.pipelines.images import ImagePipeline, _denoiser, _guidance, _keys, _Model, _place, _seeds
from diffusion_jax.process import Prediction
from diffusion_jax.training.sharding import fetch, num_batch_shards, on_mesh, sharded_batch


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
def _begin(seeds, indices, prior_std, *, solver: samplers.Solver, shape: tuple[int, int, int]):
    """(state, keys of the steps)."""
    keys_init, keys_steps = _keys(seeds, indices)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys_init)
    return samplers.begin(None, solver, prior_std * noise), jax.random.key_data(keys_steps)


@functools.partial(jax.jit, static_argnames=('model', 'solver', 'clip', 'mesh'))
def _advance(params, state, row, alpha, sigma, keys, conditioning, null, guided, *, model: _Model, solver, clip, mesh):
    """(state, x0, eps) of one call. Its row is traced: however many there are, the program is the same."""

    def call(state):
        denoiser = _denoiser(model, params, conditioning, null, guided)
        keys_steps = jax.random.wrap_key_data(keys)
        after, x0 = samplers.advance(denoiser, solver, state, row, keys_steps, clip=clip)
        return after, x0, Prediction(x0, 'x0', state.carry.x, alpha, sigma).eps

    return on_mesh(mesh, call)(state)


def walk(
    pipeline: ImagePipeline,
    num: int,
    *,
    labels: Sequence[int] | None = None,
    prompts: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    guidance_scale: float | None = None,
    solver: str | None = None,
    steps: int = 50,
    spacing: str | None = None,
    final: str | None = None,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    size: tuple[int, int] | None = None,
    seed: int | Sequence[int] = 0,
    clip: bool | None = None,
    **solver_options: Any,
) -> Iterator[Call]:
    """The calls that draw what `pipeline(num, ..)` with these settings draws, each as soon as it is made.

    Whoever stops asking stops the work. The program that is compiled is that of one call: another number of steps,
    seed, label or scale compiles nothing, as little as another spacing. For speed alone, call the pipeline.

    Args:
      pipeline: the model.
      num, labels, .., solver_options: as a call of the pipeline takes them.

    Raises:
      UsageError: as the pipeline does, at once.
      SamplingDiverged: the network gave NaN or inf.
    """
    size = pipeline._check_size(size)
    plan = pipeline.plan(solver, steps, spacing, final=final, **solver_options)
    pipeline.check_guidance(guidance_scale, guidance_rescale, guidance_interval)
    wanted = pipeline.check(num, labels, guidance_scale, num)
    texts, negative = pipeline.check_texts(num, prompts, negative_prompt, guidance_scale)
    pipeline._check_image(num, size, None, 1.0, None)
    seeds, indices = _seeds(seed, num)
    shards = num_batch_shards(pipeline.mesh)
    numbers = np.arange(-(-num // shards) * shards)
    placed = functools.partial(_place, rows=numbers, sharding=sharded_batch(pipeline.mesh))
    plan = jax.tree.map(np.asarray, plan)

    def calls() -> Iterator[Call]:
        guided = _guidance(guidance_scale, guidance_rescale, guidance_interval)
        conditioning, null = pipeline._condition(numbers, wanted, texts, negative, size, guided is not None)
        prior_std = np.float32(plan.prior_std)
        state, keys = _begin(
            placed(seeds), placed(indices), prior_std, solver=plan.solver, shape=pipeline._shape_of(size)
        )
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
                conditioning,
                null,
                guided,
                model=pipeline._model,
                solver=plan.solver,
                clip=pipeline.planner.clip if clip is None else clip,
                mesh=pipeline.mesh,
            )
            x_t, (x, x0, eps) = x, (fetch(leaf)[:num] for leaf in (state.carry.x, x0, eps))
            if bad := int((~np.isfinite(x).all(axis=(1, 2, 3))).sum()):
                raise SamplingDiverged(bad, num)
            yield Call(index, plan.num_calls, float(plan.times[index]), x_t, x0, eps, x)

    return calls()
