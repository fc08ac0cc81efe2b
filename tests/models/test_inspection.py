"""What is seen in a network, against its modules called one by one, and against NumPy on its parameters."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import NETWORKS, assert_close, network

import diffusion_jax as dj
from diffusion_jax import UsageError, guidance, schedules
from diffusion_jax.config import default_config
from diffusion_jax.denoisers import ModelDenoiser, edm_preconditioned
from diffusion_jax.experiment import DataInfo, make_experiment
from diffusion_jax.interop.folders import make_network
from diffusion_jax.models import MODELS, inspection
from diffusion_jax.models.blocks import timestep_embedding
from diffusion_jax.models.functional import ModuleApply, count_params, functional
from diffusion_jax.models.inspection import (
    ablated,
    activations,
    average_maps,
    count_skips,
    cross_attention_maps,
    network_map,
)
from diffusion_jax.models.layers import sinusoidal_embedding
from diffusion_jax.models.taps import with_taps

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'interop'
RARE = ('patches', 'resblocks', 'dit_embedders')
EVERY_NETWORK = [pytest.param(name, marks=pytest.mark.slow) if name in RARE else name for name in NETWORKS]
U_NETS = ('unet', 'ddpm_unet', 'conditional_unet', 'text_unet')


@functools.cache
def seen(name):
    """All activations of a network."""
    apply, params, x, t, conditioning = network(name)
    return activations(apply, params, x, t, **conditioning)


def map_of(name):
    apply, _, x, _, _ = network(name)
    return network_map(apply, x.shape[1:])


# --- the map ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', EVERY_NETWORK)
def test_each_parameter_is_of_one_block_of_the_map(name):
    apply, params, *_ = network(name)
    entries = map_of(name)
    assert sum(entry.num_params for entry in entries) == count_params(params)
    for entry in entries:
        node = params
        for key in entry.path.split('.'):
            node = node.get(key, {})  # a norm without parameters is in no dict
        assert count_params(node) == entry.num_params, entry.path
    assert len({entry.path for entry in entries}) == len(entries)
    assert {type(leaf) for leaf in jax.tree.leaves(apply.shapes)} == {jax.ShapeDtypeStruct}


@pytest.mark.parametrize('name', EVERY_NETWORK)
def test_the_maps_shapes_are_those_of_what_the_blocks_give(name):
    shapes = {path: block.shape[1:] for path, block in seen(name).blocks.items()}
    assert shapes == {entry.path: entry.output_shape for entry in map_of(name)}


def test_the_map_of_a_unet():
    entries = {entry.path: entry for entry in map_of('unet')}
    of = {path: (e.kind, e.side, e.level, e.resolution, e.channels, e.heads) for path, e in entries.items()}
    assert list(of)[:4] == ['time_in', 'time_out', 'label', 'conv_in']
    assert of['label'] == ('label_embedding', None, None, None, 32, None)
    assert of['conv_in'] == ('conv_in', 'down', 0, (8, 8), 8, None)
    assert of['down.0.resample'] == ('downsample', 'down', 0, (4, 4), 8, None)
    assert of['down.1.blocks.0.attention'] == ('attention', 'down', 1, (4, 4), 16, 1)
    assert of['middle_out'] == ('res_block', 'middle', 1, (4, 4), 16, None)
    assert of['up.0.blocks.1.res'] == ('res_block', 'up', 1, (4, 4), 16, None)
    assert of['up.1.blocks.0.res'] == ('res_block', 'up', 0, (8, 8), 8, None)
    assert list(of)[-1] == 'conv_out'
    made = [e.path for e in entries.values() if e.skip_out is not None]
    assert made == ['conv_in', 'down.0.blocks.0.res', 'down.0.resample', 'down.1.blocks.0.attention']
    assert [e.skip_out for e in entries.values() if e.skip_out is not None] == [0, 1, 2, 3]
    taken = {e.path: e.skip_in for e in entries.values() if e.skip_in is not None}
    assert taken == {f'up.{i}.blocks.{j}.res': 3 - 2 * i - j for i in range(2) for j in range(2)}


def test_resblocks_that_resample_and_patches_are_told():
    kinds = {entry.path: entry.kind for entry in map_of('resblocks')}
    assert (kinds['down.0.resample'], kinds['up.0.resample']) == ('downsample', 'upsample')
    assert {entry.path: entry.resolution for entry in map_of('patches')}['conv_in'] == (8, 8)


def test_the_map_of_a_transformer_is_in_order():
    entries = [entry for entry in map_of('dit') if entry.kind == 'dit_block']
    assert [entry.path for entry in entries] == [f'transformer_blocks.{i}' for i in range(11)]
    assert {(entry.resolution, entry.channels, entry.heads, entry.level) for entry in entries} == {
        ((4, 4), 16, 2, None)
    }


def test_the_map_says_what_attends_to_a_text():
    entries = {entry.path: entry for entry in map_of('text_unet')}
    assert entries['text'].kind == 'text_encoder'
    assert entries['text'].output_shape == (6, 8)
    middle = entries['unet.mid_block.attentions.0']
    assert (middle.kind, middle.side, middle.level, middle.heads) == ('transformer', 'middle', 1, 2)
    assert middle.cross_attention == ('unet.mid_block.attentions.0.transformer_blocks.0',)
    apply, _, x, *_ = network('text_unet')
    states = jax.ShapeDtypeStruct((1, 6, 8), jnp.float32)
    with_context = network_map(apply, x.shape[1:], context=states)
    text = next(entry for entry in with_context if entry.path == 'text')
    assert text.output_shape is None
    assert text.num_params == entries['text'].num_params


# --- activations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', EVERY_NETWORK)
def test_the_prediction_is_the_networks_own(name):
    apply, params, x, t, conditioning = network(name)
    assert_close(seen(name).prediction, jax.jit(apply)(params, x, t, **conditioning))


@pytest.mark.parametrize('name', ['unet', 'resblocks'])
def test_what_a_unets_blocks_give_is_what_its_modules_give(name):
    apply, params, x, t, conditioning = network(name)
    module, blocks = apply.module(params), seen(name).blocks
    embedding = module.time_out(jax.nn.silu(module.time_in(sinusoidal_embedding(t, 8))))
    assert_close(blocks['time_out'], embedding)
    if conditioning:
        assert_close(blocks['label'], module.label(conditioning['label']))
        embedding = embedding + module.label(conditioning['label'])
    h = module.conv_in(x)
    assert_close(blocks['conv_in'], h)
    skips = [h]
    for i, level in enumerate(module.down):
        h = level.blocks[0].res(h, embedding)
        assert_close(blocks[f'down.{i}.blocks.0.res'], h)
        if level.blocks[0].attention is not None:
            h = level.blocks[0].attention(h)
            assert_close(blocks[f'down.{i}.blocks.0.attention'], h)
        skips.append(h)
        if level.resample is not None:
            h = level.resample(h, embedding) if name == 'resblocks' else level.resample(h)
            assert_close(blocks[f'down.{i}.resample'], h)
            skips.append(h)
    h = module.middle_out(module.middle_in(h, embedding), embedding)
    assert_close(blocks['middle_out'], h)
    h = module.up[0].blocks[0](jnp.concatenate([h, skips[-1]], axis=-1), embedding)
    asked = activations(apply, params, x, t, 'up.0.blocks.0', **conditioning).blocks
    assert_close(asked['up.0.blocks.0'], h)  # a block that the map shows in parts


def test_what_a_transformers_blocks_give_is_what_its_modules_give():
    apply, params, _, t, conditioning = network('dit')
    module, blocks = apply.module(params), seen('dit').blocks
    embedding = module.embedders[0](timestep_embedding(t, 256, shift=1.0), conditioning['label'])
    h = blocks['transformer_blocks.8']
    for i in (9, 10):
        h = module.transformer_blocks[i](h, embedding)
        assert_close(blocks[f'transformer_blocks.{i}'], h)


@pytest.mark.parametrize('name', ['ddpm_unet', 'text_unet'])
def test_a_chosen_block_is_that_block_and_no_other_of_its_kind(name):
    apply, params, x, t, conditioning = network(name)
    prefix = 'unet.' if name == 'text_unet' else ''
    paths = [f'{prefix}up_blocks.0.attentions.1', f'{prefix}up_blocks.0.attentions.0']
    if name == 'ddpm_unet':
        paths = [f'up_blocks.1.resnets.{i}' for i in (1, 0)]
    chosen = activations(apply, params, x, t, paths, **conditioning).blocks
    assert list(chosen) == paths
    for path in paths:
        assert_close(chosen[path], seen(name).blocks[path])
    assert not np.allclose(*chosen.values())


def test_a_new_time_compiles_nothing_nor_does_another_order():
    apply, params, x, t, conditioning = network('unet')
    activations(apply, params, x, t, ['conv_in', 'middle_out'], **conditioning)
    before = inspection._activations._cache_size()
    other = activations(apply, params, 2 * x, t + 1, ['middle_out', 'conv_in'], label=conditioning['label'] + 1)
    assert inspection._activations._cache_size() == before
    assert not np.allclose(other.blocks['middle_out'], seen('unet').blocks['middle_out'])


@pytest.mark.parametrize('name', ['unet', 'text_unet', 'dit_embedders'])
def test_a_network_that_nobody_looks_into_is_the_same_program(name):
    apply, params, x, t, conditioning = network(name)

    def program(function):
        return str(jax.make_jaxpr(lambda p, x, t: function(p, x, t, **conditioning))(params, x, t))

    model, options = NETWORKS[name]
    _, fresh = functional(lambda rngs: MODELS[model](image_channels=2, **options, rngs=rngs))
    activations(apply, params, x, t, **conditioning)
    assert program(apply) == program(fresh)
    if name == 'unet':  # the others are to recompute parts, which a look into them does not
        assert program(with_taps(apply, {})) == program(fresh)
        assert program(functools.partial(apply, skip_scale=jnp.ones(4))) != program(fresh)


def test_what_is_not_there_is_said():
    apply, params, x, t, conditioning = network('unet')
    with pytest.raises(UsageError, match=r"'down\.0\.blocks\.0\.rez'.*Did you mean 'down\.0\.blocks\.0\.res'"):
        activations(apply, params, x, t, ['down.0.blocks.0.rez'], **conditioning)
    with pytest.raises(UsageError, match=r'does not call down\.0 itself'):
        activations(apply, params, x, t, ['down.0'], **conditioning)
    with pytest.raises(UsageError, match=r'does not call down itself'):
        activations(apply, params, x, t, 'down', **conditioning)
    with pytest.raises(UsageError, match='cannot see into it'):
        activations(lambda params, x, t: x, params, x, t)
    _, autoencoder = functional(
        lambda rngs: MODELS['autoencoder_kl'](channels=8, channel_multipliers=(1,), num_groups=4, rngs=rngs)
    )
    with pytest.raises(UsageError, match='AutoencoderKL is no denoiser'):
        network_map(autoencoder, (8, 8, 3))


# --- the module behind what wraps it ----------------------------------------------------------------------------------


def test_one_sees_through_preconditioning():
    apply, params, x, _, conditioning = network('unet')
    t = jnp.log(jnp.array([0.5, 20.0])) / 4
    wrapped = edm_preconditioned(apply, sigma_data=0.7)
    assert wrapped == edm_preconditioned(apply, sigma_data=0.7)
    out = activations(jax.jit(wrapped), params, x, t, ['conv_in'], **conditioning)
    scale = 1 / np.sqrt(np.array([0.5, 20.0]) ** 2 + 0.7**2)
    assert_close(out.blocks['conv_in'], apply.module(params).conv_in(x * jnp.float32(scale)[:, None, None, None]))
    assert_close(out.prediction, jax.jit(wrapped)(params, x, t, **conditioning))


def test_a_configs_network_is_seen_into_on_every_schedule():
    config = default_config()
    config.model.update({'channels': 8, 'channel_multipliers': (1, 2), 'attention_resolutions': ()})
    info = DataInfo((8, 8, 1), ('a', 'b'))
    assert len(network_map(make_experiment(config, info).apply, (8, 8, 1))) > 10
    config.schedule = {'name': 'edm'}
    config.loss.prediction = 'x0'
    experiment = make_experiment(config, info)
    assert not isinstance(experiment.apply, ModuleApply)
    assert network_map(experiment.apply, (8, 8, 1))[2].path == 'label'


def test_the_shipped_model_is_seen_into():
    pipeline = dj.pretrained('fashion_mnist')
    entries = network_map(pipeline.apply, pipeline.image_shape)
    assert sum(entry.num_params for entry in entries) == count_params(pipeline.params)
    assert {entry.skip_out for entry in entries} - {None} == set(range(count_skips(pipeline.apply)))


@pytest.mark.parametrize('kind', ['unet', 'transformer'])
def test_an_imported_model_is_seen_into(kind):
    folder = FIXTURES / ('sd1' if kind == 'unet' else 'dit') / kind
    config = json.loads((folder / 'config.json').read_text())
    shapes, apply = make_network(config['_class_name'], config)
    entries = network_map(apply, (config['sample_size'], config['sample_size'], 4))
    assert sum(entry.num_params for entry in entries) == count_params(shapes)


# --- skip connections -------------------------------------------------------------------------------------------------


def by_hand(name, without):
    """The prediction of a U-Net one of whose skips is zeros, module by module, from what enters its up path on."""
    apply, params, _, _, conditioning = network(name)
    module, blocks = apply.module(params), seen(name).blocks
    context = blocks['text'] if name == 'text_unet' else conditioning.get('context')
    if name == 'text_unet':
        module = module.unet
        blocks = {path.removeprefix('unet.'): block for path, block in blocks.items()}
    skips = [blocks[e.path.removeprefix('unet.')] for e in map_of(name) if e.skip_out is not None]
    skips[without] = jnp.zeros_like(skips[without])
    if name == 'unet':
        embedding, h = blocks['time_out'] + blocks['label'], blocks['middle_out']
        for level in module.up:
            for block in level.blocks:
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), embedding)
            h = h if level.resample is None else level.resample(h)
        return module.conv_out(jax.nn.silu(module.norm_out(h)))
    embedding = blocks['time_embedding']
    for other in ('class_embedding', 'add_embedding'):
        embedding = embedding + blocks.get(other, 0)
    h = blocks['mid_block.resnets.1'] / getattr(module, 'middle_scale', 1)
    told = () if name == 'ddpm_unet' else (context,)
    for level in module.up_blocks:
        for i, resnet in enumerate(level.resnets):
            h = resnet(jnp.concatenate([h, skips.pop()], axis=-1), embedding)
            h = h if level.attentions is None else level.attentions[i](h, *told)
        h = h if level.upsamplers is None else level.upsamplers[0](h)
    return module.conv_out(jax.nn.silu(module.conv_norm_out(h)))


@pytest.mark.parametrize('name', U_NETS)
def test_a_skip_left_out_is_a_network_with_zeros_in_its_place(name):
    apply, params, x, t, conditioning = network(name)
    skips = count_skips(apply)
    run = jax.jit(ablated(apply, params, np.ones(skips))[0])
    plain = seen(name).prediction
    assert_close(run(ablated(apply, params, np.ones(skips))[1], x, t, **conditioning), plain)
    for i in range(skips):
        scale = np.ones(skips)
        scale[i] = 0
        out = run(ablated(apply, params, scale)[1], x, t, **conditioning)
        assert_close(out, by_hand(name, i), 5e-5)
        assert np.abs(out - plain).max() > 1e-3 * np.abs(plain).max()
    assert run._cache_size() == 1


def test_each_sample_can_have_skips_of_its_own():
    apply, params, x, t, conditioning = network('unet')
    run = jax.jit(apply)
    scales = jnp.float32([[1, 0, 1, 1], [1, 1, 0.5, 1]])
    both = run(params, x, t, skip_scale=scales, **conditioning)
    for i, scale in enumerate(scales):
        assert_close(both[i], run(params, x, t, skip_scale=scale, **conditioning)[i])


def test_gradients_flow_into_the_numbers_and_through_them():
    apply, params, x, t, conditioning = network('unet')

    def loss(scale, params):
        apply_ablated, both = ablated(apply, params, scale)
        return jnp.sum(apply_ablated(both, x, t, **conditioning) ** 2)

    of_scale, of_params = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.float32([1, 1, 1, 0]), params)
    assert np.all(of_scale != 0)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(of_params['up']))
    step = 1e-2
    up, down = (jax.jit(loss)(jnp.float32([1 + d, 1, 1, 0]), params) for d in (step, -step))
    assert float(of_scale[0]) == pytest.approx(float(up - down) / (2 * step), rel=2e-2)


def test_an_ablated_network_is_a_network_guided_and_looked_into():
    apply, params, x, t, _ = network('unet')
    schedule, label, null = schedules.cosine(), {'label': jnp.array([0, 1])}, {'label': jnp.array([3, 3])}

    def guided(apply, params, conditioning=label):
        return ModelDenoiser(apply, params, schedule, 'eps', conditioning)

    @jax.jit
    def predict(params, scale):
        denoiser = guided(*ablated(apply, params, scale))
        return guidance.classifier_free(denoiser, null, 2.0)(x, 0.5).eps

    plain = jax.jit(lambda p: guidance.classifier_free(guided(apply, p), null, 2.0)(x, 0.5).eps)(params)
    assert_close(predict(params, jnp.ones(4)), plain)
    assert not np.allclose(predict(params, jnp.zeros(4)), plain, atol=1e-2)
    assert predict._cache_size() == 1

    network_of, both = ablated(apply, params, [1, 1, 1, 0])
    out = activations(network_of, both, x, t, ['middle_out', 'up.0.blocks.0.res'], **label)
    assert_close(out.blocks['middle_out'], seen('unet').blocks['middle_out'])
    assert not np.allclose(out.blocks['up.0.blocks.0.res'], seen('unet').blocks['up.0.blocks.0.res'], atol=1e-2)
    assert network_map(network_of, x.shape[1:]) == map_of('unet')


def test_networks_without_skips_and_wrong_numbers_are_said():
    apply, params, x, t, conditioning = network('unet')
    with pytest.raises(UsageError, match='each of the 4 skips'):
        ablated(apply, params, np.ones(5))
    for shape in ((5,), (3, 4), ()):
        with pytest.raises(UsageError, match='each of the 4 skips'):
            jax.eval_shape(lambda s: apply(params, x, t, skip_scale=s, **conditioning), jnp.ones(shape))
    assert count_skips(network('dit')[0]) == 0
    with pytest.raises(UsageError, match='no skip connections'):
        ablated(network('dit')[0], network('dit')[1], [])


# --- cross-attention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['conditional_unet', 'text_unet'])
def test_maps_are_the_softmax_of_queries_and_keys(name):
    apply, params, x, t, conditioning = network(name)
    maps = cross_attention_maps(apply, params, x, t, **conditioning)
    entries = {path: entry for entry in map_of(name) for path in entry.cross_attention}
    assert list(maps) == list(entries)
    normed = [f'{path}.norm2' for path in entries]
    inputs = activations(apply, params, x, t, [*normed, *(['text'] if name == 'text_unet' else [])], **conditioning)
    context = np.float64(inputs.blocks['text'] if name == 'text_unet' else conditioning['context'])
    for path, entry in entries.items():
        weights = params
        for key in f'{path}.attn2'.split('.'):
            weights = weights[key]
        q = np.float64(inputs.blocks[f'{path}.norm2']) @ np.float64(weights['to_q']['kernel'])
        k = context @ np.float64(weights['to_k']['kernel'])
        d = q.shape[-1] // entry.heads
        mean = 0
        for head in range(entry.heads):
            of = slice(head * d, (head + 1) * d)
            scores = np.exp(np.einsum('bld,bsd->bls', q[..., of], k[..., of]) / np.sqrt(d))
            mean = mean + scores / scores.sum(axis=-1, keepdims=True) / entry.heads
        assert maps[path].shape == (2, *entry.resolution, context.shape[1])
        assert entry.resolution[0] == 2 * entry.resolution[1]
        np.testing.assert_allclose(maps[path].sum(axis=-1), 1, rtol=1e-5)
        np.testing.assert_allclose(maps[path].reshape(mean.shape), mean, atol=1e-5)
        assert maps[path].std() > 0.01


def test_maps_of_chosen_blocks_and_errors():
    apply, params, x, t, conditioning = network('text_unet')
    middle = cross_attention_maps(apply, params, x, t, 'unet.mid_block', **conditioning)
    assert list(middle) == ['unet.mid_block.attentions.0.transformer_blocks.0']
    chosen = cross_attention_maps(apply, params, x, t, ['unet.up_blocks.0.attentions.1'], **conditioning)
    assert list(chosen) == ['unet.up_blocks.0.attentions.1.transformer_blocks.0']
    with pytest.raises(UsageError, match=r'Valid choices: unet\.down_blocks\.0\.attentions\.0\.transformer_blocks\.0'):
        cross_attention_maps(apply, params, x, t, 'unet.down_blocks.0.resnets.0', **conditioning)
    with pytest.raises(UsageError, match='attends to no context'):
        cross_attention_maps(network('unet')[0], network('unet')[1], x, t)


def test_maps_are_averaged_at_one_size():
    rng = np.random.default_rng(0)
    fine, coarse = (rng.dirichlet(np.ones(5), (2, *size)).astype(np.float32) for size in ((4, 2), (1, 1)))
    mean = average_maps({'fine': fine, 'coarse': coarse})
    np.testing.assert_allclose(mean, (fine + coarse) / 2, atol=1e-6)  # one position, resized, is the same everywhere
    for size in ((8, 6), (2, 1)):
        resized = average_maps({'fine': fine, 'coarse': coarse}, size)
        assert resized.shape == (2, *size, 5)
        np.testing.assert_allclose(resized.sum(axis=-1), 1, rtol=1e-5)
    with pytest.raises(UsageError, match='no maps'):
        average_maps({})
