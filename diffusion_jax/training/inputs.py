"""From a batch, as `data.batches` gives it, to what the network is trained on: x0 and its conditioning. All pure."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffusion_jax.data.batches import FROZEN, Arrays, prepare
from diffusion_jax.experiment import LatentInfo
from diffusion_jax.losses import drop_condition
from diffusion_jax.models.autoencoder import Moments
from diffusion_jax.pipelines.latents import Encode


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """What becomes of a batch.

    Attributes:
      flip: mirror each image left to right with probability 1/2.
      null_label: the label that stands for none: the number of classes, or 0 for a model without labels.
      label_dropout: how often it replaces the label, or the null text the text.
      latents: the network's, of pixels if None. A batch has `mean` and `log_variance` (with flip also `mirrored_mean`
        and `mirrored_log_variance`), or images, which `encoder` encodes by what is frozen as 'autoencoder'.
      draw: from the latents' Gaussians, or take their means.
      null_ids: of the null text; None for a model that takes no text. A batch has `ids`.
      encode_text: (what is frozen as 'text', ids) -> context, where the network does not do so itself.
    """

    flip: bool = False
    null_label: int = 0
    label_dropout: float = 0.0
    latents: LatentInfo | None = None
    encoder: Encode | None = None
    draw: bool = True
    null_ids: Int[np.ndarray, 'L'] | None = None
    encode_text: Any = None

    def x0(self, batch: Arrays, key: PRNGKeyArray, flip: bool | None = None) -> Float[Array, 'B H W C']:
        """The images in [-1, 1], or their latents at unit scale; mirrored as said, or by `flip` if it is given."""
        flip = self.flip if flip is None else flip
        if self.latents is None:
            return prepare(batch['image'], key, flip)
        if 'mean' in batch:
            moments = _mirrored(batch, key) if flip else Moments(batch['mean'], batch['log_variance'])
        else:
            moments = self.encoder(batch[FROZEN]['autoencoder'], prepare(batch['image'], key, flip))
        moments = Moments(*(part.astype(jnp.float32) for part in moments))
        z = moments.sample(jax.random.fold_in(key, 1)) if self.draw else moments.mean
        return (z - self.latents.shift) * self.latents.scale

    def conditioning(self, batch: Arrays, key: PRNGKeyArray | None) -> dict[str, Array]:
        """Keyword arguments of the network; with a key, some of them are dropped."""
        found: dict[str, Array] = {}
        if self.null_label:
            found['label'] = batch['label']
            if key is not None:
                found['label'] = drop_condition(key, batch['label'], self.null_label, self.label_dropout)
        if self.null_ids is not None:
            ids = batch['ids']
            if key is not None:
                dropped = jax.random.bernoulli(key, self.label_dropout, ids.shape[:1])
                ids = jnp.where(dropped[:, None], self.null_ids, ids)
            if self.encode_text is None:
                found['ids'] = ids
            else:
                found['context'] = self.encode_text(batch[FROZEN]['text'], ids)
        return found


def _mirrored(batch: Arrays, key: PRNGKeyArray) -> Moments:
    """Each image's, or those of its mirror image with probability 1/2."""
    chosen = jax.random.bernoulli(key, 0.5, batch['mean'].shape[:1])[:, None, None, None]
    return Moments(
        jnp.where(chosen, batch['mirrored_mean'], batch['mean']),
        jnp.where(chosen, batch['mirrored_log_variance'], batch['log_variance']),
    )
