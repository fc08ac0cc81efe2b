"""Eight simulated devices for every test, compiled programs kept for the session, and what the tests share."""

import gc
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Programs are compiled once for all workers, for the commands that tests start, and for later runs.
COMPILED = ROOT / '.pytest_cache' / 'compiled'
MAX_COMPILED_BYTES = 2**31

os.environ['JAX_PLATFORMS'] = 'cpu'
# Tests compile much and compute little: without LLVM's optimisations, and XLA's newer code generator, they take half
# the time.
FLAGS = (
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
    '--xla_cpu_use_fusion_emitters=false',
    '--xla_cpu_parallel_codegen_split_count=1',
)
os.environ['XLA_FLAGS'] = ' '.join((os.environ.get('XLA_FLAGS', ''), *FLAGS))
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(COMPILED)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import jax  # noqa: E402  (after the environment is set)
import pytest  # noqa: E402

# A plugin of pytest's may have imported JAX before this file was read.
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_compilation_cache_dir', str(COMPILED))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)

sys.path.insert(0, str(ROOT))  # main.py and configs/ are not part of the package


def pytest_sessionstart(session):
    """The oldest programs go where there are too many; not while workers read them."""
    if hasattr(session.config, 'workerinput') or not COMPILED.is_dir():
        return
    kept = 0
    for path in sorted(COMPILED.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
        kept += path.stat().st_size
        if kept > MAX_COMPILED_BYTES:
            path.unlink(missing_ok=True)


@pytest.fixture(scope='module', autouse=True)
def forgotten(request):
    """What a file compiled is dropped after it: kept, it grows to gigabytes in a process, and each file is slower.

    The explorer's files share one server, and so what it compiled.
    """
    yield
    if request.path.parent.name != 'explorer':
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope='session')
def workdir(tmp_path_factory):
    """A finished run of the tiny config, twelve steps. Tests that change what it holds take a copy."""
    from runs import load_config

    from diffusion_jax.training.train import train

    folder = tmp_path_factory.mktemp('run')
    train(load_config(), folder)
    return folder
