"""Several processes, one program: JAX's own runtime, started from flags or from what the environment says."""

import os
import signal
import threading
from collections.abc import Mapping

import jax

from diffusion_jax.errors import UsageError


def launcher(environment: Mapping[str, str]) -> str | None:
    """What started several processes, told by the environment variables that it sets; None for a single process."""

    def number(name: str) -> int:
        return int(environment.get(name) or 1)

    if environment.get('JAX_COORDINATOR_ADDRESS'):
        return 'JAX_COORDINATOR_ADDRESS'
    # Inside srun alone: a batch script itself has the job's variables too, and is one process.
    if number('SLURM_STEP_NUM_TASKS') > 1:
        return 'SLURM'
    if number('OMPI_COMM_WORLD_SIZE') > 1:
        return 'Open MPI'
    if ',' in environment.get('TPU_WORKER_HOSTNAMES', '') or environment.get('MEGASCALE_COORDINATOR_ADDRESS'):
        return 'TPU pod'
    if environment.get('KUBERNETES_SERVICE_HOST') and environment.get('JOB_COMPLETION_INDEX'):
        return 'Kubernetes'
    return None


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes, if there are any; call it before anything else of JAX.

    Without arguments the environment tells: SLURM, Open MPI, a TPU pod, an indexed job of Kubernetes (with the package
    `kubernetes`), or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. None of them: a single process.

    Args:
      coordinator: HOST:PORT of process 0, the same in every process.
      num_processes: how many there are.
      process_id: 0 .. num_processes - 1, another in each.

    Raises:
      UsageError: the arguments do not fit, or the others were not found.
    """
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None):
        found = launcher(os.environ)
        if found is None:
            return
        if found == 'JAX_COORDINATOR_ADDRESS':
            given = (os.environ[found], *(_from_environment(name) for name in ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')))
    elif None in given:
        raise UsageError(
            'several processes need --coordinator=HOST:PORT, --num_processes and --process_id, all three; a single '
            'process none of them.'
        )
    if given[1] is not None and not 0 <= given[2] < given[1]:
        raise UsageError(f'process_id must be in 0..{given[1] - 1} (num_processes={given[1]}), got {given[2]}.')
    # On CPUs programs in flight together may start their collectives in another order in each process, and then all of
    # them wait for ever.
    jax.config.update('jax_cpu_enable_async_dispatch', False)
    try:
        jax.distributed.initialize(*given)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f'the processes did not find one another ({str(error).strip().splitlines()[0]}). Is the coordinator '
            f'{given[0] or "that the environment names"} reachable, and were all processes started?'
        ) from error


def _from_environment(name: str) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        raise UsageError(
            f'JAX_COORDINATOR_ADDRESS is set, but {name} is not a number: set it too, or unset both.'
        ) from None


def joined() -> bool:
    """Whether this is one of several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_writer() -> bool:
    """Whether this process is the one that writes to the workdir (all of them write checkpoints)."""
    return jax.process_index() == 0


class Interruption:
    """While open, SIGTERM (preemption) and SIGINT (Ctrl-C) ask to stop at the next dispatch instead of ending at once.

    A second Ctrl-C ends at once. With several processes JAX's preemption service hears SIGTERM, and all of them stop at
    the same dispatch, whichever heard it.
    """

    def __init__(self):
        self.signal_number: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> 'Interruption':
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number

    def requested(self, dispatch: int) -> bool:
        """Whether to stop after this dispatch; call it after every one, with its number."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(dispatch):
                self.signal_number = signal.SIGTERM
        return self.signal_number is not None
