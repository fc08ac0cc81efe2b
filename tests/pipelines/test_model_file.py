"""A model as one file: written, read, shipped, and begun from."""

import json
import shutil

import jax
import numpy as np
import pytest
from runs import load_config, newest_state

import diffusion_jax as dj
from diffusion_jax import UsageError
from diffusion_jax.images import to_uint8
from diffusion_jax.pipelines import load_pipeline
from diffusion_jax.pipelines.model_file import SHIPPED, load_model, load_source, shipped_models
from diffusion_jax.pipelines.workdir import export, sample
from diffusion_jax.training.train import train
from diffusion_jax.weights import load_weights, save_weights


@pytest.fixture(scope='module')
def exported(workdir, tmp_path_factory):
    """The tiny run's model file, in a folder of its own."""
    folder = tmp_path_factory.mktemp('exported')
    shutil.copytree(workdir, folder / 'run')
    export(load_config(), folder / 'run')
    return (folder / 'run' / 'model.safetensors').rename(folder / 'model.safetensors')


def test_an_exported_model_draws_what_the_run_draws(workdir, exported):
    pipeline, step = load_source(load_config(init_from=str(exported)))
    reference, of_run = load_pipeline(workdir)
    assert step == of_run == 12
    assert pipeline.class_names == reference.class_names
    settings = {'steps': 2, 'guidance_scale': 2.0}
    np.testing.assert_array_equal(pipeline(8, **settings).images, reference(8, **settings).images)
    np.testing.assert_array_equal(dj.pretrained(str(exported))(8, **settings).images, pipeline(8, **settings).images)


def test_raw_parameters_and_half_precision_can_be_exported(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / 'run')
    path = export(load_config(sample__ema=False, export_dtype='float16'), tmp_path / 'run')
    params, metadata = load_weights(path)
    assert metadata['ema'] is False
    state = newest_state(workdir)
    raw = jax.tree.map(lambda leaf: np.float32(np.float16(leaf)), state.params)
    jax.tree.map(np.testing.assert_array_equal, params, raw)


def test_a_folder_with_a_run_will_do_too(workdir):
    pipeline, _ = load_source(load_config(init_from=str(workdir)))
    np.testing.assert_array_equal(pipeline(3, steps=2).images, load_pipeline(workdir)[0](3, steps=2).images)


@pytest.mark.slow
def test_training_begins_from_a_model_and_then_goes_on_by_itself(exported, workdir, tmp_path):
    config = load_config(
        init_from=str(exported),
        train__num_steps=4,
        optimizer__learning_rate=1e-8,
        optimizer__warmup_steps=0,
        evaluate__after_training=False,
    )
    state = train(config, tmp_path)
    before = newest_state(workdir).ema
    for ours in (state.params, state.ema):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, before)
    # A run that has begun needs the model no more; another one is refused.
    config.init_from = None
    config.train.num_steps = 8
    assert int(train(config, tmp_path).step) == 8
    config.init_from = 'pretrained:digits'
    with pytest.raises(UsageError, match=r"init_from: '.*model\.safetensors' -> 'pretrained:digits'"):
        train(config, tmp_path)


def test_sampling_needs_no_run(exported, tmp_path):
    path = sample(load_config(init_from=str(exported)), tmp_path / 'fresh')
    assert path.exists()
    assert np.load(path.with_suffix('.npz'))['images'].shape == (20, 8, 8, 1)


@pytest.mark.parametrize('name', ['digits', 'fashion_mnist'])
def test_what_ships_draws_images_and_has_a_card(name):
    assert name in shipped_models()
    pipeline = dj.pretrained(name)
    images = pipeline(10, steps=8, guidance_scale=2.0).images
    real = dj.data.load('digits').test.images if name == 'digits' else None
    assert images.shape[1:] == pipeline.image_shape
    assert images.std() > 50
    if real is not None:
        assert abs(images.mean() - real.mean()) < 25
    card = (SHIPPED / f'{name}.md').read_text()
    assert f'--config=configs/{name}.py' in card
    assert 'Frechet distance' in card


def test_what_ships_is_small():
    files = list(SHIPPED.glob('*.safetensors'))
    assert len(files) == 4
    assert sum(file.stat().st_size for file in files) <= 8e6


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('pretrained:imagenet', "unknown pretrained model 'imagenet'.*digits, fashion_mnist"),
        ('nothing', r'is no model: name a folder with a run, .*pretrained:digits'),
        ('none.safetensors', 'there is no weights file'),
        (str(SHIPPED / 'digits_classifier.safetensors'), "holds no diffusion model .but 'classifier'"),
        ('pretrained:fashion_mnist', r'is a model of another config.*model\.channels: 40 -> 8'),
    ],
)
def test_what_is_no_model_or_another_is_refused(source, message):
    with pytest.raises(UsageError, match=message):
        load_source(load_config(init_from=source))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match='a folder without a run'):
        load_source(load_config(init_from=str(tmp_path)))


def test_a_damaged_file_is_refused(exported, tmp_path):
    content = exported.read_bytes()
    for number, damaged in enumerate((b'', content[:1000], content[:-100])):
        path = tmp_path / f'{number}.safetensors'
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match='is no weights file of this library, or is damaged'):
            load_model(path)


def test_a_file_of_other_tensors_is_refused_by_name(exported, tmp_path):
    params, metadata = load_weights(exported)
    params['conv_in']['kernel'] = params['conv_in']['kernel'][:, :1]
    params['extra'] = np.zeros(3)
    del params['conv_out']['bias']
    save_weights(tmp_path / 'other.safetensors', params, metadata)
    with pytest.raises(UsageError, match=r'conv_out\.bias is missing; extra is not of .*; conv_in\.kernel is \(3, 1'):
        load_model(tmp_path / 'other.safetensors')


def test_what_a_dtype_cannot_hold_is_not_written(tmp_path):
    for value in (1e6, np.nan):
        with pytest.raises(UsageError, match=r'a\.b has values that float16 cannot hold, or is not finite'):
            save_weights(tmp_path / 'x.safetensors', {'a': {'b': np.full(2, value)}}, {}, 'float16')
    with pytest.raises(UsageError, match='one of float16, float32'):
        save_weights(tmp_path / 'x.safetensors', {'a': np.ones(2)}, {}, 'int8')
    assert not list(tmp_path.iterdir())


def test_metadata_is_plain_json(exported):
    from safetensors import safe_open

    with safe_open(exported, 'numpy') as file:
        assert json.loads(file.metadata()['data'])['image_shape'] == [8, 8, 1]


def test_a_trajectory_ends_at_the_sample_of_the_same_settings(workdir):
    pipeline, _ = load_pipeline(workdir)
    settings = {'steps': 3, 'guidance_scale': 2.0, 'seed': 4, 'solver': 'ddpm', 'labels': [1, 2, 3]}
    trajectory = pipeline.trajectory(3, **settings)
    assert trajectory.x.shape == (4, 3, 8, 8, 1)
    assert trajectory.x0.shape == (3, 3, 8, 8, 1)
    images = np.asarray(to_uint8(trajectory.x[-1]))
    np.testing.assert_array_equal(images, pipeline(3, **settings).images)
