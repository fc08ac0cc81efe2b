"""Denoisers whose answer is known in closed form."""

import jax.numpy as jnp

from diffusion_jax.process import Prediction, expand


def gaussian(schedule, mean: float, std: float, kind: str = 'x0'):
    """The exact denoiser of data ~ N(mean, std^2 I), answering in the given kind of prediction."""

    def denoiser(x_t, t):
        alpha, sigma = (expand(f(jnp.asarray(t)), x_t) for f in (schedule.alpha, schedule.sigma))
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        x0 = Prediction(mean + gain * (x_t - alpha * mean), 'x0', x_t, alpha, sigma)
        return Prediction(x0.read(kind), kind, x_t, alpha, sigma)

    return denoiser
