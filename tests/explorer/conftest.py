"""One server and one browser for all tests of the explorer that need them, and the subjects that all look into."""

from pathlib import Path

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


@pytest.fixture(scope='session')
def stable(one_device):
    """A tiny Stable Diffusion: texts and latents, with no real images at hand."""
    from diffusion_jax.interop.load import load

    folder = Path(__file__).parent.parent / 'fixtures' / 'interop' / 'sd1'
    return subjects.given(load(folder, mesh=one_device), 'tiny')


@pytest.fixture(scope='session')
def unlabelled(one_device, tmp_path_factory):
    """An untrained U-Net of three channels, with neither labels nor texts."""
    from flax import nnx

    from diffusion_jax import models, schedules
    from diffusion_jax.pipelines import ImagePipeline

    unet = models.UNet(
        resolution=8,
        image_channels=3,
        channels=8,
        channel_multipliers=(1, 2),
        attention_resolutions=(4,),
        num_groups=4,
        rngs=nnx.Rngs(0),
    )
    apply, params = models.split(unet)
    pipeline = ImagePipeline(apply, params, schedules.cosine(1000), 'v', (8, 8, 3), mesh=one_device)
    return subjects.given(pipeline, 'untrained')


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
