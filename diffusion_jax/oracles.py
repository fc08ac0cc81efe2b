"""Data whose exact denoiser is known in closed form: what every solver is tested against, and a model to learn on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from diffusion_jax.denoisers import Denoiser
from diffusion_jax.errors import UsageError
from diffusion_jax.process import PREDICTIONS, Prediction, expand
from diffusion_jax.registry import unknown
from diffusion_jax.schedules import Schedule


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianMixture:
    """x_0 ~ sum_k weights_k N(means_k, C_k), for x of any shape with D elements, with C_k = U_k diag(s_k) U_k^T.

    Made by `gaussian_mixture` or `gaussian`. Attributes, float64 NumPy arrays:
      weights: [K], their sum 1.
      means: [K, D].
      variances: [K, D], the s_k.
      axes: [K, D, D], the U_k, whose columns are orthonormal; None where all are the identity.
      shape: that of one x, D elements; () means x of any shape, each of whose elements is an independent draw.
    """

    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray
    axes: np.ndarray | None
    shape: tuple[int, ...]

    def _to_axes(self, x):
        """[B, D] -> [B, K, D], in the axes of each component."""
        difference = x[:, None, :]
        return difference if self.axes is None else jnp.einsum('bd,kde->bke', x, jnp.asarray(self.axes, x.dtype))

    def _from_axes(self, y):
        """[B, K, D] in the axes of each component -> [B, K, D] in those of x."""
        return y if self.axes is None else jnp.einsum('bke,kde->bkd', y, jnp.asarray(self.axes, y.dtype))

    def _terms(self, x, alpha, sigma):
        """(log w_k N(x; alpha m_k, alpha^2 C_k + sigma^2 I) [B, K], E[x_0 | x, k] [B, K, D]), x [B, D], alpha [B]."""
        means = jnp.asarray(
            self.means if self.axes is None else np.einsum('kd,kde->ke', self.means, self.axes), x.dtype
        )
        variances = jnp.asarray(self.variances, x.dtype)
        alpha, sigma = alpha[:, None, None], sigma[:, None, None]
        total = alpha**2 * variances + sigma**2
        difference = self._to_axes(x) - alpha * means
        log_density = -0.5 * jnp.sum(difference**2 / total + jnp.log(2 * jnp.pi * total), axis=-1)
        x0 = self._from_axes(means + alpha * variances / total * difference)
        return log_density + jnp.asarray(np.log(self.weights), x.dtype), x0

    def _rows(self, x, alpha, sigma):
        """x as [B, D], or [B * elements, 1] where each element is a draw, with alpha and sigma of each row."""
        rows = x.reshape(x.shape[0], -1) if self.shape else x.reshape(-1, 1)
        repeats = rows.shape[0] // x.shape[0]
        return rows, jnp.repeat(alpha, repeats), jnp.repeat(sigma, repeats)

    def denoiser(self, schedule: Schedule, kind: str = 'x0') -> Denoiser:
        """The exact denoiser, E[x_0 | x_t], answering as a network of that kind would (one of `PREDICTIONS`)."""
        if kind not in PREDICTIONS:
            raise unknown('prediction', kind, PREDICTIONS)

        def denoise(x_t, t):
            t = jnp.broadcast_to(jnp.asarray(t), x_t.shape[:1])
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            log_terms, x0 = self._terms(*self._rows(x_t, alpha, sigma))
            x0 = jnp.sum(jax.nn.softmax(log_terms)[:, :, None] * x0, axis=1).reshape(x_t.shape)
            prediction = Prediction(x0, 'x0', x_t, expand(alpha, x_t), expand(sigma, x_t))
            return dataclasses.replace(prediction, value=prediction.read(kind), kind=kind)

        return denoise

    def log_density(self, x: Float[Array, 'B ...'], alpha: float = 1.0, sigma: float = 0.0) -> Float[Array, 'B']:
        """log q(x_t = x), natural, for x_t = alpha x_0 + sigma eps; of the data themselves by default."""
        ones = jnp.ones(x.shape[0], x.dtype)
        log_terms, _ = self._terms(*self._rows(x, alpha * ones, sigma * ones))
        return jax.nn.logsumexp(log_terms, axis=-1).reshape(x.shape[0], -1).sum(axis=-1)

    def probability_flow(self, x, log_snrs) -> np.ndarray:
        """Where the probability-flow ODE carries x, to 1e-12, on the host: what deterministic solvers converge to.

        Args:
          x: [B, ...], x_t / alpha(t) at the first of `log_snrs`: in these units the ODE is that of every schedule.
          log_snrs: [N] finite and monotonic, either way.

        Returns:
          [N, B, ...], float64, x_t / alpha(t) at each of them.
        """
        x = np.asarray(x, np.float64)
        rows = x.reshape(x.shape[0] if self.shape else -1, self.means.shape[1])
        axes = np.eye(rows.shape[1])[None] if self.axes is None else self.axes

        def velocity(ratio, flat):
            """eps = (x - E[x_0 | x]) / sigma where alpha is 1 (Karras et al. 2022, eq. 1 and 3)."""
            difference = flat.reshape(rows.shape)[:, None] - self.means
            inside = np.einsum('bkd,kde->bke', difference, np.broadcast_to(axes, (len(self.means), *axes.shape[1:])))
            total = self.variances + ratio**2
            log_terms = np.log(self.weights) - 0.5 * (inside**2 / total + np.log(total)).sum(-1)
            share = np.exp(log_terms - log_terms.max(axis=1, keepdims=True))
            share /= share.sum(axis=1, keepdims=True)
            return np.einsum('bk,bke,kde->bd', share, inside / total, axes + 0 * self.means[:, :, None]).ravel() * ratio

        from scipy.integrate import solve_ivp  # a third of a second, which an import of the library need not wait for

        ratios = np.exp(-0.5 * np.asarray(log_snrs, np.float64))
        solution = solve_ivp(
            velocity, ratios[[0, -1]], rows.ravel(), method='DOP853', t_eval=ratios, rtol=1e-12, atol=1e-13
        )
        return solution.y.T.reshape(len(ratios), *x.shape)

    def sample(self, key: PRNGKeyArray, num: int) -> Float[Array, 'B ...']:
        """Exact draws of x_0."""
        key_component, key_noise = jax.random.split(key)
        k = jax.random.choice(key_component, len(self.weights), (num,), p=jnp.asarray(self.weights))
        noise = jnp.sqrt(jnp.asarray(self.variances))[k] * jax.random.normal(key_noise, (num, self.means.shape[1]))
        if self.axes is not None:
            noise = jnp.einsum('be,bde->bd', noise, jnp.asarray(self.axes)[k])
        return (jnp.asarray(self.means)[k] + noise).reshape(num, *self.shape)


def gaussian_mixture(weights, means, covariances) -> GaussianMixture:
    """A mixture of K Gaussians over x of any shape with D elements.

    Args:
      weights: [K], positive; normalised here.
      means: [K, ...]; [K] for a distribution of each element of x by itself, whatever its shape.
      covariances: [K, D, D], symmetric and positive semi-definite; or standard deviations, [K] or as the means.
    """
    weights, means, covariances = (np.asarray(value, np.float64) for value in (weights, means, covariances))
    if weights.ndim != 1 or not (weights > 0).all() or means.shape[:1] != weights.shape:
        raise UsageError(
            f'a mixture needs K positive weights and K means, got weights {weights} and means of shape {means.shape}.'
        )
    num, shape = len(weights), means.shape[1:]
    means = means.reshape(num, -1)
    size = means.shape[1]
    axes = None
    if covariances.shape == (num, size, size) != (num, *shape):
        variances, axes = np.linalg.eigh(covariances)
        if not np.allclose(covariances, np.swapaxes(covariances, 1, 2)) or variances.min() < -1e-9:
            raise UsageError('covariances must be symmetric and positive semi-definite.')
        variances = np.maximum(variances, 0.0)
    elif covariances.shape == (num,):
        variances = np.broadcast_to(covariances[:, None] ** 2, means.shape)
    elif covariances.shape == (num, *shape):
        variances = covariances.reshape(num, size) ** 2
    else:
        raise UsageError(
            f'covariances must be [K, D, D], or standard deviations [K] or {(num, *shape)}, with K = {num} and '
            f'D = {size}; got {covariances.shape}.'
        )
    return GaussianMixture(weights / weights.sum(), means, variances, axes, shape)


def gaussian(mean, covariance) -> GaussianMixture:
    """N(mean, covariance): `covariance` is [D, D], or a standard deviation, a scalar or of the mean's shape."""
    return gaussian_mixture([1.0], np.asarray(mean, np.float64)[None], np.asarray(covariance, np.float64)[None])
