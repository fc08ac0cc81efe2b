"""Every shipped config builds, and says what its source says."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from runs import ROOT, load_config

from diffusion_jax import UsageError
from diffusion_jax.config import default_config, differences, flatten, solver_options, with_defaults
from diffusion_jax.experiment import DataInfo, LatentInfo, TextInfo, make_autoencoder, make_experiment
from diffusion_jax.models import count_params
from diffusion_jax.pipelines.latents import LatentSpace
from diffusion_jax.pipelines.parts import Parts, pipeline_of
from diffusion_jax.pipelines.workdir import check_sampling
from diffusion_jax.text import ClipTokenizer
from diffusion_jax.training.autoencoding import make_objective
from diffusion_jax.training.optimizer import make_optimizer

THOUSAND = tuple(map(str, range(1000)))
TEN = tuple('0123456789')
DATA = {
    'cifar10': DataInfo((32, 32, 3), TEN),
    'digits': DataInfo((8, 8, 1), TEN),
    'fashion_mnist': DataInfo((28, 28, 1), TEN),
    'unet64': DataInfo((64, 64, 3), ('cat', 'dog')),
    'emoji_autoencoder': DataInfo((64, 64, 3), ()),
    'emoji_text2image': DataInfo((64, 64, 3), (), LatentInfo(4, 4, 0.3, 0.36, (0.0,)), TextInfo(4514, 24)),
    'ldm_fashion_mnist': DataInfo((28, 28, 1), TEN, LatentInfo(4, 4, 0.3, 0.0, (0.0,))),
    'ldm_imagenet256': DataInfo((256, 256, 3), THOUSAND, LatentInfo(8, 4, 0.18, 0.0, (0.0,))),
    'stable_diffusion': DataInfo((512, 512, 3), (), LatentInfo(8, 4, 0.18, 0.0, (0.0,)), TextInfo(49408, 77, 768)),
    'fashion_mnist_autoencoder': DataInfo((28, 28, 1), TEN),
}
MILLIONS = {
    'cifar10': 35.7,
    'digits': 1.0,
    'fashion_mnist': 1.2,
    'unet64': 63.2,
    'emoji_autoencoder': 1.39,
    'emoji_text2image': 10.3,
    'fashion_mnist_autoencoder': 0.54,
    'ldm_fashion_mnist': 0.93,
    'ldm_imagenet256': 257.4,
    'stable_diffusion': 859.5,
}


def stand_ins(info):
    """Parts of such a kind, which nobody runs."""
    latents = info.latents and LatentSpace(None, None, {}, 1.0, 0.0, info.latents.factor, info.latents.channels)
    return Parts(latents, info.latents, ClipTokenizer.small() if info.text else None, info.text)


TRAINED = sorted(path for path in (ROOT / 'configs').glob('*.py') if path.stem != 'generate')


@pytest.mark.parametrize('path', TRAINED, ids=lambda path: path.stem)
def test_every_config_builds_and_has_a_header(path: Path):
    config = load_config(path)
    if config.task == 'autoencoder':
        experiment = make_autoencoder(config, DATA[path.stem])
        make_objective(config.autoencoder, experiment)
    else:
        experiment = make_experiment(config, DATA[path.stem])
        check_sampling(pipeline_of(experiment, {}, parts=stand_ins(experiment.data)), config.sample)
    make_optimizer(**config.optimizer, num_steps=config.train.num_steps)
    size = count_params(jax.eval_shape(experiment.init, jax.random.key(0))) / 1e6
    assert size == pytest.approx(MILLIONS[path.stem], abs=0.05)
    assert f'--config=configs/{path.name}' in path.read_text()


def test_cifar10_is_the_papers_recipe():
    flat = flatten(load_config(ROOT / 'configs' / 'cifar10.py').to_dict())
    expected = {
        'model.channels': 128,
        'model.channel_multipliers': [1, 2, 2, 2],
        'model.num_res_blocks': 2,
        'model.attention_resolutions': [16],
        'model.dropout': 0.1,
        'schedule.name': 'linear',
        'schedule.num_timesteps': 1000,
        'loss.prediction': 'eps',
        'loss.weighting.name': 'simple',
        'optimizer.name': 'adam',
        'optimizer.learning_rate': 2e-4,
        'optimizer.warmup_steps': 5000,
        'optimizer.clip_norm': 1.0,
        'optimizer.decay': 'constant',
        'ema_decay': 0.9999,
        'train.batch_size': 128,
        'train.num_steps': 800_000,
        'data.flip': True,
        'class_conditional': False,
    }
    assert {key: flat[key] for key in expected} == expected


def test_defaults_are_locked_and_hold_every_argument_of_the_network():
    config = default_config()
    with pytest.raises(AttributeError):
        config.train.steps = 3
    assert 'time_conditioning' in config.model
    assert 'resolution' not in config.model  # the data's


def test_differences_tell_what_matters_to_a_run_and_nothing_else():
    ours, theirs = default_config(), default_config()
    ours.sample.steps = 7
    ours.train.num_steps = 9
    ours.data.dir = '/elsewhere'
    assert differences(ours.to_dict(), theirs.to_dict()) == []
    ours.model.channels = 32
    ours.schedule.name = 'linear'
    assert differences(ours.to_dict(), theirs.to_dict()) == [
        'model.channels: 128 -> 32',
        "schedule.name: 'cosine' -> 'linear'",
    ]


def test_a_config_from_before_a_key_was_added_reads_with_its_default():
    record = default_config().to_dict()
    record['sample']['steps'] = 7
    del record['sample']['order'], record['loss']['vlb_weight'], record['model']['learned_variance']
    filled = with_defaults(record)
    assert filled['sample']['steps'] == 7
    assert filled['sample']['order'] is None
    assert differences(default_config().to_dict(), filled) == []


def test_every_option_of_the_solvers_reaches_them():
    config = default_config()
    config.sample.lower_order_final = False
    config.sample.order = 3
    assert solver_options(config.sample) == {'lower_order_final': False, 'order': 3}


@pytest.mark.parametrize('name', ['edm', 've'])
def test_on_an_exploding_schedule_the_network_is_preconditioned(name):
    """A new network says 0, and so x0 is the paper's c_skip x: x near the data, nothing far away."""
    config = load_config()
    config.schedule = ConfigDict({'name': name})
    with pytest.raises(UsageError, match=r"set loss\.prediction='x0'"):
        make_experiment(config, DATA['digits'])
    config.loss.prediction = 'x0'
    config.loss.weighting.name = 'edm'
    experiment = make_experiment(config, DATA['digits'])
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(experiment.init, jax.random.key(0)))
    t = jnp.array([1e-4, 0.5])
    sigma = experiment.schedule.sigma(t)
    x = jnp.ones((2, 8, 8, 1))
    x0 = experiment.apply(params, x, experiment.schedule.timestep(t), label=jnp.zeros(2, int))
    np.testing.assert_allclose(x0[:, 0, 0, 0], 0.25 / (sigma**2 + 0.25), rtol=1e-5)
    assert jnp.isfinite(experiment.loss(params, x, jax.random.key(1), label=jnp.zeros(2, int))).all()
