import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import guidance, oracles, schedules
from diffusion_jax.denoisers import ModelDenoiser, Stateful, clip_x0
from diffusion_jax.errors import UsageError
from diffusion_jax.process import Prediction

CHAIN = schedules.cosine(1000)
LABELS = jnp.array([1, 2, 3])
NULL = {'label': jnp.zeros(3, int)}
KINDS = ('eps', 'x0', 'v')
SCHEDULES = {'cosine': CHAIN, 'edm': schedules.edm(), 'flow': schedules.flow()}


def apply(params, x, t, label):
    return jnp.tanh(params * x) * label[:, None] / 7 + 0.1 * x + 0.3


def exact(params, x, t, label):
    """A network without rounding, whatever the batch and the compiler."""
    return jnp.where(label[:, None] > 0, jnp.maximum(jnp.abs(x), 0.1), -x[:, ::-1])


def conditional(kind='eps', apply=apply, label=LABELS, schedule=CHAIN, **options):
    return ModelDenoiser(apply, jnp.float32(0.7), schedule, kind, {'label': label}, **options)


def unconditional(kind='eps', **options):
    return conditional(kind, label=NULL['label'], **options)


def constant(x0):
    """A denoiser that predicts x0, whatever it is given."""
    return lambda x_t, t: Prediction(x0, 'x0', x_t, jnp.float32(0.8), jnp.float32(0.6))


def counting(denoiser):
    """A `Stateful` that answers as `denoiser` and counts its calls."""
    return Stateful(lambda x: 0, lambda x_t, t, state: (denoiser(x_t, t), state + 1))


def normal(*shape, seed=0):
    """N(0, I) draws, from NumPy, which compiles nothing."""
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.fixture
def x():
    return jnp.asarray(normal(3, 5), jnp.float32)


# Classifier-free guidance


@pytest.mark.parametrize('sequential', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_scale_one_is_exactly_the_conditional_model_and_zero_the_unconditional(kind, sequential, x):
    @jax.jit
    def run(scale, rescale):
        options = {'rescale': rescale, 'sequential': sequential}
        cond, uncond = conditional(kind, apply=exact), unconditional(kind, apply=exact)
        return guidance.classifier_free(cond, NULL, scale, **options)(x, 0.5), cond(x, 0.5), uncond(x, 0.5)

    for scale, phi, which in ((1.0, 0.0, 1), (1.0, 0.3, 1), (1.0, 1.0, 1), (0.0, 0.0, 2)):
        predictions = run(scale, phi)
        np.testing.assert_array_equal(predictions[0].value, predictions[which].value)
        np.testing.assert_array_equal(predictions[0].x0, predictions[which].x0)


def test_guidance_extrapolates_every_prediction_alike(x):
    fields = ('eps', 'x0', 'v', 'score')

    @jax.jit
    def run():
        denoisers = (guidance.classifier_free(conditional(), NULL, 3.0), conditional(), unconditional())
        return [[denoiser(x, 0.5).read(field) for field in fields] for denoiser in denoisers]

    for guided, cond, uncond in zip(*run(), strict=True):
        np.testing.assert_allclose(guided, uncond + 3 * (cond - uncond), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('sequential', [False, True])
def test_scale_time_and_rescale_may_differ_per_sample(sequential, x):
    scales, times, phis = jnp.array([0.0, 1.0, 4.0]), jnp.array([0.2, 0.5, 0.9]), jnp.array([0.2, 0.5, 1.0])

    def guided(scale, t, phi):
        options = {'rescale': phi, 'sequential': sequential, 'interval': (-2.0, 10.0)}
        return guidance.classifier_free(conditional(), NULL, scale, **options)(x, t).x0

    @jax.jit
    def run():
        return guided(scales, times, phis), [guided(scales[i], times[i], phis[i])[i] for i in range(3)]

    np.testing.assert_allclose(*run(), rtol=1e-5)


@pytest.mark.parametrize(('sequential', 'expected'), [(False, [6]), (True, [3, 3])])
def test_the_network_runs_on_a_doubled_batch_or_twice(sequential, expected, x):
    batches = []

    def counted(params, x, t, label):
        batches.append(x.shape[0])
        return apply(params, x, t, label)

    guided = guidance.classifier_free(conditional(apply=counted), NULL, 2.0, sequential=sequential)
    jax.eval_shape(guided, x, 0.5)
    assert batches == expected


@pytest.mark.parametrize('sequential', [False, True])
def test_a_negative_condition_is_what_guidance_leads_away_from(sequential, x):
    negative = jnp.array([3, 1, 2])

    @jax.jit
    def run():
        guided = guidance.classifier_free(conditional(), {'label': negative}, 3.0, sequential=sequential)
        return [denoiser(x, 0.5).value for denoiser in (guided, conditional(), conditional(label=negative))]

    guided, asked, avoided = run()
    np.testing.assert_allclose(guided, 3 * asked - 2 * avoided, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('sequential', [False, True])
def test_a_learned_variance_is_the_conditional_models(sequential, x):
    def doubled(params, x, t, label):
        return jnp.concatenate([apply(params, x, t, label), jnp.ones_like(x) * label[:, None] / 4], axis=1)

    denoiser = conditional(apply=doubled, learned_variance=True)
    guided = guidance.classifier_free(denoiser, NULL, 3.0, sequential=sequential)(x, 0.5)
    np.testing.assert_array_equal(guided.variance_fraction, jnp.ones_like(x) * (LABELS[:, None] / 4 + 1) / 2)


@pytest.mark.parametrize('sequential', [False, True])
def test_outside_the_interval_the_scale_is_one(sequential, x):
    edm = SCHEDULES['edm']
    # log-SNR -2 log(sigma) of 1.39, 0 and -1.39.
    times = jnp.array([0.5, 1.0, 2.0]) / 80

    @jax.jit
    def guided(interval):
        denoiser = conditional(schedule=edm, apply=exact)
        return guidance.classifier_free(denoiser, NULL, 3.0, interval=interval, sequential=sequential)(x, times).value

    cond, uncond = (make(schedule=edm, apply=exact)(x, times).value for make in (conditional, unconditional))
    full = uncond + 3 * (cond - uncond)
    edge, nudge = 2 * np.log(2), 1e-4
    for interval, inside in (
        ((-edge + nudge, edge - nudge), [False, True, False]),
        ((-edge - nudge, edge - nudge), [False, True, True]),
        ((-edge + nudge, edge + nudge), [True, True, False]),
        ((-np.inf, np.inf), [True, True, True]),
        ((3.0, 4.0), [False, False, False]),
    ):
        value, inside = np.asarray(guided(interval)), np.array(inside)
        np.testing.assert_array_equal(value[~inside], cond[~inside])
        np.testing.assert_allclose(value[inside], full[inside], rtol=1e-5, atol=1e-6)


def test_outside_the_interval_the_second_forward_is_left_out(x):
    calls = []

    def watched(params, x, t, label):
        jax.debug.callback(lambda: calls.append(1))
        return apply(params, x, t, label)

    denoiser = conditional(apply=watched, schedule=SCHEDULES['flow'])
    guided = guidance.classifier_free(denoiser, NULL, 3.0, interval=(-1.0, 1.0), sequential=True)
    guided = jax.jit(guided)
    for times, expected in (([0.1, 0.9, 0.8], 1), ([0.1, 0.5, 0.8], 2)):
        calls.clear()
        jax.block_until_ready(guided(x, jnp.array(times)))
        jax.effects_barrier()
        assert len(calls) == expected


@pytest.mark.parametrize('sequential', [False, True])
def test_rescale_pulls_each_samples_std_to_the_conditional_ones(sequential, x):
    scale = jnp.array([3.0, 5.0, 7.0])

    def std(phi):
        options = {'rescale': phi, 'sequential': sequential}
        return np.std(guidance.classifier_free(conditional(), NULL, scale, **options)(x, 0.5).value, axis=1)

    target, unscaled = np.std(conditional()(x, 0.5).value, axis=1), std(0.0)
    assert np.all(unscaled > 1.2 * target)
    np.testing.assert_allclose(std(1.0), target, rtol=1e-5)
    np.testing.assert_allclose(std(0.25), 0.25 * target + 0.75 * unscaled, rtol=1e-5)


def test_rescale_leaves_a_constant_sample_alone():
    # 0.1 + 0.2 x 3: its std in float32 is rounding, not 0.
    strong, weak = jnp.array([[0.1, 0.5, 0.9], [1.0, 2.0, 3.0]]), jnp.array([[-0.05, 0.15, 0.35], [1.0, 2.0, 3.0]])
    weak = weak.at[0].set((3 * strong[0] - 0.7) / 2)
    zero = jnp.zeros_like(weak)

    @jax.jit
    def guided(strong, weak):
        value = guidance.autoguidance(constant(strong), constant(weak), 3.0, rescale=1.0)(strong, 0.5).value
        return value.sum(), value

    np.testing.assert_allclose(guided(strong, weak)[1], [[0.7] * 3, [1, 2, 3]], rtol=1e-5)
    np.testing.assert_array_equal(guided(zero, zero)[1], 0.0)
    assert np.all(np.isfinite(jax.grad(guided, has_aux=True)(zero, weak)[0]))


# Autoguidance


def test_autoguidance_reads_a_weak_model_of_any_kind(x):
    strong, weak = conditional('eps'), conditional('v', label=2 * LABELS)
    for field in ('eps', 'x0'):
        guided = guidance.autoguidance(strong, weak, 2.5)(x, 0.4)
        a, b = strong(x, 0.4).read(field), weak(x, 0.4).read(field)
        assert guided.kind == 'eps'
        np.testing.assert_allclose(guided.read(field), b + 2.5 * (a - b), rtol=1e-5, atol=1e-5)
    alike = conditional('eps', label=2 * LABELS)
    np.testing.assert_array_equal(guidance.autoguidance(strong, alike, 0.0)(x, 0.4).value, alike(x, 0.4).value)
    np.testing.assert_array_equal(guidance.autoguidance(strong, weak, 1.0)(x, 0.4).value, strong(x, 0.4).value)


# Adaptive projected guidance


def reference_apg(cond, uncond, scale, average, parallel, limit, momentum):
    """Algorithm 1 of the paper, in the order and with the projection that it has."""
    average = cond - uncond + momentum * average
    diff = average * np.minimum(1, limit / np.linalg.norm(average, axis=1, keepdims=True))
    unit = cond / np.linalg.norm(cond, axis=1, keepdims=True)
    along = (diff * unit).sum(axis=1, keepdims=True) * unit
    return cond + (scale[:, None] - 1) * (diff - along + parallel * along), average


@pytest.mark.usefixtures('x64')
def test_adaptive_projected_follows_the_algorithm_over_three_calls():
    scale, options = np.array([1.5, 4.0, 9.0]), {'parallel': 0.3, 'momentum': -0.6}
    limits = np.array([0.2, 0.8, 100.0])
    guided = guidance.adaptive_projected(conditional(), NULL, scale, norm_threshold=limits, **options)

    @jax.jit
    def run(x, t, state):
        return guided.call(x, t, state), conditional()(x, t).x0, unconditional()(x, t).x0

    state, average = guided.initial_state(jnp.zeros((3, 5))), 0.0
    norms = []
    for t, x in zip((0.8, 0.5, 0.2), normal(3, 3, 5), strict=True):
        (prediction, state), cond, uncond = run(x, t, state)
        expected, average = reference_apg(
            np.asarray(cond), np.asarray(uncond), scale, average, limit=limits[:, None], **options
        )
        norms.append(np.linalg.norm(average, axis=1))
        assert prediction.kind == 'x0'
        np.testing.assert_allclose(prediction.value, expected, rtol=1e-6)
        np.testing.assert_allclose(state, average, rtol=1e-6)
    above = np.array(norms) > limits
    assert above.any()
    assert not above.all()


@pytest.mark.parametrize('kind', KINDS)
def test_adaptive_projected_with_all_of_the_parallel_part_is_classifier_free(kind, x):
    scales = jnp.array([0.0, 3.0, 7.0])
    projected = guidance.adaptive_projected(conditional(kind), NULL, scales, parallel=1.0)(x, 0.5)
    plain = guidance.classifier_free(conditional(kind), NULL, scales)(x, 0.5)
    np.testing.assert_allclose(projected.x0, plain.x0, rtol=1e-4, atol=1e-5)


def test_adaptive_projected_at_scale_one_is_exactly_the_conditional_x0(x):
    denoiser = conditional('v')
    guided = guidance.adaptive_projected(denoiser, NULL, jnp.float32(1.0), norm_threshold=0.1)(x, 0.5)
    np.testing.assert_array_equal(guided.x0, denoiser(x, 0.5).x0)


def test_adaptive_projected_is_finite_where_predictions_are_zero():
    zero = conditional('x0', apply=lambda params, x, t, label: params * 0 * x)
    x = jnp.ones((3, 5))

    @jax.jit
    def run(x):
        return guidance.adaptive_projected(zero, NULL, 5.0, norm_threshold=1.0)(x, 0.5).value

    np.testing.assert_array_equal(run(x), 0.0)
    assert np.all(np.isfinite(jax.grad(lambda x: run(x).sum())(x)))


# Classifier guidance


@pytest.mark.parametrize(('schedule', 'kind', 'k'), [('cosine', 'eps', 0), ('edm', 'x0', 2), ('flow', 'flow', 1)])
@pytest.mark.usefixtures('x64')
def test_classifier_guidance_of_exact_models_is_the_denoiser_of_the_class(schedule, kind, k):
    weights, means, stds = [0.2, 0.5, 0.3], [[-1.0, 0.5], [0.3, 1.2], [1.0, -0.8]], [0.3, 0.5, 0.2]
    schedule = SCHEDULES[schedule]
    mixture, alone = oracles.gaussian_mixture(weights, means, stds), oracles.gaussian(means[k], stds[k])
    t = np.array([0.01, 0.3, 0.6, 0.95])
    scales = jnp.array([2.0, 0.0, 1.5, 4.0])

    def log_prob(x_t, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        joint = np.log(weights[k]) + alone.log_density(x_t, alpha, sigma)
        return joint - mixture.log_density(x_t, alpha, sigma)

    @jax.jit
    def run(x_t):
        denoiser = mixture.denoiser(schedule, kind)
        guided = guidance.classifier(denoiser, log_prob, 1.0)(x_t, t).x0
        eps = guidance.classifier(denoiser, log_prob, scales)(x_t, t).eps
        gradient = jax.grad(lambda x: log_prob(x, t).sum())(x_t)
        equation = denoiser(x_t, t).eps - (scales * schedule.sigma(t))[:, None] * gradient
        return guided, alone.denoiser(schedule)(x_t, t).x0, eps, equation

    x_t = normal(4, 2) * (schedule.alpha(t) + schedule.sigma(t))[:, None]
    guided, expected, eps, equation = run(x_t)
    np.testing.assert_allclose(guided, expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(eps, equation, rtol=1e-6, atol=1e-8)


# Dynamic thresholding


def test_dynamic_threshold_follows_numpy():
    x0 = jnp.asarray(normal(4, 3, 5) * np.array([0.2, 1.0, 3.0, 20.0])[:, None, None], jnp.float32)
    for percentile, maximum in ((0.9, None), (0.5, None), (1.0, 2.5), (0.9, 2.5)):
        s = np.quantile(np.abs(x0), percentile, axis=(1, 2), keepdims=True)
        s = np.clip(s, 1, maximum)
        prediction = guidance.dynamic_threshold(constant(x0), percentile, maximum)(x0, 0.5)
        np.testing.assert_allclose(prediction.x0, np.clip(x0, -s, s) / s, rtol=1e-5)
    defaults = guidance.dynamic_threshold(constant(x0))(x0, 0.5).x0
    np.testing.assert_array_equal(defaults, guidance.dynamic_threshold(constant(x0), 0.995, np.inf)(x0, 0.5).x0)


def test_dynamic_threshold_with_maximum_one_is_plain_clipping_and_hides_nothing():
    x0 = 2 * normal(3, 40)
    x0[0, 3], x0[1, 5], x0[0, 7] = np.inf, np.nan, -np.inf
    x0 = jnp.asarray(x0, jnp.float32)
    clipped = clip_x0(constant(x0))(x0, 0.5).x0
    np.testing.assert_array_equal(guidance.dynamic_threshold(constant(x0), maximum=1.0)(x0, 0.5).x0, clipped)
    free = np.asarray(guidance.dynamic_threshold(constant(x0), 1.0)(x0, 0.5).x0)
    np.testing.assert_array_equal(np.isnan(free), ~np.isfinite(x0))
    np.testing.assert_allclose(np.nanmax(np.abs(free), axis=1), 1.0)


# Reconstruction guidance

SHAPE = (4, 4, 1)
KERNEL = np.random.default_rng(0).uniform(-0.1, 0.1, 3)


def blur(x):
    """A symmetric circulant convolution over the height, of eigenvalues in [0.4, 1.6]."""
    return x + sum(c * (jnp.roll(x, i, 1) + jnp.roll(x, -i, 1)) for i, c in enumerate(KERNEL, 1))


def shifted(x):
    """A is not symmetric."""
    return x + 0.4 * jnp.roll(x, 1, 2)


def doubled_mask(x):
    """Some pixels, each measured twice: A A^T is singular."""
    return jnp.concatenate([x[:, :2], x[:, :2], 0 * x[:, 2:]], axis=1)


def matrix_of(operator):
    basis = jnp.eye(np.prod(SHAPE)).reshape(-1, *SHAPE)
    return np.asarray(operator(basis)).reshape(len(basis), -1).T


@pytest.mark.parametrize(
    ('operator', 'schedule'),
    [
        (guidance.average_pool(2), 'cosine'),
        (blur, 'cosine'),
        (blur, 'flow'),
        (shifted, 'edm'),
        (doubled_mask, 'flow'),
    ],
)
@pytest.mark.usefixtures('x64')
def test_reconstruction_of_gaussian_data_is_the_posterior_mean(operator, schedule):
    schedule = SCHEDULES[schedule]
    mean, std = np.linspace(-0.5, 0.5, 16).reshape(SHAPE), 0.7
    denoiser = oracles.gaussian(mean, std).denoiser(schedule, 'eps')
    t = np.array([0.02, 0.3, 0.6, 0.95])
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t = normal(4, *SHAPE) * (alpha + sigma)[:, None, None, None]
    matrix = matrix_of(operator)
    y = operator(0.7 * jnp.asarray(normal(4, *SHAPE, seed=1)))
    noises = np.array([0.05, 0.3, 1.0, 0.1])

    @jax.jit
    def restore(y, noise_std):
        x = jnp.asarray(x_t)
        return guidance.reconstruction(denoiser, operator, y, noise_std, prior_std=std, iterations=25)(x, t).x0

    noisy = y + noises[:, None, None, None] * normal(*y.shape, seed=2)
    restored, exact = restore(noisy, noises), restore(y, np.zeros(4))
    for i in range(4):
        flat_x, flat_mean = np.asarray(x_t[i]).ravel(), mean.ravel()
        # The precisions of the prior, of x_t and of y add up.
        precision = np.eye(16) * (std**-2 + (alpha[i] / sigma[i]) ** 2)
        weighted = flat_mean / std**2 + alpha[i] / sigma[i] ** 2 * flat_x
        x0 = np.linalg.solve(precision, weighted)
        projected = x0 + np.linalg.pinv(matrix) @ (np.asarray(y[i]).ravel() - matrix @ x0)
        precision += matrix.T @ matrix / noises[i] ** 2
        weighted += matrix.T @ np.asarray(noisy[i]).ravel() / noises[i] ** 2
        expected = np.linalg.solve(precision, weighted)
        np.testing.assert_allclose(np.asarray(restored[i]).ravel(), expected, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(np.asarray(exact[i]).ravel(), projected, rtol=1e-6, atol=1e-9)


def test_reconstruction_adds_nothing_where_it_cannot_or_need_not():
    """At alpha = 0, at sigma = 0, at scale 0, and where x0_hat explains the measurement; all of it finite."""
    x = jnp.asarray(normal(3, *SHAPE), jnp.float32)
    pool, flow = guidance.average_pool(2), SCHEDULES['flow']
    denoiser = oracles.gaussian(0.0, 0.5).denoiser(flow, 'flow')
    y = pool(x) + 1.0

    @jax.jit
    def restore(y, noise_std, scale, t):
        return guidance.reconstruction(denoiser, pool, y, noise_std, scale=scale)(x, t).x0

    one, ends, t = jnp.ones(3), jnp.array([0.0, 0.0, 1.0]), jnp.array([1e-4, 0.5, 1 - 1e-4])
    plain_ends, plain = jax.jit(lambda: (denoiser(x, ends).x0, denoiser(x, t).x0))()
    for noise_std in (0.0, 0.1):
        np.testing.assert_allclose(restore(y, noise_std, one, ends), plain_ends, rtol=1e-6)
        np.testing.assert_allclose(restore(y, noise_std, 0 * one, t), plain, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(restore(pool(plain), noise_std, one, t), plain, rtol=1e-5, atol=1e-6)
        assert np.all(np.isfinite(restore(y, noise_std, one, t)))
        # Nearly noiseless: r^2 is 1e-16.
        assert np.all(np.isfinite(restore(y, noise_std, one, 1e-8 * one)))
        full, half = restore(y, noise_std, one, t), restore(y, noise_std, jnp.array([0.5, 1.0, 0.0]), t)
        np.testing.assert_allclose(half[0] - plain[0], 0.5 * (full[0] - plain[0]), rtol=1e-2, atol=1e-6)
        np.testing.assert_allclose(half[1:], jnp.stack([full[1], plain[2]]), rtol=1e-5, atol=1e-6)
    assert np.any(np.isnan(restore(y.at[0, 0, 0, 0].set(jnp.nan), 0.0, one, t)[0]))


def test_reconstruction_takes_complex_measurements():
    x = jnp.asarray(normal(2, 6), jnp.float32)
    denoiser = oracles.gaussian(0.0, 0.5).denoiser(SCHEDULES['flow'])

    def fourier(x):
        return jnp.fft.rfft(x, axis=1)[:, :3] * (1 + 2j)

    def parts(x):
        return jnp.concatenate([fourier(x).real, fourier(x).imag], axis=1)

    def restore(operator):
        options = {'noise_std': 0.5, 'prior_std': 0.5}
        return guidance.reconstruction(denoiser, operator, operator(x[::-1]), **options)(x, 0.5).x0

    one, other = jax.jit(lambda: (restore(fourier), restore(parts)))()
    assert one.dtype == x.dtype
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_average_pool_is_the_mean_of_squares():
    x = normal(2, 6, 3, 2)
    pooled = guidance.average_pool(3)(x)
    assert pooled.shape == (2, 2, 1, 2)
    np.testing.assert_allclose(pooled[1, 1, 0], np.mean(x[1, 3:, :, :], axis=(0, 1)), rtol=1e-5)


# What they have in common


def test_guidance_of_a_denoiser_with_a_memory_carries_it(x):
    plain = conditional()
    y, log_prob = 0.5 * x, lambda x_t, t: -jnp.sum(x_t**2, axis=1)

    builders = [
        lambda d: guidance.autoguidance(d, unconditional(), 2.0),
        lambda d: guidance.autoguidance(unconditional(), d, 2.0, interval=(-9.0, 9.0)),
        lambda d: guidance.classifier(d, log_prob, 2.0),
        guidance.dynamic_threshold,
        lambda d: guidance.reconstruction(d, lambda x: 2 * x, y),
    ]
    for build in builders:
        guided = build(counting(plain))
        run = jax.jit(lambda state, guided=guided, build=build: (guided.call(x, 0.5, state), build(plain)(x, 0.5).x0))
        state = guided.initial_state(x)
        for calls in (1, 2):
            (prediction, state), expected = run(state)
            assert jax.tree.leaves(state) == [calls]
            np.testing.assert_allclose(prediction.x0, expected, rtol=1e-6)


def test_changed_scales_and_options_run_one_compiled_program(x):
    @jax.jit
    def run(x, scale, low, phi, beta):
        options = {'interval': (low, low + 5), 'rescale': phi}
        one = guidance.classifier_free(conditional(), NULL, scale, **options)(x, 0.5)
        two = guidance.autoguidance(conditional(), unconditional(), scale, **options)(x, 0.5)
        apg = guidance.adaptive_projected(
            conditional(), NULL, scale, parallel=phi, norm_threshold=low + 5, momentum=beta
        )
        apg, _ = apg.call(x, 0.5, apg.initial_state(x))
        four = guidance.classifier(conditional(), lambda x_t, t: -jnp.sum(x_t**2, axis=1), scale)(x, 0.5)
        five = guidance.dynamic_threshold(conditional(), 1 - phi / 2, 1 + phi)(x, 0.5)
        six = guidance.reconstruction(conditional(), lambda x: 2 * x, x, phi, prior_std=1 + phi, scale=scale)(x, 0.5)
        return [prediction.x0 for prediction in (one, two, apg, four, five, six)]

    before = run(x, 2.0, -3.0, 0.5, 0.1)
    after = run(x, 4.0, -2.0, 0.7, 0.0)
    assert run._cache_size() == 1
    np.testing.assert_allclose(before[0], before[1], rtol=1e-5)
    assert all(np.any(a != b) for a, b in zip(before, after, strict=True))
    expected = guidance.classifier_free(conditional(), NULL, 4.0, interval=(-2.0, 3.0), rescale=0.7)(x, 0.5).x0
    np.testing.assert_allclose(after[0], expected, rtol=1e-5, atol=1e-6)


def guided_by(call, **options):
    """`call` with defaults for what is not given, traced once."""
    x = jnp.ones((3, 4, 4, 1))
    anything = constant(x)
    denoiser = conditional()
    match call:
        case 'classifier_free':
            defaults = {'denoiser': denoiser, 'null_conditioning': NULL, 'guidance_scale': 2.0}
            x = x[:, 0, :, 0]
        case 'adaptive_projected':
            defaults = {'denoiser': denoiser, 'null_conditioning': NULL, 'guidance_scale': 2.0}
            x = x[:, 0, :, 0]
        case 'autoguidance':
            defaults = {'denoiser': anything, 'weak': anything, 'guidance_scale': 2.0}
        case 'classifier':
            defaults = {'denoiser': anything, 'log_prob': lambda x, t: x[:, 0, 0, 0], 'guidance_scale': 2.0}
        case 'dynamic_threshold':
            defaults = {'denoiser': anything}
        case 'reconstruction':
            defaults = {'denoiser': anything, 'operator': lambda x: x[:, :2], 'measurement': x[:, :2]}
    denoiser = getattr(guidance, call)(**{**defaults, **options})
    jax.eval_shape(denoiser, x, 0.5)


@pytest.mark.parametrize(
    ('call', 'options', 'message'),
    [
        ('classifier_free', {'null_conditioning': {'text': jnp.zeros(3)}}, r"\['text'\], the conditioning \['label'\]"),
        ('classifier_free', {'null_conditioning': {'label': 0}}, r"shapes {'label': \(\)}"),
        ('classifier_free', {'denoiser': constant(0.0)}, 'ModelDenoiser, got a function'),
        ('classifier_free', {'denoiser': counting(constant(0.0))}, 'ModelDenoiser, got a Stateful'),
        ('classifier_free', {'interval': (1.0, 1.0)}, r'low < high, or None, got \(1.0, 1.0\)'),
        ('classifier_free', {'interval': (2.0, 1.0), 'sequential': True}, 'low < high'),
        ('classifier_free', {'interval': 3.0}, r'must be \(low, high\)'),
        ('classifier_free', {'rescale': 1.5}, r'rescale must lie in \[0, 1\].*got 1.5'),
        ('classifier_free', {'rescale': np.array([0.0, -0.1, 0.5])}, r'\[0, 1\]'),
        ('classifier_free', {'guidance_scale': jnp.ones(2)}, r'\[3\], got an array of shape \(2,\)'),
        ('autoguidance', {'interval': (2.0, 1.0)}, 'low < high'),
        ('autoguidance', {'rescale': float('nan')}, 'rescale'),
        ('autoguidance', {'weak': constant(jnp.ones((3, 4, 4, 2)))}, 'they must agree'),
        ('adaptive_projected', {'null_conditioning': {}}, r'keys \[\]'),
        ('adaptive_projected', {'denoiser': constant(0.0)}, 'ModelDenoiser'),
        ('adaptive_projected', {'norm_threshold': 0.0}, 'norm_threshold must be positive'),
        ('adaptive_projected', {'momentum': -1.0}, r'momentum must lie in \(-1, 1\)'),
        ('classifier', {'log_prob': lambda x, t: x.sum()}, r'\(3,\), got \(\)'),
        ('dynamic_threshold', {'percentile': 0.0}, r'\(0, 1\]'),
        ('dynamic_threshold', {'percentile': 99.5}, r'\(0, 1\].*got 99.5'),
        ('dynamic_threshold', {'maximum': 0.5}, 'at least 1'),
        ('reconstruction', {'noise_std': -0.1}, 'noise_std'),
        ('reconstruction', {'prior_std': 0.0}, 'prior_std'),
        ('reconstruction', {'iterations': 0}, 'iterations'),
        ('reconstruction', {'measurement': jnp.ones((1, 2, 4, 1))}, r'\(3, 2, 4, 1\), the measurement'),
        ('reconstruction', {'operator': guidance.average_pool(3)}, 'multiples of 3'),
    ],
)
def test_what_cannot_be_is_refused(call, options, message):
    with pytest.raises(UsageError, match=message):
        guided_by(call, **options)


CALLS = ('classifier_free', 'autoguidance', 'adaptive_projected', 'classifier', 'dynamic_threshold', 'reconstruction')


@pytest.mark.parametrize('call', CALLS)
def test_the_defaults_of_the_refusals_are_accepted(call):
    guided_by(call)


def test_average_pool_of_no_pixels_is_refused():
    with pytest.raises(UsageError, match='factor'):
        guidance.average_pool(0)
