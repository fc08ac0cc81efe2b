"""Guidance: functions from denoisers to a denoiser."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.denoisers import Denoiser, ModelDenoiser
from diffusion_jax.process import expand


def classifier_free(
    denoiser: ModelDenoiser, null_conditioning: Mapping[str, Any], guidance_scale: Float[Array, ''] | Float[Array, 'B']
) -> Denoiser:
    """Classifier-free guidance in one batched forward (Ho & Salimans 2022): uncond + scale (cond - uncond).

    Scale 1 is exactly the conditional model, scale 0 exactly the unconditional one. In that convention the paper's w is
    scale - 1.

    Args:
      denoiser: the conditional network.
      null_conditioning: what replaces `denoiser.conditioning` for the unconditional half; same keys and shapes.
      guidance_scale: scalar or one per sample; may be traced.
    """
    if set(null_conditioning) != set(denoiser.conditioning):
        raise ValueError(
            f'null_conditioning has keys {sorted(null_conditioning)}, the conditioning {sorted(denoiser.conditioning)}.'
        )
    # Each sample's two halves lie side by side, so that a batch sharded over devices stays where it is.
    pairs = jax.tree.map(
        lambda cond, null: jnp.stack([cond, null], axis=1).reshape(-1, *cond.shape[1:]),
        dict(denoiser.conditioning),
        dict(null_conditioning),
    )
    paired = dataclasses.replace(denoiser, conditioning=pairs)

    def guided(x_t, t):
        t = jnp.broadcast_to(jnp.asarray(t), x_t.shape[:1])
        prediction = paired(jnp.repeat(x_t, 2, axis=0), jnp.repeat(t, 2))
        prediction = jax.tree.map(lambda leaf: leaf.reshape(x_t.shape[0], 2, *leaf.shape[1:]), prediction)
        conditional, unconditional = (jax.tree.map(lambda leaf, i=i: leaf[:, i], prediction) for i in (0, 1))
        scale = expand(guidance_scale, x_t)
        # Not uncond + scale * (cond - uncond): this form is exact at scale 0 and 1.
        value = scale * conditional.value + (1 - scale) * unconditional.value
        return dataclasses.replace(conditional, value=value)

    return guided
