"""A trace of a few steps: what the host and the devices did, and who waited for whom."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

FIRST, LAST = 5, 14  # dispatches since the start: past the first ones, which are not as the rest


class Tracer:
    """Traces dispatches 5 to 14 to a folder; without a folder it does nothing."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._dispatch = 0
        self._running = False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a dispatch."""
        self._dispatch += 1
        if self.folder is not None and self._dispatch == FIRST:
            jax.profiler.start_trace(self.folder)
            self._running = True
        with jax.profiler.StepTraceAnnotation('train', step_num=step):
            yield
        if self._dispatch == LAST:
            self.close()

    def close(self) -> None:
        """Ends the trace and writes it."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
