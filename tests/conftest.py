"""Eight simulated devices for every test, and what the tests share."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8'

import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # configs/ and main.py are not part of the package


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory):
    """Programs compiled once a session, by the commands that tests start as well."""
    folder = str(tmp_path_factory.mktemp('compilation_cache'))
    os.environ['JAX_COMPILATION_CACHE_DIR'] = folder
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.5'
    jax.config.update('jax_compilation_cache_dir', folder)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
