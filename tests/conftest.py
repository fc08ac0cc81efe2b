"""Eight simulated devices for every test, compiled programs kept for the session, and what the tests share."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

CACHE = tempfile.mkdtemp(prefix='diffusion_jax_compiled_')
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ['JAX_PLATFORMS'] = 'cpu'
# Tests compile much and compute little: without LLVM's optimisations they take a third less time.
FLAGS = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {FLAGS}'
os.environ['JAX_COMPILATION_CACHE_DIR'] = CACHE  # for the commands that tests start, too
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'

import jax  # noqa: E402  (after the environment is set)
import pytest  # noqa: E402

# A plugin of pytest's may have imported JAX before this file was read.
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_compilation_cache_dir', CACHE)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # main.py and configs/ are not part of the package


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
