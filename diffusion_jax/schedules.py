"""What alpha(t), sigma(t) and the log-SNR are. Nothing else in the package knows a beta.

A schedule describes q(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I) for t in [0, 1], from data (t = 0) to noise (t = 1),
with log_snr(t) = log(alpha(t)^2 / sigma(t)^2). A family says how the two are normalised, and then the log-SNR alone
fixes both: variance preserving (alpha^2 + sigma^2 = 1), variance exploding (alpha = 1) or rectified flow
(alpha + sigma = 1). Reading them from it keeps full relative precision in float32 at either end, where 1 - alpha_bar
computed in float32 is off by up to 5e-4.

`linear`, `cosine`, `scaled_linear` and `sigmoid` are variance preserving and give the published discrete chain of
`num_timesteps` betas, or with `num_timesteps=None` its continuous-time limit. A chain of T steps is the grid
t_i = (i + 1) / T, i = 0 .. T-1, on which its values are exact; t = 0 is the data itself, and in between the log-SNR is
interpolated. `edm` and `ve` explode, `flow` is rectified flow.

Methods take t as a Python float or NumPy array, computed in float64 on the host, or as a JAX array (traced or not).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.errors import UsageError

Time = float | np.ndarray | Float[Array, '...']


def namespace(*values) -> ModuleType:
    """jax.numpy if any value is a JAX array (or traced), else numpy, whose arithmetic is float64."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def _as_time(t: Time) -> np.ndarray | jax.Array:
    if isinstance(t, jax.Array):
        return t if t.dtype in (jnp.float32, jnp.float64) else t.astype(jnp.float32)
    return np.asarray(t, np.float64)


class Schedule:
    """Base of every schedule: a subclass defines `log_snr`; `alpha`, `sigma`, drift and diffusion follow from it."""

    num_timesteps: int | None = None
    """Length of the discrete chain; None in continuous time."""
    t_min: float = 1e-3
    """The last noisy time of grids that are spaced by noise level: 1 / T on a chain."""

    def log_snr(self, t: Time):
        """log(alpha^2 / sigma^2) at t in [0, 1], decreasing in t; +inf at t = 0."""
        raise NotImplementedError

    def alpha(self, t: Time):
        """The signal's share of x_t at t in [0, 1]; 1 at t = 0."""
        log_snr = self.log_snr(t)
        return namespace(log_snr).exp(-0.5 * namespace(log_snr).logaddexp(0.0, -log_snr))

    def sigma(self, t: Time):
        """The noise's standard deviation in x_t at t in [0, 1]; 0 at t = 0."""
        log_snr = self.log_snr(t)
        return namespace(log_snr).exp(-0.5 * namespace(log_snr).logaddexp(0.0, log_snr))

    def timestep(self, t: Time):
        """What a network is told of the time: 0 .. T-1 on a chain of T steps, 1000 t in continuous time."""
        return 1000.0 * _as_time(t)

    def prior_std(self, t: Time):
        """The standard deviation of the noise that stands for x_t where sampling starts, whatever the data; 1 here."""
        t = _as_time(t)
        return namespace(t).ones_like(t)

    def time_of_log_snr(self, log_snr: Time):
        """The t in [0, 1] with that log-SNR, by bisection; 0 or 1 for values out of the schedule's range."""
        log_snr = _as_time(log_snr)
        xp = namespace(log_snr)

        def halve(_, bracket):
            low, high = bracket
            middle = 0.5 * (low + high)
            noisier = self.log_snr(middle) < log_snr
            return xp.where(noisier, low, middle), xp.where(noisier, middle, high)

        # Until the two are neighbours in this precision: near 0, floating-point numbers lie closer than near 1.
        halvings = 70 if log_snr.dtype == np.float64 else 40
        bracket = xp.zeros_like(log_snr), xp.ones_like(log_snr)
        if xp is jnp:
            _, high = jax.lax.fori_loop(0, halvings, halve, bracket)
        else:
            _, high = functools.reduce(lambda bracket, i: halve(i, bracket), range(halvings), bracket)
        return xp.where(log_snr == xp.inf, 0.0, xp.where(self.log_snr(xp.ones_like(high)) >= log_snr, 1.0, high))

    def drift(self, t: Float[Array, '...']) -> Float[Array, '...']:
        """f(t) = d log alpha / dt of the forward SDE dx = f x dt + g dW (Song et al. 2021), t in (0, 1)."""
        t = jnp.asarray(t)
        return jax.jvp(lambda u: jnp.log(self.alpha(u)), (t,), (jnp.ones_like(t),))[1]

    def diffusion(self, t: Float[Array, '...']) -> Float[Array, '...']:
        """g(t) of the forward SDE: g^2 = -sigma^2 d log_snr / dt (Kingma et al. 2021, eq. 20), t in (0, 1)."""
        t = jnp.asarray(t)
        slope = jax.jvp(self.log_snr, (t,), (jnp.ones_like(t),))[1]
        return self.sigma(t) * jnp.sqrt(-slope)


class Levels(NamedTuple):
    """What x_t is made of, each of the shape of the times.

    Attributes:
      alpha, sigma: x_t = alpha x_0 + sigma eps.
      alpha_bar: alpha^2.
      signal, noise: the shares of the variance of x_t, for data of unit variance; their sum is 1.
      snr: alpha^2 / sigma^2.
      log_snr: its natural logarithm.
    """

    alpha: Any
    sigma: Any
    alpha_bar: Any
    signal: Any
    noise: Any
    snr: Any
    log_snr: Any


def levels(schedule: Schedule, t: Time) -> Levels:
    """What a schedule has at t in [0, 1]: a float or NumPy array in float64 on the host, or a JAX array."""
    log_snr = schedule.log_snr(t)
    xp = namespace(log_snr)
    with np.errstate(over='ignore'):
        shares = (xp.exp(-xp.logaddexp(0.0, -log_snr)), xp.exp(-xp.logaddexp(0.0, log_snr)))
        alpha = schedule.alpha(t)
        return Levels(alpha, schedule.sigma(t), alpha**2, *shares, xp.exp(log_snr), log_snr)


@dataclasses.dataclass(frozen=True, eq=False)
class Continuous(Schedule):
    """A variance-preserving schedule given by its log-SNR, `formula(t, xp)` with xp numpy or jax.numpy."""

    formula: Callable[[np.ndarray | jax.Array, ModuleType], np.ndarray | jax.Array]

    def log_snr(self, t: Time):
        t = _as_time(t)
        with np.errstate(divide='ignore'):  # t = 0 is +inf by definition
            return self.formula(t, namespace(t))


@dataclasses.dataclass(frozen=True, eq=False)
class Exploding(Continuous):
    """A variance-exploding schedule, alpha = 1, given by its log-SNR -2 log sigma."""

    t_min: float = 1e-3

    def alpha(self, t: Time):
        t = _as_time(t)
        return namespace(t).ones_like(t)

    def sigma(self, t: Time):
        log_snr = self.log_snr(t)
        return namespace(log_snr).exp(-0.5 * log_snr)

    def timestep(self, t: Time):
        """log(sigma) / 4, which EDM calls c_noise (Karras et al. 2022, table 1)."""
        return -0.125 * self.log_snr(t)

    def prior_std(self, t: Time):
        return self.sigma(t)


@dataclasses.dataclass(frozen=True, eq=False)
class Flow(Continuous):
    """A rectified flow, alpha + sigma = 1, given by its log-SNR 2 log((1 - sigma) / sigma)."""

    def alpha(self, t: Time):
        log_snr = self.log_snr(t)
        return namespace(log_snr).exp(-namespace(log_snr).logaddexp(0.0, -0.5 * log_snr))

    def sigma(self, t: Time):
        log_snr = self.log_snr(t)
        return namespace(log_snr).exp(-namespace(log_snr).logaddexp(0.0, 0.5 * log_snr))

    def timestep(self, t: Time):
        """1000 sigma, as Stable Diffusion 3 has it."""
        return 1000.0 * self.sigma(t)

    def prior_std(self, t: Time):
        return self.sigma(t)


class Chain(Schedule):
    """The discrete chain of T betas, q(x_i | x_{i-1}) = N(sqrt(1 - beta_i) x_{i-1}, beta_i I) (Ho et al. 2020, eq. 2).

    Attributes, float64 NumPy arrays of shape [T]: `betas`, `alphas_cumprod` (the products of 1 - beta),
    `log_snrs`, and `posterior_variances` of q(x_{i-1} | x_i, x_0) (eq. 7; its first entry is 0).
    """

    def __init__(self, betas):
        betas = np.asarray(betas, np.float64)
        if betas.ndim != 1 or betas.size == 0 or not np.all((betas > 0) & (betas <= 1)):
            raise UsageError(f'betas must be a non-empty list of numbers in (0, 1], got {betas}.')
        self.betas = betas
        self.num_timesteps = len(betas)
        self.t_min = 1.0 / len(betas)
        self.alphas_cumprod = np.cumprod(1.0 - betas)
        with np.errstate(divide='ignore'):  # a last beta of 1 is zero terminal SNR: log_snr = -inf
            log_alpha_bar = np.cumsum(np.log1p(-betas))
            self.log_snrs = log_alpha_bar - np.log(-np.expm1(log_alpha_bar))
        previous = np.append(1.0, self.alphas_cumprod[:-1])
        self.posterior_variances = betas * (1.0 - previous) / (1.0 - self.alphas_cumprod)

    def time(self, index):
        """The continuous time t = (index + 1) / T of the chain's index 0 .. T-1."""
        return (index + 1) / self.num_timesteps

    def _position(self, t: Time):
        """t as a fractional index in [-1, T-1], and exactly the index wherever t is one up to rounding."""
        t = _as_time(t)
        xp = namespace(t)
        position = t * self.num_timesteps - 1.0
        offset = xp.round(position) - position
        # float32 carries t to 6e-8, so t * T to 2e-3 for any T in use. The offset is a constant to derivatives.
        snap = xp.where(abs(offset) < (2e-3 if position.dtype == np.float32 else 1e-9), offset, 0.0)
        return position + (jax.lax.stop_gradient(snap) if xp is jnp else snap)

    def timestep(self, t: Time):
        position = self._position(t)
        return namespace(position).maximum(position, 0.0)

    def log_snr(self, t: Time):
        position = self._position(t)
        xp = namespace(position)
        table = xp.asarray(self.log_snrs, dtype=position.dtype)
        last = self.num_timesteps - 1
        lower = xp.clip(xp.floor(position), 0, max(last - 1, 0)).astype(int)
        below, above = table[lower], table[xp.minimum(lower + 1, last)]
        fraction = xp.where(position < 0, 0.0, position - lower)
        finite = xp.isfinite(above)  # not so at a zero-SNR end
        inside = below + fraction * (xp.where(finite, above, below) - below)
        rounding = xp.where(fraction == 1, xp.where(finite, above, below) - inside, 0.0)
        inside = inside + (jax.lax.stop_gradient(rounding) if xp is jnp else rounding)
        inside = xp.where(finite | (fraction == 0), inside, -xp.inf)
        # Between the data (t = 0) and the first step the variance grows linearly from 0.
        first = self.log_snrs[0]
        variance = math.exp(-np.logaddexp(0.0, first)) * xp.clip(position + 1.0, 0.0, 1.0)
        with np.errstate(divide='ignore'):
            before = xp.log1p(-variance) - xp.log(variance)
        return xp.where(position < 0, before, inside)


MAX_BETA = 0.999
"""Of the cosine chain as published, and of every beta that is not given but derived."""


def _length(num_timesteps: int | None) -> int:
    if num_timesteps is not None and num_timesteps < 1:
        raise UsageError(f'num_timesteps must be at least 1 (or None for continuous time), got {num_timesteps}.')
    return num_timesteps or 1000


def _chain_or_limit(
    num_timesteps: int | None, betas: Callable[[int], np.ndarray], limit, rescale: bool = False
) -> Schedule:
    if num_timesteps is None:
        if rescale:
            raise UsageError('zero_terminal_snr rescales a chain of betas: give num_timesteps.')
        return Continuous(limit)
    chain = Chain(betas(_length(num_timesteps)))
    return zero_terminal_snr(chain) if rescale else chain


def zero_terminal_snr(chain: Chain) -> Chain:
    """The chain with sqrt(alpha_bar) shifted and scaled to end in pure noise (Lin et al. 2024, algorithm 1).

    The first alpha_bar stays as it is. Predict v or x0 with it: at its end x_t says nothing of x0, and eps nothing new.
    """
    if chain.num_timesteps < 2:
        raise UsageError('zero_terminal_snr needs a chain of two steps or more.')
    root = np.sqrt(chain.alphas_cumprod)
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas_cumprod = root**2
    return Chain(1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))


def _log_snr_of_log_alpha_bar(log_alpha_bar, xp):
    return log_alpha_bar - xp.log(-xp.expm1(log_alpha_bar))


def _betas_of_log_snr(formula, num_timesteps: int) -> np.ndarray:
    """beta_i = min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), 0.999) (Nichol & Dhariwal 2021, eq. 17)."""
    with np.errstate(divide='ignore', over='ignore'):
        log_snr = formula(np.linspace(0.0, 1.0, num_timesteps + 1), np)
        log_alpha_bar = -np.logaddexp(0.0, -log_snr)
        return np.minimum(-np.expm1(np.diff(log_alpha_bar)), MAX_BETA)


def linear(
    num_timesteps: int | None = 1000,
    beta_start: float | None = None,
    beta_end: float | None = None,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """Betas rising linearly (Ho et al. 2020, section 4): 1e-4 to 0.02 for T = 1000.

    Betas left out are scaled by 1000 / T, so that a chain of any length ends in the same noise (as guided-diffusion
    does), up to 0.999; betas given are used as they are. With `num_timesteps=None`, betas are those of T = 1000 and the
    schedule is the VP SDE with beta(t) from 0.1 to 20 (Song et al. 2021, eq. 33). `zero_terminal_snr` applies the
    function of that name to the chain.
    """
    length = _length(num_timesteps)
    start = 0.1 / length if beta_start is None else beta_start
    end = min(20.0 / length, MAX_BETA) if beta_end is None else beta_end

    def limit(t, xp):
        return _log_snr_of_log_alpha_bar(-length * (start * t + 0.5 * (end - start) * t**2), xp)

    return _chain_or_limit(num_timesteps, lambda n: np.linspace(start, end, n), limit, zero_terminal_snr)


def scaled_linear(
    num_timesteps: int | None = 1000,
    beta_start: float | None = None,
    beta_end: float | None = None,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """Betas whose square roots rise linearly (Rombach et al. 2022; Stable Diffusion): 0.00085 to 0.012 for T = 1000.

    Betas left out are scaled by 1000 / T, betas given are used as they are, and `zero_terminal_snr` rescales, as in
    `linear`.
    """
    length = _length(num_timesteps)
    root_start = math.sqrt(0.85 / length if beta_start is None else beta_start)
    root_end = math.sqrt(min(12.0 / length, MAX_BETA) if beta_end is None else beta_end)

    def limit(t, xp):
        slope = root_end - root_start
        return _log_snr_of_log_alpha_bar(
            -length * t * (root_start**2 + root_start * slope * t + (slope * t) ** 2 / 3), xp
        )

    return _chain_or_limit(num_timesteps, lambda n: np.linspace(root_start, root_end, n) ** 2, limit, zero_terminal_snr)


def cosine(num_timesteps: int | None = 1000, s: float = 0.008) -> Schedule:
    """alpha_bar(t) = f(t) / f(0), f(t) = cos^2((t + s) / (1 + s) pi / 2) (Nichol & Dhariwal 2021, eq. 17).

    The chain clips its betas at 0.999, as published. The continuous limit ends at zero signal: log_snr(1) = -inf.
    """
    start = s / (1 + s) * math.pi / 2

    def limit(t, xp):
        # f(0) - f(t) is a product of sines and cos at the end a sine: no cancellation at either end.
        angle = t / (1 + s) * math.pi / 2
        remaining = (1 - t) / (1 + s) * math.pi / 2
        return 2 * xp.log(xp.sin(remaining)) - xp.log(xp.sin(angle)) - xp.log(xp.sin(angle + 2 * start))

    return _chain_or_limit(num_timesteps, lambda n: _betas_of_log_snr(limit, n), limit)


def sigmoid(num_timesteps: int | None = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Schedule:
    """alpha_bar(t) falling along a sigmoid between start / tau and end / tau (Jabri et al. 2022, algorithm 5).

    The chain clips its betas at 0.999. The continuous limit ends at zero signal: log_snr(1) = -inf.
    """
    if not (start < end and tau > 0):
        raise UsageError(f'sigmoid needs start < end and tau > 0, got start={start}, end={end}, tau={tau}.')
    constant = math.log(math.cosh(start / tau / 2)) - math.log(math.cosh(end / tau / 2))

    def limit(t, xp):
        # Differences of sigmoids as hyperbolic sines: exact at both ends.
        half_range = (end - start) / tau / 2
        return xp.log(xp.sinh((1 - t) * half_range)) - xp.log(xp.sinh(t * half_range)) + constant

    return _chain_or_limit(num_timesteps, lambda n: _betas_of_log_snr(limit, n), limit)


def _check_sigmas(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max:
        raise UsageError(f'a schedule needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}.')


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Schedule:
    """sigma(t) = sigma_max t, alpha = 1 (Karras et al. 2022); `sigma_min` is the last noisy level of grids."""
    _check_sigmas(sigma_min, sigma_max)
    return Exploding(lambda t, xp: -2.0 * (math.log(sigma_max) + xp.log(t)), t_min=sigma_min / sigma_max)


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Schedule:
    """The VE SDE: sigma(t)^2 = sigma_min^2 ((sigma_max / sigma_min)^2t - 1) (Song et al. 2021, appendix C)."""
    _check_sigmas(sigma_min, sigma_max)
    growth = 2.0 * math.log(sigma_max / sigma_min)
    return Exploding(
        lambda t, xp: -2.0 * math.log(sigma_min) - xp.log(xp.expm1(growth * t)), t_min=math.log(2.0) / growth
    )


def flow(shift: float = 1.0) -> Schedule:
    """Rectified flow, x_t = (1 - sigma) x_0 + sigma eps (Liu et al. 2022), sigma = shift t / (1 + (shift - 1) t).

    `shift` above 1 spends more of [0, 1] on noise, as images of more pixels need (Esser et al. 2024, eq. 23):
    `resolution_shift` gives it.
    """
    if not shift > 0:
        raise UsageError(f'flow needs shift > 0, got {shift}; 1 is none, 3 that of Stable Diffusion 3.')
    return Flow(lambda t, xp: 2.0 * (xp.log1p(-t) - xp.log(t) - math.log(shift)))


def resolution_shift(pixels: int, base_pixels: int) -> float:
    """sqrt(pixels / base_pixels): the shift of `flow` that keeps x_t as uncertain as at the base resolution."""
    return math.sqrt(pixels / base_pixels)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    'linear': linear,
    'cosine': cosine,
    'scaled_linear': scaled_linear,
    'sigmoid': sigmoid,
    'edm': edm,
    've': ve,
    'flow': flow,
}
