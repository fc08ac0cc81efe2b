"""Datasets: every format read back exactly, and every damaged or missing file named."""

import dataclasses
import gzip
import io
import json
import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from image_files import prepare, random_bytes

from diffusion_jax.data import SOURCES, ImageSet, Splits, examples, formats, load, sources
from diffusion_jax.errors import UsageError

# ImageSet


def image_set(**changes):
    fields = {'images': random_bytes(3, 4, 5, 1), 'labels': np.array([0, 1, 1], np.int32), 'class_names': ('a', 'b')}
    return ImageSet(**(fields | changes))


def test_image_set_describes_itself():
    images = image_set()
    assert (len(images), images.image_shape, images.num_classes) == (3, (4, 5, 1), 2)
    assert image_set(labels=None, class_names=()).num_classes == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        images.labels = None


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'images': np.zeros((3, 4, 5, 1), np.float32)}, r'uint8 \[N, H, W, C\].*not float32'),
        ({'images': np.zeros((3, 4, 5), np.uint8)}, r'not uint8 \[3, 4, 5\]'),
        ({'images': np.zeros((0, 4, 5, 1), np.uint8)}, r'not uint8 \[0, 4, 5, 1\]'),
        ({'labels': np.array([0, 1, 1])}, r'int32 \[3\], not int64'),
        ({'labels': np.array([0, 1], np.int32)}, r'int32 \[3\], not int32 \[2\]'),
        ({'labels': np.array([0, 1, 2], np.int32)}, r'0\.\.1, not 0\.\.2'),
        ({'labels': np.array([-1, 1, 1], np.int32)}, r'0\.\.1, not -1\.\.1'),
        ({'labels': None}, 'given together'),
        ({'class_names': ()}, 'given together'),
    ],
)
def test_image_set_rejects(changes, message):
    with pytest.raises(UsageError, match=message):
        image_set(**changes)


# load and resolution


def test_load_builds_by_name():
    assert set(SOURCES) == {'digits', 'fashion_mnist', 'cifar10', 'folder', 'captioned_folder', 'npz', 'tfds'}
    assert load('digits', resolution=16).train.image_shape == (16, 16, 1)


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('fashion_mnits', {}, "Did you mean 'fashion_mnist'"),
        ('digits', {'dir': 'x'}, "option of dataset 'digits'.*Valid choices: resolution"),
        ('folder', {'data_dir': 'x'}, 'needs the option resolution'),
        ('digits', {'resolution': 0}, 'resolution must be a positive whole number.*not 0'),
        ('digits', {'resolution': 8.5}, 'resolution must be a positive whole number.*not 8.5'),
    ],
)
def test_load_explains_wrong_options(name, options, message):
    with pytest.raises(UsageError, match=message):
        load(name, **options)


def test_resize_is_antialiased():
    fine = np.zeros((1, 64, 64, 3), np.uint8)
    fine[:, :, ::2] = 200
    coarse = formats.resize(fine, 8)
    assert coarse.shape == (1, 8, 8, 3)
    np.testing.assert_allclose(coarse.astype(int), 100, atol=12)


def test_resize_keeps_the_channels_and_the_native_size():
    images = np.broadcast_to(np.array([10, 20, 30], np.uint8), (2, 8, 8, 3))
    np.testing.assert_array_equal(formats.resize(images, 12), np.broadcast_to(images[0, 0, 0], (2, 12, 12, 3)))
    assert formats.resize(images, 8) is images
    assert formats.resize(images, None) is images


# digits


def test_digits_are_a_fixed_shuffled_split_of_scikit_learns():
    from sklearn.datasets import load_digits

    train, test = sources.digits()
    assert (len(train), len(test), train.image_shape) == (1500, 297, (8, 8, 1))
    assert train.class_names == tuple('0123456789')
    pixels, labels = load_digits(return_X_y=True)
    images = np.concatenate([train.images, test.images]).reshape(1797, 64)
    expected = {
        (np.rint(p * 255 / 16).astype(np.uint8).tobytes(), label) for p, label in zip(pixels, labels, strict=True)
    }
    read = zip(images, np.concatenate([train.labels, test.labels]), strict=True)
    assert {(image.tobytes(), label) for image, label in read} == expected
    assert (images.min(), images.max()) == (0, 255)
    # The split of every machine; in scikit-learn's order the first labels would be 0, 1, 2, 3, ...
    assert train.labels[:10].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5]
    assert np.bincount(test.labels, minlength=10).min() > 15


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(UsageError, match='pip install scikit-learn'):
        sources.digits()


# Fashion-MNIST in IDX files

FASHION = {
    'train-images-idx3-ubyte': random_bytes(12, 28, 28),
    'train-labels-idx1-ubyte': (np.arange(12) % 10).astype(np.uint8),
    't10k-images-idx3-ubyte': random_bytes(4, 28, 28),
    't10k-labels-idx1-ubyte': np.array([9, 0, 3, 3], np.uint8),
}


def idx(array, magic=None):
    return (magic or bytes((0, 0, 8, array.ndim))) + struct.pack(f'>{array.ndim}I', *array.shape) + array.tobytes()


def write_fashion(root, suffix='', **changes):
    for name, array in FASHION.items():
        data = changes.get(name.replace('-', '_'), idx(array))
        (root / (name + suffix)).write_bytes(gzip.compress(data) if suffix else data)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No dataset in the default places of this machine."""
    constants = pytest.importorskip('tensorflow_datasets').core.constants
    monkeypatch.setattr(sources, 'DEBIAN_FASHION_MNIST', tmp_path / 'debian')
    monkeypatch.setattr(constants, 'DATA_DIR', str(tmp_path / 'tfds'))
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))


def assert_is_fashion(splits):
    assert isinstance(splits, Splits)
    for part, images in zip(('train', 't10k'), splits, strict=True):
        np.testing.assert_array_equal(images.images[..., 0], FASHION[f'{part}-images-idx3-ubyte'])
        np.testing.assert_array_equal(images.labels, FASHION[f'{part}-labels-idx1-ubyte'])
        assert images.image_shape == (28, 28, 1)
        assert (images.class_names[0], images.class_names[9], images.num_classes) == ('T-shirt/top', 'Ankle boot', 10)


@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_fashion_mnist_reads_idx(tmp_path, suffix):
    write_fashion(tmp_path, suffix)
    assert_is_fashion(sources.fashion_mnist(str(tmp_path)))


def test_fashion_mnist_prefers_the_inflated_of_two_files(tmp_path):
    write_fashion(tmp_path, '.gz', train_labels_idx1_ubyte=b'damaged')
    write_fashion(tmp_path)
    assert_is_fashion(sources.fashion_mnist(str(tmp_path)))


def test_fashion_mnist_reads_debians_package_by_default(nowhere):
    sources.DEBIAN_FASHION_MNIST.mkdir()
    write_fashion(sources.DEBIAN_FASHION_MNIST, '.gz')
    assert_is_fashion(load('fashion_mnist'))


def test_fashion_mnist_expands_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'images').mkdir()
    write_fashion(tmp_path / 'images')
    assert_is_fashion(sources.fashion_mnist('~/images'))


def test_fashion_mnist_resizes(tmp_path):
    write_fashion(tmp_path)
    train, test = sources.fashion_mnist(str(tmp_path), resolution=32)
    assert train.images.shape == (12, 32, 32, 1)
    assert test.images.shape == (4, 32, 32, 1)
    assert abs(train.images.mean() - FASHION['train-images-idx3-ubyte'].mean()) < 2


@pytest.mark.skipif(not sources.DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debians_package():
    train, test = sources.fashion_mnist()
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert train.labels[:5].tolist() == [9, 0, 0, 3, 0]
    assert round(train.images.mean(), 2) == 72.94


IMAGES = FASHION['train-images-idx3-ubyte']


@pytest.mark.parametrize(
    ('name', 'data', 'message'),
    [
        ('train-images-idx3-ubyte', idx(IMAGES)[:-1], r'expected 9424 bytes.*\[12, 28, 28\].*found 9423 bytes'),
        ('train-images-idx3-ubyte', idx(IMAGES) + b'x', 'expected 9424 bytes.*found 9425 bytes'),
        ('train-images-idx3-ubyte', idx(IMAGES, b'\0\0\x08\x01'), 'magic number 0x00000803, found 0x00000801'),
        ('train-images-idx3-ubyte', idx(IMAGES)[:15], 'IDX header of 16 bytes, found 15 bytes'),
        ('train-images-idx3-ubyte', b'', 'IDX header of 16 bytes, found 0 bytes'),
        ('t10k-images-idx3-ubyte', idx(IMAGES[:0]), r'at least one item, found the shape \[0, 28, 28\]'),
        ('t10k-labels-idx1-ubyte', idx(np.zeros(3, np.uint8)), 'for t10k-images.*expected 4 labels.*found 3'),
        ('t10k-labels-idx1-ubyte', idx(np.full(4, 10, np.uint8)), r'labels in 0\.\.9, found 10\.\.10'),
    ],
)
def test_fashion_mnist_names_the_damaged_file(tmp_path, name, data, message):
    write_fashion(tmp_path, **{name.replace('-', '_'): data})
    with pytest.raises(UsageError, match=f'{tmp_path / name}.*{message}.*whole copy.*--config.data.dir='):
        sources.fashion_mnist(str(tmp_path))


@pytest.mark.parametrize(
    'damage',
    [
        lambda data: data[:-20],
        lambda data: data + b'trailing',
        lambda data: b'PK' + data[2:],
        lambda data: data[:10] + b'\xff' + data[11:],
        lambda data: data[:200] + bytes(byte ^ 255 for byte in data[200:300]) + data[300:],
    ],
    ids=['short', 'trailing bytes', 'no gzip', 'no deflate', 'flipped bits'],
)
def test_fashion_mnist_names_the_damaged_gzip(tmp_path, damage):
    write_fashion(tmp_path, '.gz')
    path = tmp_path / 'train-images-idx3-ubyte.gz'
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match=f'{path}: expected a whole gzip file, found '):
        sources.fashion_mnist(str(tmp_path))


def test_fashion_mnist_of_two_sizes(tmp_path):
    write_fashion(tmp_path, t10k_images_idx3_ubyte=idx(random_bytes(4, 14, 14)))
    with pytest.raises(UsageError, match=r'shape \(28, 28, 1\) of training, found \(14, 14, 1\)'):
        sources.fashion_mnist(str(tmp_path))


def test_fashion_mnist_names_the_missing_files(tmp_path):
    write_fashion(tmp_path)
    (tmp_path / 't10k-labels-idx1-ubyte').unlink()
    message = f'{tmp_path} has train-images-idx3-ubyte but lacks t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz'
    with pytest.raises(UsageError, match=message):
        sources.fashion_mnist(str(tmp_path))


def test_fashion_mnist_that_is_nowhere(nowhere, tmp_path):
    with pytest.raises(UsageError) as error:
        sources.fashion_mnist()
    for word in (
        f'{tmp_path}/debian (IDX files)',
        f'{tmp_path}/tfds (prepared by TFDS)',
        'apt-get install dataset-fashion-mnist',
        '--config.data.dir=DIR',
        '`tfds build fashion_mnist --file_format=array_record`',
        "pip install 'diffusion_jax[tfds]'",
    ):
        assert word in str(error.value)


def test_fashion_mnist_not_in_the_named_folder(tmp_path):
    # A default place must not stand in for the folder that was asked for.
    with pytest.raises(UsageError, match=f'Looked in: {tmp_path} .*tfds build .* --data_dir={tmp_path}`') as error:
        sources.fashion_mnist(str(tmp_path))
    assert '/usr/share' not in str(error.value)


def test_fashion_mnist_without_tfds(nowhere, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
    with pytest.raises(UsageError, match='fashion_mnist was not found'):
        sources.fashion_mnist()


# TFDS


@pytest.fixture(scope='module')
def tfds_fashion():
    """Images whose first pixel says their label, as TFDS shuffles them."""
    labels = np.arange(7) % 3
    images = random_bytes(7, 28, 28, 1)
    images[:, 0, 0, 0] = labels
    return {'train': (images[:5], labels[:5]), 'test': (images[5:], labels[5:])}


def rows(images):
    return sorted(image.tobytes() for image in images)


def assert_is_tfds_fashion(splits, expected):
    for images, (pixels, _) in zip(splits, expected.values(), strict=True):
        assert rows(images.images) == rows(pixels)
        np.testing.assert_array_equal(images.labels, images.images[:, 0, 0, 0])
        assert images.labels.dtype == np.int32
        assert images.class_names == ('x', 'y', 'z')


def test_tfds_data_directory(tmp_path, tfds_fashion):
    prepare(tmp_path, 'FashionMnist', tfds_fashion, ['x', 'y', 'z'])
    assert_is_tfds_fashion(sources.fashion_mnist(str(tmp_path)), tfds_fashion)
    assert sources.fashion_mnist(str(tmp_path), resolution=14).train.image_shape == (14, 14, 1)


def test_tfds_default_directory(nowhere, tmp_path, tfds_fashion):
    prepare(tmp_path / 'tfds', 'FashionMnist', tfds_fashion, ['x', 'y', 'z'])
    assert_is_tfds_fashion(sources.fashion_mnist(), tfds_fashion)


def test_tfds_cifar10_in_colour(nowhere, tmp_path):
    images = random_bytes(3, 32, 32, 3)
    prepare(tmp_path / 'tfds', 'Cifar10', {'train': (images[:2], [0, 1]), 'test': (images[2:], [1])}, ['u', 'v'])
    train, test = sources.cifar10()
    assert rows(train.images) == rows(images[:2])
    np.testing.assert_array_equal(test.images, images[2:])
    assert (test.labels.tolist(), test.class_names) == ([1], ('u', 'v'))


@pytest.mark.parametrize('damage', [lambda path: path.write_bytes(path.read_bytes()[:1000]), os.unlink])
def test_tfds_damaged_records(tmp_path, tfds_fashion, damage):
    prepare(tmp_path, 'FashionMnist', tfds_fashion, ['x', 'y', 'z'])
    damage(next(tmp_path.rglob('*-test.array_record*')))
    with pytest.raises(UsageError, match=f"{tmp_path}/fashion_mnist/3.0.1: expected readable images in 'test', found"):
        sources.fashion_mnist(str(tmp_path))


def test_tfds_without_a_test_split(tmp_path, tfds_fashion):
    prepare(tmp_path, 'FashionMnist', {'train': tfds_fashion['train']}, ['x', 'y', 'z'])
    with pytest.raises(UsageError, match=r"fashion_mnist/3.0.1: expected a split 'test', found.*train"):
        sources.fashion_mnist(str(tmp_path))


def test_tfds_format_that_needs_tensorflow(tmp_path, tfds_fashion):
    prepare(tmp_path, 'FashionMnist', tfds_fashion, ['x', 'y', 'z'])
    path = next(tmp_path.rglob('dataset_info.json'))
    path.write_text(json.dumps(json.loads(path.read_text()) | {'fileFormat': 'tfrecord'}))
    message = f'only TensorFlow reads.*`tfds build fashion_mnist --file_format=array_record --data_dir={tmp_path}`'
    with pytest.raises(UsageError, match=message):
        sources.fashion_mnist(str(tmp_path))


# CIFAR-10

BATCHES = {
    name: (random_bytes(n, 3, 32, 32), random_bytes(n) % 10) for n, name in enumerate(sources.CIFAR10_BATCHES, 1)
}


class Python2Pickler(pickle._Pickler):
    """Writes byte strings as Python 2 did, whose protocol 2 the published files are in."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack('<i', len(value)) + value)

    dispatch[bytes] = save_bytes


def python2_pickle(value):
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(value)
    return stream.getvalue().replace(b'numpy._core', b'numpy.core')


def binary_batch(pixels, labels):
    return b''.join(bytes([label]) + image.tobytes() for image, label in zip(pixels, labels, strict=True))


def python_batch(pixels, labels):
    fields = {b'batch_label': b'a batch', b'labels': labels.tolist(), b'data': pixels.reshape(-1, 3072)}
    return python2_pickle(fields | {b'filenames': [b'x.png'] * len(labels)})


def write_cifar(root, batch=binary_batch, suffix='.bin', **changes):
    root.mkdir(exist_ok=True)
    for name, data in BATCHES.items():
        (root / (name + suffix)).write_bytes(changes.get(name, batch(*data)))


@pytest.mark.parametrize('child', ['', 'cifar-10-batches-bin', 'cifar-10-batches-py'])
@pytest.mark.parametrize(('batch', 'suffix'), [(binary_batch, '.bin'), (python_batch, '')])
def test_cifar10_reads_both_versions(tmp_path, child, batch, suffix):
    write_cifar(tmp_path / child, batch, suffix)
    train, test = load('cifar10', data_dir=str(tmp_path))
    expected = [np.concatenate(part) for part in zip(*list(BATCHES.values())[:5], strict=True)]
    np.testing.assert_array_equal(train.images.transpose(0, 3, 1, 2), expected[0])
    np.testing.assert_array_equal(train.labels, expected[1])
    np.testing.assert_array_equal(test.images.transpose(0, 3, 1, 2), BATCHES['test_batch'][0])
    np.testing.assert_array_equal(test.labels, BATCHES['test_batch'][1])
    assert (len(train), len(test), train.image_shape) == (15, 6, (32, 32, 3))
    assert (train.class_names[0], test.class_names[9]) == ('airplane', 'truck')


def test_cifar10_resizes(tmp_path):
    write_cifar(tmp_path)
    train, test = sources.cifar10(str(tmp_path), resolution=16)
    assert (train.image_shape, test.image_shape) == ((16, 16, 3), (16, 16, 3))
    means = train.images.mean((1, 2)), BATCHES['data_batch_1'][0].mean((2, 3))
    np.testing.assert_allclose(means[0][:1], means[1], atol=3)


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (binary_batch(*BATCHES['test_batch'])[:-1], 'whole records of 3073 bytes.*found 18437 bytes'),
        (binary_batch(*BATCHES['test_batch']) + b'xy', 'whole records of 3073 bytes.*found 18440 bytes'),
        (b'', 'at least one, found 0 bytes'),
        (bytes([10] * 3073), r'labels in 0\.\.9, found 10\.\.10'),
    ],
)
def test_cifar10_names_the_damaged_binary_file(tmp_path, data, message):
    write_cifar(tmp_path, test_batch=data)
    with pytest.raises(UsageError, match=f'{tmp_path}/test_batch.bin: expected.*{message}'):
        sources.cifar10(str(tmp_path))


PIXELS, LABELS = BATCHES['test_batch'][0].reshape(6, 3072), [0, 1, 2, 3, 4, 5]
GOOD = python_batch(*BATCHES['test_batch'])


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (GOOD[:-1], 'a pickle of plain values and numpy arrays, found'),
        (GOOD[: len(GOOD) // 2], 'a pickle of plain values and numpy arrays, found'),
        (b'', 'a pickle of plain values and numpy arrays, found EOFError'),
        (GOOD + b'more', 'the end of the file after the pickle, found 4 bytes'),
        (python2_pickle([1]), "a dictionary with 'data' and 'labels', found list"),
        (python2_pickle({b'data': PIXELS}), r"a dictionary with 'data' and 'labels', found the keys \[b'data'\]"),
        (python2_pickle({b'data': PIXELS[:, 1:], b'labels': LABELS}), r'3072\], found uint8 \[6, 3071\]'),
        (python2_pickle({b'data': PIXELS[:0], b'labels': []}), r'3072\], found uint8 \[0, 3072\]'),
        (python2_pickle({b'data': PIXELS.astype(np.int16), b'labels': LABELS}), r'3072\], found int16'),
        (python2_pickle({b'data': b'bytes', b'labels': LABELS}), r'3072\], found bytes'),
        (python2_pickle({b'data': PIXELS, b'labels': [b'a'] * 6}), 'small integers as labels, found list'),
        (python2_pickle({b'data': PIXELS, b'labels': [-1] * 6}), 'small integers as labels, found list'),
        (python2_pickle({b'data': PIXELS, b'labels': 5}), 'small integers as labels, found int'),
        (python2_pickle({b'data': PIXELS, b'labels': LABELS[:5]}), '6 labels, one an image, found 5'),
        (python2_pickle({b'data': PIXELS, b'labels': [10] * 6}), r'labels in 0\.\.9, found 10\.\.10'),
    ],
)
def test_cifar10_names_the_damaged_pickle(tmp_path, data, message):
    write_cifar(tmp_path, python_batch, '', test_batch=data)
    with pytest.raises(UsageError, match=f'{tmp_path}/test_batch: expected.*{message}'):
        sources.cifar10(str(tmp_path))


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('protocol', [0, 2, 4])
@pytest.mark.parametrize(('function', 'name'), [(os.mkdir, 'mkdir'), (exec, 'exec'), (getattr, 'getattr')])
def test_cifar10_pickles_cannot_call_anything(tmp_path, protocol, function, name):
    mark = tmp_path / 'mark'
    arguments = {'mkdir': [str(mark)], 'exec': [f'import os; os.mkdir({str(mark)!r})'], 'getattr': [1, 'real']}[name]
    data = pickle.dumps({'data': Hostile(function, *arguments)}, protocol=protocol)
    write_cifar(tmp_path, python_batch, '', data_batch_1=data)
    with pytest.raises(
        UsageError, match=rf'{tmp_path}/data_batch_1: expected.*reference to \w+\.{name}, which is refused'
    ):
        sources.cifar10(str(tmp_path))
    assert not mark.exists()
    if name != 'getattr':
        pickle.loads(data)
        assert mark.is_dir(), 'the file is not hostile, so that the test shows nothing'


def test_cifar10_pickles_refer_to_three_names_only():
    assert set(formats._ArrayUnpickler.known) == {
        ('numpy.core.multiarray', '_reconstruct'),
        ('numpy', 'ndarray'),
        ('numpy', 'dtype'),
    }


def test_cifar10_names_the_missing_files(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / 'data_batch_3.bin').unlink()
    (tmp_path / 'test_batch.bin').unlink()
    with pytest.raises(UsageError, match=r'has data_batch_1.bin but lacks data_batch_3.bin, test_batch.bin'):
        sources.cifar10(str(tmp_path))


def test_cifar10_that_is_nowhere(nowhere, tmp_path):
    with pytest.raises(
        UsageError, match=rf'Looked in: {tmp_path}/tfds .*cifar-10-binary.tar.gz.*--config.data.dir=DIR'
    ):
        sources.cifar10()
    with pytest.raises(UsageError, match=f'{tmp_path}/cifar-10-batches-bin .*{tmp_path}/cifar-10-batches-py .*'):
        sources.cifar10(str(tmp_path))


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, 'Permission denied')

    write_cifar(tmp_path)
    monkeypatch.setattr(Path, 'read_bytes', refuse)
    with pytest.raises(UsageError, match=r'data_batch_1.bin: expected a readable file, found Permission denied'):
        sources.cifar10(str(tmp_path))


@pytest.mark.parametrize('name', ['digits', 'fashion_mnist'])
def test_examples_are_images_of_the_test_set_the_classes_in_turn(name):
    some = examples(name)
    np.testing.assert_array_equal(some.labels, np.tile(np.arange(10), 3))
    try:
        test = load(name).test
    except UsageError:
        pytest.skip('the data set is not on this machine')
    assert some.class_names == test.class_names
    for image, label in zip(some.images, some.labels, strict=True):
        same = (test.images[test.labels == label] == image).all(axis=(1, 2, 3))
        assert same.sum() == 1
