"""What is compiled once and kept, and what a compiled program needs."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def use_cache(workdir: str | Path) -> None:
    """Keeps compiled programs in `workdir/cache`, so that the next start finds them.

    A cache that is chosen already (JAX_COMPILATION_CACHE_DIR, or JAX's own configuration) stays; with
    JAX_ENABLE_COMPILATION_CACHE=false there is none.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update('jax_compilation_cache_dir', os.fspath(Path(workdir).absolute() / 'cache'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
    compilation_cache.reset_cache()  # JAX decides at the first compilation whether there is one, and then no more


_COMPILE_EVENT = '/jax/core/compile/backend_compile_duration'


@functools.cache
def count_programs() -> Callable[[], int]:
    """A counter of the programs that this process has compiled, or read from the cache, since it was first asked for.

    Standing still while values change shows that they are traced.
    """
    counted = [0]

    def listen(event: str, duration: float, **attributes: object) -> None:
        counted[0] += event == _COMPILE_EVENT

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: counted[0]


def memory_report(compiled: jax.stages.Compiled) -> str:
    """What a compiled program needs of each device's memory, in words."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 'memory not known on this platform'
    arguments, temporaries, results = (
        size / 2**20
        for size in (
            memory.argument_size_in_bytes,
            memory.temp_size_in_bytes,
            memory.output_size_in_bytes - memory.alias_size_in_bytes,
        )
    )
    return (
        f'per device {arguments + temporaries + results:.1f} MiB: state and batch {arguments:.1f}, temporaries '
        f'{temporaries:.1f}, results {results:.1f}'
    )
