"""Images on the disk, in the layouts that the data sources read."""

import io

import numpy as np
import pytest
from PIL import Image

RANDOM = np.random.default_rng(0)


def random_bytes(*shape):
    return RANDOM.integers(0, 256, shape, np.uint8)


def colour(*value, size=(8, 8), mode='RGB'):
    return Image.new(mode, size, value if len(value) > 1 else value[0])


def save(root, name, image=None):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or colour(9, 9, 9)).save(path)
    return path


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
