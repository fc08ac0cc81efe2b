"""DPM-Solver-12 and -23, which choose their own steps (Lu et al. 2022a, appendix C)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from diffusion_jax.denoisers import Denoiser, Stateful, clip_x0
from diffusion_jax.errors import UsageError
from diffusion_jax.samplers.engine import check_finite
from diffusion_jax.samplers.grids import LEAST_LOG_SNR
from diffusion_jax.schedules import Schedule


class Adaptive(NamedTuple):
    """What `sample_adaptive` gives.

    Attributes:
      x: [B, ...], the samples.
      calls: model calls made.
      steps: steps accepted; calls made in vain are (calls - order * steps).
      finished: whether the end was reached within `max_calls`; where it was not, x is NaN.
    """

    x: Float[Array, 'B ...']
    calls: Int[Array, '']
    steps: Int[Array, '']
    finished: Bool[Array, '']


def sample_adaptive(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Float[Array, 'B ...'],
    *,
    order: int = 3,
    atol: float = 0.0078,
    rtol: float = 0.05,
    t_start: float | None = None,
    t_end: float | None = None,
    denoise_to_zero: bool = True,
    first_step: float = 0.05,
    safety: float = 0.9,
    max_calls: int = 1000,
    clip: bool = False,
) -> Adaptive:
    """Integrates the probability-flow ODE in log-SNR, with steps as long as the tolerance allows.

    Each step of DPM-Solver-2 (order 2) or -3 (order 3) is compared to the solver one order below that shares its calls;
    the step is kept if max over the batch of the root mean square of (difference / max(atol, rtol |x|)) is at most 1.
    One `lax.while_loop`: pure and compiled, but without a reverse derivative.

    Args:
      x: the state at `t_start`: noise times `schedule.prior_std(t_start)`.
      order: 2 for DPM-Solver-12, 3 for DPM-Solver-23.
      atol, rtol: tolerances on x; 0.0078 is one level of 8-bit images. May be traced.
      t_start: noisy end; by default 1, or where the log-SNR is -10.2 if the schedule ends in less.
      t_end: clean end; `schedule.t_min` by default.
      denoise_to_zero: one more call, whose x0 is the sample.
      first_step: of half the log-SNR.
      safety: theta, shortens each next step.
      max_calls: give up after that many.
      clip: clip the predicted x0 to [-1, 1].

    Raises:
      UsageError: for options out of range.
      SamplingDiverged: as `sample`; also where `max_calls` did not suffice.
    """
    if order not in (2, 3):
        raise UsageError(f'order of sample_adaptive must be 2 (DPM-Solver-12) or 3 (DPM-Solver-23), got {order}.')
    if isinstance(denoiser, Stateful):
        raise UsageError('sample_adaptive takes no denoiser with a memory (guidance with momentum): steps are retried.')
    if t_start is None:
        # time_of_log_snr is 1 for what lies beyond the schedule's end.
        t_start = float(schedule.time_of_log_snr(LEAST_LOG_SNR))
    t_end = schedule.t_min if t_end is None else t_end
    if not 0 < t_end < t_start <= 1:
        raise UsageError(f'sample_adaptive needs 0 < t_end < t_start <= 1, got {t_end} and {t_start}.')
    if not (0 < safety < 1 and first_step > 0 and max_calls >= order):
        raise UsageError(
            f'sample_adaptive needs 0 < safety < 1, first_step > 0 and max_calls >= {order}, got {safety}, '
            f'{first_step} and {max_calls}.'
        )
    if clip:
        denoiser = clip_x0(denoiser)
    real = lambda value: jnp.asarray(value, x.dtype)  # noqa: E731
    lam_end = real(0.5 * schedule.log_snr(t_end))

    def level(lam):
        t = schedule.time_of_log_snr(2 * lam)
        return t, schedule.alpha(t), schedule.sigma(t)

    def solve(x, lam, h):
        """(x one order below, x) at lam + h."""
        t, alpha, _ = level(lam)
        _, alpha_s, sigma_s = level(lam + h)
        eps = denoiser(x, t).eps

        def stage(r):
            """(t, sigma, x by DPM-Solver-1) r h further."""
            t, alpha_r, sigma_r = level(lam + r * h)
            return t, sigma_r, alpha_r / alpha * x - sigma_r * jnp.expm1(r * h) * eps

        first = alpha_s / alpha * x - sigma_s * jnp.expm1(h) * eps
        if order == 2:
            t_1, _, x_1 = stage(0.5)
            return first, first - sigma_s * jnp.expm1(h) * (denoiser(x_1, t_1).eps - eps)
        t_1, _, x_1 = stage(1 / 3)
        rise = denoiser(x_1, t_1).eps - eps
        second = first - 1.5 * sigma_s * jnp.expm1(h) * rise
        t_2, sigma_2, x_2 = stage(2 / 3)
        phi_2 = [jnp.expm1(z) / z - 1 for z in (2 / 3 * h, h)]
        rise = denoiser(x_2 - 2 * sigma_2 * phi_2[0] * rise, t_2).eps - eps
        return second, first - 1.5 * sigma_s * phi_2[1] * rise

    def body(state):
        x, lam, h, calls, steps, previous = state
        h = jnp.minimum(h, lam_end - lam)
        lower, higher = solve(x, lam, h)
        scale = jnp.maximum(atol, rtol * jnp.maximum(jnp.abs(lower), jnp.abs(previous)))
        error = jnp.sqrt(jnp.mean(((higher - lower) / scale) ** 2, axis=tuple(range(1, x.ndim)))).max()
        accepted = error <= 1
        x, previous = (jnp.where(accepted, new, old) for new, old in ((higher, x), (lower, previous)))
        # What reaches the end lands on it exactly, whatever the rounding of lam + h.
        lam_next = jnp.where(h >= lam_end - lam, lam_end, lam + h)
        lam = jnp.where(accepted, lam_next, lam)
        h = jnp.clip(safety * h * error ** (-1.0 / order), 0.2 * h, 5.0 * h)
        return x, lam, h, calls + order, steps + accepted, previous

    def unfinished(state):
        _, lam, _, calls, _, _ = state
        return (lam < lam_end) & (calls + order <= max_calls)

    start = (x, real(0.5 * schedule.log_snr(t_start)), real(first_step), jnp.int32(0), jnp.int32(0), x)
    x, lam, _, calls, steps, _ = jax.lax.while_loop(unfinished, body, start)
    finished = lam >= lam_end
    if denoise_to_zero:
        x, calls = denoiser(x, real(t_end)).x0, calls + 1
    x = jnp.where(finished, x, jnp.nan)
    check_finite(x)
    return Adaptive(x, calls, steps, finished)
