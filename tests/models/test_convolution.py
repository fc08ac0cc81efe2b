"""Our convolution is XLA's, with all of its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from diffusion_jax.models import convolution

OPTIONS = {
    'lhs_dilation': (1, 1),
    'rhs_dilation': (1, 1),
    'dimension_numbers': convolution.NHWC,
    'feature_group_count': 1,
    'precision': None,
}


def case(shape, kernel, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    x, dx = (jax.random.normal(key, shape) for key in keys[:2])
    w, dw = (jax.random.normal(key, kernel) for key in keys[2:4])
    return x, dx, w, dw


@pytest.mark.parametrize('size', [(8, 8), (4, 6), (1, 5), (2, 1)])
@pytest.mark.parametrize(('kernel', 'stride'), [(3, 1), (3, 2), (1, 1)])
def test_value_and_derivatives_are_those_of_xla(size, kernel, stride):
    x, dx, w, dw = case((3, *size, 4), (kernel, kernel, 4, 5))
    strides = (stride, stride)

    def ours(x, w):
        return convolution.conv_general_dilated(x, w, strides, 'SAME', **OPTIONS)

    def xlas(x, w):
        return lax.conv_general_dilated(x, w, strides, 'SAME', **OPTIONS)

    def everything(function, x, w, dx, dw):
        out, tangent = jax.jvp(function, (x, w), (dx, dw))
        alone = jax.jvp(lambda w: function(x, w), (w,), (dw,))[1], jax.jvp(lambda x: function(x, w), (x,), (dx,))[1]
        gradient = jax.vjp(function, x, w)[1](jnp.cos(out))
        second = jax.grad(lambda w: jnp.square(jax.grad(lambda x: (function(x, w) ** 3).sum())(x)).sum())(w)
        return out, tangent, alone, gradient, second

    got, expected = (jax.jit(everything, static_argnums=0)(f, x, w, dx, dw) for f in (ours, xlas))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * float(jnp.abs(b).max()) + 1e-6)


def test_the_kernels_gradient_takes_the_fast_path_on_a_cpu():
    x, _, w, _ = case((2, 8, 8, 4), (3, 3, 4, 5))
    grad = jax.grad(lambda w: convolution.conv_general_dilated(x, w, (1, 1), 'SAME', **OPTIONS).sum())
    windows = [
        eqn.outvars[0].aval.ndim for eqn in jax.make_jaxpr(grad)(w).eqns if eqn.primitive.name.startswith('conv_')
    ]
    assert 3 in windows  # along one axis
