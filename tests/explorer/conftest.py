"""One server and one browser for all tests of the explorer that need them, and the subjects that all look into."""

import jax
import pytest

from diffusion_jax import pretrained
from diffusion_jax.explorer import subject as subjects
from diffusion_jax.training.sharding import make_mesh


@pytest.fixture(scope='session')
def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope='session')
def digits(one_device):
    """The digits model that ships, on one device."""
    from dataclasses import replace

    return replace(subjects.shipped('digits'), pipeline=pretrained('digits', one_device))


def serve(subject):
    """(blocks, address)"""
    from diffusion_jax import explorer

    blocks = explorer.build(subject)
    _, address, _ = explorer.serve(blocks, port=0, block=False)
    return blocks, address


@pytest.fixture(scope='session')
def address(digits):
    """Where the explorer serves the digits model."""
    blocks, address = serve(digits)
    yield address
    blocks.close()


@pytest.fixture(scope='session')
def driver():
    from browsing import start

    driver = start()
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver, address):
    from browsing import Browser

    driver.get_log('performance')
    return Browser(driver, address)
