"""What a pipeline is conditioned on, with a network whose x0 is its conditioning: the image says what it was told."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import schedules
from diffusion_jax.errors import UsageError
from diffusion_jax.models.autoencoder import Moments
from diffusion_jax.models.layers import channels_to_space, space_to_channels
from diffusion_jax.pipelines import ImagePipeline
from diffusion_jax.pipelines.latents import LatentSpace

SCHEDULE = schedules.cosine(8)
STEPS = {'steps': 4, 'batch_size': 8}


def tone_of(text):
    """'dark' is black, 'light' is white, and '' is between."""
    return {'dark': -1.0, 'light': 1.0, '': 0.0, 'dim': -0.5, 'bright': 0.5}[text]


class Tones:
    """Each text as one number."""

    def check(self, texts):
        for text in texts:
            if text not in ('dark', 'light', '', 'dim', 'bright'):
                raise UsageError(f'no such tone: {text}')

    def condition(self, texts, size, place):
        return {'tone': place(np.array([tone_of(text) for text in texts], np.float32))}

    def null(self, texts, num, size, place):
        return self.condition(texts or [''] * num, size, place)


def toned(params, x, t, tone):
    return jnp.broadcast_to(tone[:, None, None, None], x.shape)


def plain(params, x, t):
    return jnp.zeros_like(x)


LATENTS = LatentSpace(
    encoder=lambda params, images: Moments(space_to_channels(images, 2), -30.0),
    decoder=lambda params, z: channels_to_space(z, 2),
    params={'unused': np.zeros(1, np.float32)},
    scale=0.5,
    shift=0.25,
    factor=2,
    channels=4,
)


def pipeline_of(apply, prediction='x0', **options):
    return ImagePipeline(apply, {'unused': np.zeros(1, np.float32)}, SCHEDULE, prediction, (8, 8, 1), **options)


@pytest.fixture(scope='module')
def of_text():
    return pipeline_of(toned, prompts=Tones())


def levels(samples):
    """The mean grey of each image, from -1 to 1."""
    return samples.images.mean(axis=(1, 2, 3)) / 127.5 - 1


def test_prompts_are_taken_in_turn(of_text):
    drawn = of_text(5, prompts=['dark', 'light'], **STEPS)
    np.testing.assert_allclose(levels(drawn), [-1, 1, -1, 1, -1], atol=0.01)
    assert drawn.labels is None


def test_no_prompt_is_an_empty_one(of_text):
    np.testing.assert_allclose(levels(of_text(2, **STEPS)), 0, atol=0.01)


def test_guidance_leads_away_from_nothing_or_from_the_negative_prompt(of_text):
    guided = of_text(2, prompts='dim', guidance_scale=2.0, **STEPS)
    np.testing.assert_allclose(levels(guided), -1.0, atol=0.01)  # 0 + 2 (-0.5 - 0)
    away = of_text(2, prompts='dim', negative_prompt='bright', guidance_scale=1.25, **STEPS)
    np.testing.assert_allclose(levels(away), 0.5 + 1.25 * (-0.5 - 0.5), atol=0.01)
    each = of_text(2, prompts='dim', negative_prompt=['bright', 'dim'], guidance_scale=1.25, **STEPS)
    np.testing.assert_allclose(levels(each), [-0.75, -0.5], atol=0.01)


def test_the_way_from_noise_is_that_of_the_call(of_text):
    way = of_text.trajectory(2, prompts=['dark', 'light'], steps=4)
    np.testing.assert_allclose(way.x[-1].mean(axis=(1, 2, 3)), [-1, 1], atol=1e-5)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'prompts': ['dark'] * 3}, '1 to 2 prompts for 2 images, got 3'),
        ({'prompts': []}, '1 to 2 prompts for 2 images, got 0'),
        ({'prompts': 'pink'}, 'no such tone: pink'),
        ({'negative_prompt': 'dark'}, 'set a guidance_scale'),
        ({'labels': [1]}, 'takes text and no labels'),
        ({'size': (8,)}, r'size must be \(height, width\)'),
        ({'noise': np.zeros((1, 8, 8, 1))}, r'noise must be \(2, 8, 8, 1\)'),
        ({'seed': []}, 'seed must be an integer'),
        ({'seed': 'x'}, 'seed must be an integer'),
    ],
)
def test_what_does_not_fit_is_refused(of_text, settings, message):
    with pytest.raises(UsageError, match=message):
        of_text(2, **settings, **STEPS)


def test_a_model_without_text_takes_none():
    with pytest.raises(UsageError, match='takes no text'):
        pipeline_of(plain)(1, prompts='dark', **STEPS)


def noisy(params, x, t):
    return 0.5 * x


def test_each_image_may_have_a_seed_of_its_own():
    pipeline = pipeline_of(noisy, 'eps')
    settings = {'spacing': 'leading', **STEPS}
    together = pipeline(3, seed=[5, 6, 5], **settings).images
    np.testing.assert_array_equal(together[0], together[2])
    assert (together[0] != together[1]).any()
    for image, seed in zip(together, [5, 6, 5], strict=True):
        np.testing.assert_array_equal(image, pipeline(1, seed=seed, **settings).images[0])


def test_noise_can_be_given():
    pipeline = pipeline_of(noisy, 'eps')
    noise = np.random.RandomState(0).standard_normal((2, 8, 8, 1))
    settings = {'spacing': 'leading', 'noise': noise, **STEPS}
    np.testing.assert_array_equal(pipeline(2, seed=1, **settings).images, pipeline(2, seed=2, **settings).images)
    flipped = pipeline(2, **{**settings, 'noise': noise[::-1]}).images
    np.testing.assert_array_equal(pipeline(2, **settings).images, flipped[::-1])


def test_another_size_is_drawn_at_that_size(of_text):
    assert of_text(2, prompts='dark', size=(4, 12), **STEPS).images.shape == (2, 4, 12, 1)


@pytest.fixture(scope='module')
def of_latents():
    return pipeline_of(toned, prompts=Tones(), latents=LATENTS)


def test_latents_are_decoded_by_scale_and_shift(of_latents):
    drawn = of_latents(2, prompts=['dim', ''], **STEPS)
    assert drawn.images.shape == (2, 8, 8, 1)
    np.testing.assert_allclose(levels(drawn), [-0.5 / 0.5 + 0.25, 0.25], atol=0.01)
    (batch,) = of_latents.batches(2, prompts=['dim', ''], decode=False, **STEPS)
    assert batch.images.shape == (2, 4, 4, 4)
    np.testing.assert_allclose(batch.images.mean(axis=(1, 2, 3)), [-0.5, 0], atol=1e-5)


def test_latents_are_not_clipped_unless_asked(of_latents):
    far = {'prompts': 'light', 'negative_prompt': '', 'guidance_scale': 3.0, 'decode': False}
    (free,) = of_latents.batches(1, **far, **STEPS)
    np.testing.assert_allclose(free.images, 3.0, atol=1e-5)
    (clipped,) = of_latents.batches(1, clip=True, **far, **STEPS)
    np.testing.assert_allclose(clipped.images, 1.0, atol=1e-5)


def test_encoding_is_the_inverse_of_decoding():
    images = np.random.RandomState(0).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)
    np.testing.assert_allclose(LATENTS.decode(LATENTS.encode(images)), images, atol=1e-6)


def test_a_size_that_is_no_multiple_of_the_factor_is_refused(of_latents):
    with pytest.raises(UsageError, match='multiples of 2 pixels'):
        of_latents(1, size=(8, 9), **STEPS)


def test_what_a_mask_keeps_is_kept_to_the_last_bit(of_latents):
    image = np.random.RandomState(0).randint(0, 256, (8, 8, 1)).astype(np.uint8)
    mask = np.zeros((8, 8), int)
    mask[:, :5] = 1  # through the middle of a latent
    drawn = of_latents(2, prompts='dim', image=image, mask=mask, **STEPS).images
    np.testing.assert_array_equal(drawn[:, :, :5], np.stack([image[:, :5]] * 2))
    np.testing.assert_allclose(drawn[:, :, 5:] / 127.5 - 1, -0.75, atol=0.01)


def test_variations_of_an_image_begin_with_its_latents():
    pipeline = pipeline_of(lambda params, x, t: x, latents=LATENTS)  # x0 is what there is: noise stays as it was
    image = np.full((8, 8, 1), 200, np.uint8)
    settings = {'image': image, 'solver': 'ddim', **STEPS}
    near, far = (pipeline(4, strength=strength, **settings).images for strength in (0.25, 0.75))
    errors = [np.abs(images.astype(float) - 200).mean() for images in (near, far)]
    assert errors[0] < errors[1]


def seen(params, x, t, extra):
    """x0 is what the mask says there, in every channel."""
    return jnp.broadcast_to(extra[..., :1], x.shape)


def test_a_network_that_inpaints_sees_the_mask_and_what_is_kept():
    pipeline = pipeline_of(seen, latents=LATENTS, inpaints=True)
    image = np.full((8, 8, 1), 255, np.uint8)
    mask = np.zeros((8, 8), int)
    mask[:4] = 1
    (batch,) = pipeline.batches(1, image=image, mask=mask, decode=False, **STEPS)
    np.testing.assert_allclose(batch.images[0, :2], 0, atol=1e-5)
    np.testing.assert_allclose(batch.images[0, 2:], 1, atol=1e-5)
    with pytest.raises(UsageError, match='give an image and a mask'):
        pipeline(1, **STEPS)


def test_its_masked_image_is_encoded():
    def visible(params, x, t, extra):
        return extra[..., 1:]

    pipeline = pipeline_of(visible, latents=LATENTS, inpaints=True)
    image = np.full((8, 8, 1), 255, np.uint8)
    mask = np.zeros((8, 8), int)
    mask[:4] = 1
    (batch,) = pipeline.batches(1, image=image, mask=mask, decode=False, **STEPS)
    np.testing.assert_allclose(batch.images[0, :2], (1 - 0.25) * 0.5, atol=1e-5)
    np.testing.assert_allclose(batch.images[0, 2:], (0 - 0.25) * 0.5, atol=1e-5)
