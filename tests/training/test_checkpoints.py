import errno
import logging
import os
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.errors import SavingFailed, UsageError
from diffusion_jax.training.checkpoints import Checkpoints, _items, abstract
from diffusion_jax.training.sharding import make_mesh, replicated
from diffusion_jax.training.step import init_state

WHOLE = replicated(make_mesh())
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def state_at(seed: int, shape=(64, 64)):  # Orbax has a checksum of what is small, and none of this
    state = init_state(lambda key: {'w': jax.random.normal(key, shape)}, optax.adam(1e-3), seed)
    return jax.device_put(state, WHOLE)


def shapes(**options):
    return abstract(jax.eval_shape(lambda: state_at(0, **options)), WHOLE)


def saved(folder, losses, keep=2):
    checkpoints = Checkpoints(folder, keep)
    for step, loss in losses.items():
        checkpoints.save(step, state_at(step), loss)
    checkpoints.close()
    return Checkpoints(folder)


def flip(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def spoil(folder, step, item='record'):
    """Flips a bit in every file of an item."""
    for path in (folder / 'checkpoints' / str(step) / item).rglob('*'):
        if path.is_file():
            flip(path, path.stat().st_size // 2)


def messages(caplog) -> list[str]:
    """What we have said ourselves."""
    return [record.getMessage() for record in caplog.records if record.name.startswith('diffusion_jax')]


def bits(tree) -> list[bytes]:
    leaves = jax.tree.leaves(tree)
    keys = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    return [
        np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes() for leaf, key in zip(leaves, keys, strict=True)
    ]


def test_what_is_restored_is_what_was_saved_bit_for_bit(tmp_path, caplog):
    saved(tmp_path, {7: 0.5})
    restored, step, notes = Checkpoints(tmp_path).restore(shapes())
    expected = state_at(7)
    assert (step, notes) == (7, {})
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    assert bits(restored) == bits(expected)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.sharding.is_equivalent_to(WHOLE, a.ndim)
    assert not messages(caplog)


def test_notes_come_back_as_json_has_them(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(3, state_at(3), None, {'skipped_steps': 4, 'pair': (1, 0.1), 'by_number': {2: 'ü', 10: None}})
    expected = {'skipped_steps': 4, 'pair': [1, 0.1], 'by_number': {'2': 'ü', '10': None}}
    assert checkpoints.restore(shapes()).notes == expected  # waits for what is being written
    checkpoints.close()
    assert Checkpoints(tmp_path).restore(shapes()).notes == expected


def test_the_newest_are_kept_and_the_best_besides(tmp_path):
    checkpoints = saved(tmp_path, {1: 0.9, 2: 0.3, 3: 0.8, 4: None, 5: 0.7, 6: None})
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.choose('newest') == 6
    assert checkpoints.choose('best') == 2
    assert bits(checkpoints.restore(shapes(), 'best').state) == bits(state_at(2))
    # The best is remembered by the next run.
    assert saved(tmp_path, {8: 0.4, 9: float('nan')}).steps() == [2, 8, 9]
    assert saved(tmp_path, {10: 0.2}, keep=1).steps() == [10]


def test_parameters_are_read_without_the_rest(tmp_path):
    checkpoints = saved(tmp_path, {3: 0.5})
    spoil(tmp_path, 3, 'training')
    spoil(tmp_path, 3, 'params')
    params, step = checkpoints.restore_params(shapes().params, 'newest', ema=True)
    assert step == 3
    assert bits(params) == bits(state_at(3).ema)
    with pytest.raises(UsageError, match='3 \\('):
        checkpoints.restore_params(shapes().params, 'newest', ema=False)


def test_reading_writes_nothing(tmp_path):
    saved(tmp_path, {3: 0.5, 4: 0.6})
    spoil(tmp_path, 4)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(shapes()).step == 3
    checkpoints.close()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before
    Checkpoints(tmp_path / 'nothing').steps()
    assert not (tmp_path / 'nothing').exists()


def test_an_unfinished_checkpoint_is_not_one_and_makes_room(tmp_path):
    saved(tmp_path, {3: 0.5})
    for name in ('9.orbax-checkpoint-tmp', '8.orbax-checkpoint-tmp-123', '1.orbax-checkpoint-tmp-deleted'):
        (tmp_path / 'checkpoints' / name).mkdir()
    assert Checkpoints(tmp_path).steps() == [3]
    assert saved(tmp_path, {9: 0.5}).steps() == [3, 9]
    assert {path.name for path in (tmp_path / 'checkpoints').iterdir()} == {'3', '9'}


def test_what_is_not_there_says_so(tmp_path):
    with pytest.raises(UsageError, match=r'no checkpoint in .*--mode=train'):
        Checkpoints(tmp_path).restore(shapes())
    checkpoints = saved(tmp_path, {3: None, 4: None})
    with pytest.raises(UsageError, match=r"unknown checkpoint 'last'.*best, newest"):
        checkpoints.restore(shapes(), 'last')
    with pytest.raises(UsageError, match="has a held-out loss: use checkpoint 'newest'"):
        checkpoints.restore(shapes(), 'best')


# --- damage -----------------------------------------------------------------------------------------------------------


def test_damaged_checkpoints_are_passed_over_and_named(tmp_path, caplog):
    checkpoints = saved(tmp_path, {3: 0.3, 4: 0.2, 5: 0.1}, keep=3)
    spoil(tmp_path, 5, 'params')
    spoil(tmp_path, 4)
    restored = checkpoints.restore(shapes())
    assert restored.step == 3
    assert bits(restored.state) == bits(state_at(3))
    [first, second] = messages(caplog)
    assert 'checkpoints/5 is damaged' in first
    assert 'checkpoints/4 is damaged: its record' in second


def test_no_undamaged_checkpoint_is_an_error_that_names_them_all_and_moves_none(tmp_path):
    saved(tmp_path, {3: 0.5, 4: 0.6})
    spoil(tmp_path, 3)
    spoil(tmp_path, 4)
    with pytest.raises(UsageError, match=r'can be restored: 4 \(its record .*\); 3 \(its .*To begin anew, move'):
        Checkpoints(tmp_path, 2).restore(shapes())
    assert Checkpoints(tmp_path).steps() == [3, 4]


def test_a_run_moves_damaged_checkpoints_away_and_writes_them_again(tmp_path, caplog):
    saved(tmp_path, {3: 0.5, 4: 0.6})
    for copy in ('4', '4-2'):
        spoil(tmp_path, 4)
        damaged = (tmp_path / 'checkpoints' / '4' / 'record' / 'metadata').read_bytes()
        caplog.clear()
        checkpoints = Checkpoints(tmp_path, 2)
        assert checkpoints.restore(shapes()).step == 3
        assert checkpoints.steps() == [3]
        moved = tmp_path / 'damaged_checkpoints' / copy
        assert (moved / 'record' / 'metadata').read_bytes() == damaged
        assert f'checkpoints/4 is now {moved}' in messages(caplog)[-1]
        checkpoints.save(4, state_at(4), 0.6)
        checkpoints.close()
        assert Checkpoints(tmp_path).restore(shapes()).step == 4


def test_a_best_checkpoint_that_is_damaged_gives_way_to_the_next_best(tmp_path, caplog):
    checkpoints = saved(tmp_path, {3: 0.3, 4: 0.1, 5: 0.2, 6: 0.4}, keep=4)
    record = tmp_path / 'checkpoints' / '4' / 'record' / 'metadata'
    whole = record.read_bytes()
    spoil(tmp_path, 5, 'ema')
    record.write_bytes(whole.replace(b'"held_out_loss": 0.1', b'"held_out_loss": 0.9'))  # a wrong loss is no loss
    assert checkpoints.restore(shapes(), 'best').step == 3
    assert 'checkpoints/4 is damaged: its record is not what was written' in messages(caplog)[0]
    assert 'checkpoints/5 is damaged' in messages(caplog)[1]
    record.write_bytes(whole)
    assert checkpoints.restore_params(shapes().params, 'best', ema=True)[1] == 4


def test_a_checkpoint_of_another_step_is_damaged(tmp_path, caplog):
    saved(tmp_path, {3: 0.5, 4: 0.6})
    (tmp_path / 'checkpoints' / '4').rename(tmp_path / 'checkpoints' / '9')
    assert Checkpoints(tmp_path).restore(shapes()).step == 3
    assert 'it is the checkpoint of step 4' in caplog.text


def saved_without_digests(folder, step, loss):
    """As before there were digests."""
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics['held_out_loss'], best_mode='min')
    items = {name: ocp.args.StandardSave(item) for name, item in _items(state_at(step)).items()}
    with ocp.CheckpointManager(folder / 'checkpoints', options=options) as manager:
        manager.save(step, args=ocp.args.Composite(**items), metrics={'held_out_loss': loss})


def test_a_checkpoint_from_before_digests_is_restored_with_a_warning(tmp_path, caplog):
    caplog.set_level(logging.WARNING, 'diffusion_jax')
    saved_without_digests(tmp_path, 3, 0.5)
    saved_without_digests(tmp_path, 4, 0.6)
    restored = Checkpoints(tmp_path).restore(shapes())
    assert (restored.step, restored.notes) == (4, {})
    assert bits(restored.state) == bits(state_at(4))
    assert 'checkpoints/4 cannot be verified' in messages(caplog)[-1]
    assert Checkpoints(tmp_path).restore(shapes(), 'best').step == 3
    assert saved(tmp_path, {5: 0.7}, keep=1).steps() == [3, 5]  # the best is still that one


@pytest.mark.parametrize('lost', ['record', 'record and list of items'])
def test_a_checkpoint_that_lost_its_record_is_not_taken_for_an_older_one(lost, tmp_path, caplog):
    saved(tmp_path, {3: 0.5, 4: 0.6})
    folder = tmp_path / 'checkpoints' / '4'
    (folder / 'record').rename(tmp_path / 'record')
    if lost == 'record and list of items':
        (folder / '_CHECKPOINT_METADATA').write_bytes(b'')
    assert Checkpoints(tmp_path).restore(shapes()).step == 3
    assert 'checkpoints/4 is damaged: it' in caplog.text


# --- disks that are full ----------------------------------------------------------------------------------------------


def assert_earlier_ones_are_whole(folder):
    checkpoints = Checkpoints(folder)
    assert checkpoints.steps() == [1, 2]
    for step in (2, 1):
        restored = checkpoints.restore(shapes())
        assert restored.step == step
        assert bits(restored.state) == bits(state_at(step))
        (checkpoints.directory / str(step)).rename(folder / f'looked_at_{step}')


def test_a_full_disk_at_the_start_of_a_save_is_one_clear_error(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (1, 2):
        checkpoints.save(step, state_at(step), None)
    checkpoints.wait()

    def fail(*_, **__):
        raise RuntimeError('RESOURCE_EXHAUSTED') from FULL

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CompositeCheckpointHandler, 'async_save', fail)
        message = (
            r'step 3 could not be saved: No space left on device\. The checkpoints from before are whole: \[1, 2\], in '
            r'.*checkpoints\. Free some space .* the same command then goes on'
        )
        with pytest.raises(SavingFailed, match=message):
            checkpoints.save(3, state_at(3), None)
    checkpoints.close()  # says it once
    assert {path.name for path in checkpoints.directory.iterdir()} == {'1', '2'}
    assert_earlier_ones_are_whole(tmp_path)


@pytest.mark.parametrize('surfaces_at', ['save', 'wait', 'close', 'restore'])
def test_a_failure_in_the_background_surfaces_at_the_next_call(surfaces_at, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (1, 2):
        checkpoints.save(step, state_at(step), None)
    checkpoints.wait()

    def fail(*_):
        raise FULL

    calls = {
        'save': lambda: checkpoints.save(4, state_at(4), None),
        'wait': checkpoints.wait,
        'close': checkpoints.close,
        'restore': lambda: checkpoints.restore(shapes()),
    }
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CompositeCheckpointHandler, 'finalize', fail)
        checkpoints.save(3, state_at(3), None)
        with pytest.raises(SavingFailed, match=r'step 3 could not be saved: No space left on device.*\[1, 2\]'):
            calls[surfaces_at]()
    checkpoints.wait()
    checkpoints.close()
    assert {path.name for path in checkpoints.directory.iterdir()} == {'1', '2'}
    assert_earlier_ones_are_whole(tmp_path)


def test_a_run_saves_again_once_there_is_space(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CompositeCheckpointHandler, 'finalize', lambda *_: 1 / 0)
        checkpoints.save(3, state_at(3), None)
        with pytest.raises(SavingFailed, match=r'ZeroDivisionError: division by zero\. There are none from before'):
            checkpoints.wait()
    checkpoints.save(3, state_at(3), None)
    checkpoints.close()
    assert Checkpoints(tmp_path).restore(shapes()).step == 3


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mounted = subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip('mounting is not permitted here')
    yield folder
    subprocess.run(['umount', '-l', str(folder)], check=True)


def test_on_a_disk_that_fills_up_the_earlier_checkpoints_stay_whole(small_disk):
    big = {'shape': (300, 300)}  # a checkpoint of 0.7 MB, as the optimiser's zeros compress
    checkpoints = Checkpoints(small_disk, 5)

    def save(step):
        checkpoints.save(step, state_at(step, **big), None)
        checkpoints.close()

    save(1)
    save(2)
    with pytest.raises(SavingFailed, match=r'step 3 could not be saved: No space left on device.*whole: \[1, 2\]'):
        save(3)
    checkpoints.close()
    assert {path.name for path in checkpoints.directory.iterdir()} == {'1', '2'}
    restored = Checkpoints(small_disk, 1).restore(shapes(**big))
    assert restored.step == 2
    assert bits(restored.state) == bits(state_at(2, **big))


# --- other devices ----------------------------------------------------------------------------------------------------


def layouts():
    devices = np.array(jax.devices())
    cube = Mesh(devices.reshape(2, 2, 2), ('data', 'fsdp', 'tensor'))
    row = Mesh(devices, ('fsdp',))
    return {
        'eight': NamedSharding(row, PartitionSpec()),
        'one': NamedSharding(Mesh(devices[:1], ('fsdp',)), PartitionSpec()),
        'split over eight': NamedSharding(row, PartitionSpec('fsdp')),
        'split over three of them': NamedSharding(Mesh(devices[2:5], ('fsdp',)), PartitionSpec(None, 'fsdp')),
        'three axes': NamedSharding(cube, PartitionSpec(('data', 'fsdp'), 'tensor')),
    }


@pytest.mark.parametrize('after', layouts())
@pytest.mark.parametrize('before', layouts())
def test_other_devices_and_meshes_restore_the_same_bits(before, after, tmp_path, caplog):
    def place(tree, sharding):
        whole = NamedSharding(sharding.mesh, PartitionSpec())
        return jax.tree.map(lambda leaf: sharding if leaf.shape == (16, 12) else whole, tree)

    def create(seed):
        return init_state(lambda key: {'w': jax.random.normal(key, (16, 12))}, optax.adam(1e-3), seed)

    empty = jax.eval_shape(lambda: create(0))
    state = jax.device_put(create(3), place(empty, layouts()[before]))
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(3, state, None)
    checkpoints.close()
    targets = place(empty, layouts()[after])
    wanted = jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), empty, targets)
    restored = Checkpoints(tmp_path).restore(wanted).state
    assert bits(restored) == bits(create(3))
    for leaf, sharding in zip(jax.tree.leaves(restored), jax.tree.leaves(targets), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert not messages(caplog)
