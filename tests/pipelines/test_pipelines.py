import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import SamplingDiverged, UsageError, samplers, schedules
from diffusion_jax.pipelines import ImagePipeline
from diffusion_jax.pipelines.drawing import sample as compiled_sample
from diffusion_jax.pipelines.images import parse_labels, save_npz
from diffusion_jax.training.sharding import make_mesh

CHAIN = schedules.cosine(100)
NAMES = ('low', 'middle', 'high')


def apply(params, x, t, label=None):
    """The velocity of a network that believes every image of label k to be the constant k / 2 - 1, and null 0."""
    level = 0.0 if label is None else jnp.where(label == 3, 0.0, label * params['step'] - 0.5)[:, None, None, None]
    time = (t + 1) / 100
    alpha, sigma = CHAIN.alpha(time)[:, None, None, None], CHAIN.sigma(time)[:, None, None, None]
    eps = (x - alpha * level) / sigma
    return alpha * eps - sigma * level


PARAMS = {'step': jnp.float32(0.5)}


def make(class_names=NAMES, devices=8):
    return ImagePipeline(apply, PARAMS, CHAIN, 'v', (2, 2, 1), class_names, make_mesh(devices=jax.devices()[:devices]))


def test_images_show_their_labels_and_guidance_exaggerates_them():
    plain = make()(6, steps=5)
    np.testing.assert_array_equal(plain.labels, [0, 1, 2, 0, 1, 2])
    assert plain.images.shape == (6, 2, 2, 1)
    assert plain.images.dtype == np.uint8
    np.testing.assert_array_equal(plain.images[:3, 0, 0, 0], [64, 128, 191])  # -0.5, 0, 0.5
    guided = make()(6, steps=5, guidance_scale=1.5)
    np.testing.assert_array_equal(guided.images[:3, 0, 0, 0], [32, 128, 223])  # -0.75, 0, 0.75
    np.testing.assert_array_equal(make()(4, labels=[2], steps=5).labels, [2, 2, 2, 2])


def test_a_sample_depends_on_its_seed_and_number_alone():
    """Not on the batch, the number of images or the devices."""
    settings = {'solver': 'ddpm', 'steps': 4, 'clip': False, 'seed': 3, 'labels': [1]}

    def noisy(pipeline, num, **changes):
        # One step short of the end, noise is left in the image.
        plan = pipeline.plan('ddpm', 4, 'trailing')
        plan = jax.tree.map(lambda leaf: leaf[:-1] if np.ndim(leaf) else leaf, plan)
        pipeline.plan = lambda *args, **kwargs: plan
        return pipeline(num, **settings | changes).images

    expected = noisy(make(), 20)
    assert len(np.unique(expected)) > 10
    np.testing.assert_array_equal(noisy(make(), 20, batch_size=8), expected)
    np.testing.assert_array_equal(noisy(make(), 5), expected[:5])
    np.testing.assert_array_equal(noisy(make(devices=1), 20, batch_size=7), expected)
    assert (noisy(make(), 20, seed=4) != expected).any()


def test_new_values_compile_nothing():
    pipeline = make()
    pipeline(16, steps=6, guidance_scale=1.0, labels=[0], batch_size=16)
    before = compiled_sample._cache_size()
    for seed, scale, labels, eta in [(1, 2.0, [1], 0.5), (2, 0.0, [0, 2], 1.0), (3, 7.5, None, 0.0)]:
        pipeline(16, steps=6, guidance_scale=scale, labels=labels, seed=seed, eta=eta, batch_size=16)
    pipeline(40, steps=6, guidance_scale=3.0, batch_size=16, spacing='leading')
    another = make()  # of the same network
    another(16, steps=6, guidance_scale=3.0, batch_size=16)
    assert compiled_sample._cache_size() == before


def test_guidance_one_is_the_conditional_model():
    np.testing.assert_array_equal(make()(6, steps=5, guidance_scale=1.0).images, make()(6, steps=5).images)


def test_an_unconditional_model_has_no_labels():
    samples = make(class_names=())(3, steps=5)
    assert samples.labels is None
    np.testing.assert_allclose(samples.images, 127.5, atol=0.5)  # 0, up to rounding


def test_progress_counts_every_step_of_every_batch(capsys):
    make()(40, steps=5, batch_size=16, progress=True)
    assert '15/15' in capsys.readouterr().err


def test_an_image_is_varied_by_strength_and_filled_in_by_mask():
    """The model believes in constant images of -0.5, 0, 0.5; a given image of 0.9 is none of them."""
    image = np.full((2, 2, 1), 242, np.uint8)
    free = make()(3, steps=20).images
    mild = make()(3, steps=20, image=image, strength=0.05, clip=False).images
    np.testing.assert_array_equal(mild, make()(3, steps=20, image=np.stack([image] * 3), strength=0.05).images)
    np.testing.assert_array_equal(make()(3, steps=20, image=image, strength=0.9).images, free)
    mask = np.array([[1, 0], [0, 0]])
    filled = make()(3, steps=20, image=image, mask=mask).images
    np.testing.assert_array_equal(filled[:, 0, 0, 0], 242)
    np.testing.assert_array_equal(filled[:, 1], free[:, 1])
    one = make()(3, steps=20, image=image, mask=mask, batch_size=1).images
    np.testing.assert_array_equal(one, filled)


def test_variations_start_from_the_image():
    """A model that sees no noise in anything gives back what it is given."""
    pipeline = ImagePipeline(lambda params, x, t: jnp.zeros_like(x), {}, CHAIN, 'eps', (2, 2, 1))
    image = np.array([[[20], [100]], [[160], [230]]], np.uint8)
    out = pipeline(200, steps=20, image=image, strength=0.05, clip=False).images
    np.testing.assert_allclose(out.mean(axis=0), image, atol=6)


def test_the_denoiser_of_a_pipeline_goes_with_the_samplers():
    pipeline = make()
    denoiser = pipeline.denoiser(labels=[0, 2, 2], guidance_scale=1.5)
    plan = samplers.plan('ddim', pipeline.schedule, 5)
    x = samplers.prior(plan, jax.random.key(0), (3, 2, 2, 1))
    images = samplers.sample(denoiser, plan, x, jax.random.key(1))
    np.testing.assert_allclose(images[:, 0, 0, 0], [-0.75, 0.75, 0.75], atol=1e-5)
    with pytest.raises(UsageError, match='give one per sample'):
        pipeline.denoiser()
    with pytest.raises(UsageError, match=r'labels must be among 0\.\.2'):
        pipeline.denoiser(labels=[5])


def test_every_solver_draws_the_images_of_the_model():
    for solver, options in (
        ('dpmpp_2m', {}),
        ('unipc', {'order': 3, 'spacing': 'log_snr'}),
        ('heun', {'final': 'sigma_min'}),
        ('edm', {'churn': 5.0}),
    ):
        images = make()(3, solver=solver, steps=12, **options).images
        np.testing.assert_allclose(images[:, 0, 0, 0].astype(int), [64, 128, 191], atol=8)


def test_guidance_options_compile_nothing_new_and_do_something():
    make()(8, steps=3, guidance_scale=2.0, guidance_interval=(-1.0, 1.0))
    before = compiled_sample._cache_size()
    low = make()(8, steps=3, guidance_scale=4.0, guidance_interval=(-30.0, 30.0)).images
    off = make()(8, steps=3, guidance_scale=4.0, guidance_interval=(29.0, 30.0)).images
    assert compiled_sample._cache_size() == before
    np.testing.assert_allclose(off.astype(int), make()(8, steps=3).images, atol=1)  # a level of 0 rounds either way
    assert np.abs(low.astype(int) - off).max() > 20


@pytest.mark.parametrize('clip', [False, True])
def test_a_model_that_diverges_draws_no_image(clip):
    pipeline = ImagePipeline(apply, {'step': jnp.float32(np.nan)}, CHAIN, 'v', (2, 2, 1), NAMES)
    with pytest.raises(SamplingDiverged, match='3 of 3 samples'):
        pipeline(3, steps=2, clip=clip)


def test_eps_at_zero_signal_is_refused_and_v_is_not():
    chain = schedules.linear(100, zero_terminal_snr=True)
    ImagePipeline(apply, PARAMS, chain, 'v', (2, 2, 1), NAMES).plan('ddim', 5, 'trailing')
    with pytest.raises(UsageError, match=r"predicts eps.*'leading'"):
        ImagePipeline(apply, PARAMS, chain, 'eps', (2, 2, 1), NAMES)(3, steps=5)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'strength': 0.5}, 'need an image'),
        ({'mask': np.ones((2, 2))}, 'need an image'),
        ({'image': np.zeros((2, 2, 1), np.uint8)}, 'strength below 1'),
        ({'image': np.zeros((2, 2, 1)), 'strength': 0.5}, 'image must be uint8'),
        ({'image': np.zeros((3, 2, 1), np.uint8), 'strength': 0.5}, r'of shape \(2, 2, 1\)'),
        ({'image': np.zeros((2, 2, 1), np.uint8), 'mask': np.full((2, 2), 0.5)}, 'mask must hold 0 and 1'),
        ({'guidance_rescale': 0.5}, 'need a guidance_scale'),
        ({'guidance_scale': 2.0, 'guidance_rescale': 1.5}, r'rescale must lie in \[0, 1\]'),
        ({'guidance_scale': 2.0, 'guidance_interval': (3.0, 1.0)}, 'low < high'),
    ],
)
def test_settings_that_do_not_fit_an_image_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        make()(2, steps=3, **settings)


@pytest.mark.parametrize(
    ('class_names', 'settings', 'message'),
    [
        (NAMES, {'labels': [3]}, r'labels must be among 0..2 \(low, middle, high\), got \[3\]'),
        (NAMES, {'labels': [-1]}, 'labels must be among'),
        (NAMES, {'labels': []}, 'labels must be among'),
        (NAMES, {'guidance_scale': -1.0}, 'guidance_scale must be 0 or more'),
        (NAMES, {'guidance_scale': float('nan')}, 'guidance_scale must be 0 or more'),
        (NAMES, {'num': 0}, 'at least 1, got 0'),
        (NAMES, {'steps': 101}, r'steps must be in 1\.\.100'),
        (NAMES, {'solver': 'eular'}, "unknown solver 'eular'.*ddim, ddpm"),
        (NAMES, {'solver': 'ddpm', 'eta': 0.5}, "option of solver 'ddpm'"),
        ((), {'labels': [0]}, 'unconditional'),
        ((), {'guidance_scale': 2.0}, 'unconditional'),
    ],
)
def test_settings_that_do_not_fit_are_refused(class_names, settings, message):
    with pytest.raises(UsageError, match=message):
        make(class_names)(**{'num': 3, 'steps': 5} | settings)


def test_labels_are_parsed():
    assert parse_labels('all') is None
    assert parse_labels('3') == [3]
    assert parse_labels('0, 1,2') == [0, 1, 2]
    for text in ('', 'three', '1,,2'):
        with pytest.raises(UsageError, match="'all' or numbers"):
            parse_labels(text)


def test_samples_are_saved_with_their_settings(tmp_path):
    samples = make()(6, steps=5)
    save_npz(tmp_path / 'a.npz', samples, step=7, solver='ddim', guidance_scale=2.0)
    loaded = np.load(tmp_path / 'a.npz')
    np.testing.assert_array_equal(loaded['images'], samples.images)
    np.testing.assert_array_equal(loaded['labels'], samples.labels)
    assert (int(loaded['step']), str(loaded['solver']), float(loaded['guidance_scale'])) == (7, 'ddim', 2.0)
