"""One training, on meshes of every shape: the same losses, and each device with its part of the state alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from runs import ROOT, load_config

from diffusion_jax import UsageError, losses, schedules
from diffusion_jax.data.batches import Batches
from diffusion_jax.data.image_set import ImageSet
from diffusion_jax.experiment import DataInfo, make_experiment
from diffusion_jax.models import UNet, functional
from diffusion_jax.training.inputs import Inputs
from diffusion_jax.training.optimizer import make_optimizer
from diffusion_jax.training.sharding import (
    DEFAULT_RULES,
    bytes_per_device,
    fetch,
    make_mesh,
    on_mesh,
    param_shardings,
    put,
    replicated,
    sharded_batch,
    with_shardings,
)
from diffusion_jax.training.step import init_state, make_train_step, scanned, state_shardings

MESHES = {
    'data=8': {},
    'fsdp=8': {'data': 1, 'fsdp': 8},
    'data=2, fsdp=2, tensor=2': {'data': 2, 'fsdp': 2, 'tensor': 2},
}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
BATCH = {'image': np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)}
STEPS = 4


@functools.cache
def network(remat='none'):
    def build(rngs):
        return UNet(
            resolution=8,
            channels=32,
            channel_multipliers=(1,),
            num_res_blocks=1,
            attention_resolutions=(8,),
            num_heads=2,
            remat=remat,
            rngs=rngs,
        )

    return functional(build)


def compiled(mesh, *, remat='none', accumulate=1, per_dispatch=None):
    """(compiled step, a function that makes the state before it)."""
    init, apply = network(remat)
    loss = functools.partial(losses.diffusion_loss, apply, schedule=schedules.cosine(1000))

    def create():
        return init_state(init, OPTIMIZER, 0)

    shardings = state_shardings(jax.eval_shape(create), OPTIMIZER, DEFAULT_RULES, mesh)
    step = make_train_step(
        loss,
        OPTIMIZER,
        ema_decay=0.9,
        inputs=Inputs(True, 0, 0.0),
        accumulate=accumulate,
        param_shardings=shardings.params,
    )
    sharding, shape = sharded_batch(mesh), BATCH['image'].shape
    if per_dispatch:
        step = scanned(step)
        sharding, shape = jax.sharding.NamedSharding(mesh, P(None, *sharding.spec)), (per_dispatch, *shape)
    jitted = jax.jit(on_mesh(mesh, step), donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    shapes = with_shardings(jax.eval_shape(create), shardings)
    batch = {'image': jax.ShapeDtypeStruct(shape, np.uint8, sharding=sharding)}
    return jitted.lower(shapes, {}, batch).compile(), jax.jit(create, out_shardings=shardings)


@functools.cache
def on_one_device():
    """(losses, parameters on the host) of a few steps."""
    return trajectory(*compiled(make_mesh(devices=jax.devices()[:1])), make_mesh(devices=jax.devices()[:1]))


def trajectory(step, create, mesh):
    state, batch, seen = create(), put(BATCH, sharded_batch(mesh)), []
    for _ in range(STEPS):
        state, metrics = step(state, {}, batch)
        seen.append(float(metrics['loss']))
    return seen, jax.tree.map(fetch, state.params)


def assert_close(ours, theirs, rtol=1e-5):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=rtol)
    for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-4)  # Adam's first steps have the size of the learning rate, 1e-3


def ancestors_of_gathers(hlo):
    """For each all-gather of a compiled program, the inputs of the program (by name) that it depends on."""
    entry = hlo[hlo.index('\nENTRY ') :]
    inputs, operands, gathers = {}, {}, []
    for name, rest in re.findall(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$', entry, flags=re.M):
        label = re.search(r'parameter\(\d+\).*op_name="([^"]+)"', rest)
        if label:
            inputs[name] = label[1]
        operands[name] = re.findall(r'%([\w.\-]+)', rest.split('metadata=')[0])
        if re.search(r' all-gather(-start)?\(', rest):
            gathers.append(name)

    @functools.cache
    def reach(name):
        own = {inputs[name]} if name in inputs else set()
        return frozenset(own.union(*(reach(o) for o in operands.get(name, ()) if o in operands)))

    return [reach(name) for name in gathers]


@pytest.mark.parametrize('name', MESHES)
def test_a_mesh_changes_where_the_state_is_and_not_what_is_learned(name):
    mesh = make_mesh(MESHES[name])
    step, create = compiled(mesh)
    hlo = step.as_text()
    state = create()
    whole, part = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params)), bytes_per_device(state.params)
    shares = {'data=8': 1, 'fsdp=8': 1 / 8, 'data=2, fsdp=2, tensor=2': 1 / 4}
    assert part == pytest.approx(whole * shares[name], rel=0.3)  # of so small a network, much is too small to split
    for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state)):
        assert len(leaf.addressable_shards) == 8
    moments = state.opt_state[1][0]
    for params in (state.ema, moments.mu, moments.nu):
        assert bytes_per_device(params) == part

    gathers = ancestors_of_gathers(hlo)
    if name == 'data=8':
        assert not gathers
        assert 'all-reduce' in hlo
    else:
        assert gathers
        assert any(any(label.startswith('state.params') for label in inputs) for inputs in gathers)
        # Gradients are summed over devices; the CPU compiler has no reduce-scatter and writes all-reduce and slice.
        assert 'reduce-scatter' in hlo or ('all-reduce' in hlo and 'dynamic-slice' in hlo)
        for inputs in gathers:
            assert not [label for label in inputs if label.startswith(('state.opt_state', 'state.ema'))]
    assert_close(trajectory(step, create, mesh), on_one_device())


def test_each_of_eight_devices_holds_an_eighth_of_the_cifar10_state():
    config = load_config(ROOT / 'configs' / 'cifar10.py')
    experiment = make_experiment(config, DataInfo((32, 32, 3), ()))
    optimizer, _ = make_optimizer(**config.optimizer, num_steps=config.train.num_steps)
    shapes = jax.eval_shape(lambda: init_state(experiment.init, optimizer, 0))

    def size(mesh):
        return bytes_per_device(with_shardings(shapes, state_shardings(shapes, optimizer, DEFAULT_RULES, mesh)))

    whole = size(make_mesh(devices=jax.devices()[:1]))
    assert whole == pytest.approx(4 * 4 * 35_746_307, rel=1e-6)  # parameters, their average, two moments
    assert size(make_mesh(MESHES['fsdp=8'])) == pytest.approx(whole / 8, rel=0.02)
    assert size(make_mesh(MESHES['data=2, fsdp=2, tensor=2'])) == pytest.approx(whole / 4, rel=0.15)


def test_an_all_gather_of_the_optimiser_would_be_seen():
    """The test above can fail: a step that leaves its moments whole gathers them."""
    mesh = make_mesh(MESHES['fsdp=8'])
    split, whole = jax.sharding.NamedSharding(mesh, P('fsdp')), replicated(mesh)

    def step(opt_state):
        return jax.lax.with_sharding_constraint(opt_state * 2, whole)

    shape = jax.ShapeDtypeStruct((1024,), np.float32, sharding=split)
    hlo = jax.jit(step, out_shardings=whole).lower(shape).compile().as_text()
    assert ancestors_of_gathers(hlo) == [frozenset({'opt_state'})]


@pytest.mark.slow
def test_rematerialised_and_accumulated_steps_learn_the_same():
    mesh = make_mesh(devices=jax.devices()[:1])
    plain = compiled(mesh)[0].memory_analysis().temp_size_in_bytes
    for remat in ('convs', 'blocks'):
        assert_close(trajectory(*compiled(mesh, remat=remat), mesh), on_one_device())
    step, create = compiled(make_mesh(MESHES['fsdp=8']), accumulate=2)
    state, metrics = step(create(), {}, put(BATCH, sharded_batch(make_mesh(MESHES['fsdp=8']))))
    # Other noise, image by image: the same loss within what the noise makes of it.
    assert float(metrics['loss']) == pytest.approx(on_one_device()[0][0], rel=0.05)
    assert int(state.step) == 1
    assert plain > 0


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """With a loss that draws nothing, exactly."""

    def loss(params, x0, key, **conditioning):
        return (params['w'] * x0.mean(axis=(1, 2, 3)) - 1.0) ** 2

    def run(accumulate):
        step = make_train_step(
            loss,
            optax.sgd(0.1),
            ema_decay=0.9,
            inputs=Inputs(False, 0, 0.0),
            accumulate=accumulate,
        )
        state = init_state(lambda key: {'w': jnp.float32(0.5)}, optax.sgd(0.1), 0)
        return jax.jit(step)(state, {}, BATCH)

    (one, metrics), (four, metrics_of_four) = run(1), run(4)
    np.testing.assert_allclose(four.params['w'], one.params['w'], rtol=1e-6)
    np.testing.assert_allclose(metrics_of_four['loss'], metrics['loss'], rtol=1e-6)
    np.testing.assert_allclose(metrics_of_four['grad_norm'], metrics['grad_norm'], rtol=1e-6)


@pytest.mark.slow
def test_many_steps_in_one_dispatch_are_those_steps():
    mesh = make_mesh(devices=jax.devices()[:1])
    steps, create = compiled(mesh, per_dispatch=STEPS)
    batches = {'image': np.stack([BATCH['image']] * STEPS)}
    sharding = jax.sharding.NamedSharding(mesh, P(None, *sharded_batch(mesh).spec))
    state, metrics = steps(create(), {}, put(batches, sharding))
    assert metrics['loss'].shape == (STEPS,)
    assert_close((list(map(float, metrics['loss'])), jax.tree.map(fetch, state.params)), on_one_device())


def test_batches_in_a_stack_are_the_batches(key):
    images = ImageSet(np.arange(24 * 4, dtype=np.uint8).reshape(24, 2, 2, 1))
    mesh = make_mesh(MESHES['data=2, fsdp=2, tensor=2'])
    for placement in ('device', 'host'):
        batches = Batches(images, 8, 0, replicated=replicated(mesh), sharded=sharded_batch(mesh), placement=placement)
        stack = batches(3, 2)
        for i in range(2):
            for name, leaf in batches(3 + i).items():
                np.testing.assert_array_equal(leaf, stack[name][i])
        stream = batches.stream(3, 2)
        first, second = next(stream), next(stream)
        stream.close()
        for name in stack:
            np.testing.assert_array_equal(first[name], stack[name])
            np.testing.assert_array_equal(second[name], batches(5, 2)[name])


@pytest.mark.parametrize(
    ('path', 'shape', 'spec'),
    [
        ('middle_in/attention/query/kernel', (64, 64), P('fsdp', 'tensor')),
        ('middle_in/attention/query/bias', (64,), P('tensor')),
        ('middle_in/attention/out/kernel', (64, 64), P('tensor', 'fsdp')),
        ('middle_in/attention/out/bias', (64,), P()),
        ('down/0/blocks/0/res/conv1/kernel', (3, 3, 32, 64), P(None, None, 'fsdp', 'tensor')),
        ('down/0/blocks/0/res/conv2/kernel', (3, 3, 32, 64), P(None, None, 'tensor', 'fsdp')),
        ('time_in/kernel', (32, 128), P('fsdp', 'tensor')),
        ('conv_in/kernel', (3, 3, 3, 64), P(None, None, None, 'fsdp')),
        ('conv_in/kernel', (3, 3, 3, 63), P()),  # nothing that 2 divides
        ('norm_out/scale', (64,), P()),  # too small to split
    ],
)
def test_the_default_rules(path, shape, spec):
    *parents, name = path.split('/')
    tree = {name: jax.ShapeDtypeStruct(shape, np.float32)}
    for parent in reversed(parents):
        tree = {parent: tree}
    mesh = make_mesh(MESHES['data=2, fsdp=2, tensor=2'])
    [sharding] = jax.tree.leaves(param_shardings(tree, DEFAULT_RULES, mesh))
    assert sharding.spec == spec


def test_the_first_rule_that_fits_holds():
    mesh = make_mesh(MESHES['fsdp=8'])
    params = {name: jax.ShapeDtypeStruct((64, 64), np.float32) for name in ('kept', 'split')}
    specs = param_shardings(params, (('kept', 'replicate'), ('', 'fsdp')), mesh)
    assert (specs['kept'].spec, specs['split'].spec) == (P(), P(None, 'fsdp'))


@pytest.mark.parametrize(
    ('rules', 'message'),
    [
        ((('', 'zero'),), r"unknown sharding rule 'zero'.*column, fsdp, replicate, row"),
        ((('(', 'fsdp'),), 'no regular expression'),
        ((('other', 'fsdp'),), r"no sharding rule fits the parameter 'w'.*\('', 'fsdp'\)"),
        (('fsdp',), 'must be pairs'),
    ],
)
def test_rules_that_cannot_be_followed_are_refused(rules, message):
    with pytest.raises(UsageError, match=message):
        param_shardings({'w': jax.ShapeDtypeStruct((8,), np.float32)}, rules, make_mesh())


@pytest.mark.parametrize(
    ('sizes', 'message'),
    [
        ({'data': 3}, 'data=3, fsdp=1, tensor=1 does not fit 8 devices'),
        ({'fsdp': 3}, 'data=-1, fsdp=3'),
        ({'data': -1, 'fsdp': -1}, 'one of them may be -1'),
        ({'tensor': 0}, 'tensor=0'),
        ({'model': 2}, r"unknown mesh axis 'model'.*data, fsdp, tensor"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(UsageError, match=message):
        make_mesh(sizes)
