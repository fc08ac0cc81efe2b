import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_jax import UsageError
from diffusion_jax.models import UNet, count_params, functional, split
from diffusion_jax.models.layers import (
    GroupNorm,
    SelfAttention,
    channels_to_space,
    dropout,
    sinusoidal_embedding,
    space_to_channels,
)

TINY = {
    'resolution': 8,
    'image_channels': 1,
    'channels': 8,
    'channel_multipliers': (1, 2),
    'num_res_blocks': 1,
    'attention_resolutions': (4,),
}


def make(**changes):
    init, apply = functional(lambda rngs: UNet(rngs=rngs, **TINY | changes))
    return jax.eval_shape(init, jax.random.key(0)), jax.jit(apply)


def random_params(shapes):
    """Parameters without a zero among them, so that every path through the network counts; drawn by NumPy, at once."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        return jnp.float32(rng.normal(1.0 if 'scale' in name else 0.0, 1.8 / np.sqrt(fan_in), leaf.shape))

    return jax.tree.map_with_path(draw, shapes)


def size_of(**arguments):
    init, _ = functional(lambda rngs: UNet(rngs=rngs, **arguments))
    return count_params(jax.eval_shape(init, jax.random.key(0)))


def test_ddpm_cifar10_has_the_published_35_7_million_parameters():
    assert size_of(resolution=32, dropout=0.1) == 35_746_307


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'time_conditioning': 'scale_shift'},
        {'resampling': 'resblock'},
        {'middle_attention': False, 'attention_resolutions': ()},
        {'num_heads': 2},
        {'head_channels': 4},
        {'num_res_blocks': 2, 'channel_multipliers': (1, 2, 3), 'attention_resolutions': (8, 2)},
        {'channel_multipliers': (1,), 'attention_resolutions': ()},
        {'image_channels': 3},
        {'num_classes': 10},
        {'learned_variance': True, 'image_channels': 3},
        {'patch_size': 2, 'learned_variance': True, 'image_channels': 3, 'attention_resolutions': (2,)},
    ],
)
def test_every_option_gives_a_network_of_the_right_shape_in_which_every_parameter_matters(changes):
    shapes, apply = make(**changes)
    params = random_params(shapes)
    channels = changes.get('image_channels', 1)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, channels))
    label = {'label': jnp.array([0, 10])} if 'num_classes' in changes else {}
    out = apply(params, x, jnp.array([0.0, 999.0]), **label)
    assert out.shape == (*x.shape[:-1], channels * (1 + changes.get('learned_variance', False)))
    assert out.dtype == jnp.float32
    # Every parameter matters once none is zero.
    grads = jax.jit(jax.grad(lambda p: jnp.sum(apply(p, x, jnp.array([3.0, 700.0]), **label) ** 2)))(
        random_params(shapes)
    )
    still = {
        jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(grads) if jnp.abs(leaf).max() < 1e-5
    }
    # A softmax over keys cancels what is added to all of them: their bias alone is without effect.
    assert all(name.endswith("['key']['bias']") for name in still), still


def test_a_new_network_says_zero():
    init, apply = functional(lambda rngs: UNet(rngs=rngs, **TINY))
    x = jnp.ones((2, 8, 8, 1))
    np.testing.assert_array_equal(apply(jax.jit(init)(jax.random.key(0)), x, jnp.zeros(2)), 0)


@pytest.mark.parametrize('conditioning', ['additive', 'scale_shift'])
def test_time_and_label_matter_and_enter_every_res_block(conditioning):
    shapes, apply = make(time_conditioning=conditioning, num_classes=3)
    params = random_params(shapes)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))

    def out(t, label, params=params):
        return apply(params, x, jnp.full(2, t), label=jnp.full(2, label))

    assert jnp.abs(out(10.0, 0) - out(500.0, 0)).max() > 1e-3
    assert jnp.abs(out(10.0, 0) - out(10.0, 1)).max() > 1e-3
    assert jnp.abs(out(10.0, 0) - out(10.0, 3)).max() > 1e-3  # the learned null label
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(out(10.0, 0, p) ** 2)))(params)
    kernels = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(gradients)
        if "['time']['kernel']" in jax.tree_util.keystr(path)
    ]
    assert len(kernels) == 2 + 2 + 4  # down, middle, up
    assert all(jnp.abs(kernel).max() > 0 for kernel in kernels)


def test_samples_of_a_batch_do_not_mix():
    shapes, apply = make(num_classes=3)
    params = random_params(shapes)
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    t, label = jnp.array([1.0, 50.0, 900.0]), jnp.array([0, 1, 3])
    together = apply(params, x, t, label=label)
    for i in range(3):
        alone = apply(params, x[i : i + 1], t[i : i + 1], label=label[i : i + 1])
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-3, atol=1e-4)


def test_attention_is_where_it_was_asked_for():
    params, _ = make(channel_multipliers=(1, 2, 2), attention_resolutions=(8, 2), middle_attention=False)
    down = {
        8 >> int(level): ['attention' in block for block in blocks['blocks'].values()]
        for level, blocks in params['down'].items()
    }
    up = {
        2 << int(level): ['attention' in block for block in blocks['blocks'].values()]
        for level, blocks in params['up'].items()
    }
    assert down == {8: [True], 4: [False], 2: [True]}
    assert up == {8: [True, True], 4: [False, False], 2: [True, True]}
    assert 'attention' not in params['middle_in']


@pytest.mark.parametrize('heads', [1, 2])
def test_attention_is_softmax_of_scaled_products_over_all_positions(heads, key):
    layer = SelfAttention(8, num_heads=heads, num_groups=2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.out.kernel[...] = jax.random.normal(key, (8, 8))
    x = np.asarray(jax.random.normal(key, (2, 3, 5, 8)))
    h = np.asarray(layer.norm(x)).reshape(2, 15, 8)
    q, k, v = (
        (h @ np.asarray(p.kernel[...]) + np.asarray(p.bias[...])).reshape(2, 15, heads, -1)
        for p in (layer.query, layer.key, layer.value)
    )
    scores = np.exp(np.einsum('bqhd,bkhd->bhqk', q, k) / np.sqrt(8 // heads))
    mixed = np.einsum('bhqk,bkhd->bqhd', scores / scores.sum(-1, keepdims=True), v).reshape(2, 15, 8)
    expected = x + (mixed @ np.asarray(layer.out.kernel[...])).reshape(x.shape)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_computes_low_and_keeps_float32_parameters_and_output():
    shapes, apply = make(dtype='bfloat16')
    params = random_params(shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    low = apply(params, x, jnp.array([1.0, 500.0]))
    high = make()[1](params, x, jnp.array([1.0, 500.0]))
    assert low.dtype == jnp.float32
    error = float(jnp.abs(low - high).max() / jnp.abs(high).max())
    assert 1e-4 < error < 0.1  # it is another precision, and no more
    text = jax.jit(apply).lower(params, x, jnp.zeros(2)).as_text()
    convolutions = [line for line in text.splitlines() if 'stablehlo.convolution' in line]
    assert sum('bf16' in line for line in convolutions) == len(convolutions) - 1  # all but the output's


def test_dropout_only_with_a_key_and_differs_between_keys():
    shapes, apply = make(dropout=0.5)
    params = random_params(shapes)
    x = jnp.ones((2, 8, 8, 1))
    t = jnp.zeros(2)
    np.testing.assert_array_equal(apply(params, x, t), apply(params, x, t))
    a, b = (apply(params, x, t, dropout_key=jax.random.key(seed)) for seed in (0, 1))
    assert jnp.abs(a - b).max() > 1e-3
    assert jnp.abs(a - apply(params, x, t)).max() > 1e-3


def test_dropout_keeps_the_mean(key):
    dropped = dropout(jnp.ones(100_000), 0.3, key)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.01)
    assert float((dropped == 0).mean()) == pytest.approx(0.3, abs=0.01)


def test_sinusoidal_embedding_is_ddpms():
    t, features = 37.0, 10
    rates = np.exp(-np.log(10000) * np.arange(5) / 4)
    expected = np.concatenate([np.sin(t * rates), np.cos(t * rates)])
    np.testing.assert_allclose(sinusoidal_embedding(jnp.array([t]), features)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ('features', 'asked', 'groups'), [(128, 32, 32), (32, 8, 8), (32, 32, 8), (12, 4, 3), (6, 32, 1)]
)
def test_group_norm_agrees_with_flax_in_groups_of_four_channels_or_more(features, asked, groups, key):
    ours = GroupNorm(features, asked, rngs=nnx.Rngs(0))
    theirs = nnx.GroupNorm(features, num_groups=groups, use_fast_variance=False, rngs=nnx.Rngs(0))
    for norm in (ours, theirs):
        norm.scale[...] = jnp.arange(1.0, features + 1) / features
        norm.bias[...] = jnp.arange(features) / 10
    x = 1e-3 * jax.random.normal(key, (2, 5, 3, features)) + 0.01  # so small that epsilon matters, and off centre
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
    assert ours(x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_split_of_a_module_is_the_module():
    model = UNet(rngs=nnx.Rngs(0), **TINY)
    apply, params = split(model)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    model.conv_out.kernel[...] = jnp.ones_like(model.conv_out.kernel[...])
    params['conv_out']['kernel'] = jnp.ones_like(params['conv_out']['kernel'])
    np.testing.assert_array_equal(jnp.asarray(apply(params, x, jnp.zeros(2))), model(x, jnp.zeros(2)))


def test_a_patch_is_the_channels_of_one_position():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = space_to_channels(x, 2)
    np.testing.assert_array_equal(patches[1, 1, 2].reshape(2, 2, 3), x[1, 2:4, 4:6])
    np.testing.assert_array_equal(channels_to_space(patches, 2), x)


def test_the_network_takes_images_of_another_size_that_halves():
    shapes, apply = make()
    assert apply(random_params(shapes), jnp.ones((1, 16, 12, 1)), jnp.zeros(1)).shape == (1, 16, 12, 1)
    with pytest.raises(UsageError, match='9x8 cannot be halved'):
        apply(random_params(shapes), jnp.ones((1, 9, 8, 1)), jnp.zeros(1))
    shapes, apply = make(patch_size=2)
    assert apply(random_params(shapes), jnp.ones((1, 16, 12, 1)), jnp.zeros(1)).shape == (1, 16, 12, 1)
    with pytest.raises(UsageError, match='10x8 cannot be cut in patches of 2 and halved 1 times'):
        apply(random_params(shapes), jnp.ones((1, 10, 8, 1)), jnp.zeros(1))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'resolution': 9}, r'resolution 9 cannot be halved 1 times.*multiple of 2.*at most 1 channel_multipliers'),
        ({'resolution': 12, 'channel_multipliers': (1, 1, 1, 1)}, 'multiple of 8.*at most 3 channel_multipliers'),
        ({'attention_resolutions': (5,)}, r'attention_resolutions has 5.*levels .* at \[8, 4\]'),
        ({'time_conditioning': 'film'}, 'additive, scale_shift'),
        ({'resampling': 'pool'}, 'conv, resblock'),
        ({'dtype': 'float16'}, 'bfloat16, float32'),
        ({'num_heads': 3}, 'num_heads=3 does not divide'),
        ({'head_channels': 5}, 'head_channels=5 does not divide'),
        ({'channels': 0}, 'even number of channels'),
        ({'channel_multipliers': ()}, 'at least one channel multiplier'),
        ({'patch_size': 3}, 'patch_size must be at least 1 and divide the resolution, 8: got 3'),
        ({'patch_size': 2, 'attention_resolutions': (8,)}, r'levels .* at \[4, 2\]'),
        ({'dropout': 1.0}, r'dropout must be in \[0, 1\)'),
    ],
)
def test_settings_that_make_no_network_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        make(**changes)


def test_labels_and_networks_must_match():
    x, t = jnp.ones((1, 8, 8, 1)), jnp.zeros(1)
    shapes, apply = make()
    with pytest.raises(UsageError, match='takes no label'):
        apply(random_params(shapes), x, t, label=jnp.zeros(1, int))
    shapes, apply = make(num_classes=2)
    with pytest.raises(UsageError, match='needs a label'):
        apply(random_params(shapes), x, t)
