"""DiT against diffusers', with weights and outputs that diffusers wrote."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import load_config

from diffusion_jax.config import model_section
from diffusion_jax.errors import UsageError
from diffusion_jax.experiment import DataInfo, make_experiment
from diffusion_jax.interop.dit import dit_config, dit_layout, dit_options, read_dit, write_dit
from diffusion_jax.interop.tensors import TensorFiles, find_weights
from diffusion_jax.models import DiT, count_params, functional
from diffusion_jax.models.dit import positions_2d

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'interop' / 'dit'
# Of the folder: copies of one embedder, a learned variance. The variant: embedders that differ, another norm_eps.
FOLDERS = {'published': (FIXTURES, 'transformer'), 'variant': (FIXTURES, 'variant')}


def config_of(name):
    folder, part = FOLDERS[name]
    return json.loads((folder / part / 'config.json').read_text())


def build(**options):
    return functional(lambda rngs: DiT(**options, rngs=rngs))


@pytest.fixture(scope='module', params=FOLDERS)
def loaded(request):
    """(name, tensors, apply, params, reference) of a small model that diffusers saved."""
    folder, part = FOLDERS[request.param]
    tensors = TensorFiles(find_weights(folder / part, 'diffusion_pytorch_model'))
    init, apply = build(**dit_options(config_of(request.param)), **dit_layout(tensors))
    params = read_dit(tensors, jax.eval_shape(init, jax.random.key(0)))
    where = folder if part == 'transformer' else folder / part
    return request.param, tensors, apply, params, np.load(where / 'reference.npz')


def test_it_computes_what_diffusers_does(loaded):
    _, _, apply, params, reference = loaded
    label = jnp.asarray(reference['label'])
    run = jax.jit(lambda x, t: apply(params, x, t, label=label))
    for i, t in enumerate(reference['t']):
        with jax.default_matmul_precision('highest'):
            ours = run(reference[f'x_{i}'], np.full(2, t))
        theirs = reference[f'y_{i}']
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()


def test_it_is_written_as_it_was_read(loaded):
    _, tensors, _, params, _ = loaded
    written = write_dit(params)
    assert written.keys() == set(tensors)
    assert all(written[name].astype(np.float16).tobytes() == tensors[name].tobytes() for name in tensors)


def test_copies_of_one_embedder_are_read_as_one(loaded):
    name, tensors, _, params, _ = loaded
    assert len(params['embedders']) == (1 if name == 'published' else 2)
    if name == 'published':
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        leaf = 'transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias'
        changed = {key: tensors[key] for key in tensors} | {leaf: tensors[leaf] + np.float16(1)}
        assert not dit_layout(changed)['shared_embedder']
        with pytest.raises(UsageError, match='no copies of one'):
            read_dit(changed, shapes)


@pytest.mark.parametrize('name', FOLDERS)
def test_the_config_survives_a_round_trip(name):
    options = dit_options(config_of(name))
    assert dit_options(json.loads(json.dumps(dit_config(options)))) == options


def test_its_size_is_the_published_one():
    init, _ = build(**dit_options({'out_channels': 8, 'sample_size': 32}))
    assert count_params(jax.eval_shape(init, jax.random.key(0))) / 1e6 == pytest.approx(674.83, abs=0.005)


def test_published_configs_are_of_a_class_that_was_split_since():
    config = {**config_of('published'), '_class_name': 'Transformer2DModel'}
    assert dit_options(config) == dit_options(config_of('published'))
    del config['norm_type']
    with pytest.raises(UsageError, match="norm_type='layer_norm' is not supported"):
        dit_options(config)


def test_positions_of_another_size_span_the_same_range():
    own, larger = positions_2d(4, 4, 8, 4), positions_2d(8, 4, 8, 4)
    np.testing.assert_allclose(larger.reshape(8, 4, 8)[::2], own.reshape(4, 4, 8), atol=1e-6)
    first, second = own.reshape(4, 4, 8)[0, 1], own.reshape(4, 4, 8)[1, 0]
    np.testing.assert_allclose(first[:4], second[4:])  # the column comes first


def test_images_need_not_be_square():
    """A patch that changes moves its own part of the prediction most: height and width are not mixed up."""
    init, apply = build(**TINY)
    params = perturbed(init(jax.random.key(0)), 0.02)
    params['proj_out_2']['kernel'] = 50 * params['proj_out_2']['kernel']
    x = jax.random.normal(jax.random.key(1), (1, 8, 4, 1))
    y = jax.jit(apply)(params, x, jnp.array([5.0]), label=jnp.array([0]))
    assert y.shape == (1, 8, 4, 1)
    moved = jax.jit(apply)(params, x.at[0, 6, 1].add(1.0), jnp.array([5.0]), label=jnp.array([0]))
    assert np.unravel_index(np.abs(moved - y).argmax(), y.shape)[1:3] in [(6, 0), (6, 1), (7, 0), (7, 1)]


TINY = {
    'resolution': 8,
    'image_channels': 1,
    'channels': 16,
    'num_layers': 2,
    'num_heads': 2,
    'num_classes': 3,
}


def perturbed(params, scale):
    """With noise: at its beginning the network is zero."""
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda leaf: leaf + scale * jax.random.normal(next(keys), leaf.shape), params)


def tiny_inputs():
    return jax.random.normal(jax.random.key(1), (2, 8, 8, 1)), jnp.array([0.0, 900.0]), jnp.array([0, 3])


def test_it_begins_as_zero_and_each_block_as_the_identity():
    x, t, label = tiny_inputs()
    init, apply = build(**TINY)
    params = init(jax.random.key(0))
    assert not np.any(jax.jit(apply)(params, x, t, label=label))
    assert not np.any(params['transformer_blocks']['0']['modulation']['kernel'])
    table = params['embedders']['0']['class_embedder']['embedding']
    assert np.std(table) == pytest.approx(0.02, rel=0.3)
    assert np.abs(params['patch_embed']['kernel']).max() <= np.sqrt(6 / (4 + 16))


@pytest.mark.parametrize('remat', ['convs', 'blocks'])
@pytest.mark.parametrize('shared', [True, False])
def test_gradients_do_not_depend_on_what_is_kept(remat, shared):
    x, t, label = tiny_inputs()

    def gradient(remat):
        init, apply = build(**TINY, remat=remat, shared_embedder=shared)
        params = perturbed(init(jax.random.key(0)), 0.1)
        return jax.jit(jax.grad(lambda params: apply(params, x, t, label=label).var()))(params)

    kept, again = gradient('none'), gradient(remat)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(kept))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), kept, again)


def test_bfloat16_gives_nearly_the_same(loaded):
    name, tensors, apply, params, reference = loaded
    _, half = build(**dit_options(config_of(name)), **dit_layout(tensors), dtype='bfloat16')
    label = jnp.asarray(reference['label'])
    ours, theirs = (
        jax.jit(f)(params, reference['x_0'], reference['t'][:1].repeat(2), label=label) for f in (half, apply)
    )
    assert ours.dtype == jnp.float32
    assert np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max()


def test_dropout_needs_a_key():
    x, t, label = tiny_inputs()
    init, apply = build(**TINY, dropout=0.5)
    params = perturbed(init(jax.random.key(0)), 0.1)
    run = jax.jit(apply)
    plain, again = run(params, x, t, label), run(params, x, t, label)
    np.testing.assert_array_equal(plain, again)
    assert not np.allclose(plain, run(params, x, t, label, dropout_key=jax.random.key(0)), atol=1e-4)


@pytest.mark.parametrize('variance', [False, True])
@pytest.mark.parametrize('names', [(), ('a', 'b')])
def test_a_step_of_training(variance, names):
    config = load_config()
    config.unlock()
    config.model = model_section('dit')
    config.lock()
    config.model.update({name: TINY[name] for name in ('channels', 'num_layers', 'num_heads')})
    config.model.learned_variance = variance
    config.loss.vlb_weight = 0.001 if variance else 0.0
    config.loss.prediction = 'eps'
    experiment = make_experiment(config, DataInfo((8, 8, 1), names))
    params = experiment.init(jax.random.key(0))
    x0 = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    given = {'label': jnp.array([0, 1, 2, 0])} if names else {}

    @jax.jit
    def step(params):
        loss, gradient = jax.value_and_grad(
            lambda params: experiment.loss(params, x0, jax.random.key(2), **given).mean()
        )(params)
        return loss, jax.tree.map(lambda leaf, change: leaf - 0.02 * change, params, gradient)

    first, params = step(params)
    second, _ = step(params)
    assert np.isfinite(second)
    assert second < first


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'channels': 18}, 'channels in a multiple of 4'),
        ({'num_layers': 0}, 'at least one layer'),
        ({'num_heads': 3}, 'num_heads=3 does not divide'),
        ({'patch_size': 3}, 'divide the resolution, 8: got 3'),
        ({'dropout': 1.0}, r'dropout must be in \[0, 1\)'),
        ({'remat': 'some'}, 'unknown remat'),
        ({'dtype': 'float16'}, 'unknown dtype'),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        nnx.eval_shape(lambda: DiT(**{**TINY, **changes}, rngs=nnx.Rngs(0)))


def test_inputs_that_do_not_fit_are_refused():
    x, t, label = tiny_inputs()
    init, apply = build(**TINY)
    params = jax.eval_shape(init, jax.random.key(0))
    with pytest.raises(UsageError, match='needs a label'):
        jax.eval_shape(lambda params: apply(params, x, t), params)
    with pytest.raises(UsageError, match='images of 7x8 cannot be cut in patches of 2'):
        jax.eval_shape(lambda params: apply(params, x[:, 1:], t, label=label), params)


def test_absent_keys_have_the_defaults_of_diffusers():
    assert dit_options({}) == {
        'resolution': 32,
        'image_channels': 4,
        'patch_size': 2,
        'channels': 1152,
        'num_layers': 28,
        'num_heads': 16,
        'dropout': 0.0,
        'epsilon': 1e-5,
        'learned_variance': False,
        'num_classes': 1000,
    }


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'norm_type': 'ada_norm_single'}, "norm_type='ada_norm_single' is not supported, only 'ada_norm_zero'"),
        ({'activation_fn': 'geglu'}, "activation_fn='geglu'"),
        ({'attention_bias': False}, 'attention_bias=False'),
        ({'norm_elementwise_affine': True}, 'norm_elementwise_affine=True'),
        ({'upcast_attention': True}, 'upcast_attention=True'),
        ({'out_channels': 5}, 'out_channels=5'),
        ({'num_embeds_ada_norm': None}, 'num_embeds_ada_norm=None'),
    ],
)
def test_configs_that_compute_something_else_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        dit_options({**config_of('published'), **change})


def test_one_without_labels_cannot_be_written():
    with pytest.raises(UsageError, match='no DiT without labels'):
        dit_config({**dit_options(config_of('variant')), 'num_classes': 0})


def test_tensors_that_do_not_fit_are_named(loaded):
    name, tensors, *_ = loaded
    have = {key: tensors[key] for key in tensors}

    def read(tensors):
        """As a folder is read: with an embedder for each block where they are no copies."""
        init, _ = build(**dit_options(config_of(name)), **dit_layout(tensors))
        return read_dit(tensors, jax.eval_shape(init, jax.random.key(0)))

    for missing in (
        'transformer_blocks.1.attn1.to_k.bias',
        'transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight',
        'transformer_blocks.0.norm1.emb.timestep_embedder.linear_2.bias',
    ):
        with pytest.raises(UsageError, match=rf'{missing} is missing'):
            read({key: array for key, array in have.items() if key != missing})
        with pytest.raises(UsageError, match=rf'{missing} is \(1,\), not'):
            read({**have, missing: np.zeros(1, np.float16)})
    for surplus in ('pos_embed.pos_embed', 'transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.bias'):
        with pytest.raises(UsageError, match=rf'{surplus} is no part of this model'):
            read({**have, surplus: np.zeros(1)})
