"""Modules as functions."""

import jax
import numpy as np
from flax import nnx

from diffusion_jax.models import UNet, functional, split


def small(rngs):
    return UNet(
        resolution=8,
        channels=8,
        channel_multipliers=(1, 2),
        num_classes=3,
        num_res_blocks=1,
        attention_resolutions=(4,),
        rngs=rngs,
    )


def test_parameters_are_those_that_flax_draws():
    """Keys are counted without Flax: each parameter must get the key that nnx.Rngs has for it."""
    key = jax.random.key(5)
    init, _ = functional(small)
    init = jax.jit(init)
    theirs = jax.jit(lambda key: split(small(nnx.Rngs(key)))[1])(key)
    ours = init(key)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert (ours['time_in']['kernel'] != init(jax.random.key(6))['time_in']['kernel']).any()
