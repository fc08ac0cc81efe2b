"""How probable does the model hold unseen images to be? In bits per dimension, of the model and not of samples."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from diffusion_jax.denoisers import clip_x0
from diffusion_jax.errors import UsageError
from diffusion_jax.evaluation.likelihood import (
    DEQUANTIZED_BITS,
    dequantize,
    ode_bits_per_dim,
    vlb_bits_per_dim,
)
from diffusion_jax.evaluation.result import Batch, Result, evenly
from diffusion_jax.images import to_float
from diffusion_jax.training.sharding import fetch, num_batch_shards, on_mesh, put, sharded_batch

BATCH = 64
ODE_STEPS = 64


class BitsPerDim:
    """`bits_per_dim` of `evaluate.num_likelihood` test images, and the standard error of that mean.

    For a chain the variational bound, with the learned variance where there is one and else the smaller of the bounds
    that the two fixed variances give (Ho et al. 2020); for a continuous schedule the density of the probability-flow
    ODE. Labels are given, and no guidance.
    """

    needs_features, needs_model = False, True

    def __init__(self, setting: Any):
        self._setting = setting

    @staticmethod
    def check(setting: Any) -> None:
        if setting.num_likelihood < 2:
            raise UsageError(f'evaluate.num_likelihood must be 2 at least, got {setting.num_likelihood}.')
        if setting.pipeline is None:
            raise UsageError('bits_per_dim looks at the model: give the setting its pipeline.')
        if setting.pipeline.num_classes and setting.splits.test.labels is None:
            raise UsageError('bits_per_dim of a model that is conditioned on labels needs test images that have them.')

    def update(self, batch: Batch) -> None:
        """The samples say nothing of it."""

    def result(self) -> Result:
        setting, pipeline = self._setting, self._setting.pipeline
        test = setting.splits.test
        test = test.load(evenly(len(test), setting.num_likelihood))
        shards = num_batch_shards(pipeline.mesh)
        size = -(-min(BATCH, len(test)) // shards) * shards
        chain = pipeline.schedule.num_timesteps is not None
        variances = () if not chain else ('learned',) if pipeline.learned_variance else ('small', 'large')

        def bits(params, images, labels, key_data):
            x0, key = to_float(images), jax.random.wrap_key_data(key_data)
            denoiser = pipeline.denoiser_of(params, labels)
            if chain:
                bound = functools.partial(vlb_bits_per_dim, clip_x0(denoiser), pipeline.schedule, x0, key)
                return jnp.stack([bound(variance=variance).total for variance in variances])
            key_dequantize, key_probes = jax.random.split(key)
            noisy = dequantize(x0, key_dequantize)
            density = ode_bits_per_dim(denoiser, pipeline.schedule, noisy, key_probes, steps=ODE_STEPS)
            return density[None] + DEQUANTIZED_BITS

        compiled = jax.jit(on_mesh(pipeline.mesh, bits))
        columns = []
        for start in tqdm(range(0, len(test), size), desc='bits per dimension', unit='batch', leave=None):
            rows = np.minimum(np.arange(start, start + size), len(test) - 1)
            labels = test.labels[rows] if pipeline.num_classes else None
            images, labels = put((test.images[rows], labels), sharded_batch(pipeline.mesh))
            key = jax.random.fold_in(jax.random.key(setting.seed), start)
            each = compiled(pipeline.params, images, labels, np.asarray(jax.random.key_data(key)))
            columns.append(fetch(each)[:, : len(test) - start])
        each = np.concatenate(columns, axis=1)
        best = int(each.mean(axis=1).argmin())
        scores = {
            'bits_per_dim': float(each[best].mean()),
            'bits_per_dim_standard_error': float(each[best].std(ddof=1) / math.sqrt(each.shape[1])),
        }
        return Result(scores | ({'bits_per_dim_variance': variances[best]} if chain else {}), {})
