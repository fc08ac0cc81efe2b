"""Image sets of the user's own files: each can be read into memory as a whole, or streamed from the disk."""

import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np

from diffusion_jax.data import formats, prepared
from diffusion_jax.data.image_set import Splits
from diffusion_jax.data.streamed import ArrayImages, ImageFiles, NpzImages, StreamedSet, TfdsImages, TfdsLabels
from diffusion_jax.errors import UsageError

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif')


def folder(
    data_dir: str,
    resolution: int,
    channels: int = 3,
    test_fraction: float = 0.1,
    streaming: bool = False,
    crop: str = 'center',
    crop_min_scale: float = 0.8,
) -> Splits:
    """All images under a folder, cropped to their central square and resized, transparency over white.

    The first level of sub-folders are the classes if each image lies in one; otherwise there are no labels. Hidden
    files and folders are left out and links to folders are not followed. An image's split depends on its relative path
    alone, so that it stays where it is when others are added (but for the one image that an empty split is given).

    Args:
        data_dir: the folder; png, jpg, jpeg, webp, bmp and gif (first frame) count as images.
        resolution: the side of the images.
        channels: 3 for RGB, 1 for grey.
        test_fraction: the share of test images, between 0 and 1; each split gets at least one.
        streaming: read images when they are needed, instead of all of them now.
        crop, crop_min_scale: of training images that are streamed: see `StreamedSet`.

    Raises:
        UsageError: an option is out of range, the folder is missing or has under two images, or an image is unreadable.
    """
    root = _checked_folder('folder', data_dir, resolution, channels, test_fraction)
    paths = [path for path in root.rglob('*') if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()]
    names = sorted(path.relative_to(root).as_posix() for path in paths)
    names = [name for name in names if not any(part.startswith('.') for part in name.split('/'))]
    if len(names) < 2:
        raise UsageError(
            f'{root} has {len(names) or "no"} image{"s" * (not names)} ({", ".join(IMAGE_SUFFIXES)}); at least two are '
            'needed, one to train on and one to test on. Name another folder with --config.data.dir=DIR.'
        )
    classes, labels = (), None
    if all('/' in name for name in names):
        classes, labels = np.unique([name.split('/')[0] for name in names], return_inverse=True)
        classes, labels = tuple(map(str, classes)), labels.astype(np.int32)
    whole = StreamedSet(ImageFiles(str(root), names), resolution, channels, labels, classes, None, crop, crop_min_scale)
    return _placed(_split(whole, names, test_fraction), streaming)


def captioned_folder(
    data_dir: str,
    resolution: int,
    channels: int = 3,
    test_fraction: float = 0.1,
    streaming: bool = False,
    crop: str = 'center',
    crop_min_scale: float = 0.8,
) -> Splits:
    """Images with a text each: a folder with `metadata.jsonl`, a line {"file_name": .., "text": ..} for each of them.

    An image of several lines counts once for each. The split is that of `folder`, by file name. Arguments as there.

    Raises:
        UsageError: as `folder`; or a line is damaged or names a file that is not there.
    """
    root = _checked_folder('captioned_folder', data_dir, resolution, channels, test_fraction)
    metadata = root / 'metadata.jsonl'
    if not metadata.is_file():
        raise UsageError(
            f'{metadata} is missing: a line {{"file_name": .., "text": ..}} for each image. Images without texts are '
            '--config.data.name=folder.'
        )
    names, captions = [], []
    with metadata.open('rb') as lines:  # not splitlines(), which also ends lines at characters that texts have
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f'{metadata}, line {number}'
            try:
                row = json.loads(line.decode('utf-8-sig'))
                name, text = row['file_name'], row['text']
            except (ValueError, KeyError, TypeError) as error:
                raise formats.broken(place, '{"file_name": .., "text": ..}', repr(error)) from error
            if not isinstance(name, str) or not isinstance(text, str):
                raise formats.broken(place, 'two strings', f'{name!r}, {text!r}')
            if Path(name).is_absolute() or '..' in Path(name).parts or '\0' in name or not (root / name).is_file():
                raise formats.broken(place, f'a file below {root}', repr(name))
            names.append(name)
            captions.append(text)
    if len(set(names)) < 2:
        raise UsageError(f'{metadata} names {len(set(names))} images; at least two are needed, one of them to test on.')
    whole = StreamedSet(
        ImageFiles(str(root), names), resolution, channels, None, (), tuple(captions), crop, crop_min_scale
    )
    return _placed(_split(whole, names, test_fraction), streaming)


def npz(
    data_dir: str,
    resolution: int | None = None,
    test_fraction: float = 0.1,
    streaming: bool = False,
    crop: str = 'center',
    crop_min_scale: float = 0.8,
) -> Splits:
    """Arrays in a file of NumPy's: `images` uint8 [N, H, W, C], and perhaps `labels`, `class_names` and `captions`.

    Args:
        data_dir: the .npz file, or a folder with train.npz and test.npz (without the latter, some are held out).
        resolution: the side that the images are cropped (to their central square) and resized to; by default their own.
        test_fraction: the share held out, where there is no test.npz.
        streaming: map the images into memory, instead of reading them now. The file must not be compressed.
        crop, crop_min_scale: as in `folder`.

    Raises:
        UsageError: a file is missing, damaged or holds anything else; pickled arrays are refused.
    """
    if not data_dir:
        raise UsageError('The dataset npz needs a file: --config.data.dir=FILE.npz, or a folder with train.npz.')
    root = Path(data_dir).expanduser()
    paths = [root / name for name in ('train.npz', 'test.npz')] if root.is_dir() else [root]
    if not paths[0].is_file():
        raise UsageError(f'{paths[0]} is missing. Name a .npz file, or a folder with train.npz: --config.data.dir=.')
    sets = [_npz_set(path, resolution, streaming, crop, crop_min_scale) for path in paths if path.is_file()]
    if len(sets) == 1:
        return _placed(_split(sets[0], [str(row) for row in range(len(sets[0]))], test_fraction), streaming)
    train, test = sets
    if (train.image_shape, train.class_names) != (test.image_shape, test.class_names):
        raise formats.broken(
            paths[1],
            f'images {train.image_shape} of {train.num_classes} classes, as in train.npz',
            f'{test.image_shape} of {test.num_classes}',
        )
    return _placed(Splits(train, test.take(np.arange(len(test)), crop='center')), streaming)


def tfds(
    tfds_name: str,
    resolution: int,
    data_dir: str | None = None,
    test_fraction: float = 0.1,
    streaming: bool = True,
    crop: str = 'center',
    crop_min_scale: float = 0.8,
) -> Splits:
    """Any image data set that TFDS prepared in ArrayRecord, read record by record, without TensorFlow.

    Its image, and its label if it has one, are found from its description. Without a split 'test' or 'validation', some
    training images are held out.

    Args:
        tfds_name: such as 'oxford_flowers102' or 'imagenet2012:5.*.*'.
        resolution: the side of the images.
        data_dir: TFDS's data directory; its own default otherwise.
        test_fraction: the share held out, where there is no split to test on.
        streaming: read images when they are needed, instead of all of them now.
        crop, crop_min_scale: as in `folder`.

    Raises:
        UsageError: it is not prepared, or not in that format, or has no images, or TFDS is not installed.
    """
    try:
        builder = prepared.find(tfds_name, data_dir)
        from tensorflow_datasets import features as kinds
    except ImportError as error:
        raise UsageError(f'The dataset tfds needs `pip install tensorflow-datasets` ({error}).') from error
    if builder is None:
        raise prepared.not_found(tfds_name, [], data_dir, 'name another with --config.data.tfds_name=NAME')
    found = {
        kind: next((name for name, feature in builder.info.features.items() if isinstance(feature, kind)), None)
        for kind in (kinds.Image, kinds.ClassLabel)
    }
    image, label = found.values()
    if image is None:
        raise UsageError(f'{builder.data_dir} has no images; its features are {", ".join(builder.info.features)}.')
    sources = prepared.data_source(builder, tfds_name, data_dir)
    if 'train' not in sources:
        raise formats.broken(builder.data_dir, "a split 'train'", ', '.join(sorted(sources)))
    channels = 1 if builder.info.features[image].shape[-1] == 1 else 3
    classes = tuple(builder.info.features[label].names) if label else ()

    def whole(split: str, crop: str) -> StreamedSet:
        place = (str(builder.data_dir), split)
        labels = TfdsLabels(*place, label, len(sources[split])) if label else None
        images = TfdsImages(*place, image, len(sources[split]))
        return StreamedSet(images, resolution, channels, labels, classes, None, crop, crop_min_scale)

    train, test = whole('train', crop), next((name for name in ('test', 'validation') if name in sources), None)
    if test is None:
        return _placed(_split(train, [str(row) for row in range(len(train))], test_fraction), streaming)
    return _placed(Splits(train, whole(test, 'center')), streaming)


def _checked_folder(dataset: str, data_dir: str, resolution: int, channels: int, test_fraction: float) -> Path:
    """The folder; what is wrong with the other options is said before millions of files are listed."""
    if not data_dir:
        raise UsageError(f'The dataset {dataset} needs a folder of images: --config.data.dir=DIR.')
    formats.check_resolution(resolution)
    formats.check_channels(channels)
    _check_fraction(test_fraction)
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise UsageError(f'{root} is not a folder. Name a folder of images with --config.data.dir=DIR.')
    return root


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UsageError(f'test_fraction must lie between 0 and 1, not {fraction!r}.')


def _split(whole: StreamedSet, names: list[str], fraction: float) -> Splits:
    """A set in two, each image's part by a hash of its name; at least one is in each."""
    _check_fraction(fraction)
    if len(whole) < 2:
        raise UsageError('at least two images are needed, one of them to test on.')
    draws = np.array([int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:6], 'big') for name in names])
    in_test = draws < fraction * 2**48
    in_test[draws == draws.min()] = True
    in_test[draws == draws.max()] = False
    return Splits(whole.take(np.flatnonzero(~in_test)), whole.take(np.flatnonzero(in_test), crop='center'))


def _placed(splits: Splits, streaming: bool) -> Splits:
    """The splits as they are, to be streamed, or all of their images in memory."""
    if streaming:
        return splits
    if splits.train.crop != 'center':
        raise UsageError(
            f'crop={splits.train.crop!r} needs images that are read anew each time: --config.data.placement=stream.'
        )
    return Splits(*(part.load() for part in splits))


def _npz_set(path: Path, resolution: int | None, streaming: bool, crop: str, crop_min_scale: float) -> StreamedSet:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if 'images' not in arrays:
                raise formats.broken(path, "an array 'images'", ', '.join(arrays.files) or 'none')
            held = {name: arrays[name] for name in ('labels', 'class_names', 'captions') if name in arrays}
            images = _mapped(path) if streaming else arrays['images']
    except UsageError:
        raise
    except Exception as error:  # zip, zlib and NumPy each have their own
        raise formats.broken(
            path, 'arrays in a .npz file, none of them pickled', f'{type(error).__name__}: {error}'
        ) from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        found = f'{images.dtype} {list(images.shape)}'
        raise formats.broken(path, "'images' of uint8 [N, H, W, C], C = 1 or 3", found)
    if streaming and not images.flags.c_contiguous:
        raise formats.broken(path, 'images one after another, to stream them', 'an array in Fortran order')
    height, width, channels = images.shape[1:]
    if resolution is None and height != width:
        raise UsageError(f'{path} has images of {height}x{width}, and models take squares: set data.resolution.')
    for name, array in held.items():
        integers = np.issubdtype(array.dtype, np.integer) and (array >= 0).all()
        if array.ndim != 1 or not (integers if name == 'labels' else array.dtype.kind == 'U'):
            expected = 'integers from 0' if name == 'labels' else 'strings'
            raise formats.broken(path, f'{name!r}: a list of {expected}', f'{array.dtype} {list(array.shape)}')
    labels, classes = held.get('labels'), ()
    if labels is not None:
        num_classes = int(labels.max(initial=0)) + 1
        classes = tuple(map(str, held.get('class_names', range(num_classes))))
        if len(classes) < num_classes:
            raise formats.broken(path, f"'labels' in 0..{len(classes) - 1}, by its class_names", num_classes - 1)
        labels = labels.astype(np.int32)
    captions = tuple(map(str, held['captions'])) if 'captions' in held else None
    stored = NpzImages(str(path), images.shape, images.offset) if streaming else ArrayImages(str(path), images)
    return StreamedSet(stored, resolution or height, channels, labels, classes, captions, crop, crop_min_scale)


def _mapped(path: Path) -> np.memmap:
    """The array 'images' of a .npz file, where it lies in the file."""
    with zipfile.ZipFile(path) as file, path.open('rb') as raw:
        member = file.getinfo('images.npy')
        if member.compress_type != zipfile.ZIP_STORED:
            raise UsageError(
                f'{path} is compressed, and cannot be streamed. Write it with np.savez, or leave out '
                '--config.data.placement=stream.'
            )
        raw.seek(member.header_offset + 26)
        lengths = np.frombuffer(raw.read(4), '<u2')  # of the name and of the extra field, which stand before the data
        raw.seek(int(lengths.sum()), os.SEEK_CUR)
        version = np.lib.format.read_magic(raw)
        read_header = getattr(np.lib.format, f'read_array_header_{version[0]}_{version[1]}')
        shape, fortran, dtype = read_header(raw)
        return np.memmap(raw, dtype, 'r', raw.tell(), shape, 'F' if fortran else 'C')
