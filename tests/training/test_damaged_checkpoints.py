"""Every file of a checkpoint, damaged in every way: what is restored is right, or an older one, never wrong."""

import gc
import json
import logging
import os
import socket
import subprocess
import sys

import pytest
from runs import ROOT
from test_checkpoints import bits, messages, saved, shapes, state_at

from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.digests import digests

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


PROCESS = """
import json
import sys

import jax
import optax
import orbax.checkpoint as ocp

index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f'localhost:{port}', 2, index)

from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.digests import digests
from diffusion_jax.training.sharding import make_mesh, with_shardings
from diffusion_jax.training.step import init_state, state_shardings

mesh, optimizer = make_mesh({'data': 2, 'fsdp': 4}), optax.adam(1e-3)


def create(seed):
    return init_state(lambda key: {'w': jax.random.normal(key, (64, 64))}, optimizer, seed)


shapes = jax.eval_shape(lambda: create(0))
shardings = state_shardings(shapes, optimizer, (('', 'fsdp'),), mesh)
shapes = with_shardings(shapes, shardings)
state_at = jax.jit(create, static_argnums=0, out_shardings=shardings)
assert not state_at(3).params['w'].is_fully_addressable

checkpoints = Checkpoints(folder, 2)
for step in (3, 4):
    checkpoints.save(step, state_at(step), None)
checkpoints.close()

real = ocp.StandardCheckpointHandler.restore


def fail(self, directory, *arguments, **options):
    if directory.parent.name == '4':
        raise OSError('this process cannot read it')
    return real(self, directory, *arguments, **options)


if index == 1:
    ocp.StandardCheckpointHandler.restore = fail
checkpoints = Checkpoints(folder, 2)
restored = checkpoints.restore(shapes)
ocp.StandardCheckpointHandler.restore = real
steps = [restored.step, *checkpoints.steps()]
checkpoints.save(4, restored.state, None)
checkpoints.close()
print(json.dumps([steps, Checkpoints(folder).restore(shapes).step, digests(restored.state)]))
"""


@pytest.mark.slow
def test_processes_agree_on_what_is_damaged_and_on_digests(tmp_path):
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = str(probe.getsockname()[1])
    flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=4'
    environment = os.environ | {'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', PROCESS, str(i), port, str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    here = Checkpoints(tmp_path).restore(shapes())  # in one process: verified by what the two wrote down
    expected = [[3, 3], 4, digests(here.state)]
    assert [json.loads(output.splitlines()[-1]) for output, _ in outputs] == [expected] * 2
    assert 'damaged: another process could not read it' in outputs[0][1]
    assert 'this process cannot read it' in outputs[1][1]
    assert (tmp_path / 'damaged_checkpoints' / '4').is_dir()
