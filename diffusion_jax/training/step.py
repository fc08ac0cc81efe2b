"""The training state and the pure step that advances it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffusion_jax.data.batches import Arrays, cut
from diffusion_jax.losses import Loss, LossHistory, draw_indices, update_history
from diffusion_jax.models.partition import split_batch
from diffusion_jax.training.inputs import Inputs
from diffusion_jax.training.sharding import optimizer_shardings, param_shardings, replicated

Metrics = dict[str, Float[jax.Array, '...']]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adversary:
    """A discriminator that is trained beside an autoencoder: its parameters and its optimiser's state."""

    params: Any
    opt_state: optax.OptState


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
      adversary: what is trained against it, if anything is.
    """

    step: Int[jax.Array, '']
    params: Any
    ema: Any
    opt_state: optax.OptState
    key: PRNGKeyArray
    loss_history: LossHistory | None = None
    adversary: Adversary | None = None


def init_state(
    init: Callable[[PRNGKeyArray], Any],
    optimizer: optax.GradientTransformation,
    seed: int,
    loss_history: LossHistory | None = None,
    init_adversary: Callable[[PRNGKeyArray], Any] | None = None,
) -> TrainState:
    """The state before the first step. Jit it with shardings, so that it is created where it lives."""
    key_params, key_steps = jax.random.split(jax.random.key(seed))
    params = init(key_params)
    # A copy: the two must not share buffers that a donated step writes to.
    ema = jax.tree.map(jnp.copy, params)
    adversary = None
    if init_adversary is not None:
        against = init_adversary(jax.random.fold_in(key_params, 1))
        adversary = Adversary(against, optimizer.init(against))
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params), key_steps, loss_history, adversary)


def state_shardings(state: TrainState, optimizer: optax.GradientTransformation, rules: Any, mesh: Mesh) -> TrainState:
    """Where each part of a state (concrete or abstract) lives, by `sharding.param_shardings`' rules."""
    whole = replicated(mesh)

    def trained(params: Any, opt_state: Any) -> tuple[Any, Any]:
        shardings = param_shardings(params, rules, mesh)
        return shardings, optimizer_shardings(optimizer, opt_state, shardings, whole)

    params, opt_state = trained(state.params, state.opt_state)
    against = state.adversary
    return TrainState(
        step=whole,
        params=params,
        ema=params,
        opt_state=opt_state,
        key=whole,
        loss_history=jax.tree.map(lambda _: whole, state.loss_history),
        adversary=None if against is None else Adversary(*trained(against.params, against.opt_state)),
    )


def ema_decay_at(step: Int[jax.Array, ''], decay: float) -> Float[jax.Array, '']:
    """min(decay, (1 + step) / (10 + step)): a young average forgets its random start quickly."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    inputs: Inputs,
    accumulate: int = 1,
    skip_nonfinite: bool = False,
    param_shardings: Any = None,
) -> Callable[[TrainState, Arrays, Arrays], tuple[TrainState, Metrics]]:
    """step(state, arrays, batch) -> (state, metrics), pure: see `data.batches` for arrays and batch.

    With a `loss_history` in the state, the times come from it: the loss is called with them as `t`, its values are
    weighted so that their mean stays an estimate of the uniform one, and the history takes note of them.

    Args:
      inputs: what the batch becomes.
      accumulate: the batch goes through the network in as many parts, one after the other, and their gradients' mean is
        what the optimiser sees: less memory for the same batch. Divides the batch.
      skip_nonfinite: where the loss or the gradient is not finite, nothing but the step's number changes, and the
        metric 'skipped' is 1, else 0.
      param_shardings: of the parameters, for the gradients to be split alike as soon as they are there.
    """

    def placed(grads):
        return grads if param_shardings is None else jax.lax.with_sharding_constraint(grads, param_shardings)

    def loss_and_gradient(params, x0, weights, key_loss, key_dropout, conditioning):
        """(mean loss, loss of each image, gradient) of one part of the batch."""

        def weighted_mean(params):
            values = loss(params, x0, key_loss, dropout_key=key_dropout, **conditioning)
            return (weights * values).mean(), values

        (mean_loss, values), grads = jax.value_and_grad(weighted_mean, has_aux=True)(params)
        return mean_loss, values, placed(grads)

    def accumulated(params, x0, weights, key_loss, key_dropout, conditioning):
        parts = jax.tree.map(lambda leaf: interleaved_parts(leaf, accumulate), (x0, weights, conditioning))

        def add(total, row):
            index, (x0, weights, conditioning) = row
            keys = (jax.random.fold_in(key, index) for key in (key_loss, key_dropout))
            mean_loss, values, grads = loss_and_gradient(params, x0, weights, *keys, conditioning)
            return jax.tree.map(jnp.add, total, (mean_loss, grads)), values

        zero = (jnp.zeros(()), placed(jax.tree.map(jnp.zeros_like, params)))
        total, values = jax.lax.scan(add, zero, (jnp.arange(accumulate), parts))
        mean_loss, grads = jax.tree.map(lambda leaf: leaf / accumulate, total)
        return mean_loss, values.T.reshape(-1), grads

    def step(state: TrainState, arrays: Arrays, batch: Arrays):
        key_flip, key_label, key_dropout, key_loss = jax.random.split(jax.random.fold_in(state.key, state.step), 4)
        batch = cut(arrays, batch)
        x0 = split_batch(inputs.x0(batch, key_flip))
        conditioning = inputs.conditioning(batch, key_label)

        history, weights = state.loss_history, jnp.ones(len(x0))
        if history is not None:
            key_loss, key_time = jax.random.split(key_loss)
            indices, conditioning['t'], weights = draw_indices(history, key_time, len(x0))

        gradient_of = loss_and_gradient if accumulate == 1 else accumulated
        mean_loss, values, grads = gradient_of(state.params, x0, weights, key_loss, key_dropout, conditioning)
        if history is not None:
            history = update_history(history, indices, values)
        metrics = {'loss': mean_loss, 'grad_norm': optax.tree.norm(grads)}
        new = dataclasses.replace(advanced(state, grads, optimizer, ema_decay), loss_history=history)
        return unless_nonfinite(state, new, metrics) if skip_nonfinite else (new, metrics)

    return step


def advanced(state: TrainState, grads: Any, optimizer: optax.GradientTransformation, ema_decay: float) -> TrainState:
    """The state after one update of the parameters and their average; all else as it is."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = ema_decay_at(state.step, ema_decay)
    ema = jax.tree.map(lambda average, new: decay * average + (1 - decay) * new, state.ema, params)
    return dataclasses.replace(state, step=state.step + 1, params=params, ema=ema, opt_state=opt_state)


def unless_nonfinite(state: TrainState, new: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
    """(new, metrics), or where a metric is not finite the old state at the new step; 'skipped' says which."""
    finite = jnp.all(jnp.stack([jnp.isfinite(value).all() for value in metrics.values()]))
    old = dataclasses.replace(state, step=new.step)
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
    return new, metrics | {'skipped': 1.0 - finite}


def interleaved_parts(array: Float[Array, 'B ...'], parts: int) -> Float[Array, 'parts b ...']:
    """Part m has rows m, m + parts, ...: so each part has rows of every device's share of the batch."""
    return jnp.moveaxis(array.reshape(-1, parts, *array.shape[1:]), 1, 0)


def scanned(step: Callable[..., Any]) -> Callable[[TrainState, Arrays, Arrays], tuple[TrainState, Metrics]]:
    """Many steps in one dispatch: the batch has a leading axis of steps, and so have the metrics."""

    def steps(state: TrainState, arrays: Arrays, batches: Arrays):
        return jax.lax.scan(lambda state, batch: step(state, arrays, batch), state, batches)

    return steps


def make_held_out_loss(
    loss: Loss, inputs: Inputs
) -> Callable[[Any, Arrays, Arrays, PRNGKeyArray], Float[jax.Array, '']]:
    """held_out_loss(params, arrays, batch, key_data): the loss without dropout, flips or dropped labels.

    The key comes as its data, uint32, which may be a host array: the same in every process.
    """

    def held_out_loss(params, arrays, batch, key_data):
        key = jax.random.wrap_key_data(key_data)
        batch = cut(arrays, batch)
        x0 = inputs.x0(batch, key, flip=False)
        return loss(params, x0, key, **inputs.conditioning(batch, None)).mean()

    return held_out_loss
