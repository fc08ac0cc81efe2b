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
from PIL import Image

from diffusion_jax.data import SOURCES, ImageSet, Splits, formats, load, sources
from diffusion_jax.errors import UsageError

RANDOM = np.random.default_rng(0)


def random_bytes(*shape):
    return RANDOM.integers(0, 256, shape, np.uint8)


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
    assert set(SOURCES) == {'digits', 'fashion_mnist', 'cifar10', 'folder'}
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


def png(pixels):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, 'png')
    data.seek(0)
    return data


def prepare(root, name, splits, class_names):
    """Has TFDS prepare images uint8 [N, H, W, C] and labels as the dataset `name`, with no TensorFlow."""
    tfds = pytest.importorskip('tensorflow_datasets')
    shape = next(iter(splits.values()))[0].shape[1:]

    def info(self):
        features = {
            'image': tfds.features.Image(shape=shape),
            'label': tfds.features.ClassLabel(names=class_names),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def generate(self, images, labels):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {'image': png(image.squeeze()), 'label': int(label)}

    members = {
        'VERSION': tfds.core.Version('3.0.1'),
        'pkg_dir_path': root,
        '_info': info,
        '_split_generators': lambda self, _: {split: self._generate_examples(*data) for split, data in splits.items()},
        '_generate_examples': generate,
    }
    with tfds.core.registered.skip_registration():
        builder = type(name, (tfds.core.GeneratorBasedBuilder,), members)
    builder(data_dir=str(root), file_format='array_record').download_and_prepare()


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


# Folders


def colour(*value, size=(8, 8), mode='RGB'):
    return Image.new(mode, size, value if len(value) > 1 else value[0])


def save(root, name, image=None):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or colour(9, 9, 9)).save(path)
    return path


def read(root, image, name='a.png', channels=3, resolution=8):
    """What `folder` makes of one image."""
    path = save(root, name, image)
    return formats.read_images([path], resolution, channels)[0]


def test_folder_of_all_formats(tmp_path):
    names = [f'{i}{suffix}' for i, suffix in enumerate(['.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.PNG'])]
    for i, name in enumerate(names):
        save(tmp_path, f'deep/{i % 2}/{name}' if i else name, colour(200, 40 * (i > 2), 30))
    (tmp_path / 'notes.txt').write_text('no image')
    (tmp_path / 'folder.png').mkdir()
    train, test = load('folder', data_dir=str(tmp_path), resolution=4, test_fraction=0.4)
    assert len(train) + len(test) == len(names)
    assert train.image_shape == (4, 4, 3)
    assert (train.labels, train.class_names) == (None, ())
    images = np.concatenate([train.images, test.images]).astype(int)
    np.testing.assert_allclose(images[..., 0], 200, atol=3)
    assert (images[:, 0, 0, 1] > 20).sum() == len(names) - 3


def test_folder_takes_classes_from_the_first_level(tmp_path):
    for i in range(20):
        save(tmp_path, f'cat/{i}.png', colour(1, 1, 1))
        save(tmp_path, f'dog/{i % 3}/{i}.png', colour(2, 2, 2))
        save(tmp_path, f'ant/{i}.png', colour(0, 0, 0))
    for images in sources.folder(str(tmp_path), 8, test_fraction=0.3):
        assert images.class_names == ('ant', 'cat', 'dog')
        assert set(images.labels.tolist()) == {0, 1, 2}
        np.testing.assert_array_equal(images.images[:, 0, 0, 0], images.labels)


def test_folder_leaves_out_what_is_hidden(tmp_path):
    for name in ('a/1.png', 'b/1.png', '.trash/1.png'):
        save(tmp_path, name)
    (tmp_path / 'a' / '._1.png').write_bytes(b'left by another system')
    train, test = sources.folder(str(tmp_path), 8)
    assert (len(train), len(test), train.class_names) == (1, 1, ('a', 'b'))


def shades(images):
    return images.images[:, 0, 0, 0].tolist()


def test_folder_split_is_stable(tmp_path):
    expected = [2, 3, 4, 22, 25, 29, 38, 40, 41, 42, 48, 51, 52, 54, 58, 62, 64, 71, 72, 73, 75, 82, 87, 95, 96, 99]
    for i in range(100):
        save(tmp_path / 'x', f'{i:03}.png', colour(i, i, i))
    first = sources.folder(str(tmp_path / 'x'), 8, test_fraction=0.2)
    # The split of every machine and of every place of the folder, in the order of the names.
    assert shades(first.test) == expected
    assert shades(first.train) == [i for i in range(100) if i not in expected]
    for i in range(100, 200):
        save(tmp_path / 'x', f'{i:03}.png', colour(i, i, i))
    (tmp_path / 'x').rename(tmp_path / 'y')
    grown = sources.folder(str(tmp_path / 'y'), 8, test_fraction=0.2)
    assert [i for i in shades(grown.test) if i < 100] == expected
    assert 20 < len(grown.test) < 60


@pytest.mark.parametrize('fraction', [1e-9, 1 - 1e-9])
def test_folder_gives_each_split_an_image(tmp_path, fraction):
    for i in range(3):
        save(tmp_path, f'{i}.png')
    train, test = sources.folder(str(tmp_path), 8, test_fraction=fraction)
    assert (len(train), len(test)) == ((2, 1) if fraction < 0.5 else (1, 2))


@pytest.mark.parametrize(('size', 'box'), [((12, 8), (2, 0, 10, 8)), ((8, 14), (0, 3, 8, 11)), ((8, 8), None)])
def test_folder_crops_the_centre(tmp_path, size, box):
    image = Image.fromarray(random_bytes(size[1], size[0], 3))
    np.testing.assert_array_equal(read(tmp_path, image), np.asarray(image.crop(box)))


def test_folder_resizes_without_aliases(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::2] = 200
    np.testing.assert_allclose(read(tmp_path, Image.fromarray(stripes)).astype(int), 100, atol=12)
    assert read(tmp_path, colour(5, 6, 7, size=(3, 3)))[4, 4].tolist() == [5, 6, 7]


def test_folder_composites_over_white(tmp_path):
    assert (read(tmp_path, colour(0, 0, 0, 0, mode='RGBA')) == 255).all()
    assert (read(tmp_path, colour(0, 0, mode='LA'), channels=1) == 255).all()
    assert abs(int(read(tmp_path, colour(100, 100, 100, 128, mode='RGBA'))[0, 0, 0]) - 177) <= 1
    palette = colour(3, mode='P')
    palette.putpalette([10, 20, 30] * 4)
    assert read(tmp_path, palette)[0, 0].tolist() == [10, 20, 30]
    palette.info['transparency'] = 3
    assert (read(tmp_path, palette) == 255).all()


def test_folder_converts_the_channels(tmp_path):
    assert read(tmp_path, colour(77, mode='L')).tolist() == [[[77] * 3] * 8] * 8
    grey = read(tmp_path, colour(255, 0, 0), channels=1)
    assert (grey.shape, grey[0, 0, 0]) == ((8, 8, 1), 76)
    assert (read(tmp_path, Image.fromarray(np.full((8, 8), 0x80FF, np.uint16))) == 0x80).all()


def test_folder_turns_photographs_upright(tmp_path):
    image = Image.fromarray(random_bytes(8, 8, 3))
    exif = Image.Exif()
    exif[0x0112] = 3
    image.save(tmp_path / 'a.png', exif=exif)
    upright = formats.read_images([tmp_path / 'a.png'], 8, 3)[0]
    np.testing.assert_array_equal(upright, np.asarray(image)[::-1, ::-1])


def test_folder_takes_the_first_frame(tmp_path):
    colour(200, 0, 0).save(tmp_path / 'a.gif', save_all=True, append_images=[colour(0, 0, 200)])
    assert formats.read_images([tmp_path / 'a.gif'], 8, 3)[0, 0, 0].tolist() == [200, 0, 0]


def damaged_png(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize('damage', [damaged_png, lambda path: path.write_bytes(b''), os.unlink])
def test_folder_names_the_unreadable_image(tmp_path, damage):
    save(tmp_path, 'sub/good.png')
    target = tmp_path / 'target'
    Image.fromarray(random_bytes(8, 8, 3)).save(target, 'png')
    (tmp_path / 'sub' / 'bad.png').symlink_to(target)
    damage(target)
    with pytest.raises(UsageError, match=f'{tmp_path}/sub/bad.png cannot be read as an image .*Repair or remove it'):
        sources.folder(str(tmp_path), 8)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'data_dir': None}, 'needs a folder of images: --config.data.dir='),
        ({'data_dir': '/nowhere/at/all'}, '/nowhere/at/all is not a folder.*--config.data.dir='),
        ({'resolution': None}, 'resolution must be a positive whole number.*not None'),
        ({'channels': 4}, r'channels must be 1 \(grey\) or 3 \(RGB\), not 4'),
        ({'test_fraction': 0}, 'test_fraction must lie between 0 and 1, not 0'),
        ({'test_fraction': 1.0}, 'test_fraction must lie between 0 and 1, not 1.0'),
        ({}, 'has no images .*.png.*--config.data.dir='),
    ],
)
def test_folder_explains_wrong_options(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        sources.folder(**({'data_dir': str(tmp_path), 'resolution': 8} | options))


def test_folder_of_one_image(tmp_path):
    save(tmp_path, 'a.png')
    with pytest.raises(UsageError, match=r'has 1 image \(.*at least two'):
        sources.folder(str(tmp_path), 8)


def test_folder_shows_its_progress_when_it_is_large(tmp_path, monkeypatch, capsys):
    for i in range(3):
        save(tmp_path, f'{i}.png')
    sources.folder(str(tmp_path), 8)
    assert capsys.readouterr().err == ''
    monkeypatch.setattr(formats, 'PROGRESS_FROM', 2)
    sources.folder(str(tmp_path), 8)
    assert '3/3' in capsys.readouterr().err
