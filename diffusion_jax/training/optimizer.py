"""The optimiser that a config names."""

from collections.abc import Callable

import optax

from diffusion_jax.errors import UsageError
from diffusion_jax.registry import lookup

DECAYS: dict[str, Callable[[float, int], optax.Schedule]] = {
    'constant': lambda peak, steps: optax.constant_schedule(peak),
    'cosine': lambda peak, steps: optax.cosine_decay_schedule(peak, steps),
    'linear': lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
}
"""Name -> (peak learning rate, steps left after the warm-up) -> learning rate."""

OPTIMIZERS = ('adam', 'adamw')


def make_optimizer(
    *,
    name: str,
    learning_rate: float,
    warmup_steps: int,
    decay: str,
    b1: float,
    b2: float,
    weight_decay: float,
    clip_norm: float | None,
    num_steps: int,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """(optimiser, learning rate as a function of the step): clipping, then Adam or AdamW, warm-up and decay.

    Args:
      warmup_steps: the learning rate rises linearly from 0 over these.
      decay: 'constant', or 'cosine' / 'linear' to 0 at `num_steps`.
      weight_decay: decoupled (Loshchilov & Hutter 2019), of 'adamw' alone.
      clip_norm: limit of the global gradient norm; None for no limit.
    """
    lookup('optimizer', dict.fromkeys(OPTIMIZERS), name)
    if weight_decay and name != 'adamw':
        raise UsageError(f"weight_decay={weight_decay} needs optimizer 'adamw'; {name!r} has none.")
    if learning_rate <= 0 or warmup_steps < 0 or not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise UsageError(
            'the optimizer needs learning_rate > 0, warmup_steps >= 0, b1 and b2 in [0, 1), got '
            f'learning_rate={learning_rate}, warmup_steps={warmup_steps}, b1={b1}, b2={b2}.'
        )
    if clip_norm is not None and clip_norm <= 0:
        raise UsageError(f'clip_norm must be above 0, or None for no clipping, got {clip_norm}.')
    if num_steps <= warmup_steps:
        raise UsageError(f'train.num_steps={num_steps} leaves nothing after {warmup_steps} warmup_steps.')
    main = lookup('decay', DECAYS, decay)(learning_rate, num_steps - warmup_steps)
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    rate = optax.join_schedules([warmup, main], [warmup_steps]) if warmup_steps else main
    adam = optax.adamw(rate, b1, b2, weight_decay=weight_decay) if name == 'adamw' else optax.adam(rate, b1, b2)
    return (optax.chain(optax.clip_by_global_norm(clip_norm), adam) if clip_norm is not None else adam), rate
