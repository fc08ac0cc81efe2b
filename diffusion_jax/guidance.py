"""Guidance: functions from denoisers to a denoiser.

What wraps a `Stateful` denoiser is one itself. A `guidance_scale` is a scalar or one per sample, [B], and may be
traced: another one runs the same compiled program.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.denoisers import Denoiser, ModelDenoiser, Stateful, map_x0
from diffusion_jax.errors import UsageError
from diffusion_jax.process import Prediction, divide_or_zero, expand

PerSample = Float[Array, ''] | Float[Array, 'B'] | float
Interval = tuple[float | Float[Array, ''], float | Float[Array, '']]


def _traced(value) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))


def _is_zero(value: PerSample) -> bool:
    """Whether an option is off; one that is traced is on."""
    return not _traced(value) and not np.any(np.asarray(value))


def _check(value, valid: Callable[[np.ndarray], Any], message: str) -> None:
    """A `UsageError` if a value is not valid; what is traced is not looked at."""
    if not _traced(value) and not np.all(valid(np.asarray(value))):
        raise UsageError(f'{message}, got {value}.')


def check_options(interval: Interval | None, rescale: PerSample) -> None:
    """A `UsageError` for options of `classifier_free` that are out of range."""
    if interval is not None:
        if not hasattr(interval, '__len__') or len(interval) != 2:
            raise UsageError(f'interval must be (low, high) in log-SNR, or None, got {interval}.')
        _check(
            interval, lambda ends: ends[0] < ends[1], 'interval must be (low, high) in log-SNR with low < high, or None'
        )
    _check(rescale, lambda phi: (phi >= 0) & (phi <= 1), 'rescale must lie in [0, 1]; 0 is none, the paper uses 0.7')


def _per_sample(name: str, value: PerSample, x: Float[Array, 'B ...']):
    """A scalar or [B] to multiply x with, in its dtype."""
    if jnp.shape(value) not in ((), x.shape[:1]):
        raise UsageError(
            f'{name} must be a scalar or one per sample, [{x.shape[0]}], got an array of shape {jnp.shape(value)}.'
        )
    return expand(jnp.asarray(value, x.dtype), x)


def _sum(x: Float[Array, 'B ...']) -> Float[Array, 'B ...']:
    """The sum of each sample, [B, 1, .. 1]."""
    return jnp.sum(x, axis=tuple(range(1, x.ndim)), keepdims=True)


def _wrap(call: Callable[..., tuple[Prediction, tuple]], *denoisers: Denoiser) -> Denoiser:
    """A denoiser around others: `call(denoisers, x_t, t, states)` -> (Prediction, states), where all are `Stateful`."""
    parts = tuple(
        part
        if isinstance(part, Stateful)
        else Stateful(lambda x: (), lambda x_t, t, state, part=part: (part(x_t, t), state))
        for part in denoisers
    )
    if any(isinstance(part, Stateful) for part in denoisers):
        return Stateful(
            lambda x: tuple(part.initial_state(x) for part in parts),
            lambda x_t, t, states: call(parts, x_t, t, states),
        )
    return lambda x_t, t: call(parts, x_t, t, ((),) * len(parts))[0]


def _null_denoiser(denoiser: ModelDenoiser, null_conditioning: Mapping[str, Any]) -> ModelDenoiser:
    """The denoiser under the null conditioning."""
    if not isinstance(denoiser, ModelDenoiser):
        raise UsageError(
            f'this guidance replaces the conditioning of a ModelDenoiser, got a {type(denoiser).__name__}: wrap the '
            'guided denoiser instead, or use autoguidance, which takes any two denoisers.'
        )
    if set(null_conditioning) != set(denoiser.conditioning):
        raise UsageError(
            f'null_conditioning has keys {sorted(null_conditioning)}, the conditioning {sorted(denoiser.conditioning)}.'
        )
    null, shapes = dict(null_conditioning), jax.tree.map(jnp.shape, dict(denoiser.conditioning))
    if jax.tree.map(jnp.shape, null) != shapes:
        raise UsageError(
            f'null_conditioning has shapes {jax.tree.map(jnp.shape, null)}, the conditioning {shapes}: they must agree.'
        )
    return dataclasses.replace(denoiser, conditioning=null)


def _pair(denoiser: ModelDenoiser, null: ModelDenoiser) -> Callable[..., tuple[Prediction, Prediction]]:
    """(x_t, t) -> the predictions under both conditionings, from one forward of twice the batch."""
    # Each sample's two halves lie side by side, so that a batch sharded over devices stays where it is.
    pairs = jax.tree.map(
        lambda cond, null: jnp.stack([cond, null], axis=1).reshape(-1, *cond.shape[1:]),
        dict(denoiser.conditioning),
        dict(null.conditioning),
    )
    paired = dataclasses.replace(denoiser, conditioning=pairs)

    def predict(x_t, t):
        t = jnp.broadcast_to(jnp.asarray(t), x_t.shape[:1])
        prediction = paired(jnp.repeat(x_t, 2, axis=0), jnp.repeat(t, 2))
        prediction = jax.tree.map(lambda leaf: leaf.reshape(x_t.shape[0], 2, *leaf.shape[1:]), prediction)
        return tuple(jax.tree.map(lambda leaf, i=i: leaf[:, i], prediction) for i in (0, 1))

    return predict


def _inside(interval: Interval, prediction: Prediction):
    """Whether x_t's log-SNR lies in the interval."""
    log_snr = 2 * (jnp.log(prediction.alpha) - jnp.log(prediction.sigma))
    return (interval[0] <= log_snr) & (log_snr <= interval[1])


def _std(x: Float[Array, 'B ...']) -> Float[Array, 'B ...']:
    """The standard deviation of each sample, with finite derivatives where it is 0."""
    variance = jnp.var(x, axis=tuple(range(1, x.ndim)), keepdims=True)
    zero = variance == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, variance)))


def _extrapolate(
    strong: Prediction,
    weak: Float[Array, 'B ...'],
    guidance_scale: PerSample,
    interval: Interval | None,
    rescale: PerSample,
) -> Prediction:
    """weak + scale (strong - weak), within the interval, its standard deviation pulled to strong's by `rescale`."""
    scale = _per_sample('guidance_scale', guidance_scale, strong.value)
    if interval is not None:
        scale = jnp.where(_inside(interval, strong), scale, 1.0)
    # Not weak + scale * (strong - weak): this form is exact at scale 0 and 1.
    value = scale * strong.value + (1 - scale) * weak
    if not _is_zero(rescale):
        std = _std(value)
        # A constant image's std is not 0 but rounding, and the ratio anything.
        largest = jnp.max(jnp.abs(value), axis=tuple(range(1, value.ndim)), keepdims=True)
        flat = std <= 16 * jnp.finfo(value.dtype).eps * largest
        ratio = jnp.where(flat | (scale == 1), 1.0, _std(strong.value) / jnp.where(flat, 1.0, std))
        value = value * (1 + _per_sample('rescale', rescale, value) * (ratio - 1))
    return dataclasses.replace(strong, value=value)


def classifier_free(
    denoiser: ModelDenoiser,
    null_conditioning: Mapping[str, Any],
    guidance_scale: PerSample,
    *,
    interval: Interval | None = None,
    rescale: PerSample = 0.0,
    sequential: bool = False,
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): uncond + scale (cond - uncond), of what is predicted.

    Scale 1 is exactly the conditional model, scale 0 exactly the unconditional one. In that convention the paper's w is
    scale - 1. A learned variance is the conditional model's.

    Args:
      denoiser: the conditional network.
      null_conditioning: what replaces `denoiser.conditioning` in the other prediction; same keys and shapes. It need
        not be the dropped label: with another label or a negative prompt, guidance leads away from that.
      guidance_scale: scalar or [B]; may be traced.
      interval: (low, high) in log-SNR; outside, the scale is 1 (Kynkäänniemi et al. 2024). Their sigma is
        exp(-log_snr / 2). Both ends belong to it, and may be infinite or traced.
      rescale: phi in [0, 1], scalar or [B]: how far the standard deviation of each guided sample is pulled back to
        that of its conditional prediction (Lin et al. 2024, section 3.4, who use 0.7). Nothing happens at scale 1.
      sequential: two forwards of the batch instead of one of twice the batch: half the memory of activations, and
        with an `interval` the second is left out where no sample lies in it.

    Raises:
      UsageError: an option out of its range, a null_conditioning of other keys or shapes, or no `ModelDenoiser`.
    """
    null = _null_denoiser(denoiser, null_conditioning)
    if sequential:
        return autoguidance(denoiser, null, guidance_scale, interval=interval, rescale=rescale)
    check_options(interval, rescale)
    predict = _pair(denoiser, null)

    def guided(x_t, t):
        conditional, unconditional = predict(x_t, t)
        return _extrapolate(conditional, unconditional.value, guidance_scale, interval, rescale)

    return guided


def autoguidance(
    denoiser: Denoiser,
    weak: Denoiser,
    guidance_scale: PerSample,
    *,
    interval: Interval | None = None,
    rescale: PerSample = 0.0,
) -> Denoiser:
    """Guidance by a bad version of the model itself (Karras et al. 2024): weak + scale (strong - weak).

    Scale 1 is exactly the denoiser, scale 0 exactly `weak` where both predict the same kind.

    Args:
      denoiser: the strong one; the answer is of its kind.
      weak: on the same schedule, smaller or less trained, say; its prediction is read as the strong one's kind.
      guidance_scale, interval, rescale: as in `classifier_free`. `weak` is not called where no sample lies in the
        interval.

    Raises:
      UsageError: an option out of its range, or predictions of other shapes.
    """
    check_options(interval, rescale)

    def call(denoisers, x_t, t, states):
        strong, strong_state = denoisers[0].call(x_t, t, states[0])

        def run_weak(state):
            prediction, state = denoisers[1].call(x_t, t, state)
            value = prediction.read(strong.kind)
            if value.shape != strong.value.shape:
                raise UsageError(
                    f'the weak denoiser predicts shape {value.shape}, the strong one {strong.value.shape}: '
                    'they must agree.'
                )
            return value.astype(strong.value.dtype), state

        if interval is None:
            value, weak_state = run_weak(states[1])
        else:
            value, weak_state = jax.lax.cond(
                jnp.any(_inside(interval, strong)), run_weak, lambda state: (strong.value, state), states[1]
            )
        return _extrapolate(strong, value, guidance_scale, interval, rescale), (strong_state, weak_state)

    return _wrap(call, denoiser, weak)


def adaptive_projected(
    denoiser: ModelDenoiser,
    null_conditioning: Mapping[str, Any],
    guidance_scale: PerSample,
    *,
    parallel: PerSample = 0.0,
    norm_threshold: PerSample | None = None,
    momentum: PerSample = 0.0,
) -> Denoiser:
    """Adaptive projected guidance, which does not oversaturate at high scales (Sadat et al. 2024, algorithm 1).

    On predictions of x0: cond + (scale - 1) (the part of diff orthogonal to cond + parallel * the part along it), with
    diff = cond - uncond, summed over calls and limited in norm. Scale 1 is exactly the conditional x0; with `parallel`
    1 and nothing else it is `classifier_free`.

    Args:
      denoiser, null_conditioning, guidance_scale: as in `classifier_free`, in one forward of twice the batch.
      parallel: the share of the part along cond, the paper's eta; scalar or [B].
      norm_threshold: the largest norm of diff over a sample, the paper's r, > 0; scalar or [B]. None is no limit.
      momentum: the paper's beta in average = diff + momentum * average over the calls, in (-1, 1); the paper takes it
        negative, -0.5 say; scalar or [B]. Unless it is 0, the result is a `Stateful` that carries the average.

    Returns:
      a denoiser that predicts x0.

    Raises:
      UsageError: an option out of its range, a null_conditioning of other keys or shapes, or no `ModelDenoiser`.
    """
    predict = _pair(denoiser, _null_denoiser(denoiser, null_conditioning))
    if norm_threshold is not None:
        _check(norm_threshold, lambda limit: limit > 0, 'norm_threshold must be positive, or None for no limit')
    _check(momentum, lambda beta: abs(beta) < 1, 'momentum must lie in (-1, 1); 0 is none, the paper uses -0.5')

    def call(x_t, t, average):
        conditional, unconditional = predict(x_t, t)
        x0 = conditional.x0
        average = diff = x0 - unconditional.x0 + _per_sample('momentum', momentum, x0) * average
        if norm_threshold is not None:
            limit, square = _per_sample('norm_threshold', norm_threshold, x0), _sum(diff**2)
            above = square > limit**2
            diff = diff * jnp.where(above, limit / jnp.sqrt(jnp.where(above, square, 1.0)), 1.0)
        along = divide_or_zero(_sum(diff * x0), _sum(x0**2)) * x0
        update = diff - (1 - _per_sample('parallel', parallel, x0)) * along
        value = x0 + (_per_sample('guidance_scale', guidance_scale, x0) - 1) * update
        return dataclasses.replace(conditional, value=value, kind='x0'), average

    if _is_zero(momentum):
        return lambda x_t, t: call(x_t, t, 0.0)[0]
    return Stateful(jnp.zeros_like, call)


def _add_to_score(prediction: Prediction, gradient: Float[Array, 'B ...'], over_sigma2=1.0) -> Prediction:
    """The prediction, of x0, with `gradient / over_sigma2` added to its score, by Tweedie; alpha = 0 adds nothing."""
    gain = divide_or_zero(prediction.sigma**2, prediction.alpha * over_sigma2)
    return dataclasses.replace(prediction, value=prediction.x0 + gain * gradient, kind='x0')


def classifier(
    denoiser: Denoiser,
    log_prob: Callable[[Float[Array, 'B ...'], Float[Array, 'B']], Float[Array, 'B']],
    guidance_scale: PerSample,
) -> Denoiser:
    """Classifier guidance (Dhariwal & Nichol 2021, eq. 14): eps - scale sigma grad log p(y | x_t), read as x0.

    At scale 1 and with exact models it is the denoiser of p(x_0 | y).

    Args:
      denoiser: the unconditional one (or a conditional one, as the paper does too).
      log_prob: (x_t, t) -> log p(y | x_t) [B] of what is asked for, differentiable in x_t, t [B]; each sample's depends
        on its own x_t alone.
      guidance_scale: scalar or [B]; may be traced.

    Returns:
      a denoiser that predicts x0. Nothing is added at alpha = 0, where x_t says nothing of x_0, or of y.

    Raises:
      UsageError: log_prob gives no [B].
    """

    def total(x_t, t):
        values = log_prob(x_t, t)
        if jnp.shape(values) != x_t.shape[:1]:
            raise UsageError(
                f'log_prob must give one number per sample, shape {x_t.shape[:1]}, got {jnp.shape(values)}.'
            )
        return jnp.sum(values)

    def call(denoisers, x_t, t, states):
        prediction, state = denoisers[0].call(x_t, t, states[0])
        gradient = jax.grad(total)(x_t, jnp.broadcast_to(jnp.asarray(t), x_t.shape[:1]))
        return _add_to_score(prediction, _per_sample('guidance_scale', guidance_scale, x_t) * gradient), (state,)

    return _wrap(call, denoiser)


def dynamic_threshold(
    denoiser: Denoiser, percentile: float | Float[Array, ''] = 0.995, maximum: float | Float[Array, ''] | None = None
) -> Denoiser:
    """The denoiser with each predicted x0 clipped to [-s, s] and divided by s (Saharia et al. 2022, section 2.3).

    Args:
      denoiser: any, for data in [-1, 1].
      percentile: s is this quantile of |x0| over each sample, in (0, 1], but at least 1.
      maximum: the largest s, at least 1, where s = 1 is `clip_x0`; None is no limit.

    Returns:
      a denoiser that predicts x0. What is not finite becomes NaN and has no part in s.

    Raises:
      UsageError: an option out of its range.
    """
    _check(percentile, lambda q: (q > 0) & (q <= 1), 'percentile must lie in (0, 1]; the usual one is 0.995')
    if maximum is not None:
        _check(maximum, lambda s: s >= 1, 'maximum must be at least 1, which is plain clipping, or None for no limit')

    def threshold(x0):
        finite = jnp.isfinite(x0)
        size = jnp.where(finite, jnp.abs(x0), jnp.nan).reshape(x0.shape[0], -1)
        s = jnp.clip(expand(jnp.nanquantile(size, percentile, axis=1).astype(x0.dtype), x0), 1.0, maximum)
        return jnp.where(finite, jnp.clip(x0, -s, s) / s, jnp.nan)

    return map_x0(denoiser, threshold)


def _conjugate_gradients(matrix: Callable, b: Float[Array, 'B ...'], iterations: int) -> Float[Array, 'B ...']:
    """matrix(z) = b for each sample by itself, from z = 0, with matrix symmetric, positive semi-definite, b in range.

    A sample whose residual has reached rounding is left as it is, so that none divides by 0. NaN stays NaN.
    """

    def body(_, carry):
        z, residual, direction, square = carry
        image = matrix(direction)
        curvature = _sum(direction * image)
        done = (square < enough) | (curvature <= 0)
        step = jnp.where(done, 0.0, square / jnp.where(done, 1.0, curvature))
        z, residual = z + step * direction, residual - step * image
        following = jnp.where(done, 0.0, _sum(residual**2))
        return z, residual, residual + divide_or_zero(following, square) * direction, following

    square = _sum(b**2)
    enough = jnp.finfo(b.dtype).eps ** 2 * square
    return jax.lax.fori_loop(0, iterations, body, (jnp.zeros_like(b), b, b, square))[0]


def reconstruction(
    denoiser: Denoiser,
    operator: Callable[[Float[Array, 'B ...']], Array],
    measurement: Array,
    noise_std: PerSample = 0.0,
    *,
    prior_std: PerSample = 1.0,
    scale: PerSample = 1.0,
    iterations: int = 20,
) -> Denoiser:
    """Samples of x_0 given y = A x_0 + noise_std n, n ~ N(0, I): pseudo-inverse guidance (Song et al. 2023, eq. 7-8).

    To the score comes (d x0_hat / d x_t)^T A^T (r^2 A A^T + noise_std^2 I)^-1 (y - A x0_hat), the gradient of
    log p(y | x_t) where p(x_0 | x_t) = N(x0_hat, r^2 I), r^2 = sigma^2 prior_std^2 / (alpha^2 prior_std^2 + sigma^2).
    That is exact for data N(mean, prior_std^2 I). Reconstruction guidance (Ho et al. 2022, "Video diffusion models")
    has a number in place of the inverse. Each call differentiates the denoiser: more time, and the memory of training.

    Args:
      denoiser: any that is differentiable in x_t.
      operator: A, [B, ...] -> [B, ...], of each sample by itself, real or complex; `average_pool(4)`, say, or
        `lambda x: mask * x`. One that is not linear is linearised at x0_hat.
      measurement: y, of the operator's shape.
      noise_std: >= 0, scalar or [B]; in each of the real and the imaginary part if y is complex.
      prior_std: about the standard deviation of the data's elements, > 0; scalar or [B].
      scale: of the term added to the score; scalar or [B].
      iterations: of conjugate gradients, for the inverse: as many as A A^T has distinct eigenvalues other than 0 give
        it exactly (1 for pooling and masks, 20 are plenty for mild blur), fewer a smoother answer.

    Returns:
      a denoiser that predicts x0; nothing is added at alpha = 0 and sigma = 0.

    Raises:
      UsageError: an option out of its range, or a measurement of another shape than the operator's.
    """
    _check(noise_std, lambda std: std >= 0, 'noise_std must be 0 or positive')
    _check(prior_std, lambda std: std > 0, "prior_std must be positive, about the data's standard deviation")
    if iterations < 1:
        raise UsageError(f'iterations must be at least 1, got {iterations}.')

    def call(denoisers, x_t, t, states):
        def run(x_t):
            prediction, state = denoisers[0].call(x_t, t, states[0])
            return prediction.x0, (prediction, state)

        x0, pull_back, (prediction, state) = jax.vjp(run, x_t, has_aux=True)
        measured, forward = jax.linearize(operator, x0)
        if measured.shape != jnp.shape(measurement):
            raise UsageError(
                f'the operator gives shape {measured.shape}, the measurement has {jnp.shape(measurement)}: they must '
                'agree.'
            )
        transpose = jax.linear_transpose(forward, x0)

        def adjoint(y):
            return transpose(y.conj())[0]  # the adjoint for the real inner product, Re(y^* A x)

        prior_variance = _per_sample('prior_std', prior_std, x0) ** 2
        noise_variance = _per_sample('noise_std', noise_std, x0) ** 2
        sigma2 = prediction.sigma**2
        r2 = sigma2 * prior_variance / (prediction.alpha**2 * prior_variance + sigma2)
        total = r2 + noise_variance
        # A^T (r^2 A A^T + noise^2)^-1 = (r^2 A^T A + noise^2)^-1 A^T: on this side the system can be solved however
        # singular A is. Over r^2 + noise^2 it is of order 1 at every noise level.
        difference = (measurement - measured).astype(measured.dtype)
        solution = _conjugate_gradients(
            lambda z: divide_or_zero(r2, total) * adjoint(forward(z)) + divide_or_zero(noise_variance, total) * z,
            adjoint(difference),
            iterations,
        )
        (gradient,) = pull_back(solution)
        return _add_to_score(prediction, _per_sample('scale', scale, x0) * gradient, total), (state,)

    return _wrap(call, denoiser)


def average_pool(factor: int) -> Callable[[Float[Array, 'B H W C']], Float[Array, 'B h w C']]:
    """An operator of `reconstruction` for super-resolution: means over squares of `factor` by `factor` pixels.

    It takes images whose height and width are multiples of factor, else raises a `UsageError`.
    """
    if factor < 1:
        raise UsageError(f'factor must be at least 1, got {factor}.')

    def pool(x):
        if x.ndim != 4 or x.shape[1] % factor or x.shape[2] % factor:
            raise UsageError(
                f'average_pool({factor}) takes [B, H, W, C] with H and W multiples of {factor}, got shape {x.shape}.'
            )
        batch, height, width, channels = x.shape
        squares = x.reshape(batch, height // factor, factor, width // factor, factor, channels)
        return jnp.mean(squares, axis=(2, 4))

    return pool
