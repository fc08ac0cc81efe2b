"""Small denoisers of every kind, with random parameters and inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.models import MODELS, functional

SMALL = {'channels': 8, 'channel_multipliers': (1, 2), 'num_res_blocks': 1, 'num_groups': 4}
ATTENDING = {'attention_depths': (1, 1), 'num_heads': (1, 2)} | SMALL
NETWORKS = {
    'unet': ('unet', {'resolution': 8, 'attention_resolutions': (4,), 'num_classes': 3} | SMALL),
    'patches': ('unet', {'resolution': 16, 'patch_size': 2, 'attention_resolutions': (), 'remat': 'blocks'} | SMALL),
    'resblocks': (
        'unet',
        {'resolution': 8, 'attention_resolutions': (8,), 'resampling': 'resblock', 'middle_attention': False} | SMALL,
    ),
    'ddpm_unet': ('ddpm_unet', {'resolution': 8, 'middle_scale': 2.0, 'remat': 'convs'} | SMALL),
    'conditional_unet': (
        'conditional_unet',
        {'resolution': 8, 'context_features': 5, 'pooled_features': 3, 'size_features': 4, 'extra_channels': 1}
        | ATTENDING,
    ),
    'text_unet': (
        'text_unet',
        {'resolution': 8, 'vocab_size': 9, 'text_length': 6, 'text_features': 8, 'text_layers': 1, 'text_heads': 2}
        | ATTENDING
        | {'remat': 'blocks', 'num_classes': 2},
    ),
    'dit': ('dit', {'resolution': 8, 'channels': 16, 'num_layers': 11, 'num_heads': 2, 'num_classes': 3}),
    'dit_embedders': (
        'dit',
        {'resolution': 8, 'channels': 16, 'num_layers': 2, 'num_heads': 2}
        | {'shared_embedder': False, 'learned_variance': True, 'remat': 'blocks'},
    ),
}
SIZES = {'patches': (16, 16), 'conditional_unet': (8, 4), 'text_unet': (8, 4)}  # not square, where it can be mistaken


@functools.cache
def network(name):
    """(apply, params, x, t, conditioning): parameters without a zero among them, so that every path counts."""
    model, options = NETWORKS[name]
    _, apply = functional(lambda rngs: MODELS[model](image_channels=2, **options, rngs=rngs))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        loc = 1.0 if 'scale' in jax.tree_util.keystr(path) else 0.0
        return jnp.float32(rng.normal(loc, 1.5 / np.sqrt(fan_in), leaf.shape))

    def normal(*shape):
        return jnp.float32(rng.normal(size=shape))

    params = jax.tree.map_with_path(draw, apply.shapes)
    size = SIZES.get(name, (8, 8))
    conditioning = {}
    if options.get('num_classes'):
        conditioning['label'] = jnp.array([0, 1])
    if name == 'conditional_unet':
        conditioning = {'context': normal(2, 7, 5), 'pooled': normal(2, 3), 'extra': normal(2, *size, 1)}
        conditioning['sizes'] = jnp.float32(rng.integers(0, 64, (2, 6)))
    if name == 'text_unet':
        conditioning['ids'] = jnp.array(rng.integers(0, 9, (2, 6)))
    return apply, params, normal(2, *size, 2), jnp.array([3.0, 700.0]), conditioning


def assert_close(ours, theirs, tolerance=2e-5):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()
