"""Streamed images: the same batches as from memory, whatever reads them, however often it is stopped and resumed."""

import itertools
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import numpy as np
import pytest
from image_files import colour, random_bytes, save
from PIL import Image
from runs import ROOT

from diffusion_jax import UsageError
from diffusion_jax.data.batches import Batches, batch_indices, cut
from diffusion_jax.data.files import folder
from diffusion_jax.data.reading import StreamedBatches, read_ahead
from diffusion_jax.data.streamed import ImageFiles, StreamedSet
from diffusion_jax.training.sharding import make_mesh, replicated, sharded_batch

MESHES = {'data': {}, 'all': {'data': 2, 'fsdp': 2, 'tensor': 2}}


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """A folder of 40 images of 12x10 in two classes."""
    root = tmp_path_factory.mktemp('photographs')
    for i in range(40):
        save(root, f'{"ab"[i % 2]}/{i:02}.png', Image.fromarray(random_bytes(10, 12, 3)))
    return str(root)


def batches_of(images, mesh='data', **changes):
    mesh = make_mesh(MESHES[mesh])
    arguments = {'batch_size': 16, 'seed': 3, 'replicated': replicated(mesh), 'sharded': sharded_batch(mesh)}
    return Batches(images, **arguments | changes)


def taken(stream, n):
    with stream:
        return [jax.tree.map(np.asarray, batch) for batch in itertools.islice(stream, n)]


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('count', [None, 3])
def test_batches_are_the_same_wherever_the_images_are(photographs, mesh, count):
    loaded, streamed = (folder(photographs, 8, streaming=streaming).train for streaming in (False, True))
    device = batches_of(loaded, mesh, placement='device')
    expected = [jax.jit(cut)(device.arrays, device(7 + i)) for i in range(6)]
    if count:
        expected = [jax.tree.map(lambda *parts: np.stack(parts), *expected[i : i + count]) for i in range(0, 6, count)]
    for batches in (batches_of(loaded, mesh, placement='host'), batches_of(streamed, mesh)):
        assert not batches.on_device
        same(taken(batches.stream(7, count), len(expected)), expected)
        same([batches(7, count)], expected[:1])
    with batches.stream(0, count) as stream:
        image = next(stream)['image']
    rows = {shard.data.shape[1 if count else 0] for shard in image.addressable_shards}
    assert rows == {16 // (8 if mesh == 'data' else 4)}


@pytest.mark.parametrize('workers', [0, 1, 2])
def test_a_stream_goes_on_where_it_stopped_with_any_number_of_workers(photographs, workers):
    images = folder(photographs, 8, streaming=True, crop='random', crop_min_scale=0.5).train
    whole = [batches_of(images)(step) for step in range(9)]
    resumed = batches_of(images, workers=workers)
    same(taken(resumed.stream(0), 5), whole[:5])
    same(taken(resumed.stream(5), 4), whole[5:])


def test_random_crops_differ_each_time_and_lie_in_the_image(tmp_path):
    ramp = np.arange(40, dtype=np.uint8)
    image = np.stack([np.tile(ramp, (30, 1)), np.tile(ramp[:30, None], (1, 40)), np.zeros((30, 40), np.uint8)], -1)
    for name in 'ab':
        save(tmp_path, f'{name}.png', Image.fromarray(image))
    images = folder(str(tmp_path), 8, streaming=True, crop='random', crop_min_scale=0.5, test_fraction=0.4).train
    batch = np.asarray(batches_of(images, batch_size=256)(0)['image'], int)
    # Each pixel says where it was: the step from one to the next is side / 8, the same in both directions.
    across, down = batch[:, 4, 7, 0] - batch[:, 4, 0, 0], batch[:, 7, 4, 1] - batch[:, 0, 4, 1]
    assert np.abs(across - down).max() <= 1
    sides = across * 8 / 7
    assert sides.min() == pytest.approx(15, abs=1.5)
    assert sides.max() == pytest.approx(30, abs=1.5)
    left, top = batch[:, 4, 0, 0], batch[:, 0, 4, 1]
    assert left.max() > 18
    assert top.max() > 9
    assert min(left.min(), top.min()) <= 2
    assert len({crop.tobytes() for crop in batch}) > 200
    np.testing.assert_array_equal(images.read(0), images.read(0))  # the centre, where nothing is drawn
    again = np.asarray(batches_of(images, batch_size=256)(0)['image'], int)
    np.testing.assert_array_equal(batch, again)
    assert not np.array_equal(batch, batches_of(images, batch_size=256)(1)['image'])
    assert not np.array_equal(batch, batches_of(images, batch_size=256, seed=4)(0)['image'])


def test_each_epoch_reads_every_image_once(photographs):
    images = folder(photographs, 8, streaming=True, test_fraction=0.2).train
    size = len(images)
    source = StreamedBatches(images, 0, size, 0, np.arange(size))
    for step in range(2):
        read = sorted(image.tobytes() for image in source.read(step)['image'])
        assert read == sorted(images.read(i).tobytes() for i in range(size))


def test_a_process_reads_the_rows_of_its_own_devices_alone(photographs):
    images = folder(photographs, 8, streaming=True).train
    whole = StreamedBatches(images, 0, 16, 0, np.arange(16)).read(2)
    part = StreamedBatches(images, 0, 16, 0, np.array([4, 5, 12])).read(2)
    for name in whole:
        np.testing.assert_array_equal(part[name], whole[name][[4, 5, 12]])


@pytest.mark.parametrize('workers', [0, 2])
def test_a_damaged_image_is_named_and_ends_the_stream(photographs, tmp_path, workers):
    for i in range(30):
        save(tmp_path, f'{i:02}.png', colour(i, i, i))
    images = folder(str(tmp_path), 8, streaming=True).train
    (tmp_path / '05.png').write_bytes(b'no image')
    message = r'05.png cannot be read as an image \(Unidentified.*Repair or remove it'
    with pytest.raises(UsageError, match=message):
        taken(batches_of(images, workers=workers).stream(0), 4)


class Broken:
    remedy = ''

    def __len__(self):
        return 30

    def name(self, index):
        return f'image {index}'

    def open(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_an_error_and_no_hang():
    ahead = read_ahead(StreamedBatches(StreamedSet(Broken(), 8), 0, 4, 0, np.arange(4)), 1)
    with pytest.raises(UsageError, match=r'a process that reads images ended .*-9.*fewer --config.data.workers'):
        next(ahead)


def children():
    out = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(os.getpid())], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


@pytest.mark.parametrize('workers', [0, 2])
def test_a_closed_stream_leaves_no_process_and_no_thread(photographs, workers):
    images = folder(photographs, 8, streaming=True).train
    before, threads = children(), threading.active_count()
    stream = batches_of(images, workers=workers).stream(0)
    next(stream)
    stream.close()
    stream.close()
    for _ in range(100):
        left = [thread for thread in threading.enumerate() if thread.name == 'batches']
        # Python's own tracker of shared memory stays, one for the whole process.
        if not left and len(children() - before) <= 1:
            break
        time.sleep(0.1)
    else:
        pytest.fail(f'left: {left}, {children() - before}, {threads} threads before')
    with pytest.raises(ValueError, match='closed'):
        next(stream)


def test_few_batches_are_read_ahead(photographs):
    images = folder(photographs, 8, streaming=True).train
    seen = []

    class Counted(ImageFiles):
        def open(self, index):
            seen.append(index)
            return super().open(index)

    counted = StreamedSet(Counted(photographs, [f'a/{i:02}.png' for i in range(0, 40, 2)]), 8)
    with batches_of(counted).stream(0) as stream:
        next(stream)
        time.sleep(2)
        # The one given, two on the devices, and what Grain's threads hold.
        assert len(seen) <= 16 * 8
        held = len(seen)
        time.sleep(1)
        assert len(seen) == held
    assert len(images) > 16


def test_what_travels_to_workers_is_small(tmp_path):
    names = [f'{i % 1000:04}/{i:07}.jpg' for i in range(200_000)]
    files = ImageFiles(str(tmp_path), names)
    assert files.name(123_456) == os.path.join(str(tmp_path), names[123_456])
    assert files.name(0) == os.path.join(str(tmp_path), names[0])
    part = StreamedSet(files, 8, labels=np.zeros(len(names), np.int32), class_names=('x',)).take(np.arange(5, 199_000))
    assert part.stored.name(0) == files.name(5)
    start = time.perf_counter()
    sent = pickle.dumps(part)
    copy = pickle.loads(sent)
    assert time.perf_counter() - start < 1  # seconds; strings by themselves take many
    assert len(sent) < 8e6
    assert copy.stored.name(100_000) == files.name(100_005)


def test_an_excerpt_is_spread_over_the_set(monkeypatch, tmp_path):
    for i in range(50):
        save(tmp_path, f'{i // 10}/{i:02}.png', colour(i, i, i))
    images = folder(str(tmp_path), 8, streaming=True).train
    monkeypatch.setattr('diffusion_jax.data.streamed.EXCERPT_IMAGES', 10)
    excerpt = images.in_memory()
    assert len(excerpt) == 10
    assert set(excerpt.labels.tolist()) == set(range(5))
    np.testing.assert_array_equal(excerpt.images[:, 0, 0, 0] // 10, excerpt.labels)


def test_a_script_without_a_main_guard_is_told_of_it(photographs, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(
        textwrap.dedent(
            f"""
            import numpy as np
            from diffusion_jax import UsageError
            from diffusion_jax.data.files import folder
            from diffusion_jax.data.reading import StreamedBatches, read_ahead
            images = folder({photographs!r}, 8, streaming=True).train
            try:
                next(read_ahead(StreamedBatches(images, 0, 4, 0, np.arange(4)), 1))
            except UsageError as error:
                print(error)
            """
        )
    )
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=120)
    assert "below `if __name__ == '__main__':`" in done.stdout


def test_batch_indices_are_those_of_the_set_in_memory(photographs):
    images = folder(photographs, 8, streaming=True).train
    indices = batch_indices(3, 4, 16, len(images))
    np.testing.assert_array_equal(batches_of(images)(4)['image'], np.stack([images.read(int(i)) for i in indices]))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'placement': 'device'}, "'device' is for images in memory, and these are streamed"),
        ({'placement': 'host'}, "'host' is for images in memory"),
        ({'workers': -1}, 'workers must be 0'),
    ],
)
def test_batches_that_do_not_fit_streamed_images_are_refused(photographs, changes, message):
    with pytest.raises(UsageError, match=message):
        batches_of(folder(photographs, 8, streaming=True).train, **changes)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'crop': 'left'}, "unknown crop 'left'.*center, random"),
        ({'crop_min_scale': 0.0}, r'crop_min_scale must lie in \(0, 1\], not 0.0'),
        ({'resolution': 0}, 'resolution must be a positive'),
        ({'channels': 2}, 'channels must be 1'),
        ({'labels': np.zeros(2, np.int32), 'class_names': ('a',)}, '3 images need as many labels, not 2'),
        ({'class_names': ('a',)}, 'given together'),
        ({'captions': ('x',)}, '3 images need as many captions, not 1'),
    ],
)
def test_a_streamed_set_refuses(changes, message):
    with pytest.raises(UsageError, match=message):
        StreamedSet(**{'stored': ImageFiles('.', ['a', 'b', 'c']), 'resolution': 8} | changes)
