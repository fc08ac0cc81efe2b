"""A run that is killed at random moments ends as an unbroken one: the experiment's 25 kills, made short."""

import pytest

from experiments.fault_tolerance.kill import kill_and_resume

pytestmark = pytest.mark.slow


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    rows = kill_and_resume(tmp_path, kills=4, seed=3, num_steps=60, progress=False)
    assert len(rows) == 4
    assert max(row.reached for row in rows) > 0
