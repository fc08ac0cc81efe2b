"""Texts as Stable Diffusion's U-Net takes them: through CLIP's text encoders."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion_jax.errors import UsageError
from diffusion_jax.pipelines.drawing import Place
from diffusion_jax.text import ClipTokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """A tokenizer and the text encoder that it is of: `apply(params, ids)` -> `models.clip_text.TextOutput`.

    Attributes:
      length: tokens of a text; the tokenizer's own if None.
    """

    tokenizer: ClipTokenizer
    apply: Callable[..., Any]
    params: Any
    length: int | None = None


@functools.partial(jax.jit, static_argnames=('apply', 'layer'))
def _encode(params, ids: Int[Array, 'B L'], *, apply, layer: int | None) -> tuple[Float[Array, 'B L D'], Array]:
    """(hidden states, pooled). `layer` counts from the end: 2 is the last but one, without the final norm."""
    out = apply(params, ids)
    return (out.last if layer is None else out.hidden[-layer]), out.pooled


@dataclasses.dataclass(frozen=True, eq=False)
class ClipPrompts:
    """Stable Diffusion 1 and 2: the encoder's last hidden state, normed.

    Attributes:
      encoders: one.
    """

    encoders: tuple[Encoder, ...]

    def check(self, texts: Sequence[str]) -> None:
        for text in texts:
            if not isinstance(text, str):
                raise UsageError(f'a prompt must be text, got {text!r}.')

    def _encoded(self, texts: Sequence[str], place: Place, layer: int | None = None) -> list[tuple[Array, Array]]:
        return [
            _encode(each.params, place(each.tokenizer(list(texts), each.length)), apply=each.apply, layer=layer)
            for each in self.encoders
        ]

    def condition(self, texts: Sequence[str], size: tuple[int, int], place: Place) -> dict[str, Array]:
        ((hidden, _),) = self._encoded(texts, place)
        return {'context': hidden}

    def null(self, texts: Sequence[str] | None, num: int, size: tuple[int, int], place: Place) -> dict[str, Array]:
        return self.condition(texts or [''] * num, size, place)


@dataclasses.dataclass(frozen=True, eq=False)
class ClipPromptsXL(ClipPrompts):
    """Stable Diffusion XL: both encoders' last hidden state but one, side by side, the second's pooled output, sizes.

    Attributes:
      encoders: two.
      zeros_for_none: whether no negative prompt is zeros, which an empty one is not.
    """

    zeros_for_none: bool = True

    def condition(self, texts: Sequence[str], size: tuple[int, int], place: Place) -> dict[str, Array]:
        encoded = self._encoded(texts, place, layer=2)
        sizes = np.tile(np.array([*size, 0, 0, *size], np.float32), (len(texts), 1))  # as if it was never cropped
        return {
            'context': jnp.concatenate([hidden for hidden, _ in encoded], axis=-1),
            'pooled': encoded[-1][1],
            'sizes': place(sizes),
        }

    def null(self, texts: Sequence[str] | None, num: int, size: tuple[int, int], place: Place) -> dict[str, Array]:
        conditioning = self.condition(texts or [''] * num, size, place)
        if texts is None and self.zeros_for_none:
            conditioning |= {name: jnp.zeros_like(conditioning[name]) for name in ('context', 'pooled')}
        return conditioning
