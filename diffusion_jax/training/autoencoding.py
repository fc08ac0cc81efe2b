"""The objective of an autoencoder, and the pure step that trains it: reconstruction, and a discriminator's opinion.

The objective of an image is mean |x - y| (or of its square) over its numbers, plus weighted terms: the distance of
features, and

- the KL of its latents, in nats, divided by the numbers of the image. This is Latent Diffusion's objective (Rombach et
  al. 2022, appendix G), which sums over pixels, divided by their number; its log-variance of pixels stays at 0;
- or the codebook's error plus the weighted commitment error (van den Oord et al. 2017, eq. 3).
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from diffusion_jax.data.batches import Arrays, cut, prepare
from diffusion_jax.errors import UsageError
from diffusion_jax.evaluation.features import FeatureNetwork, load_features
from diffusion_jax.experiment import Autoencoder
from diffusion_jax.models.autoencoder import decode, encode
from diffusion_jax.models.discriminator import PatchDiscriminator
from diffusion_jax.models.functional import functional
from diffusion_jax.models.partition import split_batch
from diffusion_jax.models.vq_autoencoder import codebook_use, decode_quantised, quantise
from diffusion_jax.registry import lookup
from diffusion_jax.training.step import (
    Adversary,
    Metrics,
    TrainState,
    advanced,
    interleaved_parts,
    unless_nonfinite,
)

RECONSTRUCTIONS: dict[str, Callable] = {'l1': jnp.abs, 'l2': jnp.square}
"""Name -> the error of each number of an image, of the difference."""

LARGEST_ADAPTIVE_WEIGHT = 1e4

Images = Float[Array, 'B H W C']


class Coded(NamedTuple):
    """Images that went through an autoencoder.

    Attributes:
      images: the reconstructions.
      regulariser: the mean over the batch of the term that keeps the latents in order, with its weight.
    """

    images: Images
    regulariser: Float[Array, '']


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """What `config.autoencoder` asks for.

    Attributes:
      autoencoder: to be trained.
      reconstruction: of `RECONSTRUCTIONS`.
      kl_weight, commitment_weight: of the one with Gaussians and of the one with a codebook.
      perceptual: (x, y) -> the distance of their features, [B]; None for none.
      init_discriminator, discriminator: key -> its parameters; (parameters, images) -> [B, h, w]; None for none.
      discriminator_weight, discriminator_start: of the adversarial term, and its first step.
    """

    autoencoder: Autoencoder
    reconstruction: str
    kl_weight: float
    commitment_weight: float
    perceptual: Callable[[Images, Images], Float[Array, 'B']] | None = None
    perceptual_weight: float = 0.0
    init_discriminator: Callable[[PRNGKeyArray], Any] | None = None
    discriminator: Callable[[Any, Images], Float[Array, 'B h w']] | None = None
    discriminator_weight: float = 0.0
    discriminator_start: int = 0

    def code(self, params: Any, x: Images, key: PRNGKeyArray | None) -> tuple[Coded, Metrics]:
        """Images through the autoencoder, by a draw of their latents with a key and by their means without; metrics."""
        apply = self.autoencoder.apply
        if self.autoencoder.codebook_size:
            latents = quantise(apply, params, apply(params, x, method='encode'))
            used, perplexity = codebook_use(latents.indices, self.autoencoder.codebook_size)
            regulariser = latents.codebook_error + self.commitment_weight * latents.commitment_error
            metrics = {'commitment': latents.commitment_error.mean()}
            metrics |= {'codebook_used': used, 'codebook_perplexity': perplexity}
            return Coded(decode_quantised(apply, params, latents.z), regulariser.mean()), metrics
        moments = encode(apply, params, x)
        kl = moments.kl()
        images = decode(apply, params, moments.mean if key is None else moments.sample(key))
        return Coded(images, self.kl_weight * kl.mean() / x[0].size), {'kl': kl.mean()}

    def error(self, x: Images, y: Images) -> tuple[Float[Array, ''], Metrics]:
        """(mean error of reconstructions y of x, with the distance of features; metrics)."""
        difference = RECONSTRUCTIONS[self.reconstruction](x - y).mean()
        if self.perceptual is None:
            return difference, {'reconstruction': difference}
        apart = self.perceptual(x, y).mean()
        return difference + self.perceptual_weight * apart, {'reconstruction': difference, 'perceptual': apart}


def make_objective(section: ConfigDict, autoencoder: Autoencoder) -> Objective:
    """The objective that a config's `autoencoder` section describes.

    Raises:
      UsageError: a name, a weight or a network that does not fit.
    """
    lookup('reconstruction', RECONSTRUCTIONS, section.reconstruction)
    for name in ('kl_weight', 'commitment_weight', 'perceptual_weight', 'discriminator_weight', 'discriminator_start'):
        if not 0 <= section[name] < float('inf'):
            raise UsageError(f'autoencoder.{name} must be 0 or more, got {section[name]}.')
    arguments: dict[str, Any] = {}
    if section.perceptual_weight:
        arguments = {
            'perceptual': functools.partial(feature_distance, _features(section, autoencoder)),
            'perceptual_weight': section.perceptual_weight,
        }
    elif section.perceptual_file:
        raise UsageError('autoencoder.perceptual_file is for a perceptual_weight above 0: set it, or leave it out.')
    if section.discriminator_weight:
        resolution, _, channels = autoencoder.data.image_shape
        init, discriminator = functional(
            lambda rngs: PatchDiscriminator(
                resolution=resolution,
                image_channels=channels,
                channels=section.discriminator_channels,
                num_layers=section.discriminator_layers,
                rngs=rngs,
            )
        )
        arguments |= {
            'init_discriminator': init,
            'discriminator': discriminator,
            'discriminator_weight': section.discriminator_weight,
            'discriminator_start': section.discriminator_start,
        }
    return Objective(autoencoder, section.reconstruction, section.kl_weight, section.commitment_weight, **arguments)


def _features(section: ConfigDict, autoencoder: Autoencoder) -> FeatureNetwork:
    info = autoencoder.data
    try:
        return load_features(
            section.perceptual_features, section.perceptual_file, info.class_names, tuple(info.image_shape)
        )
    except UsageError as error:
        message = re.sub(r'evaluate\.features', 'autoencoder.perceptual_features', str(error))
        message = re.sub(r'evaluate\.weights', 'autoencoder.perceptual_file', message)
        message = re.sub(r'; or leave evaluators that.*', '; or autoencoder.perceptual_weight=0.', message)
        raise UsageError(message) from None


def feature_distance(network: FeatureNetwork, x: Images, y: Images) -> Float[Array, 'B']:
    """|f(x) / |f(x)| - f(y) / |f(y)||^2 of the network's features f: LPIPS (Zhang et al. 2018), of one layer."""

    def unit(images):
        features, _ = network.apply(network.params, images)
        return features * jax.lax.rsqrt(jnp.square(features).sum(axis=-1, keepdims=True) + 1e-10)

    return jnp.square(unit(jax.lax.stop_gradient(x)) - unit(y)).sum(axis=-1)


def hinge_loss(of_real: Float[Array, '...'], of_fake: Float[Array, '...']) -> Float[Array, '']:
    """The discriminator's: (E max(0, 1 - D(x)) + E max(0, 1 + D(y))) / 2, as VQGAN has it."""
    return 0.5 * (jax.nn.relu(1 - of_real).mean() + jax.nn.relu(1 + of_fake).mean())


def adaptive_weight(of_error: Float[Array, '...'], of_adversary: Float[Array, '...']) -> Float[Array, '']:
    """|gradient of the error| / (|gradient of the adversarial term| + 1e-4), both at the decoder's last layer.

    VQGAN (Esser et al. 2021), eq. 7: with it the adversarial term has as much say there as the reconstruction.
    """
    weight = jnp.linalg.norm(of_error) / (jnp.linalg.norm(of_adversary) + 1e-4)
    return jnp.clip(weight, 0.0, LARGEST_ADAPTIVE_WEIGHT)


def make_autoencoder_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    flip: bool,
    accumulate: int = 1,
    skip_nonfinite: bool = False,
    param_shardings: Any = None,
) -> Callable[[TrainState, Arrays, Arrays], tuple[TrainState, Metrics]]:
    """step(state, arrays, batch) -> (state, metrics), pure; arguments as of `step.make_train_step`.

    A discriminator is updated in the same step, by the optimiser of the same settings with a state of its own (its
    learning rate is counted from its start), on the reconstructions from before the update. Before its start neither it
    nor its term exists: its metrics are 0.
    """

    def placed(grads):
        return grads if param_shardings is None else jax.lax.with_sharding_constraint(grads, param_shardings)

    def gradients(params, against, x, key, begun):
        """(gradient of the parameters, the discriminator's or None, metrics) of one part of the batch."""
        coded, backward, metrics = jax.vjp(lambda params: objective.code(params, x, key), params, has_aux=True)
        (error, parts), of_error = jax.value_and_grad(lambda y: objective.error(x, y), has_aux=True)(coded.images)
        metrics = {'loss': error + coded.regulariser, **parts, **metrics}
        towards, of_against = of_error, None
        if objective.discriminator is not None:
            adversarial, of_against, more = jax.lax.cond(
                begun,
                lambda: _opposed(objective, backward, against, x, coded.images, of_error),
                lambda: _unopposed(against, of_error),
            )
            towards = of_error + adversarial
            metrics |= more
        (grads,) = backward(Coded(towards, jnp.ones_like(coded.regulariser)))
        return placed(grads), of_against, metrics

    def accumulated(params, against, x, key, begun):
        def add(total, row):
            index, part = row
            return jax.tree.map(
                jnp.add, total, gradients(params, against, part, jax.random.fold_in(key, index), begun)
            ), ()

        parts = interleaved_parts(x, accumulate)
        shapes = jax.eval_shape(gradients, params, against, parts[0], key, begun)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(accumulate), parts))
        return jax.tree.map(lambda leaf: leaf / accumulate, total)

    def step(state: TrainState, arrays: Arrays, batch: Arrays):
        key_flip, key_latents = jax.random.split(jax.random.fold_in(state.key, state.step))
        x = split_batch(prepare(cut(arrays, batch)['image'], key_flip, flip))
        against = None if state.adversary is None else state.adversary.params
        begun = state.step >= objective.discriminator_start
        gradient_of = gradients if accumulate == 1 else accumulated
        grads, of_against, metrics = gradient_of(state.params, against, x, key_latents, begun)
        metrics['grad_norm'] = optax.tree.norm(grads)
        new = advanced(state, grads, optimizer, ema_decay)
        if against is not None:
            updates, opt_state = optimizer.update(of_against, state.adversary.opt_state, against)
            updated = Adversary(optax.apply_updates(against, updates), opt_state)
            updated = jax.tree.map(lambda new, old: jnp.where(begun, new, old), updated, state.adversary)
            new = dataclasses.replace(new, adversary=updated)
        return unless_nonfinite(state, new, metrics) if skip_nonfinite else (new, metrics)

    return step


ADVERSARIAL_METRICS = ('adversarial', 'adaptive_weight', 'discriminator_loss')


def _opposed(objective: Objective, backward: Callable, against: Any, x: Images, y: Images, of_error: Images):
    """(gradient of the weighted adversarial term in the reconstructions, the discriminator's gradient, metrics)."""
    value, of_value = jax.value_and_grad(lambda y: -objective.discriminator(against, y).mean())(y)

    def at_last_layer(gradient):
        # Linear in it, and the compiler leaves out what of the way back is not asked for.
        (grads,) = backward(Coded(gradient, jnp.zeros(())))
        return grads['decoder']['conv_out']['kernel']

    weight = adaptive_weight(at_last_layer(of_error), at_last_layer(of_value))
    loss, grads = jax.value_and_grad(
        lambda against: hinge_loss(objective.discriminator(against, x), objective.discriminator(against, y))
    )(against)
    metrics = dict(zip(ADVERSARIAL_METRICS, (value, weight, loss), strict=True))
    return objective.discriminator_weight * weight * of_value, grads, metrics


def _unopposed(against: Any, of_error: Images):
    zeros = jax.tree.map(jnp.zeros_like, against)
    return jnp.zeros_like(of_error), zeros, {name: jnp.zeros(()) for name in ADVERSARIAL_METRICS}


def make_held_out_error(
    objective: Objective,
) -> Callable[[Any, Arrays, Arrays, PRNGKeyArray], Float[jax.Array, '']]:
    """held_out_error(params, arrays, batch, key_data): the loss without the discriminator, by the latents' means."""

    def held_out_error(params, arrays, batch, key_data):
        x = prepare(cut(arrays, batch)['image'], jax.random.wrap_key_data(key_data), flip=False)
        coded, _ = objective.code(params, x, None)
        return objective.error(x, coded.images)[0] + coded.regulariser

    return held_out_error
