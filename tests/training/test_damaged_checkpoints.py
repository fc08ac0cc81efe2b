"""Every file of a checkpoint, damaged in every way: what is restored is right, or an older one, never wrong."""

import gc
import logging

import pytest
from test_checkpoints import bits, messages, saved, shapes, state_at

from diffusion_jax.training.checkpoints import Checkpoints

pytestmark = [
    pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning'),
    pytest.mark.filterwarnings('ignore:coroutine .* was never awaited:RuntimeWarning'),
]


@pytest.fixture(autouse=True)
def quiet():
    """Orbax leaves behind what it did not wait for when one of its reads failed; asyncio tells of each."""
    logger = logging.getLogger('asyncio')
    logger.disabled = True
    yield
    gc.collect()
    logger.disabled = False


def damages(content: bytes) -> dict[str, bytes | None]:
    """What may become of a file; None: it is gone."""

    def flipped(position):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        return bytes(changed)

    found = {'gone': None, 'empty': b'', 'half': content[: len(content) // 2], 'zeroed': bytes(len(content))}
    positions = {0, len(content) // 3, len(content) // 2, 3 * len(content) // 4, len(content) - 1} if content else ()
    return found | {f'bit {position % 8} of byte {position}': flipped(position) for position in positions}


def many_bytes(content: bytes) -> dict[str, bytes]:
    """One bit flipped, in many bytes (all of a small file) in turn."""
    found = {}
    for i in range(0, len(content), 1 + len(content) // 400):
        changed = bytearray(content)
        changed[i] ^= 1 << i % 8
        found[f'bit {i % 8} of byte {i}'] = bytes(changed)
    return found


def assert_never_wrong(folder, damages, caplog, paths=None):
    """Damages one file at a time; returns how often the older checkpoint was restored, by path."""
    expected = {step: state_at(step) for step in (3, 4)}
    checkpoint = folder / 'checkpoints' / '4'
    paths = paths or sorted(path for path in checkpoint.rglob('*') if path.is_file())
    passed_over = {}
    for path in paths:
        whole = path.read_bytes()
        passed_over[str(path.relative_to(checkpoint))] = 0
        for damage, content in damages(whole).items():
            path.unlink() if content is None else path.write_bytes(content)
            caplog.clear()
            restored = Checkpoints(folder).restore(shapes())
            what = f'{path.relative_to(checkpoint)}, {damage}'
            assert bits(restored.state) == bits(expected[restored.step]), what
            if restored.step == 3:
                assert f'{checkpoint} is damaged: ' in caplog.text, what
            else:
                assert restored.step == 4, what
                assert not messages(caplog), what
            averaged, step = Checkpoints(folder).restore_params(shapes().params, 'best', ema=True)
            assert bits(averaged) == bits(expected[step].ema), what
            path.write_bytes(whole)
            passed_over[str(path.relative_to(checkpoint))] += restored.step == 3
    return passed_over


def test_no_damage_to_any_file_restores_wrong_values(tmp_path, caplog):
    saved(tmp_path, {3: 0.6, 4: 0.5})
    passed_over = assert_never_wrong(tmp_path, damages, caplog)
    assert len(passed_over) > 20
    assert passed_over['record/metadata'] == 9  # all that was done to it
    assert sum(passed_over.values()) > 60  # many files are needed
    assert Checkpoints(tmp_path).restore(shapes()).step == 4  # and once they are back, all is well


@pytest.mark.slow
def test_no_flipped_bit_in_record_or_arrays_restores_wrong_values(tmp_path, caplog):
    saved(tmp_path, {3: 0.6, 4: 0.5})
    folder = tmp_path / 'checkpoints' / '4'
    record = folder / 'record' / 'metadata'
    passed_over = assert_never_wrong(tmp_path, many_bytes, caplog, [record, *sorted((folder / 'ema').rglob('d/*'))])
    # Of the other files some are left over from writing.
    assert sum(passed_over.values()) > len(many_bytes(record.read_bytes())) + 300


def test_what_else_lies_among_the_checkpoints_is_no_checkpoint(tmp_path, caplog):
    saved(tmp_path, {3: 0.6, 4: 0.5})
    root = tmp_path / 'checkpoints'
    for name in ('9', 'notes.txt', '_METADATA', '11.orbax-checkpoint-tmp', '²'):
        (root / name).write_bytes(b'\0')
    for name in ('007', '-5', '6.5', 'metadata', '10.orbax-checkpoint-tmp', '٣'):
        (root / name).mkdir()
    assert Checkpoints(tmp_path).steps() == [3, 4]
    assert Checkpoints(tmp_path).restore(shapes()).step == 4
    assert not messages(caplog)
    assert saved(tmp_path, {5: 0.4}).steps() == [4, 5]


def test_a_folder_that_lost_its_files_is_a_damaged_checkpoint(tmp_path, caplog):
    saved(tmp_path, {3: 0.6, 4: 0.5})
    (tmp_path / 'checkpoints' / '8').mkdir()
    assert Checkpoints(tmp_path, 2).restore(shapes()).step == 4
    assert 'checkpoints/8 is damaged: it has no record' in caplog.text
    assert (tmp_path / 'damaged_checkpoints' / '8').is_dir()
