import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import load_config

from diffusion_jax import UsageError
from diffusion_jax.data.batches import Batches
from diffusion_jax.experiment import DataInfo, info_of, load_data, make_experiment
from diffusion_jax.losses import LossHistory, index_probabilities
from diffusion_jax.training.inputs import Inputs
from diffusion_jax.training.optimizer import make_optimizer
from diffusion_jax.training.sharding import make_mesh, replicated, sharded_batch
from diffusion_jax.training.step import ema_decay_at, init_state, make_held_out_loss, make_train_step

ADAM = {
    'name': 'adam',
    'learning_rate': 1.0,
    'warmup_steps': 0,
    'decay': 'constant',
    'b1': 0.9,
    'b2': 0.999,
    'weight_decay': 0.0,
    'clip_norm': 1.0,
    'num_steps': 100,
}


def linear_step(**changes):
    """A training step of the model params * x, whose loss and gradient are known."""
    given = {name: changes.pop(name) for name in ('flip', 'null_label', 'label_dropout') if name in changes}
    arguments = {'ema_decay': 0.9, 'inputs': Inputs(**{'null_label': 3, 'label_dropout': 0.25} | given)} | changes
    seen = {}

    def loss(params, x0, key, **conditioning):
        seen.update(conditioning)
        return (params['w'] * x0.mean(axis=(1, 2, 3)) - 1.0) ** 2

    optimizer = optax.sgd(0.1)
    return (
        init_state(lambda key: {'w': jnp.float32(0.5)}, optimizer, 0),
        make_train_step(loss, optimizer, **arguments),
        seen,
    )


BATCH = {'image': jnp.full((4, 2, 2, 1), 255, jnp.uint8), 'label': jnp.array([0, 1, 2, 0])}


def test_one_step_is_gradient_descent_and_an_average():
    state, step, _ = linear_step()
    new, metrics = step(state, {}, BATCH)
    assert float(metrics['loss']) == pytest.approx(0.25)
    assert float(metrics['grad_norm']) == pytest.approx(1.0)
    assert float(new.params['w']) == pytest.approx(0.6)
    assert float(new.ema['w']) == pytest.approx(0.1 * 0.5 + 0.9 * 0.6)  # warm-up: decay 1 / 10 at first
    assert int(new.step) == 1
    assert new.key == state.key


def test_the_average_warms_up_to_its_decay():
    steps = jnp.array([0, 10, 1000, 10**6])
    np.testing.assert_allclose(ema_decay_at(steps, 0.9999), [0.1, 0.55, 1001 / 1010, 0.9999], rtol=1e-6)


def test_labels_are_dropped_at_their_rate_and_differ_from_step_to_step():
    state, step, seen = linear_step()
    big = {'image': jnp.zeros((4000, 2, 2, 1), jnp.uint8), 'label': jnp.ones(4000, jnp.int32)}
    new, _ = step(state, {}, big)
    first = seen['label']
    assert float((first == 3).mean()) == pytest.approx(0.25, abs=0.03)
    step(new, {}, big)
    assert (first != seen['label']).any()
    assert 'dropout_key' in seen


def test_an_unconditional_step_passes_no_label():
    state, step, seen = linear_step(null_label=0)
    step(state, {}, BATCH)
    assert set(seen) == {'dropout_key'}


def test_a_step_with_a_loss_history_draws_by_it_and_adds_to_it():
    state, step, seen = linear_step()
    assert state.loss_history is None
    # Losses of 1, 2, 3 and 4: what is drawn is known to be far from uniform.
    values = jnp.broadcast_to(jnp.arange(1.0, 5.0)[:, None], (4, 10))
    history = LossHistory(values, jnp.full(4, 10))
    state = dataclasses.replace(state, loss_history=history)
    big = {'image': jnp.full((4000, 2, 2, 1), 255, jnp.uint8), 'label': jnp.ones(4000, jnp.int32)}
    new, metrics = step(state, {}, big)
    t = np.asarray(seen['t'])
    p = np.asarray(index_probabilities(history))
    counts = np.array([(t == i / 4).sum() for i in (1, 2, 3, 4)])
    np.testing.assert_allclose(counts / 4000, p, atol=0.03)
    np.testing.assert_array_equal(new.loss_history.counts, 10 + counts)
    # Every loss is (0.5 - 1)^2: unweighted in the history, and weighted by 1 / (4 p) in what is trained on.
    np.testing.assert_array_equal(new.loss_history.values, 0.25)
    weight = (counts / (4 * p)).sum() / 4000
    assert float(metrics['loss']) == pytest.approx(0.25 * weight, rel=1e-5)
    assert float(metrics['grad_norm']) == pytest.approx(weight, rel=1e-5)
    step(new, {}, big)
    assert (np.asarray(seen['t']) != t).any()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'loss__vlb_weight': 0.001}, 'set model.learned_variance=True, or loss.vlb_weight=0'),
        ({'model__learned_variance': True}, r'never trained: set it \(0.001'),
        ({'loss__vlb_weight': -1.0, 'model__learned_variance': True}, '0 or more'),
        (
            {'loss__vlb_weight': 0.001, 'model__learned_variance': True, 'schedule__num_timesteps': None},
            'give the schedule a num_timesteps, or set vlb_weight=0',
        ),
        (
            {'loss__time_sampler': 'loss_history', 'schedule__num_timesteps': None},
            'give the schedule a num_timesteps, or take another time_sampler',
        ),
        ({'loss__time_sampler': 'importance'}, 'Valid choices: loss_history, stratified, uniform'),
    ],
)
def test_objectives_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        make_experiment(load_config(**changes), DataInfo((8, 8, 1), ('a', 'b')))


@pytest.fixture(scope='module')
def tiny():
    config = load_config()
    splits = load_data(config)
    experiment = make_experiment(config, info_of(splits))
    optimizer, _ = make_optimizer(**config.optimizer, num_steps=config.train.num_steps)
    return config, splits, experiment, optimizer


def train_on(tiny, devices, steps=3):
    config, splits, experiment, optimizer = tiny
    mesh = make_mesh(devices=jax.devices()[:devices])
    whole, split = replicated(mesh), sharded_batch(mesh)
    batches = Batches(splits.train, 16, config.seed, replicated=whole, sharded=split)
    state = jax.jit(lambda: init_state(experiment.init, optimizer, config.seed), out_shardings=whole)()
    step = jax.jit(
        make_train_step(
            experiment.loss,
            optimizer,
            ema_decay=0.99,
            inputs=Inputs(True, 10, 0.1),
        ),
        donate_argnums=0,
    )
    losses = []
    for i in range(steps):
        before = state
        state, metrics = step(state, batches.arrays, batches(i))
        losses.append(float(metrics['loss']))
    assert jax.tree.leaves(before.params)[0].is_deleted()  # donated: the update is in place
    return losses, state


@pytest.mark.slow  # with labels and dropout; without, test_sharding.py has every mesh
def test_eight_devices_train_as_one(tiny):
    one, state = train_on(tiny, 1)
    eight, sharded = train_on(tiny, 8)
    np.testing.assert_allclose(one, eight, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(sharded.ema), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_the_state_is_created_on_every_device(tiny):
    config, _, experiment, optimizer = tiny
    whole = replicated(make_mesh())
    state = jax.jit(lambda: init_state(experiment.init, optimizer, config.seed), out_shardings=whole)()
    assert all(leaf.sharding.is_equivalent_to(whole, leaf.ndim) for leaf in jax.tree.leaves(state.params))
    for params, ema in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema), strict=True):
        np.testing.assert_array_equal(params, ema)


def test_the_held_out_loss_is_a_function_of_its_key(tiny, key):
    _, splits, experiment, _ = tiny
    params = jax.jit(experiment.init)(key)
    loss = jax.jit(make_held_out_loss(experiment.loss, Inputs(null_label=10)))
    batch = {'image': splits.test.images[:16], 'label': splits.test.labels[:16]}
    ours, others = (jax.random.key_data(key) for key in (key, jax.random.key(7)))
    assert loss(params, {}, batch, ours) == loss(params, {}, batch, ours)
    assert loss(params, {}, batch, ours) != loss(params, {}, batch, others)


@pytest.mark.parametrize(
    ('changes', 'at', 'expected'),
    [
        ({}, [0, 50, 100], [1, 1, 1]),
        ({'warmup_steps': 10}, [0, 5, 10, 100], [0, 0.5, 1, 1]),
        ({'decay': 'linear', 'warmup_steps': 20}, [20, 60, 100], [1, 0.5, 0]),
        ({'decay': 'cosine'}, [0, 50, 100], [1, 0.5, 0]),
    ],
)
def test_learning_rates_warm_up_and_decay(changes, at, expected):
    _, rate = make_optimizer(**ADAM | changes)
    np.testing.assert_allclose([float(rate(step)) for step in at], expected, atol=1e-6)


def test_clipping_and_weight_decay_do_what_they_say():
    params = {'w': jnp.array([3.0, 4.0])}

    def update(grads, **changes):
        optimizer, _ = make_optimizer(**ADAM | changes)
        return optimizer.update({'w': grads}, optimizer.init(params), params)[0]['w']

    plain = update(jnp.array([1e-9, 0.0]))
    decayed = update(jnp.array([1e-9, 0.0]), name='adamw', weight_decay=0.1)
    np.testing.assert_allclose(decayed - plain, -0.1 * params['w'], rtol=1e-5)
    # Adam is blind to the gradient's scale but for epsilon: far below it, a gradient cut to 1e-9 hardly moves.
    big = jnp.array([30.0, 40.0])
    np.testing.assert_allclose(update(big, clip_norm=1e-9), update(big / 50 * 1e-9, clip_norm=None), rtol=1e-4)
    assert abs(float(update(big, clip_norm=1e-9)[0])) < 0.2 < abs(float(update(big)[0]))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'name': 'sgd'}, 'Valid choices: adam, adamw'),
        ({'decay': 'step'}, 'Valid choices: constant, cosine, linear'),
        ({'weight_decay': 0.1}, "needs optimizer 'adamw'"),
        ({'learning_rate': 0.0}, 'learning_rate > 0'),
        ({'clip_norm': 0.0}, 'above 0'),
        ({'warmup_steps': 100}, 'leaves nothing after 100 warmup_steps'),
    ],
)
def test_impossible_optimizers_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        make_optimizer(**ADAM | changes)


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    state, step, _ = linear_step(skip_nonfinite=True)
    images = np.full((4, 2, 2, 1), 255, np.uint8)
    labels = np.zeros(4, np.int32)
    good, metrics = jax.jit(step)(state, {}, {'image': images, 'label': labels})
    assert metrics['skipped'] == 0
    assert good.params['w'] != state.params['w']
    broken = dataclasses.replace(good, params={'w': jnp.float32(jnp.inf)})
    after, metrics = jax.jit(step)(broken, {}, {'image': images, 'label': labels})
    assert metrics['skipped'] == 1
    assert after.step == good.step + 1
    assert after.params['w'] == jnp.inf
    assert after.ema['w'] == good.ema['w']
    for a, b in zip(jax.tree.leaves(after.opt_state), jax.tree.leaves(good.opt_state), strict=True):
        assert a == b
