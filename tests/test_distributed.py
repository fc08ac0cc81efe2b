import os
import signal

import pytest

from diffusion_jax import UsageError, distributed
from diffusion_jax.compilation import memory_report, use_cache


@pytest.mark.parametrize(
    ('environment', 'found'),
    [
        ({}, None),
        ({'JAX_COORDINATOR_ADDRESS': 'host:1'}, 'JAX_COORDINATOR_ADDRESS'),
        ({'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '4'}, None),  # in the batch script, outside srun
        ({'SLURM_JOB_ID': '1', 'SLURM_STEP_NUM_TASKS': '1'}, None),
        ({'SLURM_JOB_ID': '1', 'SLURM_STEP_NUM_TASKS': '4'}, 'SLURM'),
        ({'OMPI_COMM_WORLD_SIZE': '2'}, 'Open MPI'),
        ({'TPU_WORKER_HOSTNAMES': 'localhost'}, None),
        ({'TPU_WORKER_HOSTNAMES': 'a,b'}, 'TPU pod'),
        ({'MEGASCALE_COORDINATOR_ADDRESS': 'a'}, 'TPU pod'),
        ({'KUBERNETES_SERVICE_HOST': 'a'}, None),  # a pod like any other
        ({'KUBERNETES_SERVICE_HOST': 'a', 'JOB_COMPLETION_INDEX': '1'}, 'Kubernetes'),
    ],
)
def test_who_started_several_processes(environment, found):
    assert distributed.launcher(environment) == found


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('localhost:1', None, 0), 'all three'),
        ((None, 2, None), 'all three'),
        (('localhost:1', 2, 2), r'process_id must be in 0\.\.1'),
        (('localhost:1', 2, -1), r'process_id must be in 0\.\.1'),
    ],
)
def test_flags_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        distributed.initialize(*arguments)


def test_an_incomplete_environment_is_refused(monkeypatch):
    monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'localhost:1')
    monkeypatch.delenv('JAX_NUM_PROCESSES', raising=False)
    with pytest.raises(UsageError, match='JAX_NUM_PROCESSES is not a number'):
        distributed.initialize()


def test_signals_ask_to_stop_and_then_are_as_before():
    before = signal.getsignal(signal.SIGTERM)
    with distributed.Interruption() as interruption:
        assert not interruption.requested(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested(2)
        assert interruption.signal_number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):  # Ctrl-C after that ends at once
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_cache_that_was_chosen_stays(tmp_path):
    import jax

    chosen = jax.config.jax_compilation_cache_dir
    use_cache(tmp_path)
    assert jax.config.jax_compilation_cache_dir == chosen


def test_the_memory_that_a_program_needs_is_told():
    import jax
    import jax.numpy as jnp

    compiled = jax.jit(lambda x: jnp.sin(x).sum()).lower(jnp.zeros(2**20)).compile()
    assert memory_report(compiled).startswith('per device 8.0 MiB: state and batch 4.0, temporaries 4.0')
