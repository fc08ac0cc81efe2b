"""A U-Net and a text transformer that are trained as one, as in the first latent diffusion models (Rombach et al. 2022,
section 4.3.1)."""

from collections.abc import Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffusion_jax.errors import UsageError
from diffusion_jax.models.clip_text import ClipText
from diffusion_jax.models.conditional_unet import ConditionalUNet


class TextUNet(nnx.Module):
    """x_t, t and a text's ids -> a prediction of x_t's shape. Parameters are float32.

    Args:
      vocab_size: of the tokenizer.
      text_length: tokens of the longest text.
      text_features: of each token's state, which the U-Net attends to; the transformer's MLPs are four times as wide.
      text_layers, text_heads: of the transformer.
      resolution, image_channels, channels, channel_multipliers, num_res_blocks, attention_depths, middle_depth,
        num_heads, head_channels, dropout, num_groups, num_classes, dtype, remat: of `ConditionalUNet`.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        text_length: int = 77,
        resolution: int,
        image_channels: int = 4,
        num_classes: int = 0,
        text_features: int = 192,
        text_layers: int = 4,
        text_heads: int = 4,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 2),
        num_res_blocks: int = 2,
        attention_depths: Sequence[int] = (1, 1, 1),
        middle_depth: int | None = None,
        num_heads: int | Sequence[int] = 4,
        head_channels: int | None = None,
        dropout: float = 0.0,
        num_groups: int = 32,
        dtype: str = 'float32',
        remat: str = 'none',
        rngs: nnx.Rngs,
    ):
        self.text = ClipText(
            vocab_size=vocab_size,
            length=text_length,
            features=text_features,
            inner_features=4 * text_features,
            num_layers=text_layers,
            num_heads=text_heads,
            activation='gelu',
            dtype=dtype,
            rngs=rngs,
        )
        self.unet = ConditionalUNet(
            resolution=resolution,
            image_channels=image_channels,
            num_classes=num_classes,
            channels=channels,
            channel_multipliers=channel_multipliers,
            num_res_blocks=num_res_blocks,
            attention_depths=attention_depths,
            middle_depth=middle_depth,
            num_heads=num_heads,
            head_channels=head_channels,
            context_features=text_features,
            dropout=dropout,
            num_groups=num_groups,
            dtype=dtype,
            remat=remat,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, 'B H W C'] | Int[Array, 'B L'],
        t: Float[Array, 'B'] | None = None,
        ids: Int[Array, 'B L'] | None = None,
        context: Float[Array, 'B L D'] | None = None,
        label: Int[Array, 'B'] | None = None,
        dropout_key: PRNGKeyArray | None = None,
        skip_scale: Float[Array, 'S'] | Float[Array, 'B S'] | None = None,
        method: str = 'predict',
    ) -> Any:
        """The prediction at x_t.

        Args:
          x: x_t.
          t: timesteps as `Schedule.timestep` gives them.
          ids: of the texts; or `context`, what the text transformer made of them, to do so once for many calls.
          label: with num_classes.
          dropout_key: for dropout (training); without it there is none.
          skip_scale: of `ConditionalUNet`.
          method: 'encode' takes ids as `x` and gives the transformer's `TextOutput`, whose `last` is the context.
        """
        if method == 'encode':
            return self.text(x)
        if method != 'predict':
            raise UsageError(f"method must be 'predict' or 'encode', got {method!r}.")
        if (ids is None) == (context is None):
            raise UsageError('this network takes a text: its ids, or the context that they were encoded to.')
        context = self.text(ids).last if context is None else context
        return self.unet(x, t, context=context, label=label, dropout_key=dropout_key, skip_scale=skip_scale)
