"""Where images come from: a function a dataset, each of which reads files on this machine and downloads nothing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffusion_jax import registry
from diffusion_jax.data import formats, prepared
from diffusion_jax.data.files import captioned_folder, folder, npz, tfds
from diffusion_jax.data.image_set import ImageSet, Splits
from diffusion_jax.errors import UsageError

DEBIAN_FASHION_MNIST = Path('/usr/share/datasets/fashion-mnist')
FASHION_MNIST_CLASSES = (
    'T-shirt/top',
    'Trouser',
    'Pullover',
    'Dress',
    'Coat',
    'Sandal',
    'Shirt',
    'Sneaker',
    'Bag',
    'Ankle boot',
)
CIFAR10_CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
CIFAR10_BATCHES = ('data_batch_1', 'data_batch_2', 'data_batch_3', 'data_batch_4', 'data_batch_5', 'test_batch')


def digits(resolution: int | None = None) -> Splits:
    """scikit-learn's handwritten digits: 1500 and 297 grey images of 8x8, or of `resolution`; it needs no files.

    Raises:
        UsageError: scikit-learn is not installed, or the resolution is not positive.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError('The dataset digits comes with scikit-learn: `pip install scikit-learn`.') from error
    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    # The digits are ordered by writer. RandomState's stream is frozen, so the split is the same everywhere.
    order = np.random.RandomState(0).permutation(len(images))
    names = tuple('0123456789')
    train, test = (_image_set('digits', images[i], labels[i], names, resolution) for i in (order[:1500], order[1500:]))
    return Splits(train, test)


def fashion_mnist(data_dir: str | None = None, resolution: int | None = None) -> Splits:
    """Fashion-MNIST: 60,000 and 10,000 grey images of 28x28, or of `resolution`, in ten classes.

    Args:
        data_dir: a folder with the four IDX files, gzipped or not, or a data directory of TFDS. By default Debian's
            package dataset-fashion-mnist, and then TFDS's own default.
        resolution: the side that the images are resized to.

    Raises:
        UsageError: the images are in none of these places, or a file is damaged.
    """
    root = Path(data_dir).expanduser() if data_dir else DEBIAN_FASHION_MNIST
    stems = ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte', 't10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte')
    if files := _files(root, {stem: (stem, f'{stem}.gz') for stem in stems}):
        return _splits(
            [
                _idx_set(files[f'{part}-images-idx3-ubyte'], files[f'{part}-labels-idx1-ubyte'], resolution)
                for part in ('train', 't10k')
            ],
            root,
        )
    if splits := _tfds_splits('fashion_mnist', data_dir, resolution):
        return splits
    raise prepared.not_found(
        'fashion_mnist',
        [f'{root} (IDX files)'],
        data_dir,
        '`apt-get install dataset-fashion-mnist` on Debian and Ubuntu; or '
        f'`--config.data.dir=DIR` with the four IDX files in DIR ({", ".join(stems)}, each with .gz or without)',
    )


def cifar10(data_dir: str | None = None, resolution: int | None = None) -> Splits:
    """CIFAR-10: 50,000 and 10,000 colour images of 32x32, or of `resolution`, in ten classes.

    Args:
        data_dir: a folder with the files of the binary or the Python version, or with the folder cifar-10-batches-bin
            or cifar-10-batches-py; or a data directory of TFDS. By default TFDS's own default.
        resolution: the side that the images are resized to.

    Raises:
        UsageError: the images are in none of these places, or a file is damaged.
    """
    root = Path(data_dir).expanduser() if data_dir else None
    places = [root, root / 'cifar-10-batches-bin', root / 'cifar-10-batches-py'] if root else []
    for place in places:
        for suffix, read in (('.bin', formats.read_cifar_binary), ('', formats.read_cifar_python)):
            if files := _files(place, {name: (name + suffix,) for name in CIFAR10_BATCHES}):
                return _cifar_splits(files, read, resolution)
    if splits := _tfds_splits('cifar10', data_dir, resolution):
        return splits
    raise prepared.not_found(
        'cifar10',
        [f'{place} (data_batch_1.bin or data_batch_1, ...)' for place in places],
        data_dir,
        'unpack cifar-10-binary.tar.gz or cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html in a '
        'folder DIR and pass `--config.data.dir=DIR`',
    )


SOURCES: dict[str, Callable[..., Splits]] = {
    'digits': digits,
    'fashion_mnist': fashion_mnist,
    'cifar10': cifar10,
    'folder': folder,
    'captioned_folder': captioned_folder,
    'npz': npz,
    'tfds': tfds,
}


def load(name: str, **options: object) -> Splits:
    """Reads the dataset `name` of `SOURCES`; the options are its function's.

    Raises:
        UsageError: there is no such dataset or option, or its images cannot be read.
    """
    return registry.build('dataset', SOURCES, name, **options)


def _files(place: Path, choices: dict[str, tuple[str, ...]]) -> dict[str, Path] | None:
    """For each key the first of its file names that is in the folder `place`; None if it has none of any key's."""
    found = {}
    for key, names in choices.items():
        if present := [place / name for name in names if (place / name).is_file()]:
            found[key] = present[0]
    missing = [' or '.join(names) for key, names in choices.items() if key not in found]
    if found and missing:
        raise UsageError(
            f'{place} has {next(iter(found.values())).name} but lacks {", ".join(missing)}. '
            'Add what is missing, or name another folder with --config.data.dir=DIR.'
        )
    return found or None


def _image_set(
    place: object, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], resolution: int | None
) -> ImageSet:
    """An `ImageSet` of what was read from `place`, resized."""
    if len(images) != len(labels):
        raise formats.broken(place, f'{len(images)} labels, one an image', len(labels))
    if labels.min() < 0 or labels.max() >= len(classes):
        raise formats.broken(place, f'labels in 0..{len(classes) - 1}', f'{labels.min()}..{labels.max()}')
    return ImageSet(formats.resize(images, resolution), labels.astype(np.int32), classes)


def _splits(sets: list[ImageSet], place: object) -> Splits:
    train, test = sets
    if train.image_shape != test.image_shape:
        raise formats.broken(place, f'test images of the shape {train.image_shape} of training', test.image_shape)
    return Splits(train, test)


def _idx_set(images_path: Path, labels_path: Path, resolution: int | None) -> ImageSet:
    images, labels = formats.read_idx(images_path, 3), formats.read_idx(labels_path, 1)
    place = f'{labels_path} (for {images_path.name})'
    return _image_set(place, images[..., None], labels, FASHION_MNIST_CLASSES, resolution)


def _cifar_splits(files: dict[str, Path], read: Callable, resolution: int | None) -> Splits:
    batches = [_image_set(path, *read(path), CIFAR10_CLASSES, resolution) for path in files.values()]
    images, labels = (np.concatenate([getattr(b, field) for b in batches[:-1]]) for field in ('images', 'labels'))
    return Splits(ImageSet(images, labels, CIFAR10_CLASSES), batches[-1])


def _tfds_splits(name: str, data_dir: str | None, resolution: int | None) -> Splits | None:
    """The dataset as TFDS prepared it in `data_dir` or TFDS's default; None if it did not, or is not installed."""
    try:
        builder = prepared.find(name, data_dir)
    except ImportError:
        return None
    if builder is None:
        return None
    sources = prepared.data_source(builder, name, data_dir)
    classes = tuple(builder.info.features['label'].names)
    return _splits(
        [_tfds_set(builder.data_dir, sources, split, classes, resolution) for split in ('train', 'test')],
        builder.data_dir,
    )


def _tfds_set(place: str, sources: dict, split: str, classes: tuple[str, ...], resolution: int | None) -> ImageSet:
    if split not in sources:
        raise formats.broken(place, f'a split {split!r}', f'{sorted(sources)}')
    # Damaged records raise whatever the decoder of what is left of them raises.
    try:
        rows = [(row['image'], row['label']) for row in sources[split]]
        images, labels = np.stack([image for image, _ in rows]), np.array([label for _, label in rows])
    except Exception as error:
        raise formats.broken(place, f'readable images in {split!r}', f'{type(error).__name__}: {error}') from error
    return _image_set(place, images, labels, classes, resolution)
