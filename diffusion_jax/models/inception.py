"""Inception-v3 as the Frechet Inception distance uses it: the network of 2015, and what was done to its input.

Szegedy et al. 2016, with the differences of the published weights (`inception-2015-12-05`) from the paper and later
implementations: average pooling leaves padding out of its count, the last block pools by maximum, and there are 1008
logits. Without the auxiliary head, in inference only.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

NUM_FEATURES = 2048
NUM_LOGITS = 1008
SIDE = 299
BN_EPSILON = 1e-3

Size = int | tuple[int, int]


class ConvNorm(nnx.Module):
    """Convolution without bias, batch normalisation by stored statistics, ReLU."""

    def __init__(self, features_in: int, features_out: int, kernel: Size, stride: int = 1, pad: Size = 0, *, rngs):
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.stride = stride
        self.pad = [(pad, pad)] * 2 if isinstance(pad, int) else [(side, side) for side in pad]
        init = nnx.initializers.he_normal()
        self.kernel = nnx.Param(init(rngs.params(), (height, width, features_in, features_out)))
        self.scale, self.var = nnx.Param(jnp.ones(features_out)), nnx.Param(jnp.ones(features_out))
        self.bias, self.mean = nnx.Param(jnp.zeros(features_out)), nnx.Param(jnp.zeros(features_out))

    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B h w D']:
        x = jax.lax.conv_general_dilated(
            x, self.kernel[...], (self.stride,) * 2, self.pad, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )
        gain = self.scale[...] * jax.lax.rsqrt(self.var[...] + BN_EPSILON)
        return jax.nn.relu((x - self.mean[...]) * gain + self.bias[...])


def max_pool(x: Float[Array, 'B H W C'], stride: int = 2, pad: int = 0) -> Float[Array, 'B h w C']:
    return nnx.max_pool(x, (3, 3), (stride, stride), [(pad, pad)] * 2)


def avg_pool(x: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
    """Of 3x3, without the padding in the count."""
    return nnx.avg_pool(x, (3, 3), (1, 1), [(1, 1)] * 2, count_include_pad=False)


class Block(nnx.Module):
    """Branches side by side; each is a chain of convolutions by the names that the published weights have."""

    def __init__(self, convolutions: dict[str, tuple[Any, ...]], rngs: nnx.Rngs):
        for name, arguments in convolutions.items():
            setattr(self, name, ConvNorm(*arguments, rngs=rngs))

    def run(self, x: Float[Array, '...'], *names: str) -> Float[Array, '...']:
        for name in names:
            x = getattr(self, name)(x)
        return x


class BlockA(Block):
    def __init__(self, features: int, pool_features: int, rngs: nnx.Rngs):
        convolutions = {
            'branch1x1': (features, 64, 1),
            'branch5x5_1': (features, 48, 1),
            'branch5x5_2': (48, 64, 5, 1, 2),
            'branch3x3dbl_1': (features, 64, 1),
            'branch3x3dbl_2': (64, 96, 3, 1, 1),
            'branch3x3dbl_3': (96, 96, 3, 1, 1),
            'branch_pool': (features, pool_features, 1),
        }
        super().__init__(convolutions, rngs)

    def __call__(self, x):
        branches = [
            self.run(x, 'branch1x1'),
            self.run(x, 'branch5x5_1', 'branch5x5_2'),
            self.run(x, 'branch3x3dbl_1', 'branch3x3dbl_2', 'branch3x3dbl_3'),
            self.run(avg_pool(x), 'branch_pool'),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockB(Block):
    def __init__(self, features: int, rngs: nnx.Rngs):
        convolutions = {
            'branch3x3': (features, 384, 3, 2),
            'branch3x3dbl_1': (features, 64, 1),
            'branch3x3dbl_2': (64, 96, 3, 1, 1),
            'branch3x3dbl_3': (96, 96, 3, 2),
        }
        super().__init__(convolutions, rngs)

    def __call__(self, x):
        branches = [
            self.run(x, 'branch3x3'),
            self.run(x, 'branch3x3dbl_1', 'branch3x3dbl_2', 'branch3x3dbl_3'),
            max_pool(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockC(Block):
    def __init__(self, features: int, inner: int, rngs: nnx.Rngs):
        row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
        convolutions = {
            'branch1x1': (features, 192, 1),
            'branch7x7_1': (features, inner, 1),
            'branch7x7_2': (inner, inner, *row),
            'branch7x7_3': (inner, 192, *column),
            'branch7x7dbl_1': (features, inner, 1),
            'branch7x7dbl_2': (inner, inner, *column),
            'branch7x7dbl_3': (inner, inner, *row),
            'branch7x7dbl_4': (inner, inner, *column),
            'branch7x7dbl_5': (inner, 192, *row),
            'branch_pool': (features, 192, 1),
        }
        super().__init__(convolutions, rngs)

    def __call__(self, x):
        branches = [
            self.run(x, 'branch1x1'),
            self.run(x, *(f'branch7x7_{i}' for i in (1, 2, 3))),
            self.run(x, *(f'branch7x7dbl_{i}' for i in (1, 2, 3, 4, 5))),
            self.run(avg_pool(x), 'branch_pool'),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockD(Block):
    def __init__(self, features: int, rngs: nnx.Rngs):
        convolutions = {
            'branch3x3_1': (features, 192, 1),
            'branch3x3_2': (192, 320, 3, 2),
            'branch7x7x3_1': (features, 192, 1),
            'branch7x7x3_2': (192, 192, (1, 7), 1, (0, 3)),
            'branch7x7x3_3': (192, 192, (7, 1), 1, (3, 0)),
            'branch7x7x3_4': (192, 192, 3, 2),
        }
        super().__init__(convolutions, rngs)

    def __call__(self, x):
        branches = [
            self.run(x, 'branch3x3_1', 'branch3x3_2'),
            self.run(x, *(f'branch7x7x3_{i}' for i in (1, 2, 3, 4))),
            max_pool(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockE(Block):
    def __init__(self, features: int, max_pooled: bool, rngs: nnx.Rngs):
        self.max_pooled = max_pooled
        row, column = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
        convolutions = {
            'branch1x1': (features, 320, 1),
            'branch3x3_1': (features, 384, 1),
            'branch3x3_2a': (384, 384, *row),
            'branch3x3_2b': (384, 384, *column),
            'branch3x3dbl_1': (features, 448, 1),
            'branch3x3dbl_2': (448, 384, 3, 1, 1),
            'branch3x3dbl_3a': (384, 384, *row),
            'branch3x3dbl_3b': (384, 384, *column),
            'branch_pool': (features, 192, 1),
        }
        super().__init__(convolutions, rngs)

    def __call__(self, x):
        single = self.run(x, 'branch3x3_1')
        double = self.run(x, 'branch3x3dbl_1', 'branch3x3dbl_2')
        branches = [
            self.run(x, 'branch1x1'),
            self.run(single, 'branch3x3_2a'),
            self.run(single, 'branch3x3_2b'),
            self.run(double, 'branch3x3dbl_3a'),
            self.run(double, 'branch3x3dbl_3b'),
            self.run(max_pool(x, 1, 1) if self.max_pooled else avg_pool(x), 'branch_pool'),
        ]
        return jnp.concatenate(branches, axis=-1)


class Inception(nnx.Module):
    """A call takes [B, 299, 299, 3] in [-1, 1] and gives (features [B, 2048], logits [B, 1008]).

    The logits are without the bias: the inception score of 2016 was computed so (`logits_unbiased` in torch-fidelity).
    """

    def __init__(self, rngs: nnx.Rngs):
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, 2, rngs=rngs)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, rngs=rngs)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, 1, 1, rngs=rngs)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1, rngs=rngs)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, rngs=rngs)
        self.Mixed_5b, self.Mixed_5c = BlockA(192, 32, rngs), BlockA(256, 64, rngs)
        self.Mixed_5d, self.Mixed_6a = BlockA(288, 64, rngs), BlockB(288, rngs)
        self.Mixed_6b, self.Mixed_6c = BlockC(768, 128, rngs), BlockC(768, 160, rngs)
        self.Mixed_6d, self.Mixed_6e = BlockC(768, 160, rngs), BlockC(768, 192, rngs)
        self.Mixed_7a = BlockD(768, rngs)
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, False, rngs), BlockE(NUM_FEATURES, True, rngs)
        init = nnx.initializers.normal(0.02)
        self.fc = nnx.Param(init(rngs.params(), (NUM_FEATURES, NUM_LOGITS)))

    def __call__(self, x: Float[Array, 'B 299 299 3']) -> tuple[Float[Array, 'B 2048'], Float[Array, 'B 1008']]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool(x)))
        x = max_pool(x)
        for name in ('5b', '5c', '5d', '6a', '6b', '6c', '6d', '6e', '7a', '7b', '7c'):
            x = getattr(self, f'Mixed_{name}')(x)
        features = x.mean(axis=(1, 2))
        return features, features @ self.fc[...]


# --- the input --------------------------------------------------------------------------------------------------------


def _axis_weights(size: int, half_pixels: bool) -> Float[np.ndarray, '299 N']:
    """The weights that resize an axis to 299, bilinearly and without antialiasing."""
    out = np.arange(SIDE, dtype=np.float64)
    source = (out + 0.5) * size / SIDE - 0.5 if half_pixels else out * size / SIDE
    source = np.clip(source, 0, size - 1)
    low = np.floor(source).astype(int)
    high = np.minimum(low + 1, size - 1)
    weights = np.zeros((SIDE, size))
    weights[np.arange(SIDE), low] += 1 - (source - low)
    weights[np.arange(SIDE), high] += source - low
    return weights


def resized(x: Float[Array, 'B H W C'], half_pixels: bool) -> Float[Array, 'B 299 299 C']:
    """Bilinear to 299x299.

    Args:
      half_pixels: pixels are squares whose centres are aligned (PyTorch, and pytorch-fid with it); False: points whose
        first ones are aligned (TensorFlow 1, which FID was defined with, and torch-fidelity).
    """
    rows, columns = (jnp.asarray(_axis_weights(size, half_pixels), x.dtype) for size in x.shape[1:3])
    return jnp.einsum('ih,bhwc,jw->bijc', rows, x, columns, precision='highest')


def prepared(x: Float[Array, 'B H W C'], like_pytorch_fid: bool) -> Float[Array, 'B 299 299 3']:
    """Images in [-1, 1], grey or RGB, as the network expects them: TensorFlow's (pixel - 128) / 128, or PyTorch's."""
    x = jnp.broadcast_to(x, (*x.shape[:3], 3))
    if like_pytorch_fid:
        return resized(x, half_pixels=True)
    return (resized((x + 1) * 127.5, half_pixels=False) - 128) / 128


def params_of_state_dict(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Our parameters from a PyTorch state dict: of pytorch-fid's weights file, or torch-fidelity's.

    Raises:
      KeyError: a tensor is missing; its name.
    """
    names = {'weight': 'scale', 'bias': 'bias', 'running_mean': 'mean', 'running_var': 'var'}
    params: dict[str, Any] = {'fc': np.ascontiguousarray(tensors['fc.weight'].T)}
    for key, tensor in tensors.items():
        *path, kind, name = key.split('.')
        if kind not in ('conv', 'bn') or name == 'num_batches_tracked':
            continue
        node = params
        for part in path:
            node = node.setdefault(part, {})
        if kind == 'conv':
            node['kernel'] = np.ascontiguousarray(tensor.transpose(2, 3, 1, 0))
        else:
            node[names[name]] = tensor
    return params
