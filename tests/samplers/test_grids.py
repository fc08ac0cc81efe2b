import numpy as np
import pytest

from diffusion_jax import UsageError, schedules
from diffusion_jax.samplers import SPACINGS, time_grid, times_of_indices

CHAIN = schedules.linear(1000)


def indices(steps, spacing, schedule=CHAIN):
    return np.round(time_grid(schedule, steps, spacing)[:-1] * schedule.num_timesteps - 1).astype(int).tolist()


def test_published_spacings_of_ten_steps():
    assert indices(10, 'leading') == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert indices(10, 'trailing') == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert indices(10, 'linspace') == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]


@pytest.mark.parametrize('spacing', sorted(SPACINGS))
@pytest.mark.parametrize('steps', [1, 2, 7, 15, 333, 999, 1000])
def test_n_steps_are_n_distinct_indices_whatever_divides_t(spacing, steps):
    times = time_grid(CHAIN, steps, spacing)
    assert len(times) == steps + 1
    assert times.dtype == np.float64
    assert times[-1] == 0
    assert (np.diff(times) < 0).all()
    if spacing != 'leading':
        assert times[0] == 1


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
        (lambda: time_grid(CHAIN, 10, 'trailling'), "Did you mean 'trailing'.*leading, linspace, trailing"),
        (lambda: time_grid(schedules.cosine(None), 10, 'leading'), 'chains of T steps'),
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
