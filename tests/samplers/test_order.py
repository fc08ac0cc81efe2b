"""The measured order of convergence of every deterministic solver: see `experiments/solvers/convergence.py`."""

import pytest

from diffusion_jax.samplers import DESCRIPTIONS, SOLVERS
from experiments.solvers.convergence import AT_LEAST, CASES, SCHEDULES, slope


@pytest.mark.parametrize('kind', ['eps', 'x0', 'v'])
@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('case', CASES)
@pytest.mark.usefixtures('x64')
def test_order(case, schedule, kind):
    expected = CASES[case][1]
    measured = slope(case, schedule, kind)
    if case == 'dpmpp_3s' or case == 'dpmpp_3s heun':
        assert 2.7 <= measured < 3.25  # slow to settle
    elif case == 'lms 4':
        assert 3.75 <= measured < 4.6
    else:
        assert abs(measured - expected) < 0.25


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('case', AT_LEAST)
@pytest.mark.usefixtures('x64')
def test_order_of_unipc(case, schedule):
    expected = AT_LEAST[case][1]
    for kind in ('eps', 'x0', 'v'):
        assert expected - 0.25 < slope(case, schedule, kind) < expected + 1.3


@pytest.mark.parametrize('solver', [name for name, entry in DESCRIPTIONS.items() if entry.order])
@pytest.mark.usefixtures('x64')
def test_the_catalogue_says_the_order(solver):
    assert DESCRIPTIONS[solver].order == ({**CASES, 'unipc': AT_LEAST['unipc 2 x0 bh2 True']})[solver][1]


def test_the_catalogue_describes_every_solver():
    assert set(DESCRIPTIONS) == set(SOLVERS)
