"""Image sets of files: what is read, in memory and streamed, and every damaged or missing file named."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
from image_files import colour, prepare, random_bytes, save
from PIL import Image
from runs import load_config

from diffusion_jax.data import formats
from diffusion_jax.data.files import captioned_folder, folder, npz, tfds
from diffusion_jax.data.streamed import ImageFiles, StreamedSet
from diffusion_jax.errors import UsageError
from diffusion_jax.experiment import load_data

# Folders


def read(root, image, name='a.png', channels=3, resolution=8):
    """What `folder` makes of one image."""
    save(root, name, image)
    return StreamedSet(ImageFiles(str(root), [name]), resolution, channels).read(0)


def test_folder_of_all_formats(tmp_path):
    names = [f'{i}{suffix}' for i, suffix in enumerate(['.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.PNG'])]
    for i, name in enumerate(names):
        save(tmp_path, f'deep/{i % 2}/{name}' if i else name, colour(200, 40 * (i > 2), 30))
    (tmp_path / 'notes.txt').write_text('no image')
    (tmp_path / 'folder.png').mkdir()
    train, test = folder(str(tmp_path), resolution=4, test_fraction=0.4)
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
    for images in folder(str(tmp_path), 8, test_fraction=0.3):
        assert images.class_names == ('ant', 'cat', 'dog')
        assert set(images.labels.tolist()) == {0, 1, 2}
        np.testing.assert_array_equal(images.images[:, 0, 0, 0], images.labels)


def test_folder_leaves_out_what_is_hidden(tmp_path):
    for name in ('a/1.png', 'b/1.png', '.trash/1.png'):
        save(tmp_path, name)
    (tmp_path / 'a' / '._1.png').write_bytes(b'left by another system')
    train, test = folder(str(tmp_path), 8)
    assert (len(train), len(test), train.class_names) == (1, 1, ('a', 'b'))


def shades(images):
    return images.images[:, 0, 0, 0].tolist()


def test_folder_split_is_stable(tmp_path):
    expected = [2, 3, 4, 22, 25, 29, 38, 40, 41, 42, 48, 51, 52, 54, 58, 62, 64, 71, 72, 73, 75, 82, 87, 95, 96, 99]
    for i in range(100):
        save(tmp_path / 'x', f'{i:03}.png', colour(i, i, i))
    first = folder(str(tmp_path / 'x'), 8, test_fraction=0.2)
    # The split of every machine and of every place of the folder, in the order of the names.
    assert shades(first.test) == expected
    assert shades(first.train) == [i for i in range(100) if i not in expected]
    for i in range(100, 200):
        save(tmp_path / 'x', f'{i:03}.png', colour(i, i, i))
    (tmp_path / 'x').rename(tmp_path / 'y')
    grown = folder(str(tmp_path / 'y'), 8, test_fraction=0.2)
    assert [i for i in shades(grown.test) if i < 100] == expected
    assert 20 < len(grown.test) < 60


@pytest.mark.parametrize('fraction', [1e-9, 1 - 1e-9])
def test_folder_gives_each_split_an_image(tmp_path, fraction):
    for i in range(3):
        save(tmp_path, f'{i}.png')
    train, test = folder(str(tmp_path), 8, test_fraction=fraction)
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
    upright = StreamedSet(ImageFiles(str(tmp_path), ['a.png']), 8).read(0)
    np.testing.assert_array_equal(upright, np.asarray(image)[::-1, ::-1])


def test_folder_takes_the_first_frame(tmp_path):
    colour(200, 0, 0).save(tmp_path / 'a.gif', save_all=True, append_images=[colour(0, 0, 200)])
    assert StreamedSet(ImageFiles(str(tmp_path), ['a.gif']), 8).read(0)[0, 0].tolist() == [200, 0, 0]


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
        folder(str(tmp_path), 8)


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
        folder(**({'data_dir': str(tmp_path), 'resolution': 8} | options))


def test_folder_of_one_image(tmp_path):
    save(tmp_path, 'a.png')
    with pytest.raises(UsageError, match=r'has 1 image \(.*at least two'):
        folder(str(tmp_path), 8)


def test_folder_shows_its_progress_when_it_is_large(tmp_path, monkeypatch, capsys):
    for i in range(3):
        save(tmp_path, f'{i}.png')
    folder(str(tmp_path), 8)
    assert capsys.readouterr().err == ''
    monkeypatch.setattr(formats, 'PROGRESS_FROM', 1)
    folder(str(tmp_path), 8)
    assert '2/2' in capsys.readouterr().err


# Captions


def write_captions(root, *rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (root / 'metadata.jsonl').write_bytes(b'\n'.join(lines))


def test_captions_stay_with_their_images(tmp_path):
    texts = {f'{i}.png': f'shade {i}, \u2028 in "two" lines\n\u732b \U0001f63a' for i in range(20)}
    for i in range(20):
        save(tmp_path / 'deep', f'{i}.png', colour(i, i, i))
    rows = [{'file_name': f'deep/{name}', 'text': text, 'width': 8} for name, text in texts.items()]
    write_captions(tmp_path, *rows, b'', {'file_name': 'deep/7.png', 'text': 'shade 7, again'})
    for streaming in (False, True):
        splits = captioned_folder(str(tmp_path), 8, test_fraction=0.3, streaming=streaming)
        assert sum(map(len, splits)) == 21
        assert min(map(len, splits)) > 1
        with_seven = [part for part in splits if any('shade 7,' in text for text in part.captions)]
        assert len(with_seven) == 1  # an image is not trained on by one caption and tested by another
        for part in splits:
            for image, text in zip(part.in_memory().images, part.captions, strict=True):
                shade = int(image[0, 0, 0])
                assert text in (texts[f'{shade}.png'], f'shade {shade}, again')


@pytest.mark.parametrize(
    ('row', 'message'),
    [
        (b'{"file_name": "a.png", "te', 'line 3: expected .*found JSONDecodeError'),
        (b'\xff\xfe', 'line 3: expected .*found UnicodeDecodeError'),
        (b'[1, 2]', 'line 3: expected .*found TypeError'),
        ({'file_name': 'a.png'}, 'line 3: expected .*found KeyError..text'),
        ({'file_name': 'a.png', 'text': 7}, "line 3: expected two strings, found 'a.png', 7"),
        ({'file_name': 'c.png', 'text': ''}, "line 3: expected a file below .*, found 'c.png'"),
        ({'file_name': '../a.png', 'text': ''}, "line 3: expected a file below .*, found '../a.png'"),
        ({'file_name': '/etc/passwd', 'text': ''}, "line 3: expected a file below .*, found '/etc/passwd'"),
        ({'file_name': 'a\0', 'text': ''}, 'line 3: expected a file below'),
    ],
)
def test_damaged_captions_are_named_by_line(tmp_path, row, message):
    (tmp_path / 'in').mkdir()
    save(tmp_path, 'a.png')
    for name in ('a.png', 'b.png'):
        save(tmp_path / 'in', name)
    write_captions(tmp_path / 'in', {'file_name': 'a.png', 'text': 'x'}, {'file_name': 'b.png', 'text': 'y'}, row)
    with pytest.raises(UsageError, match=message):
        captioned_folder(str(tmp_path / 'in'), 8)


def test_captions_that_are_missing_or_too_few(tmp_path):
    save(tmp_path, 'a.png')
    with pytest.raises(UsageError, match=r'metadata.jsonl is missing.*--config.data.name=folder'):
        captioned_folder(str(tmp_path), 8)
    write_captions(tmp_path, *[{'file_name': 'a.png', 'text': 'x'}] * 3)
    with pytest.raises(UsageError, match='names 1 images; at least two'):
        captioned_folder(str(tmp_path), 8)


# Arrays


def arrays(n=12, **changes):
    images = random_bytes(n, 8, 8, 3)
    images[:, 0, 0, 0] = np.arange(n)
    labels = (np.arange(n) % 3).astype(np.int64)
    return {'images': images, 'labels': labels, 'captions': np.array([f'image {i}' for i in range(n)])} | changes


@pytest.mark.parametrize('write', [np.savez, np.savez_compressed])
def test_npz_holds_images_labels_and_captions(tmp_path, write):
    held = arrays()
    write(tmp_path / 'a.npz', **held)
    splits = npz(str(tmp_path / 'a.npz'), test_fraction=0.3)
    seen = []
    for part in splits:
        for image, label, caption in zip(part.images, part.labels, part.captions, strict=True):
            i = int(image[0, 0, 0])
            seen.append(i)
            np.testing.assert_array_equal(image, held['images'][i])
            assert (int(label), caption) == (i % 3, f'image {i}')
        assert part.class_names == ('0', '1', '2')
    assert sorted(seen) == list(range(12))


def test_npz_is_mapped_where_it_is_streamed(tmp_path):
    np.savez(tmp_path / 'a.npz', **arrays(40))
    streamed = npz(str(tmp_path / 'a.npz'), streaming=True)
    loaded = npz(str(tmp_path / 'a.npz'))
    for ours, theirs in zip(streamed, loaded, strict=True):
        np.testing.assert_array_equal(ours.in_memory().images, theirs.images)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
    copy = pickle.loads(pickle.dumps(streamed.train))
    np.testing.assert_array_equal(copy.read(3), loaded.train.images[3])
    assert len(pickle.dumps(streamed.train)) < 8000  # no pixels travel to worker processes
    fortran = {'images': np.asfortranarray(arrays()['images'])}
    np.savez(tmp_path / 'f.npz', **fortran)
    with pytest.raises(UsageError, match='Fortran order'):
        npz(str(tmp_path / 'f.npz'), streaming=True)


def test_npz_of_two_files_and_its_own_names(tmp_path):
    names = np.array(['cat', 'dog', 'ant'])
    np.savez(tmp_path / 'train.npz', **arrays(9, class_names=names))
    np.savez(tmp_path / 'test.npz', **arrays(3, class_names=names))
    train, test = npz(str(tmp_path), resolution=4)
    assert (len(train), len(test), train.class_names) == (9, 3, ('cat', 'dog', 'ant'))
    assert train.image_shape == (4, 4, 3)
    np.savez(tmp_path / 'test.npz', **arrays(3, class_names=names[::-1], images=random_bytes(3, 6, 6, 3)))
    with pytest.raises(UsageError, match=r'test.npz: expected images \(8, 8, 3\) of 3 classes.*found \(6, 6, 3\)'):
        npz(str(tmp_path))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'images': np.zeros((4, 8, 8, 3), np.float32)}, r"'images' of uint8 .*found float32 \[4, 8, 8, 3\]"),
        ({'images': np.zeros((12, 8, 8), np.uint8)}, r'found uint8 \[12, 8, 8\]'),
        ({'images': np.zeros((12, 8, 8, 4), np.uint8)}, r'found uint8 \[12, 8, 8, 4\]'),
        ({'images': np.array([{}] * 12)}, 'found ValueError.*allow_pickle|found object'),
        ({'captions': np.array([{}] * 12)}, 'none of them pickled, found ValueError.*allow_pickle'),
        ({'images': random_bytes(12, 8, 6, 3)}, '8x6, and models take squares: set data.resolution'),
        ({'labels': np.arange(12) - 1}, "'labels': a list of integers from 0"),
        ({'labels': np.ones(12)}, "'labels': a list of integers from 0, found float64"),
        ({'labels': np.arange(11)}, '12 images need as many labels, not 11'),
        ({'captions': np.array(['x'])}, '12 images need as many captions, not 1'),
        ({'captions': np.arange(12)}, "'captions': a list of strings, found int64"),
        ({'class_names': np.array(['x', 'y'])}, r"'labels' in 0..1, by its class_names, found 2"),
    ],
)
@pytest.mark.parametrize('streaming', [False, True])
def test_npz_of_anything_else_is_refused(tmp_path, changes, message, streaming):
    np.savez(tmp_path / 'a.npz', **arrays(**changes))
    with pytest.raises(UsageError, match=message):
        npz(str(tmp_path / 'a.npz'), streaming=streaming)


def test_npz_files_that_are_damaged_or_missing(tmp_path):
    with pytest.raises(UsageError, match=r'train.npz is missing'):
        npz(str(tmp_path))
    path = tmp_path / 'a.npz'
    np.savez(path, labels=np.zeros(3, int))
    with pytest.raises(UsageError, match="an array 'images', found labels"):
        npz(str(path))
    np.savez(path, **arrays())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        UsageError, match=r'a.npz: expected arrays in a .npz file, none of them pickled, found BadZipFile'
    ):
        npz(str(path))
    np.savez_compressed(path, **arrays())
    with pytest.raises(UsageError, match=r'is compressed, and cannot be streamed. Write it with np.savez'):
        npz(str(path), streaming=True)


# Sets that TFDS prepared


@pytest.fixture(scope='module')
def flowers(tmp_path_factory):
    """(folder, images by split): each image's first pixel is its label, and the sizes are not 8x8."""
    root = tmp_path_factory.mktemp('tfds')
    images = random_bytes(30, 12, 8, 3)
    images[:, 2, 0] = (np.arange(30) % 3)[:, None]  # the central square's corner
    images[:, 3:5, :3] = images[:, 2:3, :1]
    split = {'train': (images[:20], np.arange(20) % 3), 'validation': (images[20:], np.arange(20, 30) % 3)}
    prepare(root, 'Flowers', split, ['x', 'y', 'z'])
    return root, split


@pytest.mark.parametrize('streaming', [False, True])
def test_tfds_reads_any_set_of_images(flowers, streaming):
    root, expected = flowers
    splits = tfds('flowers', 8, data_dir=str(root), streaming=streaming)
    for part, (pixels, labels) in zip(splits, expected.values(), strict=True):
        assert isinstance(part, StreamedSet) == streaming
        images = part.in_memory()
        assert sorted(image.tobytes() for image in images.images) == sorted(image[2:10].tobytes() for image in pixels)
        np.testing.assert_array_equal(images.images[:, 0, 0, 0], images.labels)
        assert sorted(images.labels) == sorted(labels)
        assert part.class_names == ('x', 'y', 'z')


def test_tfds_without_a_split_to_test_on_holds_some_out(tmp_path):
    images = random_bytes(10, 8, 8, 1)
    images[:, 0, 0, 0] = np.arange(10) % 2
    prepare(tmp_path, 'Grey', {'train': (images, np.arange(10) % 2)}, ['x', 'y'])
    train, test = tfds('grey', 8, data_dir=str(tmp_path), test_fraction=0.3)
    assert len(train) + len(test) == 10
    assert train.image_shape == (8, 8, 1)
    for part in (train, test):
        loaded = pickle.loads(pickle.dumps(part)).in_memory()
        np.testing.assert_array_equal(loaded.images[:, 0, 0, 0], loaded.labels)
    assert sorted(i.tobytes() for part in (train, test) for i in part.in_memory().images) == sorted(
        image.tobytes() for image in images
    )


def test_tfds_sets_that_cannot_be_read(tmp_path, flowers):
    with pytest.raises(
        UsageError, match=rf'flowres was not found.*{tmp_path} .*--config.data.tfds_name=NAME.*tfds build'
    ):
        tfds('flowres', 8, data_dir=str(tmp_path))
    copy = shutil.copytree(flowers[0], tmp_path / 'copy')
    for path in copy.rglob('*-train.array_record*'):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"record \d+ of 'train' in .*Prepare the data set again"):
        tfds('flowers', 8, data_dir=str(copy), streaming=False)


# What all of them share


def test_only_streamed_images_are_cropped_at_random(tmp_path):
    for i in range(4):
        save(tmp_path, f'{i}.png')
    with pytest.raises(UsageError, match=r"crop='random' needs images that are read anew.*data.placement=stream"):
        folder(str(tmp_path), 8, crop='random')
    train, test = folder(str(tmp_path), 8, crop='random', streaming=True)
    assert (train.crop, test.crop) == ('random', 'center')


def config_of(name, folder, **changes):
    settings = {'data__name': name, 'data__dir': str(folder), 'data__resolution': 8}
    return load_config(**settings | changes)


def test_the_placement_says_whether_images_are_streamed(tmp_path, flowers):
    for i in range(4):
        save(tmp_path, f'{i}.png')
    for placement, streamed in (('auto', False), ('device', False), ('host', False), ('stream', True)):
        train = load_data(config_of('folder', tmp_path, data__placement=placement)).train
        assert isinstance(train, StreamedSet) == streamed
    for placement, streamed in (('auto', True), ('device', False), ('stream', True)):
        config = config_of('tfds', flowers[0], data__placement=placement, data__tfds_name='flowers')
        assert isinstance(load_data(config).train, StreamedSet) == streamed
    cropped = config_of('folder', tmp_path, data__placement='stream', data__crop='random', data__crop_min_scale=0.3)
    assert (load_data(cropped).train.crop, load_data(cropped).train.crop_min_scale) == ('random', 0.3)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'data__placement': 'stream'},
            "'digits' is read into memory as a whole: .*folder, captioned_folder, npz, tfds",
        ),
        ({'data__crop': 'random'}, "option of dataset 'digits': 'crop'"),
        ({'data__tfds_name': 'flowers'}, "option of dataset 'digits': 'tfds_name'"),
        ({'data__name': 'digit', 'data__placement': 'stream'}, "Did you mean 'digits'"),
    ],
)
def test_options_that_a_set_has_not_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        load_data(load_config(**{'data__name': 'digits'} | changes))
