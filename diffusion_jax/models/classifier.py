"""A small convolutional classifier: to read labels off images, and its last hidden layer as features of them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diffusion_jax.models.layers import GroupNorm, conv, dense, dropout


class Classifier(nnx.Module):
    """Levels of two 3x3 convolutions each, halved by averaging between them, pooled to one vector.

    A call takes images, [B, H, W, C] float in [-1, 1], and gives (features [B, num_features], logits
    [B, num_classes]); with a `dropout_key`, the features of the logits are dropped out.

    Args:
      resolution: of the images; halved once less than there are widths.
      widths: of the levels.
      num_features: of the hidden layer between the pooled vector and the logits.
      dropout: rate, on the features, while it is trained.
    """

    def __init__(
        self,
        *,
        resolution: int,
        image_channels: int,
        num_classes: int,
        widths: Sequence[int] = (32, 64, 96),
        num_features: int = 64,
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        self.dropout = dropout
        convolutions, norms = [], []
        previous = image_channels
        for width in widths:
            for features_in in (previous, width):
                convolutions.append(conv(features_in, width, 3, dtype=jnp.float32, rngs=rngs))
                norms.append(GroupNorm(width, 8, rngs=rngs))
            previous = width
        self.convolutions, self.norms = nnx.List(convolutions), nnx.List(norms)
        self.hidden = dense(previous, num_features, dtype=jnp.float32, rngs=rngs)
        self.out = dense(num_features, num_classes, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self, x: Float[Array, 'B H W C'], *, dropout_key: Array | None = None
    ) -> tuple[Float[Array, 'B F'], Float[Array, 'B K']]:
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            if index and index % 2 == 0:
                x = _halved(x)
            x = jax.nn.silu(norm(convolution(x)))
        features = jax.nn.silu(self.hidden(x.mean(axis=(1, 2))))
        return features, self.out(dropout(features, self.dropout, dropout_key))


def _halved(x: Float[Array, 'B H W C']) -> Float[Array, 'B h w C']:
    """Means of 2x2 pixels; an odd last row or column is left out."""
    height, width = x.shape[1] // 2, x.shape[2] // 2
    x = x[:, : 2 * height, : 2 * width]
    return x.reshape(len(x), height, 2, width, 2, x.shape[-1]).mean(axis=(2, 4))
