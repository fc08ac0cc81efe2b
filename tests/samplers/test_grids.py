import numpy as np
import pytest

from diffusion_jax import UsageError, schedules
from diffusion_jax.samplers import time_grid, times_of_indices

CHAIN = schedules.linear(1000)


def indices(steps, spacing, schedule=CHAIN):
    return np.round(time_grid(schedule, steps, spacing)[:-1] * schedule.num_timesteps - 1).astype(int).tolist()


def test_published_spacings_of_ten_steps():
    assert indices(10, 'leading') == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert indices(10, 'trailing') == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert indices(10, 'linspace') == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]


@pytest.mark.parametrize('spacing', ['leading', 'trailing', 'linspace'])
@pytest.mark.parametrize('steps', [1, 2, 7, 15, 333, 999, 1000])
def test_n_steps_are_n_distinct_indices_whatever_divides_t(spacing, steps):
    times = time_grid(CHAIN, steps, spacing)
    assert len(times) == steps + 1
    assert times.dtype == np.float64
    assert times[-1] == 0
    assert (np.diff(times) < 0).all()
    if spacing != 'leading':
        assert times[0] == 1


def test_published_spacings_of_other_samplers():
    """Those of diffusers' DPM-Solver and Stable Diffusion, and DDIM's quadratic sub-sequence."""
    assert indices(10, 'leading_offset') == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert indices(10, 'dpm_leading') == [900, 810, 720, 630, 540, 450, 360, 270, 180, 90]
    assert indices(10, 'dpm_linspace') == np.round(np.linspace(999, 0, 11)).astype(int)[:-1].tolist()
    assert indices(10, 'quadratic') == (np.linspace(0, 800**0.5, 10) ** 2).astype(int)[::-1].tolist()


@pytest.mark.parametrize('schedule', [CHAIN, schedules.cosine(None), schedules.edm(), schedules.flow()])
def test_spacings_by_noise_level(schedule):
    times = time_grid(schedule, 12, 'log_snr')
    np.testing.assert_allclose(np.diff(schedule.log_snr(times[:-1]), 2), 0, atol=1e-8)
    assert times[-1] == 0
    assert times[-2] == pytest.approx(schedule.t_min)
    assert schedule.log_snr(times[0]) == pytest.approx(max(schedule.log_snr(1.0), -10.2))
    karras = time_grid(schedule, 12, 'karras')
    ratio = schedule.sigma(karras[:-1]) / schedule.alpha(karras[:-1])
    np.testing.assert_allclose(np.diff(ratio ** (1 / 7), 2), 0, atol=1e-8)
    np.testing.assert_allclose(ratio[[0, -1]], np.exp(-schedule.log_snr(times[[0, -2]]) / 2), rtol=1e-6)


def test_karras_spacing_on_its_own_schedule_is_the_published_formula():
    schedule, i = schedules.edm(), np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(schedule.sigma(time_grid(schedule, 18, 'karras')), np.append(expected, 0), rtol=1e-9)


def test_grids_that_end_at_the_last_noise():
    assert time_grid(CHAIN, 10, 'trailing', 'sigma_min')[-1] == 1 / 1000
    assert time_grid(schedules.edm(), 5, 'uniform', 'sigma_min')[-1] == 0.002 / 80
    np.testing.assert_allclose(time_grid(schedules.flow(), 4, 'quadratic'), np.linspace(1, 0, 5) ** 2)


def test_trailing_with_a_divisor_that_leaves_a_rest():
    expected = np.round(np.arange(1000, 0, -1000 / 7)).astype(int) - 1  # Lin et al. 2024
    assert indices(7, 'trailing') == expected.tolist()


def test_any_subsequence_of_indices():
    np.testing.assert_array_equal(times_of_indices(CHAIN, [999, 10, 3]), [1.0, 0.011, 0.004, 0.0])


def test_continuous_time_is_uniform():
    np.testing.assert_allclose(time_grid(schedules.cosine(None), 4), [1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: time_grid(CHAIN, 0), r'steps must be in 1\.\.1000, got 0'),
        (lambda: time_grid(CHAIN, 1001), r'steps must be in 1\.\.1000, got 1001'),
        (lambda: time_grid(CHAIN, 10, 'trailling'), "Did you mean 'trailing'.*leading, leading_offset, linspace"),
        (
            lambda: time_grid(schedules.cosine(None), 10, 'leading'),
            'chains of T steps; continuous time takes uniform, log_snr, karras',
        ),
        (lambda: times_of_indices(CHAIN, [10, 10]), 'strictly decreasing'),
        (lambda: times_of_indices(CHAIN, [1000, 10]), r'integers in 0\.\.999'),
        (lambda: times_of_indices(CHAIN, [0.5]), r'integers in 0\.\.999'),
        (lambda: times_of_indices(CHAIN, [5, -1]), 'strictly decreasing'),
        (lambda: times_of_indices(schedules.cosine(None), [5]), 'continuous'),
    ],
)
def test_impossible_grids_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
