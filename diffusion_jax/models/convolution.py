"""Convolution, with a gradient of 3x3 kernels that is fast on a CPU, too."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

NHWC = ('NHWC', 'HWIO', 'NHWC')


def conv_general_dilated(x: Array, kernel: Array, window_strides: Any, padding: Any, **options: Any) -> Array:
    """`jax.lax.conv_general_dilated`, for `nnx.Conv`.

    XLA's CPU backend takes the gradient of a kernel as a convolution whose window is the whole image: of 32x32, up to
    four times slower than the forward pass (experiments/benchmarks/README.md). There the gradient of a 3x3 kernel is
    taken of an equal expression instead. Elsewhere, and of other kernels, nothing changes.
    """
    no_strides = {*window_strides, *options['lhs_dilation'], *options['rhs_dilation']} == {1}
    images_by_3x3 = x.ndim == 4 and kernel.shape[:2] == (3, 3) and _is_same(padding)
    if made_for_cpu() and images_by_3x3 and no_strides and options['feature_group_count'] == 1:
        return _conv_3x3(x, kernel)
    return lax.conv_general_dilated(x, kernel, window_strides, padding, **options)


def _is_same(padding: Any) -> bool:
    """Of a 3x3 kernel without strides."""
    return padding == 'SAME' if isinstance(padding, str) else [tuple(pair) for pair in padding] == [(1, 1), (1, 1)]


def made_for_cpu() -> bool:
    """Whether what is traced is compiled for a CPU: of JAX, only its default backend is known while it traces."""
    return jax.default_backend() == 'cpu'


def _plain(x: Float[Array, 'B H W C'], kernel: Float[Array, '3 3 C K']) -> Float[Array, 'B H W K']:
    return lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=NHWC)


# Not custom_vjp, which would leave no forward mode: likelihoods and consistency objectives need it.
@jax.custom_jvp
def _conv_3x3(x: Float[Array, 'B H W C'], kernel: Float[Array, '3 3 C K']) -> Float[Array, 'B H W K']:
    return _plain(x, kernel)


def _jvp(primals, tangents):
    (x, kernel), (dx, dkernel) = primals, tangents
    parts = []
    if not isinstance(dx, jax.custom_derivatives.SymbolicZero):
        parts.append(_conv_3x3(dx, kernel))
    if not isinstance(dkernel, jax.custom_derivatives.SymbolicZero):
        parts.append(_by_columns(x, dkernel))
    return _conv_3x3(x, kernel), sum(parts)


_conv_3x3.defjvp(_jvp, symbolic_zeros=True)


def _by_columns(x: Float[Array, 'B H W C'], kernel: Float[Array, '3 3 C K']) -> Float[Array, 'B H W K']:
    """The same convolution, of each column of the images by the kernel's three columns at once, which are then added.

    Its transpose in the kernel is a convolution along one axis, with as many batches as there are columns.
    """
    batch, height, width, channels = x.shape
    features = kernel.shape[-1]
    columns = x.transpose(0, 2, 1, 3).reshape(batch * width, height, channels)
    side_by_side = kernel.transpose(0, 2, 1, 3).reshape(3, channels, 3 * features)
    out = lax.conv_general_dilated(columns, side_by_side, (1,), 'SAME', dimension_numbers=('NWC', 'WIO', 'NWC'))
    out = out.reshape(batch, width, height, 3, features).transpose(0, 2, 1, 3, 4)
    padded = jnp.pad(out, ((0, 0), (0, 0), (1, 1), (0, 0), (0, 0)))
    return sum(padded[:, :, shift : shift + width, shift] for shift in range(3))
