"""Multistep DPM-Solver, DPM-Solver++ and their SDE forms (Lu et al. 2022a, 2022b), one call a step.

Given x_t, the exact x_s is a multiple of x_t plus an integral, over lam = log(alpha / sigma) from t to s, of x0 (++) or
eps (the first paper) with an exponential weight. A solver of order p replaces that function of lam by its Taylor
polynomial of degree p - 1, with derivatives by finite differences over earlier calls, and integrates exactly.

**The third order.** The published update multiplies the second difference by the integral of tau^2 / 2, but the second
divided difference that it forms is f'' / 2: half of what the formula needs, which leaves order 2. It is so in the
papers' code and in all that follow it. `second_difference='published'` is that form, 'full' the corrected one, of order
3. Both are tested for their order.
"""

import numpy as np

from diffusion_jax.errors import UsageError
from diffusion_jax.samplers.engine import Plan
from diffusion_jax.samplers.linear import Levels, check_choices, check_order, levels, linear_plan, multistep_orders
from diffusion_jax.schedules import Schedule

FORMS = ('x0', 'eps')
METHODS = ('midpoint', 'heun')
SECOND_DIFFERENCES = {'published': 1.0, 'full': 2.0}


class Exponential:
    """The exact integrals of one step t -> s of the ODE, or for eta > 0 of its SDE, in x0 or in eps.

    With f the function that is integrated and h = lam_s - lam_t: x_s = decay x_t + first f + scale phi_2 (h f') +
    scale phi_3 (h^2 f'') + .. + std z. The two forms are each other's image under alpha <-> sigma, lam <-> -lam.

    Args:
      form: 'x0' or 'eps'.
      eta: the SDE's noise, 0 (none: the ODE) or more; 1 is the time reversal of the forward process.
    """

    def __init__(self, t: tuple[float, float, float], s: tuple[float, float, float], form: str, eta: float = 0.0):
        (alpha_t, sigma_t, lam_t), (alpha_s, sigma_s, lam_s) = t, s
        # Where there is no signal only x0 says where to go; the step is of order 1 there and both forms are DDIM.
        self.form = form = form if alpha_t else 'x0'
        self.h = lam_s - lam_t
        self.std = sigma_s * np.sqrt(-np.expm1(-2 * eta * self.h)) if eta and sigma_s else 0.0
        with np.errstate(divide='ignore', invalid='ignore'):
            if form == 'x0':
                self.exponent = (1 + eta) * self.h
                self.scale = alpha_s
                self.decay = sigma_s / sigma_t * (np.exp(-eta * self.h) if eta else 1.0)
                self.first = alpha_s - self.decay * alpha_t
            else:
                self.exponent = -self.h
                self.scale = sigma_s
                self.decay = alpha_s / alpha_t
                self.first = sigma_s - self.decay * sigma_t

    @property
    def phi_1(self) -> float:
        return -np.expm1(-self.exponent)

    @property
    def phi_2(self) -> float:
        return 1 - self.phi_1 / self.exponent

    @property
    def phi_3(self) -> float:
        return 0.5 - self.phi_2 / self.exponent


def integral(grid: Levels, t: int, s: int, form: str, eta: float = 0.0) -> Exponential:
    """The step from level t of the grid to level s."""
    return Exponential(*((grid.alpha[i], grid.sigma[i], grid.lam[i]) for i in (t, s)), form, eta)


def multistep(
    schedule: Schedule,
    times,
    order: int = 2,
    form: str = 'x0',
    method: str = 'midpoint',
    second_difference: str = 'full',
    eta: float = 0.0,
    lower_order_final: bool | None = None,
) -> Plan:
    """Multistep DPM-Solver (form 'eps') or DPM-Solver++ (form 'x0') through `times`, decreasing [N + 1].

    Steps whose history is short, or that start without signal or end without noise, are of lower order.

    Args:
      order: 1 (DDIM), 2 or 3.
      method: of the second order, 'midpoint' (as the papers' code and diffusers do) or 'heun' (the exact integral).
      second_difference: of the third order, 'full' or 'published': see above.
      eta: of the SDE, form 'x0' only: 0 or more.
      lower_order_final: end with orders .., 2, 1; None: on grids of fewer than 15 steps.
    """
    check_order('multistep', order, 3)
    check_choices(
        'multistep',
        form=(form, FORMS),
        method=(method, METHODS),
        second_difference=(second_difference, SECOND_DIFFERENCES),
    )
    if not eta >= 0 or (eta and form == 'eps'):
        raise UsageError(f"eta must be 0 or more, and 0 for form 'eps'; got {eta}.")
    grid = levels(schedule, times)
    x, *previous, output = np.eye(order + 1)  # previous[0] is the last call's
    matrices, noise = [], []
    for i, current in enumerate(multistep_orders(grid.lam, order, lower_order_final)):
        f = output if form == 'x0' else grid.eps(i, x, output)
        step = integral(grid, i, i + 1, form, eta)
        update = step.decay * x + step.first * (output if step.form == 'x0' else f)
        if current == 2:
            slope = step.h * (f - previous[0]) / (grid.lam[i] - grid.lam[i - 1])
            update = update + step.scale * (step.phi_1 / 2 if method == 'midpoint' else step.phi_2) * slope
        elif current == 3:
            # The quadratic through the last three values of f, in units of h.
            now, before = (grid.lam[i - k] - grid.lam[i - 1 - k] for k in (0, 1))
            last = (f - previous[0]) / now
            second = (last - (previous[0] - previous[1]) / before) / (now + before)
            slope = last + now * second
            second = SECOND_DIFFERENCES[second_difference] * second
            update = update + step.scale * (step.phi_2 * step.h * slope + step.phi_3 * step.h**2 * second)
        matrices.append([update, *[f, *previous][: order - 1]])
        noise.append(step.std)
    return linear_plan(schedule, grid.times, matrices, np.array(noise) if eta else None)


def dpmpp_2m(schedule: Schedule, times, method: str = 'midpoint', lower_order_final: bool | None = None) -> Plan:
    """DPM-Solver++ 2M (Lu et al. 2022b, algorithm 2): `multistep` of order 2 in x0."""
    return multistep(schedule, times, 2, 'x0', method=method, lower_order_final=lower_order_final)


def dpmpp_3m(schedule: Schedule, times, second_difference: str = 'full', lower_order_final: bool | None = None) -> Plan:
    """DPM-Solver++ 3M: `multistep` of order 3 in x0."""
    return multistep(schedule, times, 3, 'x0', second_difference=second_difference, lower_order_final=lower_order_final)


def dpm_2m(schedule: Schedule, times, method: str = 'midpoint', lower_order_final: bool | None = None) -> Plan:
    """DPM-Solver 2M: `multistep` of order 2 in eps."""
    return multistep(schedule, times, 2, 'eps', method=method, lower_order_final=lower_order_final)


def dpm_3m(schedule: Schedule, times, second_difference: str = 'full', lower_order_final: bool | None = None) -> Plan:
    """DPM-Solver 3M: `multistep` of order 3 in eps."""
    return multistep(
        schedule, times, 3, 'eps', second_difference=second_difference, lower_order_final=lower_order_final
    )


def dpmpp_sde(schedule: Schedule, times, eta: float = 1.0) -> Plan:
    """SDE-DPM-Solver++ of order 1 (Lu et al. 2022b, eq. 17); at eta = 1 it is DDIM with eta = 1."""
    return multistep(schedule, times, 1, 'x0', eta=eta)


def dpmpp_2m_sde(
    schedule: Schedule, times, eta: float = 1.0, method: str = 'midpoint', lower_order_final: bool | None = None
) -> Plan:
    """SDE-DPM-Solver++ 2M (Lu et al. 2022b, eq. 18): `multistep` of order 2 in x0, with noise."""
    return multistep(schedule, times, 2, 'x0', method=method, eta=eta, lower_order_final=lower_order_final)


def dpmpp_3m_sde(
    schedule: Schedule,
    times,
    eta: float = 1.0,
    second_difference: str = 'full',
    lower_order_final: bool | None = None,
) -> Plan:
    """SDE-DPM-Solver++ 3M: `multistep` of order 3 in x0, with noise."""
    return multistep(
        schedule,
        times,
        3,
        'x0',
        second_difference=second_difference,
        eta=eta,
        lower_order_final=lower_order_final,
    )
