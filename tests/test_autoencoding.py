"""Autoencoders: the objective, whole runs on digits, and what is read, shown and scored of them."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from PIL import Image
from runs import files_below, load_config

from diffusion_jax import UsageError, data
from diffusion_jax.config import default_config, model_section, with_defaults
from diffusion_jax.evaluation import evaluate
from diffusion_jax.evaluation.features import load_features
from diffusion_jax.evaluation.frechet_distance import Moments as FeatureMoments
from diffusion_jax.evaluation.frechet_distance import distance
from diffusion_jax.evaluation.reconstruction import psnr
from diffusion_jax.experiment import DataInfo, make_autoencoder, make_experiment
from diffusion_jax.images import to_float, to_uint8
from diffusion_jax.models.autoencoder import Moments
from diffusion_jax.pipelines import load_autoencoder, load_pipeline
from diffusion_jax.pipelines.autoencoders import measure_scale, picture_of_pairs
from diffusion_jax.pipelines.model_file import load_model
from diffusion_jax.pipelines.workdir import export, sample
from diffusion_jax.training.autoencoding import (
    adaptive_weight,
    feature_distance,
    hinge_loss,
    make_autoencoder_step,
    make_objective,
)
from diffusion_jax.training.checkpoints import Checkpoints, abstract
from diffusion_jax.training.metrics import read_metrics
from diffusion_jax.training.optimizer import make_optimizer
from diffusion_jax.training.sharding import make_mesh, on_mesh, put, replicated, sharded_batch
from diffusion_jax.training.step import init_state
from diffusion_jax.training.train import train

INFO = DataInfo((8, 8, 1), tuple('0123456789'))


def tiny(**changes) -> ConfigDict:
    """Digits, one halving; by default with everything that a loss may have but a codebook."""
    config = default_config()
    config.task = 'autoencoder'
    config.model = model_section(changes.pop('model', 'autoencoder_kl'))
    config.model.update(channels=8, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=4, latent_channels=2)
    config.autoencoder.update(discriminator_channels=4, discriminator_layers=1)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=2)
    config.ema_decay = 0.9
    config.train.update(num_steps=12, batch_size=16, log_every=1, eval_every=6, sample_every=12, checkpoint_every=6)
    config.sample.update(num=12, batch_size=8)
    config.evaluate.update(evaluators=('psnr',), reference='test', num=70)
    flat = {'autoencoder.discriminator_weight': 0.5, 'autoencoder.discriminator_start': 6}
    flat |= {'autoencoder.perceptual_weight': 0.1, 'autoencoder.kl_weight': 1e-3}
    config.update_from_flattened_dict(flat | {key.replace('__', '.'): value for key, value in changes.items()})
    return config


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """(workdir, state) of a run of the tiny config, with a discriminator from its middle."""
    folder = tmp_path_factory.mktemp('autoencoder')
    return folder, train(tiny(), folder)


@pytest.fixture(scope='module')
def digits():
    return data.load('digits')


# --- the objective ----------------------------------------------------------------------------------------------------


@functools.cache
def parts(model='autoencoder_kl'):
    """(config, objective, optimizer, state, images) of the tiny config, the discriminator from the start."""
    config = tiny(model=model, autoencoder__discriminator_start=0)
    autoencoder = make_autoencoder(config, INFO)
    objective = make_objective(config.autoencoder, autoencoder)
    optimizer, _ = make_optimizer(**config.optimizer, num_steps=12)
    state = jax.jit(lambda: init_state(autoencoder.init, optimizer, 0, init_adversary=objective.init_discriminator))()
    return config, objective, optimizer, state, data.load('digits').train.images[:16]


def make_step(objective, optimizer, mesh=None, **options):
    step = make_autoencoder_step(objective, optimizer, ema_decay=0.9, flip=False, skip_nonfinite=True, **options)
    return jax.jit(step if mesh is None else on_mesh(mesh, step))


@functools.cache
def compiled_step(model='autoencoder_kl'):
    _, objective, optimizer, _, _ = parts(model)
    return make_step(objective, optimizer)


@functools.cache
def stepped(model='autoencoder_kl'):
    """(state, metrics) after a step of one device."""
    _, _, _, state, images = parts(model)
    return compiled_step(model)(state, {}, {'image': images})


def moments_of(opt_state):
    """Adam's first moments, a tenth of the gradient after a step."""
    return optax.tree.get(opt_state, 'mu')


def assert_nearly(ours, theirs, tolerance=1e-3):
    """Trees, by the norm of their difference: some gradients are 0 but for rounding."""
    assert optax.tree.norm(optax.tree.sub(ours, theirs)) < tolerance * optax.tree.norm(theirs)


def test_the_kl_term_is_the_closed_form():
    mean, log_variance = jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 4))
    values = Moments(mean, log_variance).kl()
    expected = 0.5 * (np.square(mean) + np.exp(log_variance) - 1 - log_variance).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    config, objective, _, state, images = parts()
    x = to_float(images)
    coded, metrics = objective.code(state.params, x, jax.random.key(1))
    kl = objective.autoencoder.apply(state.params, x, method='encode').kl().mean()
    np.testing.assert_allclose(metrics['kl'], kl, rtol=1e-5)
    np.testing.assert_allclose(coded.regulariser, config.autoencoder.kl_weight * kl / 64, rtol=1e-5)


def test_latents_are_drawn_with_a_key_and_means_without():
    _, objective, _, state, images = parts()
    x = to_float(images)
    means = objective.autoencoder.encode(state.params, x)
    expected = objective.autoencoder.decode(state.params, means)
    np.testing.assert_allclose(objective.code(state.params, x, None)[0].images, expected, atol=1e-5)
    drawn = [objective.code(state.params, x, jax.random.key(seed))[0].images for seed in (0, 1)]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3


def test_features_are_held_against_one_another_at_length_one(digits):
    network = load_features('auto', None, INFO.class_names, INFO.image_shape)
    x = to_float(digits.train.images[:6])
    y = x[::-1]
    features = [np.asarray(network.apply(network.params, images)[0]) for images in (x, y)]
    units = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in features]
    np.testing.assert_allclose(
        feature_distance(network, x, y), np.square(units[0] - units[1]).sum(axis=1), rtol=1e-4, atol=1e-6
    )


def test_hinge_loss():
    assert hinge_loss(jnp.array([2.0, 0.5]), jnp.array([-3.0, 0.0])) == 0.5 * (0.25 + 0.5)


def direct_loss(objective, params, against, x, key, adaptive):
    """All of the autoencoder's objective as one function of its parameters, to be differentiated as it stands."""
    coded, _ = objective.code(params, x, key)
    adversarial = -objective.discriminator(against, coded.images).mean()
    total = objective.error(x, coded.images)[0] + coded.regulariser
    return total + objective.discriminator_weight * adaptive * adversarial


@pytest.mark.slow
@pytest.mark.parametrize('model', ['autoencoder_kl', 'autoencoder_vq'])
def test_a_step_is_that_of_the_gradient_of_the_objective(model):
    """The adaptive weight, and gradients that came by way of the reconstructions, against plain differentiation."""
    _, objective, optimizer, state, images = parts(model)
    x = to_float(images)
    key = jax.random.split(jax.random.fold_in(state.key, 0))[1]
    new, metrics = stepped(model)

    def at_last_layer(term):
        def value(kernel):
            layer = {**state.params['decoder']['conv_out'], 'kernel': kernel}
            params = {**state.params, 'decoder': {**state.params['decoder'], 'conv_out': layer}}
            return term(objective.code(params, x, key)[0].images)

        return jax.jit(jax.grad(value))(state.params['decoder']['conv_out']['kernel'])

    against = state.adversary.params
    weight = adaptive_weight(
        at_last_layer(lambda y: objective.error(x, y)[0]),
        at_last_layer(lambda y: -objective.discriminator(against, y).mean()),
    )
    assert 0 < weight < 1e4
    np.testing.assert_allclose(metrics['adaptive_weight'], weight, rtol=1e-3)

    def direct(params):
        return direct_loss(objective, params, against, x, key, jax.lax.stop_gradient(weight))

    grads = jax.jit(jax.grad(direct))(state.params)
    np.testing.assert_allclose(metrics['grad_norm'], optax.tree.norm(grads), rtol=1e-3)
    # The first step of the warm-up has a learning rate of 0: what Adam keeps of the gradient tells.
    _, opt_state = optimizer.update(grads, state.opt_state, state.params)
    assert_nearly(moments_of(new.opt_state), moments_of(opt_state))
    assert int(new.step) == 1

    y = objective.code(state.params, x, key)[0].images
    loss = hinge_loss(objective.discriminator(against, x), objective.discriminator(against, y))
    np.testing.assert_allclose(metrics['discriminator_loss'], loss, rtol=1e-3)
    assert metrics['skipped'] == 0


@pytest.mark.slow
def test_a_batch_in_parts_has_the_gradient_of_the_whole():
    _, objective, optimizer, state, images = parts('autoencoder_vq')  # draws nothing
    split, metrics = make_step(objective, optimizer, accumulate=2)(state, {}, {'image': images})
    whole, expected = stepped('autoencoder_vq')
    assert_nearly(moments_of(split.adversary.opt_state), moments_of(whole.adversary.opt_state))
    # The adaptive weight is of each part.
    assert_nearly(moments_of(split.opt_state), moments_of(whole.opt_state), 0.2)
    for name in ('loss', 'reconstruction', 'perceptual', 'adversarial', 'discriminator_loss'):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4)


@pytest.mark.slow
def test_eight_devices_do_what_one_does():
    _, objective, optimizer, state, images = parts()
    mesh = make_mesh()
    assert mesh.size == 8
    step = make_step(objective, optimizer, mesh)
    split, metrics = step(jax.device_put(state, replicated(mesh)), {}, {'image': put(images, sharded_batch(mesh))})
    alone, expected = stepped()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, err_msg=name)
    split, alone = jax.device_get((split, alone))
    assert_nearly(moments_of(split.opt_state), moments_of(alone.opt_state))
    assert_nearly(moments_of(split.adversary.opt_state), moments_of(alone.adversary.opt_state))


def test_a_step_that_is_not_finite_is_skipped_as_a_whole():
    _, _, _, state, images = parts()
    broken = dataclasses.replace(state, params=jax.tree.map(lambda leaf: leaf * jnp.nan, state.params))
    new, metrics = compiled_step()(broken, {}, {'image': images})
    assert metrics['skipped'] == 1
    assert int(new.step) == 1
    assert_same_bits((new.opt_state, new.adversary), (broken.opt_state, broken.adversary))


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_the_loss_falls_and_the_discriminator_begins_at_its_step(finished):
    workdir, state = finished
    rows = [row for row in read_metrics(workdir) if 'loss' in row]
    assert rows[-1]['loss'] < 0.7 * rows[0]['loss']
    assert [row['discriminator_loss'] > 0 for row in rows] == [False] * 6 + [True] * 6
    assert all(row['adaptive_weight'] > 0 for row in rows[6:])
    assert {'reconstruction', 'perceptual', 'kl', 'adversarial', 'grad_norm', 'learning_rate'} <= set(rows[0])
    counts = [leaf for leaf in jax.tree.leaves(state.adversary.opt_state) if leaf.ndim == 0]
    assert counts
    assert all(int(count) == 6 for count in counts)
    held_out = [row['held_out_loss'] for row in read_metrics(workdir) if 'held_out_loss' in row]
    assert held_out[1] < held_out[0]


@pytest.mark.slow
def test_a_run_in_two_parts_is_bit_for_bit_the_unbroken_one(finished, tmp_path):
    train(tiny(train__num_steps=6), tmp_path)
    assert_same_bits(train(tiny(), tmp_path), finished[1])
    optimizer, _ = make_optimizer(**tiny().optimizer, num_steps=12)
    config = tiny()
    autoencoder = make_autoencoder(config, INFO)
    objective = make_objective(config.autoencoder, autoencoder)
    shapes = jax.eval_shape(
        lambda: init_state(autoencoder.init, optimizer, 0, init_adversary=objective.init_discriminator)
    )
    kept = Checkpoints(tmp_path).restore(abstract(shapes, replicated(make_mesh())))
    assert kept.step == 12
    assert_same_bits(kept.state, finished[1])


def test_a_run_leaves_what_it_promises(finished):
    workdir, _ = finished
    assert {'config.json', 'curves.png', 'evaluation.json', 'report.html'} <= files_below(workdir)
    picture = np.asarray(Image.open(workdir / 'samples' / 'training_step12.png'))
    assert picture.shape == (4 * 50 - 2, 10 * 50 - 2, 3)  # 12 images in rows of ten, and each row's reconstructions
    page = (workdir / 'report.html').read_text()
    assert 'Reconstructions during training' in page
    assert 'latents of 4x4x2' in page
    assert 'predicts' not in page


def test_sample_shows_held_out_images_and_their_reconstructions(finished, digits):
    workdir, state = finished
    path = sample(tiny(sample__num=5), workdir)
    assert path == workdir / 'samples' / 'step12_reconstructions_num5.png'
    arrays = np.load(path.with_suffix('.npz'))
    np.testing.assert_array_equal(arrays['images'], digits.test.images[:5])
    autoencoder = make_autoencoder(tiny(), INFO)
    z = autoencoder.encode(state.ema, to_float(digits.test.images[:5]))
    expected = to_uint8(autoencoder.decode(state.ema, z))
    assert np.abs(arrays['reconstructions'].astype(int) - np.asarray(expected)).max() <= 1
    np.testing.assert_array_equal(
        np.asarray(Image.open(path)), picture_of_pairs(arrays['images'], arrays['reconstructions'])
    )


def test_evaluate_says_psnr_and_the_distance_of_reconstructions(finished, tmp_path, digits):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    report = evaluate(tiny(evaluate__evaluators=('psnr', 'frechet_distance')), tmp_path)
    assert json.loads((tmp_path / 'evaluation.json').read_text()) == json.loads(json.dumps(report))
    assert report['num'] == 70
    assert report['features']['name'] == 'digits'
    images = digits.test.images[:70]
    autoencoder = make_autoencoder(tiny(), INFO)
    again = np.asarray(
        to_uint8(autoencoder.decode(finished[1].ema, autoencoder.encode(finished[1].ema, to_float(images))))
    )
    assert report['scores']['psnr'] == pytest.approx(psnr(images, again).mean(), abs=0.01)
    network = load_features('auto', None, INFO.class_names, INFO.image_shape)
    moments = [FeatureMoments(), FeatureMoments()]
    for part, some in zip(moments, (images, again), strict=True):
        part.update(network(some)[0])
    assert report['scores']['frechet_distance'] == pytest.approx(distance(*moments), rel=0.02)
    assert (tmp_path / 'evaluation' / 'reconstructions.png').exists()
    assert 'images of the test split' in (tmp_path / 'report.html').read_text()


def test_psnr_is_that_of_its_definition():
    images = np.full((3, 4, 4, 1), 100, np.uint8)
    other = images.copy()
    other[1] += 10
    other[2, 0, 0] += 1
    np.testing.assert_allclose(psnr(images, other)[1:], [20 * np.log10(25.5), 10 * np.log10(255**2 * 16)])
    assert psnr(images, other)[0] == psnr(images, other)[2]


def test_an_exported_file_is_the_autoencoder_with_the_scale_of_its_latents(finished, tmp_path, digits):
    workdir, state = finished
    path = export(tiny(), workdir)
    shutil.copy(path, tmp_path / 'mine.safetensors')
    encode, decode, params, info = load_autoencoder(tmp_path / 'mine.safetensors')
    assert_same_bits(jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, state.ema))
    x = to_float(digits.train.images)
    z = np.asarray(jax.jit(encode)(params, x), np.float64)
    assert z.shape == (1500, 4, 4, 2)
    assert info.scale == pytest.approx(1 / z.std(), rel=1e-4)
    assert info.shift == pytest.approx(z.mean(), abs=1e-5)
    assert (info.step, info.factor, info.channels, info.data) == (12, 2, 2, INFO)
    assert decode(params, z[:2].astype(np.float32)).shape == (2, 8, 8, 1)
    of_workdir = load_autoencoder(workdir)
    assert_same_bits(jax.tree.map(np.asarray, of_workdir[2]), jax.tree.map(np.asarray, params))
    assert of_workdir[3].scale == pytest.approx(info.scale, rel=1e-6)
    with pytest.raises(UsageError, match=r"holds no diffusion model \(but 'autoencoder'\)"):
        load_model(path)
    with pytest.raises(UsageError, match='load_autoencoder'):
        load_pipeline(workdir)


@pytest.mark.slow
def test_a_run_begins_from_another(finished, tmp_path):
    workdir, state = finished
    begun = tiny(init_from=str(workdir), autoencoder__discriminator_weight=0.0, autoencoder__perceptual_weight=0.0)
    begun.optimizer.update(learning_rate=1e-9, warmup_steps=0)
    begun.train.update(num_steps=1, eval_every=1, sample_every=1, checkpoint_every=1)
    begun.evaluate.after_training = False
    after = train(begun, tmp_path)
    for ours, theirs in zip(jax.tree.leaves(after.params), jax.tree.leaves(state.ema), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    begun.init_from = str(workdir)
    begun.model.channels = 12
    with pytest.raises(UsageError, match=r'another config.*model\.channels: 8 -> 12'):
        train(begun, tmp_path / 'other')


@pytest.mark.slow
def test_an_autoencoder_with_a_codebook(tmp_path):
    config = tiny(
        model='autoencoder_vq',
        model__codebook_size=16,
        autoencoder__discriminator_weight=0.0,
        autoencoder__perceptual_weight=0.0,
        autoencoder__reconstruction='l2',
        evaluate__evaluators=('psnr', 'codebook_use'),
        evaluate__every=6,
        evaluate__num_during_training=20,
    )
    state = train(config, tmp_path)
    assert state.adversary is None
    rows = [row for row in read_metrics(tmp_path) if 'loss' in row]
    assert rows[-1]['reconstruction'] < 0.7 * rows[0]['reconstruction']
    assert all(1 / 16 <= row['codebook_used'] <= 1 <= row['codebook_perplexity'] <= 16 for row in rows)
    assert sum('psnr' in row for row in read_metrics(tmp_path)) == 2
    scores = json.loads((tmp_path / 'evaluation.json').read_text())['scores']
    assert scores.keys() == {'psnr', 'codebook_used', 'codebook_perplexity'}
    assert 1 / 16 <= scores['codebook_used'] <= 1
    _, _, _, info = load_autoencoder(export(config, tmp_path))
    assert (info.factor, info.channels) == (2, 2)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'task': 'autoencode'}, "unknown task 'autoencode'. Did you mean 'autoencoder'"),
        ({'model': 'unet'}, r'model.name=.unet. is no autoencoder: autoencoder_kl or autoencoder_vq'),
        ({'task': 'diffusion'}, r"autoencoder_kl. is trained with task='autoencoder'"),
        ({'data__resolution': 9}, 'images of 9x9 cannot be halved 1 times'),
        ({'autoencoder__reconstruction': 'l3'}, 'Valid choices: l1, l2'),
        ({'autoencoder__kl_weight': -1.0}, 'autoencoder.kl_weight must be 0 or more'),
        ({'autoencoder__discriminator_start': -1}, 'autoencoder.discriminator_start must be 0 or more'),
        ({'autoencoder__discriminator_layers': 2}, 'too small for a discriminator.*discriminator_layers to at most 1'),
        ({'autoencoder__perceptual_features': 'inception'}, r'needs autoencoder\.perceptual_file'),
        ({'autoencoder__perceptual_features': 'lpips'}, "unknown feature network 'lpips'"),
        ({'autoencoder__perceptual_file': 'x', 'autoencoder__perceptual_weight': 0.0}, 'perceptual_weight above 0'),
        ({'data__resolution': 12}, r'autoencoder\.perceptual_features.*autoencoder\.perceptual_weight=0'),
        ({'evaluate__evaluators': ('nearest_neighbour',)}, 'codebook_use, frechet_distance, psnr'),
        ({'evaluate__evaluators': ('codebook_use',)}, 'is for model.name=autoencoder_vq'),
        ({'evaluate__evaluators': ('frechet_distance',), 'evaluate__num': 60}, 'too few for frechet_distance'),
        ({'evaluate__reference': 'x.npz'}, "must be 'train' or 'test'"),
        ({'evaluate__num': 0}, 'evaluate.num must be 1 or more'),
        ({'sample__num': 0}, 'sample.num and sample.batch_size must be at least 1'),
        ({'model__num_groups': 3}, 'num_groups=3 does not divide'),
        ({'init_from': 'pretrained:digits'}, 'is no autoencoder: name a folder'),
        ({'train__accumulate': 3}, 'train.accumulate=3'),
    ],
)
def test_settings_that_do_not_fit_write_nothing(changes, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        train(tiny(**changes), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('mode', [sample, evaluate, export])
def test_a_run_must_be_there_and_be_the_same(mode, finished, tmp_path):
    with pytest.raises(UsageError, match='no run in'):
        mode(tiny(), tmp_path)
    with pytest.raises(UsageError, match=r'another config.*autoencoder\.kl_weight'):
        mode(tiny(autoencoder__kl_weight=0.5), finished[0])
    assert not list(tmp_path.iterdir())


def test_latents_without_spread_have_no_scale():
    with pytest.raises(UsageError, match='was not trained'):
        measure_scale(lambda x: jnp.zeros((len(x), 2, 2, 1)), np.zeros((4, 8, 8, 1), np.uint8))
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1), np.uint8)
    scale, shift = measure_scale(lambda x: 3 * x + 1, images, batch_size=128)
    z = 3 * np.asarray(to_float(images), np.float64) + 1
    assert (scale, shift) == (pytest.approx(1 / z.std(), rel=1e-5), pytest.approx(z.mean(), rel=1e-4))


def test_a_config_from_before_there_were_tasks_is_a_diffusion_models(tmp_path):
    record = load_config().to_dict()
    del record['task'], record['autoencoder']
    filled = ConfigDict(with_defaults(record))
    assert filled.task == 'diffusion'
    make_experiment(filled, INFO)
    with pytest.raises(UsageError, match='of a diffusion model, not of an autoencoder'):
        make_autoencoder(filled, INFO)
