import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import TrainingDiverged
from diffusion_jax.training.metrics import MetricsWriter, RunningMetrics, plot_curves, read_metrics


def test_reports_are_means_since_the_last_report():
    running = RunningMetrics()
    for step, loss in enumerate([1.0, 3.0, 5.0], 1):
        running.add(step, {'loss': jnp.float32(loss)})
    running.check()
    running.add(4, {'loss': jnp.float32(7.0)})
    assert running.report() == {'loss': 4.0}
    running.add(5, {'loss': jnp.float32(2.0)})
    assert running.report() == {'loss': 2.0}


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_named_with_its_step(bad):
    running = RunningMetrics()
    running.add(11, {'loss': jnp.float32(1.0), 'grad_norm': jnp.float32(1.0)})
    running.add(12, {'loss': jnp.float32(1.0), 'grad_norm': jnp.float32(bad)})
    with pytest.raises(TrainingDiverged, match=r'step 12: grad_norm .*, loss 1'):
        running.check()


def test_a_resumed_run_writes_each_step_once(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.scalars(step, {'loss': 1.0 / step})
    writer.image(3, 'samples', np.zeros((4, 4, 3), np.uint8))
    writer.close()
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    writer = MetricsWriter(tmp_path, 2)
    writer.scalars(3, {'loss': 9.0})
    writer.close()
    assert [(row['step'], row['loss']) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert list((tmp_path / 'tensorboard').iterdir())
    assert plot_curves(tmp_path).stat().st_size > 1000


def test_steps_of_one_dispatch_are_told_apart():
    running = RunningMetrics()
    running.add(4, {'loss': jnp.array([1.0, 2.0, 3.0, 4.0])})
    assert running.report() == {'loss': 2.5}
    running.add(8, {'loss': jnp.array([1.0, 2.0, jnp.nan, 4.0])})
    with pytest.raises(TrainingDiverged, match='step 7: loss nan'):
        running.check()


def test_skipped_steps_are_left_out_counted_and_limited():
    running = RunningMetrics(max_skipped=3, skipped=1)
    running.add(2, {'loss': jnp.array([1.0, jnp.nan]), 'skipped': jnp.array([0.0, 1.0])})
    assert running.report() == {'loss': 1.0, 'skipped_steps': 2.0}
    running.add(4, {'loss': jnp.array([jnp.inf, 5.0]), 'skipped': jnp.array([1.0, 0.0])})
    assert running.report() == {'loss': 5.0, 'skipped_steps': 3.0}
    assert running.skipped == 3
    running.add(5, {'loss': jnp.float32(jnp.nan), 'skipped': jnp.float32(1.0)})
    with pytest.raises(TrainingDiverged, match=r'step 5: loss nan \(after 3 skipped steps\)'):
        running.check()
