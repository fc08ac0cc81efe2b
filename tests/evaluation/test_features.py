"""Feature networks: Inception against the PyTorch implementations, weights files good and bad, many devices."""

import pickle
import sys
import zipfile

import jax
import numpy as np
import pytest
from runs import ROOT

from diffusion_jax import UsageError, data
from diffusion_jax.evaluation.features import SHIPPED, in_batches, load_classifier, load_features, load_inception
from diffusion_jax.evaluation.frechet_distance import Moments, distance
from diffusion_jax.evaluation.inception_score import InceptionScore
from diffusion_jax.evaluation.kernel_distance import kernel_distance
from diffusion_jax.evaluation.torch_file import read_torch_file
from diffusion_jax.models import functional
from diffusion_jax.models.inception import Inception
from diffusion_jax.training.sharding import make_mesh

FIXTURES = ROOT / 'tests' / 'fixtures' / 'inception'
sys.path.insert(0, str(FIXTURES))

import weights  # noqa: E402  (of the fixture)

REFERENCE = np.load(FIXTURES / 'reference.npz')
DIGITS = data.load('digits')


def state_dict() -> dict[str, np.ndarray]:
    """What the fixture's script gave to PyTorch, by PyTorch's names."""
    init, _ = functional(lambda rngs: Inception(rngs))
    shapes = jax.eval_shape(init, jax.random.key(0))
    tensors = {'fc.weight': weights.draw('fc.weight', (1008, 2048)), 'fc.bias': weights.draw('fc.bias', (1008,))}
    names = {'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}
    for path, leaf in jax.tree.leaves_with_path(shapes):
        *parents, name = jax.tree_util.keystr(path, simple=True, separator='.').split('.')
        if parents and name == 'kernel':
            height, width, features_in, features_out = leaf.shape
            key = '.'.join([*parents, 'conv', 'weight'])
            tensors[key] = weights.draw(key, (features_out, features_in, height, width))
        elif parents:
            key = '.'.join([*parents, 'bn', names[name]])
            tensors[key] = weights.draw(key, leaf.shape)
    return tensors


@pytest.fixture(scope='module')
def weights_file(tmp_path_factory):
    from safetensors.numpy import save_file

    path = tmp_path_factory.mktemp('inception') / 'inception.safetensors'
    save_file(state_dict(), path)
    return path


@pytest.fixture(scope='module', params=[pytest.param('pytorch_fid', marks=pytest.mark.slow), 'torch_fidelity'])
def read(request, weights_file):
    """(name, what our network reads in the fixture's two sets of images)."""
    network = load_inception(weights_file, like_pytorch_fid=request.param == 'pytorch_fid')
    pictures = weights.images(0, 32, 40, 36), (weights.images(1, 32, 40, 36) // 2).astype(np.uint8)
    return request.param, [network(each) for each in pictures]


def test_inception_reads_what_the_pytorch_implementations_read(read):
    name, ((features, logits), _) = read
    expected = REFERENCE[f'{name}_features']
    np.testing.assert_allclose(features[:4], expected, atol=1e-5 * np.abs(expected).max())
    if name == 'torch_fidelity':
        expected = REFERENCE['logits_features']
        np.testing.assert_allclose(logits[:4], expected, atol=1e-5 * np.abs(expected).max())


def test_fid_kid_and_inception_score_are_theirs(read):
    name, ((first, logits), (second, _)) = read
    moments = Moments(), Moments()
    for moment, rows in zip(moments, (first, second), strict=True):
        for start in range(0, 32, 10):
            moment.update(rows[start : start + 10])
    assert distance(*moments) == pytest.approx(float(REFERENCE[f'{name}_fid']), rel=1e-4)
    if name == 'torch_fidelity':
        assert kernel_distance(first, second, 10, 20) == pytest.approx(REFERENCE['torch_fidelity_kid'], rel=1e-4)
        score = InceptionScore(30, shuffle=False)
        score.update(logits[:30])
        assert score.score() == pytest.approx(REFERENCE['torch_fidelity_isc'], rel=1e-4)


def test_grey_images_are_read_as_rgb(weights_file):
    network = load_inception(weights_file)
    grey = weights.images(2, 2, 30, 30, 1)
    np.testing.assert_array_equal(network(grey)[0], network(np.repeat(grey, 3, axis=-1))[0])


def test_a_pytorch_file_of_any_version_is_read_without_pytorch():
    for name in ('zip.pth', 'legacy.pth', 'parameters.pth'):
        tensors = read_torch_file(FIXTURES / name)
        assert list(tensors) == ['a.weight', 'a.bias', 'b.half', 'c.count', 'd.view']
        np.testing.assert_array_equal(tensors['a.weight'], np.arange(6, dtype=np.float32).reshape(2, 3))
        np.testing.assert_array_equal(tensors['a.bias'], np.float32([7, 8]))
        np.testing.assert_array_equal(tensors['b.half'], np.float16([0.5, -1]))
        assert tensors['c.count'] == 9
        assert tensors['c.count'].dtype == np.int64
        np.testing.assert_array_equal(tensors['d.view'], np.arange(12, dtype=np.float32).reshape(3, 4)[1:, ::2].T)


class Call:
    """What a malicious file is made of."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), 'w'))


def test_a_file_that_would_run_something_is_refused_and_runs_nothing(tmp_path):
    path, made = tmp_path / 'evil.pth', tmp_path / 'made'
    evil = pickle.dumps({'weight': Call(made)})
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('evil/data.pkl', evil)
    for content in (path.read_bytes(), evil):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r'evil.pth cannot be read as a file of PyTorch tensors'):
            read_torch_file(path)
    assert not made.exists()


@pytest.mark.parametrize('keep', [0, 10, 200, 700])
@pytest.mark.parametrize('name', ['zip.pth', 'legacy.pth'])
def test_a_file_cut_short_is_refused(tmp_path, name, keep):
    path = tmp_path / name
    path.write_bytes((FIXTURES / name).read_bytes()[:keep])
    with pytest.raises(UsageError, match='cannot be read'):
        read_torch_file(path)


def test_the_wrong_weights_are_refused_by_name(tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(UsageError, match='there is no weights file'):
        load_inception(tmp_path / 'none.pth')
    with pytest.raises(UsageError, match=r'does not hold Inception-v3.*should be .*pt_inception-2015-12-05'):
        load_inception(FIXTURES / 'zip.pth')
    tensors = state_dict()
    del tensors['Mixed_6b.branch1x1.bn.running_mean']
    tensors['Mixed_5b.branch1x1.conv.weight'] = np.zeros((64, 191, 1, 1), np.float32)
    save_file(tensors, tmp_path / 'part.safetensors')
    with pytest.raises(UsageError, match=r'Mixed_6b\.branch1x1\.mean is missing.*Mixed_5b\.branch1x1\.kernel is'):
        load_inception(tmp_path / 'part.safetensors')
    with pytest.raises(UsageError, match=r"holds no classifier \(but 'diffusion'"):
        load_classifier(SHIPPED / 'fashion_mnist.safetensors', 'classifier')
    with pytest.raises(UsageError, match='no weights file of this library, or is damaged'):
        load_classifier(FIXTURES / 'zip.pth', 'classifier')


def test_the_shipped_classifiers_read_their_data():
    network = load_features('auto', None, DIGITS.train.class_names, DIGITS.train.image_shape)
    assert network.name == 'digits'
    features, logits = network(DIGITS.test.images)
    assert features.shape == (297, network.num_features)
    assert (logits.argmax(axis=1) == DIGITS.test.labels).mean() > 0.985
    fashion = load_features('fashion_mnist', None, (), (28, 28, 1))
    assert len(fashion.class_names) == 10


def test_one_two_and_eight_devices_read_the_same():
    network = load_features('digits', None, (), (8, 8, 1))
    reference, _ = network(DIGITS.test.images, make_mesh(devices=jax.devices()[:1]))
    for count in (2, 8):
        features, _ = network(DIGITS.test.images, make_mesh(devices=jax.devices()[:count]))
        np.testing.assert_allclose(features, reference, atol=1e-5)


def test_images_are_split_over_the_devices():
    seen = []

    def apply(params, x):
        jax.debug.inspect_array_sharding(x, callback=lambda sharding: seen.append(sharding.num_devices))
        jax.debug.inspect_array_sharding(x, callback=lambda sharding: seen.append(sharding.shard_shape(x.shape)[0]))
        return x.mean(axis=(1, 2)), x.mean(axis=(1, 2))

    list(in_batches(apply, {}, DIGITS.test.images[:64], mesh=make_mesh(devices=jax.devices()[:8])))
    assert seen == [8, 8]
