"""Evaluators on samples whose score is known: real images, copies, wrong labels, noise."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import UsageError, data, oracles, schedules
from diffusion_jax.data import ImageSet, Splits
from diffusion_jax.evaluation import EVALUATORS, Setting, score
from diffusion_jax.pipelines import ImagePipeline, Samples

SPLITS = data.load('digits')
NAMES = SPLITS.train.class_names
REAL = Samples(SPLITS.test.images, SPLITS.test.labels)


def scores(samples: Samples, *evaluators: str, splits: Splits = SPLITS, **given):
    setting = Setting(splits, NAMES, len(samples.images), **given)
    return score(samples, setting, evaluators).scores


def test_real_images_agree_with_their_labels_and_not_with_others():
    right = scores(REAL, 'class_agreement')
    assert right['class_agreement'] > 0.98
    assert right['class_agreement'] == right['classifier_accuracy_on_real_test_images']
    setting = Setting(SPLITS, NAMES, len(REAL.images))
    wrong = score(Samples(REAL.images, (REAL.labels + 1) % 10), setting, ['class_agreement'])
    assert wrong.scores['class_agreement'] < 0.02
    assert wrong.pictures['misread'].ndim == 3


def test_agreement_is_told_per_class():
    labels = np.where(REAL.labels == 4, 5, REAL.labels)
    each = scores(Samples(REAL.images, labels), 'class_agreement')['class_agreement_per_class']
    assert '4' not in each
    assert 0.3 < each['5'] < 0.7
    assert each['0'] > 0.95


def test_unseen_real_images_are_no_copies_and_training_images_are():
    unseen = scores(REAL, 'nearest_neighbour')
    assert unseen['near_copies'] <= 0.011
    assert unseen['exact_copies'] == 0
    assert unseen['median_distance_to_training_set'] == unseen['median_distance_of_real_test_images']
    copies = scores(Samples(SPLITS.train.images[:100], None), 'nearest_neighbour')
    assert copies['near_copies'] == 1
    assert copies['exact_copies'] == 100
    rng = np.random.default_rng(0)
    almost = np.clip(SPLITS.train.images[:100] + rng.integers(-9, 10, (100, 8, 8, 1)), 0, 255).astype(np.uint8)
    near = scores(Samples(almost, None), 'nearest_neighbour')
    assert near['near_copies'] > 0.9
    assert near['exact_copies'] == 0


def test_the_nearest_pairs_are_the_nearest_of_all_batches():
    images = np.concatenate([REAL.images[:100], SPLITS.train.images[7:8], REAL.images[100:150]])
    whole = score(Samples(images, None), Setting(SPLITS, NAMES, 151), ['nearest_neighbour'])
    parts = (Samples(images[start : start + 40], None) for start in range(0, 151, 40))
    apart = score(parts, Setting(SPLITS, NAMES, 151), ['nearest_neighbour'])
    assert apart.scores == whole.scores
    np.testing.assert_array_equal(apart.pictures['nearest'], whole.pictures['nearest'])
    assert whole.scores['exact_copies'] == 1


ALL = [name for name in EVALUATORS if name != 'bits_per_dim']  # which looks at the model


def test_noise_scores_terribly_everywhere():
    noise = Samples(np.random.default_rng(0).integers(0, 256, (297, 8, 8, 1)).astype(np.uint8), REAL.labels)
    good, bad = scores(REAL, *ALL), scores(noise, *ALL)
    assert bad['frechet_distance'] > 20 * good['frechet_distance']
    assert bad['kernel_distance'] > 20 * abs(good['kernel_distance'])
    assert bad['precision'] < 0.3 < 0.8 < good['precision']
    assert bad['coverage'] < 0.2 < 0.8 < good['recall']
    assert bad['density'] < 0.3 < 0.8 < good['density']
    assert bad['class_agreement'] < 0.3
    assert bad['inception_score'] < good['inception_score']
    assert bad['median_distance_to_training_set'] > 2 * bad['median_distance_of_real_test_images']


def test_real_images_score_as_the_real_images_beside_them():
    """The samples are the other split itself: what they score is what is told of real images."""
    told = scores(REAL, 'frechet_distance', 'kernel_distance', 'precision_recall')
    for name in ('frechet_distance', 'kernel_distance', 'precision', 'recall', 'density', 'coverage'):
        assert told[name] == pytest.approx(told[f'{name}_of_real_images'], rel=1e-4)


def halves():
    order = np.random.default_rng(0).permutation(len(SPLITS.train))
    first, second = (SPLITS.train.load(rows) for rows in (order[:750], order[750:]))
    return Splits(first, SPLITS.test), Samples(second.images, second.labels)


def blurred(images: np.ndarray, width: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return np.rint(gaussian_filter(images.astype(float), (0, width, width, 0))).astype(np.uint8)


def noisy(images: np.ndarray, level: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, level, images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


@pytest.mark.parametrize('name', ['frechet_distance', 'kernel_distance'])
def test_distances_are_near_0_between_halves_and_rise_with_blur_and_noise(name):
    splits, half = halves()
    same = scores(half, name, splits=splits)[name]
    for damaged, amounts in ((blurred, (0.6, 0.8, 1.1, 1.5)), (noisy, (40, 80, 120, 160))):
        rising = [scores(half._replace(images=damaged(half.images, x)), name, splits=splits)[name] for x in amounts]
        assert rising == sorted(rising)
        assert rising[0] > same
        assert abs(same) < 0.02 * rising[-1]


def test_the_same_samples_get_the_same_digits_however_they_come():
    images, labels = REAL
    whole = scores(REAL, *ALL)
    assert scores(REAL, *ALL) == whole
    setting = Setting(SPLITS, NAMES, 297)
    parts = (Samples(images[i : i + 64], labels[i : i + 64]) for i in range(0, 297, 64))
    for name, value in score(parts, setting, ALL).scores.items():
        assert value == pytest.approx(whole[name], rel=1e-5), name


def test_real_features_are_kept_and_read_again(tmp_path):
    first = scores(REAL, *ALL, cache=tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    assert scores(REAL, *ALL, cache=tmp_path) == first
    for damage in (b'cut short', files[0].read_bytes()[:1000]):
        files[0].write_bytes(damage)
        assert scores(REAL, *ALL, cache=tmp_path) == first
    other = Splits(SPLITS.train.load(np.arange(700)), SPLITS.test)
    scores(REAL, 'frechet_distance', splits=other, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3  # other images, another file
    relabelled = SPLITS.test.labels[::-1].copy()
    other = SPLITS._replace(test=ImageSet(SPLITS.test.images, relabelled, NAMES))
    told = scores(REAL, 'class_agreement', splits=other, cache=tmp_path)
    assert told['classifier_accuracy_on_real_test_images'] < 0.5


def test_features_that_were_kept_are_of_one_network(tmp_path):
    import dataclasses

    setting = Setting(SPLITS, NAMES, 297, cache=tmp_path)
    network = setting.features()
    other = dataclasses.replace(network, sha256='f' * 64, params=jax.tree.map(lambda leaf: 2 * leaf, network.params))
    mean = setting._real(network, 'test').moments.mean
    assert not np.allclose(mean, setting._real(other, 'test').moments.mean)
    again = Setting(SPLITS, NAMES, 297, cache=tmp_path)
    np.testing.assert_array_equal(again._real(network, 'test').moments.mean, mean)


def test_a_setting_is_forgotten_with_its_features():
    setting = Setting(SPLITS, NAMES, 297)
    setting.reference()
    kept = weakref.ref(setting)
    del setting
    gc.collect()
    assert kept() is None


def test_the_inception_score_does_not_ask_how_a_set_is_sorted():
    order = np.argsort(SPLITS.train.labels, kind='stable')
    by_class = SPLITS._replace(train=SPLITS.train.load(order))
    plain, sorted_by_class = (
        scores(REAL, 'inception_score', splits=splits)['inception_score_of_real_images']
        for splits in (SPLITS, by_class)
    )
    assert sorted_by_class == pytest.approx(plain, rel=0.05)


def test_statistics_in_a_file_stand_for_the_reference_images(tmp_path):
    setting = Setting(SPLITS, NAMES, 297)
    moments = setting.reference().moments
    np.savez(tmp_path / 'statistics.npz', mu=moments.mean, sigma=moments.covariance)
    told = scores(REAL, 'frechet_distance', reference_name=str(tmp_path / 'statistics.npz'))
    assert told == {'frechet_distance': pytest.approx(scores(REAL, 'frechet_distance')['frechet_distance'])}
    np.savez(tmp_path / 'small.npz', mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / 'nan.npz', mu=np.full(64, np.nan), sigma=np.eye(64))
    (tmp_path / 'half.npz').write_bytes((tmp_path / 'statistics.npz').read_bytes()[:9000])
    for path, message in (
        ('small.npz', r'holds statistics of \(3,\) features'),
        ('none.npz', 'no .npz file with mu'),
        ('half.npz', 'no .npz file with mu'),
        ('nan.npz', 'statistics with NaN'),
    ):
        with pytest.raises(UsageError, match=message):
            scores(REAL, 'frechet_distance', reference_name=str(tmp_path / path))
    with pytest.raises(UsageError, match='compares images one by one'):
        scores(REAL, 'precision_recall', reference_name=str(tmp_path / 'statistics.npz'))


UNLABELLED = Splits(ImageSet(SPLITS.train.images), ImageSet(SPLITS.test.images))


@pytest.mark.parametrize(
    ('given', 'evaluator', 'message'),
    [
        ({'class_names': ()}, 'class_agreement', r'leave it out of evaluate\.evaluators'),
        ({'num': 64}, 'frechet_distance', r'evaluate\.num=64 samples are too few.*at least 65'),
        ({'num': 5}, 'precision_recall', r'evaluate\.num of 6 at least, got 5'),
        ({'num': 9}, 'inception_score', r'evaluate\.num of 10 at least, got 9'),
        ({'num': 1}, 'kernel_distance', r'evaluate\.num of 2 at least, got 1'),
        ({'num': 0}, 'nearest_neighbour', r'evaluate\.num must be at least 1'),
        ({'num_likelihood': 1}, 'bits_per_dim', 'must be 2 at least, got 1'),
        ({'reference_name': 'valid'}, 'frechet_distance', "unknown evaluate.reference 'valid'"),
        ({'features_name': 'vgg'}, 'frechet_distance', "unknown feature network 'vgg'"),
        ({'features_name': 'fashion_mnist'}, 'frechet_distance', 'reads images of 28x28x1, and these are 8x8x1'),
        ({'features_name': 'inception'}, 'frechet_distance', r'needs evaluate\.weights.*pytorch-fid'),
        ({'features_name': 'classifier'}, 'class_agreement', r'needs evaluate\.weights.*classifiers/train\.py'),
        ({'weights': 'x.pth'}, 'frechet_distance', r"needs evaluate\.features: 'inception' or 'classifier'"),
        ({'features_name': 'digits', 'weights': 'x.pth'}, 'frechet_distance', "is for evaluate.features='inception'"),
        ({'splits': UNLABELLED}, 'frechet_distance', 'no feature network is shipped for images of 8x8x1 in 0 classes'),
        ({'splits': UNLABELLED}, 'class_agreement', 'needs a classifier of these classes'),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_drawn(given, evaluator, message):
    with pytest.raises(UsageError, match=message):
        EVALUATORS[evaluator].check(Setting(**{'splits': SPLITS, 'class_names': NAMES, 'num': 300} | given))


@pytest.mark.parametrize(
    ('images', 'message'),
    [
        (np.full((20, 8, 8, 1), np.nan, np.float32), 'must be uint8, got float32 with NaN or inf'),
        (np.zeros((20, 8, 8, 3), np.uint8), r'shape \(8, 8, 3\) cannot be held against .* \(8, 8, 1\)'),
        (np.zeros((20, 16, 16, 1), np.uint8), r'shape \(16, 16, 1\) cannot be held against'),
        (np.zeros((19, 8, 8, 1), np.uint8), r'19 samples came, and the setting says num=20'),
    ],
)
def test_samples_that_are_not_as_announced_are_refused(images, message):
    with pytest.raises(UsageError, match=message):
        score(Samples(images, None), Setting(SPLITS, NAMES, 20), ['nearest_neighbour'])


@pytest.mark.parametrize('learned', [False, True])
def test_bits_per_dim_of_a_model_whose_density_is_known(learned):
    """Normal data: the exact denoiser's bits are those of the density; by the bound, with the larger variance, more."""
    mean, std = 0.1, 0.3
    values = np.random.default_rng(0).normal(mean, std, (64, 8, 8, 1))
    images = np.clip(np.rint((values + 1) * 127.5), 0, 255).astype(np.uint8)
    data_of_it = Splits(ImageSet(images), ImageSet(images))
    x0 = images / 127.5 - 1
    nats = 0.5 * ((x0 - mean) / std) ** 2 + np.log(std * np.sqrt(2 * np.pi)) - np.log(1 / 127.5)
    expected = nats.mean() / np.log(2)
    told = {}
    # A network is told of 1000 t by the flow, and of 1000 t - 1 by the chain.
    for kind, schedule, offset in (('ode', schedules.flow(), 0), ('bound', schedules.cosine(1000), 1)):
        exact = oracles.gaussian(mean, std).denoiser(schedule)

        def apply(params, x, timestep, exact=exact, offset=offset):
            x0 = exact(x, (timestep + offset) / 1000).value
            return jnp.concatenate([x0, jnp.ones_like(x0)], axis=-1) if learned else x0

        pipeline = ImagePipeline(apply, {}, schedule, 'x0', (8, 8, 1), learned_variance=learned)
        setting = Setting(data_of_it, (), 1, pipeline=pipeline)
        told[kind] = score(Samples(images[:1], None), setting, ['bits_per_dim']).scores
    assert told['ode']['bits_per_dim'] == pytest.approx(expected, rel=5e-3)
    assert expected < told['bound']['bits_per_dim'] < expected + 0.1
    assert told['bound']['bits_per_dim_variance'] in (('learned',) if learned else ('small', 'large'))
    assert 0 < told['ode']['bits_per_dim_standard_error'] < 0.05
