"""The solvers by name, and what there is to know of each."""

import dataclasses
from collections.abc import Callable

from diffusion_jax.registry import lookup
from diffusion_jax.samplers.ddim import ddim
from diffusion_jax.samplers.ddpm import ddpm
from diffusion_jax.samplers.dpm_solver import dpm_2m, dpm_3m, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde, dpmpp_sde
from diffusion_jax.samplers.dpm_solver_singlestep import dpm_2, dpm_3, dpmpp_2s, dpmpp_3s
from diffusion_jax.samplers.engine import Plan
from diffusion_jax.samplers.euler import euler, euler_ancestral
from diffusion_jax.samplers.heun import edm, heun
from diffusion_jax.samplers.lms import lms
from diffusion_jax.samplers.pndm import plms, pndm
from diffusion_jax.samplers.unipc import unipc

SOLVERS: dict[str, Callable[..., Plan]] = {
    solver.__name__: solver
    for solver in (
        *(ddim, ddpm, euler, euler_ancestral, heun, edm),
        *(dpm_2, dpm_3, dpmpp_2s, dpmpp_3s, dpm_2m, dpm_3m, dpmpp_2m, dpmpp_3m),
        *(dpmpp_sde, dpmpp_2m_sde, dpmpp_3m_sde, unipc, plms, pndm, lms),
    )
}
"""Name -> solver(schedule, times, **options) -> Plan."""


@dataclasses.dataclass(frozen=True)
class Description:
    """What there is to know of a solver.

    Attributes:
      order: of convergence to the probability-flow ODE, as measured in the tests on grids uniform in log-SNR with the
        solver's default options; None for solvers that draw noise.
      calls: model calls for `plan(..., steps=N)` that ends at the data.
      stochastic: whether it draws noise (ddim: only for eta > 0).
      paper: where it is from.
      use: when to take it.
    """

    order: int | None
    calls: str
    stochastic: bool
    paper: str
    use: str


DESCRIPTIONS: dict[str, Description] = {
    'ddim': Description(
        1, 'N', False, 'Song, Meng & Ermon 2021', 'inversion, and eta between deterministic and ancestral'
    ),
    'ddpm': Description(None, 'N', True, 'Ho, Jain & Abbeel 2020', 'the reference at 250 to T steps; learned variance'),
    'euler': Description(1, 'N', False, 'Karras et al. 2022', 'DDIM by another name; rectified flow'),
    'euler_ancestral': Description(None, 'N', True, 'Karras et al. 2022', 'DDIM with eta = 1 by another name'),
    'heun': Description(2, '2 N - 1', False, 'Karras et al. 2022', 'EDM models, 18 to 40 steps; rectified flow'),
    'edm': Description(None, '2 N - 1', True, 'Karras et al. 2022', 'best quality of EDM models at 100 to 500 steps'),
    'dpm_2': Description(2, 'N', False, 'Lu et al. 2022a', 'unguided models in 12 to 20 calls'),
    'dpm_3': Description(3, 'N', False, 'Lu et al. 2022a', 'unguided models in 15 to 50 calls'),
    'dpmpp_2s': Description(2, 'N', False, 'Lu et al. 2022b', 'guided models where history must not matter'),
    'dpmpp_3s': Description(3, 'N', False, 'Lu et al. 2022b', 'accuracy at 30 calls and more, without history'),
    'dpm_2m': Description(2, 'N', False, 'Lu et al. 2022a', 'unguided models in 15 to 50 steps'),
    'dpm_3m': Description(3, 'N', False, 'Lu et al. 2022a', 'unguided models at 20 steps and more'),
    'dpmpp_2m': Description(2, 'N', False, 'Lu et al. 2022b', 'the first to try: guided models in 10 to 25 steps'),
    'dpmpp_3m': Description(3, 'N', False, 'Lu et al. 2022b', 'unguided or weakly guided models in 15 to 50 steps'),
    'dpmpp_sde': Description(None, 'N', True, 'Lu et al. 2022b', 'DDIM with eta = 1 whose noise scales with eta'),
    'dpmpp_2m_sde': Description(None, 'N', True, 'Lu et al. 2022b', 'fresh detail in 20 to 50 steps'),
    'dpmpp_3m_sde': Description(None, 'N', True, 'Lu et al. 2022b', 'fresh detail in 30 to 100 steps'),
    'unipc': Description(3, 'N', False, 'Zhao et al. 2023', 'the fewest calls: 5 to 15 steps'),
    'plms': Description(2, 'N + 1', False, 'Liu et al. 2022', "Stable Diffusion 1's default, 50 steps"),
    'pndm': Description(2, 'N + 9', False, 'Liu et al. 2022', 'to repeat published results; 50 steps'),
    'lms': Description(None, 'N', False, 'Karras et al. 2022; k-diffusion', 'to repeat published results; 50 steps'),
}


def describe(solver: str | None = None) -> str:
    """A table of all solvers (or of the one named): order, model calls, noise, paper, and when to use it."""
    names = list(SOLVERS) if solver is None else [lookup('solver', {name: name for name in SOLVERS}, solver)]
    rows = [('solver', 'order', 'calls', 'noise', 'paper', 'use')]
    for name in names:
        d = DESCRIPTIONS[name]
        rows.append((name, str(d.order or '-'), d.calls, 'yes' if d.stochastic else '-', d.paper, d.use))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return '\n'.join(
        '  '.join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )
