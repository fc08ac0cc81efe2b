"""The U-Net of DDPM against diffusers' UNet2DModel, with weights and outputs that diffusers wrote."""

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
from diffusion_jax.interop.ddpm import ddpm_config, ddpm_options, ddpm_rename
from diffusion_jax.interop.names import export_params, import_params
from diffusion_jax.interop.tensors import TensorFiles, find_weights
from diffusion_jax.models import DDPMUNet, count_params, functional

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'interop' / 'ddpm'
# Of the folder: as published ones are. The variant: padding 1, cosines first, shift 0, heads, a scaled middle, labels.
FOLDERS = {'published': (FIXTURES, 'unet'), 'variant': (FIXTURES, 'variant')}
PUBLISHED = {
    'cifar10': ({'resolution': 32}, 35.75),
    'celebahq': (
        {'resolution': 256, 'channel_multipliers': (1, 1, 2, 2, 4, 4), 'attention_levels': (4,)},
        113.67,
    ),
}


def config_of(name):
    folder, part = FOLDERS[name]
    return json.loads((folder / part / 'config.json').read_text())


def build(**options):
    return functional(lambda rngs: DDPMUNet(**options, rngs=rngs))


@pytest.fixture(scope='module', params=FOLDERS)
def loaded(request):
    """(name, tensors, apply, params, reference) of a small model that diffusers saved."""
    folder, part = FOLDERS[request.param]
    tensors = TensorFiles(find_weights(folder / part, 'diffusion_pytorch_model'))
    init, apply = build(**ddpm_options(config_of(request.param)))
    params = import_params(tensors, jax.eval_shape(init, jax.random.key(0)), ddpm_rename(tensors))
    where = folder if part == 'unet' else folder / part
    return request.param, tensors, apply, params, np.load(where / 'reference.npz')


def test_it_computes_what_diffusers_does(loaded):
    _, _, apply, params, reference = loaded
    given = {'label': jnp.asarray(reference['label'])} if 'label' in reference else {}
    run = jax.jit(lambda x, t: apply(params, x, t, **given))
    for i, t in enumerate(reference['t']):
        with jax.default_matmul_precision('highest'):
            ours = run(reference[f'x_{i}'], np.full(2, t))
        theirs = reference[f'y_{i}']
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()


def test_it_is_written_as_it_was_read(loaded):
    _, tensors, _, params, _ = loaded
    written = export_params(params, ddpm_rename(tensors), 'float16')
    assert written.keys() == set(tensors)
    assert all(written[name].tobytes() == tensors[name].tobytes() for name in tensors)


def test_old_names_of_attention_are_read_and_written(loaded):
    name, tensors, _, params, _ = loaded
    old = {}
    for new in tensors:
        renamed = new
        if '.attentions.' in new:
            for theirs, ours in (('to_q', 'query'), ('to_k', 'key'), ('to_v', 'value'), ('to_out.0', 'proj_attn')):
                renamed = renamed.replace(theirs, ours)
        old[renamed] = tensors[new]
    assert old.keys() != set(tensors)
    init, _ = build(**ddpm_options(config_of(name)))
    again = import_params(old, jax.eval_shape(init, jax.random.key(0)), ddpm_rename(old))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert export_params(again, ddpm_rename(old)).keys() == old.keys()


@pytest.mark.parametrize('name', FOLDERS)
def test_the_config_survives_a_round_trip(name):
    options = ddpm_options(config_of(name))
    assert ddpm_options(json.loads(json.dumps(ddpm_config(options)))) == options


@pytest.mark.parametrize('name', PUBLISHED)
def test_its_size_is_the_published_one(name):
    options, millions = PUBLISHED[name]
    init, _ = build(**options)
    assert count_params(jax.eval_shape(init, jax.random.key(0))) / 1e6 == pytest.approx(millions, abs=0.005)


TINY = {
    'resolution': 8,
    'image_channels': 1,
    'channels': 8,
    'channel_multipliers': (1, 2),
    'num_res_blocks': 1,
    'num_groups': 4,
}


def tiny_inputs():
    return jax.random.normal(jax.random.key(1), (2, 8, 8, 1)), jnp.array([0.0, 900.0])


@pytest.mark.parametrize('remat', ['convs', 'blocks'])
def test_gradients_do_not_depend_on_what_is_kept(remat):
    x, t = tiny_inputs()

    def gradient(remat):
        init, apply = build(**TINY, remat=remat)
        params = jax.tree.map(lambda leaf: leaf + 0.01, init(jax.random.key(0)))
        return jax.jit(jax.grad(lambda params: apply(params, x, t).var()))(params)

    kept, again = gradient('none'), gradient(remat)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(kept))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), kept, again)


def test_bfloat16_gives_nearly_the_same(loaded):
    name, _, apply, params, reference = loaded
    _, half = build(**ddpm_options(config_of(name)), dtype='bfloat16')
    given = {'label': jnp.asarray(reference['label'])} if 'label' in reference else {}
    # Of early t: bfloat16 has no more than 8 bits for what linear layers see of its waves.
    ours, theirs = (jax.jit(f)(params, reference['x_0'], reference['t'][:1].repeat(2), **given) for f in (half, apply))
    assert ours.dtype == jnp.float32
    assert np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max()


def test_dropout_needs_a_key():
    x, t = tiny_inputs()
    init, apply = build(**TINY, dropout=0.5)
    params = jax.tree.map(lambda leaf: leaf + 0.02, init(jax.random.key(0)))
    run = jax.jit(apply)
    plain, again = run(params, x, t), run(params, x, t)
    np.testing.assert_array_equal(plain, again)
    assert not np.allclose(plain, run(params, x, t, dropout_key=jax.random.key(0)), atol=1e-4)


def test_a_step_of_training():
    config = load_config()
    config.unlock()
    config.model = model_section('ddpm_unet')
    config.lock()
    config.model.update({name: value for name, value in TINY.items() if name not in ('resolution', 'image_channels')})
    experiment = make_experiment(config, DataInfo((8, 8, 1), ('a', 'b')))
    params = experiment.init(jax.random.key(0))
    x0, label = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.array([0, 1, 2, 0])

    @jax.jit
    def step(params):
        loss, gradient = jax.value_and_grad(
            lambda params: experiment.loss(params, x0, jax.random.key(2), label=label).mean()
        )(params)
        return loss, jax.tree.map(lambda leaf, change: leaf - 0.02 * change, params, gradient)

    first, params = step(params)
    second, _ = step(params)
    assert np.isfinite(second)
    assert second < first


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'attention_levels': (2,)}, r'must be of the levels 0 \.\. 1'),
        ({'head_channels': 3}, 'head_channels=3 must divide'),
        ({'channels': 7}, 'an even number of channels'),
        ({'channels': 2, 'num_groups': 1}, 'frequency_shift=1.0 must be less'),
        ({'resolution': 7}, 'cannot be halved 1 times'),
        ({'dropout': 1.0}, r'dropout must be in \[0, 1\)'),
        ({'num_groups': 3}, 'num_groups=3 does not divide'),
        ({'middle_scale': 0}, 'middle_scale must not be 0'),
        ({'downsample_padding': 2}, 'downsample_padding must be 0'),
        ({'dtype': 'float16'}, 'unknown dtype'),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        nnx.eval_shape(lambda: DDPMUNet(**{**TINY, **changes}, rngs=nnx.Rngs(0)))


def test_inputs_that_do_not_fit_are_refused():
    x, t = tiny_inputs()
    init, apply = build(**TINY)
    params = jax.eval_shape(init, jax.random.key(0))
    with pytest.raises(UsageError, match='takes no label'):
        jax.eval_shape(lambda params: apply(params, x, t, label=jnp.zeros(2, int)), params)
    with pytest.raises(UsageError, match='images of 7x8 cannot be halved 1 times'):
        jax.eval_shape(lambda params: apply(params, x[:, 1:], t), params)


def test_absent_keys_have_the_defaults_of_diffusers():
    assert ddpm_options({}) == {
        'resolution': 32,  # there: None
        'image_channels': 3,
        'channels': 224,
        'channel_multipliers': (1, 2, 3, 4),
        'num_res_blocks': 2,
        'attention_levels': (1, 2, 3),
        'middle_attention': True,
        'middle_scale': 1,
        'head_channels': 8,
        'downsample_padding': 1,
        'cosine_first': True,
        'frequency_shift': 0,
        'dropout': 0.0,
        'num_groups': 32,
        'epsilon': 1e-5,
        'learned_variance': False,
        'num_classes': 0,
    }


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'act_fn': 'gelu'}, "act_fn='gelu' is not supported, only 'silu' or 'swish'"),
        ({'time_embedding_type': 'fourier'}, "time_embedding_type='fourier'"),
        ({'resnet_time_scale_shift': 'scale_shift'}, 'resnet_time_scale_shift'),
        ({'downsample_type': 'resnet'}, 'downsample_type'),
        ({'upsample_type': 'resnet'}, 'upsample_type'),
        ({'mid_block_type': None}, 'mid_block_type'),
        ({'class_embed_type': 'timestep'}, 'class_embed_type'),
        ({'attn_norm_num_groups': 2}, 'attn_norm_num_groups'),
        ({'center_input_sample': True}, 'center_input_sample'),
        ({'downsample_padding': 2}, 'downsample_padding=2 is not supported, only 1 or 0'),
        ({'down_block_types': ['SkipDownBlock2D', 'DownBlock2D']}, 'down_block_types'),
        ({'up_block_types': ['UpBlock2D', 'UpBlock2D']}, 'their like in reverse'),
        ({'block_out_channels': [8, 12]}, 'multiples of the first'),
        ({'time_embedding_dim': 8}, 'time_embedding_dim=8'),
        ({'out_channels': 4}, 'out_channels=4'),
        ({'num_class_embeds': 1}, 'num_class_embeds=1'),
    ],
)
def test_configs_that_compute_something_else_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        ddpm_options({**config_of('published'), **change})


def test_tensors_that_do_not_fit_are_named(loaded):
    _, tensors, _, params, _ = loaded
    have = {name: tensors[name] for name in tensors}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    rename = ddpm_rename(have)
    name = 'mid_block.attentions.0.to_k.bias'
    with pytest.raises(UsageError, match=rf'{name} is missing'):
        import_params({key: array for key, array in have.items() if key != name}, shapes, rename)
    with pytest.raises(UsageError, match=r'surplus is no part of this model'):
        import_params({**have, 'surplus': np.zeros(1)}, shapes, rename)
    with pytest.raises(UsageError, match=rf'{name} is \(1,\), not'):
        import_params({**have, name: np.zeros(1, np.float32)}, shapes, rename)
