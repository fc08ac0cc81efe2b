import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax import UsageError
from diffusion_jax.training.checkpoints import Checkpoints, abstract
from diffusion_jax.training.sharding import make_mesh, replicated
from diffusion_jax.training.step import init_state

WHOLE = replicated(make_mesh())


def state_at(seed: int):
    state = init_state(lambda key: {'w': jax.random.normal(key, (3, 4))}, optax.adam(1e-3), seed)
    return jax.device_put(state, WHOLE)


def saved(folder, losses, keep=2):
    checkpoints = Checkpoints(folder, keep)
    for step, loss in losses.items():
        checkpoints.save(step, state_at(step), loss)
    checkpoints.close()
    return Checkpoints(folder)


def test_what_is_restored_is_what_was_saved_bit_for_bit(tmp_path):
    saved(tmp_path, {7: 0.5})
    restored = Checkpoints(tmp_path).restore(abstract(jax.eval_shape(lambda: state_at(0)), WHOLE))
    expected = state_at(7)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.sharding.is_equivalent_to(WHOLE, a.ndim)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def test_the_newest_are_kept_and_the_best_besides(tmp_path):
    checkpoints = saved(tmp_path, {1: 0.9, 2: 0.3, 3: 0.8, 4: None, 5: 0.7, 6: None})
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.choose('newest') == 6
    assert checkpoints.choose('best') == 2


def test_parameters_are_read_without_the_rest(tmp_path):
    checkpoints = saved(tmp_path, {3: 0.5})
    shapes = abstract(jax.eval_shape(lambda: state_at(0).params), WHOLE)
    np.testing.assert_array_equal(checkpoints.restore_params(shapes, 3, ema=True)['w'], state_at(3).ema['w'])


def test_reading_writes_nothing(tmp_path):
    saved(tmp_path, {3: 0.5})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.restore(abstract(jax.eval_shape(lambda: state_at(0)), WHOLE))
    checkpoints.close()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before
    Checkpoints(tmp_path / 'nothing')
    assert not (tmp_path / 'nothing').exists()


def test_an_unfinished_checkpoint_is_not_one(tmp_path):
    saved(tmp_path, {3: 0.5})
    (tmp_path / 'checkpoints' / '9.orbax-checkpoint-tmp').mkdir()
    assert Checkpoints(tmp_path).steps() == [3]


def test_a_missing_or_damaged_checkpoint_says_so(tmp_path):
    shapes = abstract(jax.eval_shape(lambda: state_at(0)), WHOLE)
    with pytest.raises(UsageError, match=r'no checkpoint in .*--mode=train'):
        Checkpoints(tmp_path).restore(shapes)
    checkpoints = saved(tmp_path, {3: None, 4: None})
    with pytest.raises(UsageError, match=r"unknown checkpoint 'last'.*best, newest"):
        checkpoints.restore(shapes, 'last')
    with pytest.raises(UsageError, match="has a held-out loss: use checkpoint 'newest'"):
        checkpoints.restore(shapes, 'best')
    for path in (tmp_path / 'checkpoints' / '4' / 'params').rglob('*'):
        if path.is_file() and 'manifest' in path.name:
            path.write_bytes(b'')
    with pytest.raises(UsageError, match=r'checkpoints/4 cannot be read.*complete checkpoints: \[3, 4\]'):
        checkpoints.restore(shapes)
