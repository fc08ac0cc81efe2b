"""Several real processes over loopback, as on the hosts of a cluster: trained, killed and resumed."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from runs import ROOT, TINY, newest_state

from diffusion_jax.training.metrics import read_metrics

pytestmark = pytest.mark.slow

LONG = [
    '--config.train.num_steps=12',
    '--config.train.checkpoint_every=3',
    '--config.train.eval_every=12',
    '--config.train.log_every=1',
    '--config.train.sample_every=12',
    '--config.evaluate.after_training=False',
]


def start(workdir, processes, *arguments):
    """The processes of one run, eight devices in all."""
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={8 // processes}'
    return [
        subprocess.Popen(
            [
                sys.executable,
                'main.py',
                f'--config={TINY}',
                f'--workdir={workdir}',
                f'--coordinator=localhost:{port}',
                f'--num_processes={processes}',
                f'--process_id={i}',
                *arguments,
            ],
            cwd=ROOT,
            env=os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]


def finish(processes):
    """(exit statuses, outputs)."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def run(workdir, processes, *arguments):
    statuses, outputs = finish(start(workdir, processes, *arguments))
    assert statuses == [0] * processes, '\n'.join(outputs)
    return outputs


def wait_for_step(workdir, step, processes):
    while len(read_metrics(workdir)) < step and all(process.poll() is None for process in processes):
        time.sleep(0.01)


def parameters(workdir):
    return jax.tree.map(np.asarray, newest_state(workdir).params)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """What one process of eight devices learns."""
    workdir = tmp_path_factory.mktemp('alone')
    run(workdir, 1, *LONG)
    return workdir


@pytest.mark.parametrize(
    ('processes', 'mesh'), [(2, ['--config.mesh.fsdp=4']), (4, [])], ids=['2 processes, fsdp', '4 processes']
)
def test_processes_are_killed_and_resume_to_what_one_process_learns(processes, mesh, alone, tmp_path):
    running = start(tmp_path, processes, *LONG, *mesh)
    wait_for_step(tmp_path, 7, running)
    for process in running:
        process.send_signal(signal.SIGKILL)
    statuses, _ = finish(running)
    assert statuses == [-signal.SIGKILL] * processes
    outputs = run(tmp_path, processes, *LONG, *mesh)
    assert 'resumed at step' in outputs[0]
    assert 'resumed' not in ''.join(outputs[1:])  # one voice
    steps = [row['step'] for row in read_metrics(tmp_path) if 'loss' in row]
    assert steps == list(range(1, 13))  # and one writer
    for ours, theirs in zip(jax.tree.leaves(parameters(tmp_path)), jax.tree.leaves(parameters(alone)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)  # sums in another order; the learning rate is 1e-3
    losses = [[row['loss'] for row in read_metrics(folder) if 'loss' in row] for folder in (tmp_path, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_preemption_of_one_process_saves_and_stops_all(tmp_path):
    running = start(tmp_path, 2, *LONG, '--config.train.num_steps=4000', '--config.train.checkpoint_every=4000')
    wait_for_step(tmp_path, 5, running)
    running[1].send_signal(signal.SIGTERM)
    statuses, outputs = finish(running)
    assert statuses == [128 + signal.SIGTERM] * 2, '\n'.join(outputs)
    assert 'and saved it: the same command goes on from there' in outputs[0]
    assert int(newest_state(tmp_path).step) == read_metrics(tmp_path)[-1]['step']


def test_samples_are_the_same_from_one_process_and_from_two(alone, tmp_path):
    arguments = ['--mode=sample', '--config.sample.num=40', '--config.sample.steps=4']
    run(alone, 1, *arguments)
    [path] = alone.glob('samples/*.npz')
    one = np.load(path)
    path.unlink()
    run(alone, 2, *arguments)
    two = np.load(path)
    np.testing.assert_array_equal(one['labels'], two['labels'])
    assert np.abs(one['images'].astype(int) - two['images']).max() <= 1
