"""The training state and the pure step that advances it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int, PRNGKeyArray

from diffusion_jax.data.batches import Arrays, cut, prepare
from diffusion_jax.losses import Loss, LossHistory, draw_indices, drop_condition, update_history


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training needs to go on, and all that a checkpoint holds.

    Attributes:
      step: how many updates were made.
      params, ema: the parameters and their exponential moving average.
      opt_state: the optimiser's.
      key: never used itself; step i draws from fold_in(key, i).
      loss_history: what times are drawn by, where they are drawn by importance; else None.
    """

    step: Int[jax.Array, '']
    params: Any
    ema: Any
    opt_state: optax.OptState
    key: PRNGKeyArray
    loss_history: LossHistory | None = None


def init_state(
    init: Callable[[PRNGKeyArray], Any],
    optimizer: optax.GradientTransformation,
    seed: int,
    loss_history: LossHistory | None = None,
) -> TrainState:
    """The state before the first step. Jit it with shardings, so that it is created where it lives."""
    key_params, key_steps = jax.random.split(jax.random.key(seed))
    params = init(key_params)
    # A copy: the two must not share buffers that a donated step writes to.
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params), key_steps, loss_history)


def ema_decay_at(step: Int[jax.Array, ''], decay: float) -> Float[jax.Array, '']:
    """min(decay, (1 + step) / (10 + step)): a young average forgets its random start quickly."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    flip: bool,
    null_label: int,
    label_dropout: float,
) -> Callable[[TrainState, Arrays, Arrays], tuple[TrainState, dict[str, Float[jax.Array, '']]]]:
    """step(state, arrays, batch) -> (state, metrics), pure: see `data.batches` for arrays and batch.

    With a `loss_history` in the state, the times come from it: the loss is called with them as `t`, its values are
    weighted so that their mean stays an estimate of the uniform one, and the history takes note of them.

    Args:
      null_label: the label that stands for none: the number of classes, or 0 for an unconditional model.
      label_dropout: how often it replaces the label.
    """

    def step(state: TrainState, arrays: Arrays, batch: Arrays):
        key_flip, key_label, key_dropout, key_loss = jax.random.split(jax.random.fold_in(state.key, state.step), 4)
        batch = cut(arrays, batch)
        x0 = prepare(batch['image'], key_flip, flip)
        conditioning = {'dropout_key': key_dropout}
        if null_label:
            conditioning['label'] = drop_condition(key_label, batch['label'], null_label, label_dropout)

        history, weights = state.loss_history, 1.0
        if history is not None:
            key_loss, key_time = jax.random.split(key_loss)
            indices, conditioning['t'], weights = draw_indices(history, key_time, len(x0))

        def weighted_mean(params):
            values = loss(params, x0, key_loss, **conditioning)
            return (weights * values).mean(), values

        (mean_loss, values), grads = jax.value_and_grad(weighted_mean, has_aux=True)(state.params)
        if history is not None:
            history = update_history(history, indices, values)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema_decay_at(state.step, ema_decay)
        ema = jax.tree.map(lambda average, new: decay * average + (1 - decay) * new, state.ema, params)
        metrics = {'loss': mean_loss, 'grad_norm': optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, ema, opt_state, state.key, history), metrics

    return step


def make_held_out_loss(
    loss: Loss, *, null_label: int
) -> Callable[[Any, Arrays, Arrays, PRNGKeyArray], Float[jax.Array, '']]:
    """held_out_loss(params, arrays, batch, key): the loss without dropout, flips or dropped labels."""

    def held_out_loss(params, arrays, batch, key):
        batch = cut(arrays, batch)
        x0 = prepare(batch['image'], key, flip=False)
        return loss(params, x0, key, **({'label': batch['label']} if null_label else {})).mean()

    return held_out_loss
