"""Starting from an image instead of noise: image to image, inversion, interpolation; and resampled inpainting."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from diffusion_jax.errors import UsageError
from diffusion_jax.process import posterior_coefficients, transition
from diffusion_jax.samplers.engine import Plan
from diffusion_jax.samplers.grids import check_grid
from diffusion_jax.samplers.linear import levels, linear_plan
from diffusion_jax.schedules import Schedule


def partial_grid(times, strength: float) -> np.ndarray:
    """The last max(1, int(strength N)) of the N steps of a grid, for image to image (Meng et al. 2022, "SDEdit").

    Args:
      times: decreasing [N + 1].
      strength: in (0, 1]: how much of the image is given up to noise; 1 is the whole grid.
    """
    if not 0 < strength <= 1:
        raise UsageError(f'strength must be in (0, 1], got {strength}: 0.3 changes details, 0.8 most of the image.')
    times = check_grid(times)
    num = len(times) - 1
    return times[num - max(1, int(strength * num + 1e-9)) :]


def noised(plan: Plan, x0: Float[Array, 'B ...'], key: PRNGKeyArray) -> Float[Array, 'B ...']:
    """x0 with noise to where the plan starts, a draw of q(x_t | x0): the x of `sample` for image to image."""
    x0 = jnp.asarray(x0)
    if key.ndim == 0:
        eps = jax.random.normal(key, x0.shape, x0.dtype)
    else:
        eps = jax.vmap(lambda k: jax.random.normal(k, x0.shape[1:], x0.dtype))(key)
    return jnp.asarray(plan.alpha[0], x0.dtype) * x0 + jnp.asarray(plan.sigma[0], x0.dtype) * eps


def ddim_inversion(schedule: Schedule, times) -> Plan:
    """DDIM run backwards: from the data, x at times[-1], to the noise at times[0] that DDIM would make it from.

    Sampling from that noise on the same grid gives the data back, up to an error that falls with the steps (Song et al.
    2021, section 5.4). Each step takes eps where it starts; the one that starts at t = 0, where there is none, asks the
    network at the grid's last noisy time.

    Args:
      times: decreasing [N + 1], as for `ddim`.
    """
    grid = levels(schedule, times)
    x, x0 = np.eye(2)
    matrices, calls = [], []
    for i in reversed(range(grid.num_steps)):
        asked = i if grid.sigma[i + 1] == 0 else i + 1
        ratio = grid.alpha[i] / grid.alpha[i + 1]
        matrices.append([ratio * x + (grid.sigma[i] - ratio * grid.sigma[i + 1]) * grid.eps(asked, x, x0)])
        calls.append(grid.times[asked])
    return linear_plan(schedule, np.append(calls, grid.times[0]), matrices)


def repaint(schedule: Schedule, times, resamples: int = 10, jump: int = 10, variance: str = 'large') -> Plan:
    """RePaint (Lugmayr et al. 2022): DDPM that goes back and forth, for inpainting with `sample(..., known=...)`.

    After every `jump` steps x is diffused back to where they began and they are made again, `resamples` times in all,
    so that what is filled in has time to fit what is known. The step to the data is made once. With N steps that is
    (N - 1) resamples + 1 calls.

    Args:
      times: decreasing [N + 1].
      resamples: 1 or more; 1 is plain DDPM.
      jump: 1 or more.
      variance: 'small' or 'large', as in `ddpm`.
    """
    if resamples < 1 or jump < 1:
        raise UsageError(f'repaint needs resamples >= 1 and jump >= 1, got {resamples} and {jump}.')
    if variance not in ('small', 'large'):
        raise UsageError(f"variance of repaint must be 'small' or 'large', got {variance!r}.")
    grid = levels(schedule, times)
    x, x0 = np.eye(2)
    calls, matrices, noise = [], [], []

    def step(i):
        s, t = grid.times[i + 1], grid.times[i]
        on_x0, on_x, small = posterior_coefficients(schedule, s, t)
        std = small if variance == 'small' else transition(schedule, s, t)[1]
        calls.append(t)
        matrices.append([on_x * x + on_x0 * x0])
        noise.append(std if s > 0 else 0.0)

    def diffuse_back(i):
        """Folds the noise from level i + 1 back to where the last jump began into the last step."""
        start = (i // jump) * jump
        alpha, sigma = transition(schedule, grid.times[i + 1], grid.times[start])
        matrices[-1] = [alpha * matrices[-1][0]]
        noise[-1] = math.hypot(alpha * noise[-1], sigma)

    last = grid.num_steps - 1
    for start in range(0, last, jump):
        segment = range(start, min(start + jump, last))
        for repeat in range(resamples):
            for i in segment:
                step(i)
            if repeat < resamples - 1:
                diffuse_back(segment[-1])
    step(last)
    return linear_plan(schedule, np.append(calls, grid.times[-1]), matrices, np.array(noise))


def slerp(a: Float[Array, 'B ...'], b: Float[Array, 'B ...'], fraction) -> Float[Array, 'B ...']:
    """Spherical interpolation of noise, sample by sample: keeps the norm that N(0, I) has (Song et al. 2021, eq. 67).

    Args:
      a, b: [B, ...] of one shape.
      fraction: scalar or [B]: 0 gives a, 1 gives b. Outside [0, 1] it goes on along the arc.
    """
    if a.shape != b.shape:
        raise UsageError(f'slerp needs two arrays of one shape, got {a.shape} and {b.shape}.')
    axes = tuple(range(1, a.ndim))
    fraction = jnp.asarray(fraction, a.dtype)
    fraction = fraction.reshape(fraction.shape + (1,) * (a.ndim - fraction.ndim)) if fraction.ndim else fraction
    norms = jnp.linalg.norm(a.reshape(a.shape[0], -1), axis=1) * jnp.linalg.norm(b.reshape(b.shape[0], -1), axis=1)
    cosine = jnp.sum(a * b, axis=axes) / jnp.where(norms == 0, 1.0, norms)
    angle = jnp.arccos(jnp.clip(cosine, -1.0, 1.0)).reshape(-1, *(1,) * len(axes))
    sine = jnp.sin(angle)
    parallel = sine < 1e-4  # the arc is a chord there, and the quotient rounding
    safe = jnp.where(parallel, 1.0, sine)
    on_a = jnp.where(parallel, 1 - fraction, jnp.sin((1 - fraction) * angle) / safe)
    on_b = jnp.where(parallel, fraction, jnp.sin(fraction * angle) / safe)
    return on_a * a + on_b * b
