import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import UsageError
from diffusion_jax.data import ImageSet
from diffusion_jax.data.batches import Batches, batch_indices, cut, prepare
from diffusion_jax.training.sharding import make_mesh, replicated, sharded_batch

MESH = make_mesh()
IMAGES = ImageSet(
    np.arange(30 * 4, dtype=np.uint8).reshape(30, 2, 2, 1), np.arange(30, dtype=np.int32) % 3, ('a', 'b', 'c')
)


def batches(placement='auto', **changes):
    arguments = {'batch_size': 8, 'seed': 0} | changes
    return Batches(IMAGES, replicated=replicated(MESH), sharded=sharded_batch(MESH), placement=placement, **arguments)


def test_each_epoch_shows_every_image_once_in_an_order_of_its_own():
    stream = np.concatenate([batch_indices(7, step, 8, 30) for step in range(15)])  # four epochs of 30
    epochs = stream.reshape(4, 30)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(30), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_is_a_function_of_seed_and_step_alone():
    np.testing.assert_array_equal(batch_indices(1, 9, 8, 30), batch_indices(1, 9, 8, 30))
    assert not np.array_equal(batch_indices(1, 9, 8, 30), batch_indices(2, 9, 8, 30))
    assert not np.array_equal(batch_indices(1, 9, 8, 30), batch_indices(1, 10, 8, 30))


def test_a_batch_larger_than_the_set_takes_several_epochs():
    indices = batch_indices(0, 0, 64, 30)
    assert (np.bincount(indices, minlength=30) >= 2).all()


def test_images_on_the_device_and_on_the_host_give_the_same_batches():
    device, host = batches('device'), batches('host')
    assert device.on_device
    assert not host.on_device
    assert host.arrays == {}
    for step in (0, 5):
        a, b = (jax.jit(cut)(source.arrays, source(step)) for source in (device, host))
        np.testing.assert_array_equal(a['image'], b['image'])
        np.testing.assert_array_equal(a['label'], b['label'])
        indices = batch_indices(0, step, 8, 30)
        np.testing.assert_array_equal(a['image'], IMAGES.images[indices])
        np.testing.assert_array_equal(a['label'], IMAGES.labels[indices])


def test_batches_are_split_over_the_devices():
    for placement in ('device', 'host'):
        leaf = jax.tree.leaves(batches(placement)(0))[0]
        assert len(leaf.addressable_shards) == 8
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {1}


def test_prepared_images_are_floats_and_half_of_them_mirrored(key):
    images = jnp.tile(jnp.array([0, 255], jnp.uint8), (4000, 2, 1))[..., None]
    np.testing.assert_array_equal(prepare(images, key, flip=False)[0, 0, :, 0], [-1, 1])
    flipped = prepare(images, key, flip=True)
    assert float((flipped[:, 0, 0, 0] == 1).mean()) == pytest.approx(0.5, abs=0.03)
    np.testing.assert_array_equal(flipped[:, :, 0], -flipped[:, :, 1])


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'batch_size': 12}, 'multiple of the 8 parts that it is split in, got 12'),
        ({'batch_size': 0}, 'positive multiple'),
        ({'placement': 'disk'}, 'auto, device, host, stream'),
        ({'placement': 'stream'}, "these are in memory: 'auto', 'device' or 'host'"),
        ({'workers': 2}, 'with workers=2 is for images that are streamed'),
        ({'workers': -1}, 'workers must be 0'),
    ],
)
def test_impossible_batches_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        batches(**changes)
