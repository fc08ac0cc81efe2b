"""Inversion, image to image, inpainting and restoration against closed forms of Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import SamplingDiverged, UsageError, guidance, oracles, samplers, schedules

CHAIN = schedules.cosine(1000)
MIXTURE = oracles.gaussian_mixture([0.4, 0.6], [[-0.6, 0.2], [0.5, -0.3]], [0.2, 0.3])
COVARIANCE = np.array([[1.0, 0.8], [0.8, 1.0]]) * 0.25
PAIR = oracles.gaussian([0.2, -0.1], COVARIANCE)


def run(denoiser):
    return jax.jit(lambda plan, x, key, known=None: samplers.sample(denoiser, plan, x, key, known=known))


@pytest.mark.parametrize('schedule', [CHAIN, schedules.edm(), schedules.flow()], ids=['cosine', 'edm', 'flow'])
def test_inversion_and_back_is_the_image_with_an_error_that_falls_with_the_steps(schedule, key):
    image = MIXTURE.sample(key, 50)
    sample = run(MIXTURE.denoiser(schedule))
    errors = []
    for steps in (20, 80, 320):
        times = samplers.time_grid(schedule, steps, 'log_snr')
        noise = sample(samplers.ddim_inversion(schedule, times), image, key)
        back = sample(samplers.ddim(schedule, times), noise, key)
        errors.append(float(jnp.sqrt(jnp.mean((back - image) ** 2))))
    assert errors[2] < 0.02
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.5 * errors[1]


def test_inverted_data_are_noise(key):
    times = samplers.time_grid(CHAIN, 200, 'log_snr')
    image = MIXTURE.sample(key, 5000)
    noise = run(MIXTURE.denoiser(CHAIN))(samplers.ddim_inversion(CHAIN, times), image, key)
    np.testing.assert_allclose(np.cov(noise.T), np.eye(2), atol=0.08)
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.06)


def test_inversion_ends_at_zero_signal_too(key):
    schedule = schedules.flow()
    times = samplers.time_grid(schedule, 50)
    noise = run(MIXTURE.denoiser(schedule))(samplers.ddim_inversion(schedule, times), MIXTURE.sample(key, 500), key)
    np.testing.assert_allclose(noise.std(axis=0), 1, atol=0.15)


def test_strength_is_how_much_of_the_image_is_given_up(key):
    image = jnp.tile(jnp.array([[0.4, 0.1]]), (4000, 1))
    sample = run(PAIR.denoiser(CHAIN))
    distances = []
    for strength in (0.1, 0.4, 0.7, 1.0):
        plan = samplers.plan('dpmpp_2m', CHAIN, 40, strength=strength)
        assert plan.num_calls == 40 * strength
        key_noise, key_steps = jax.random.split(key)
        out = sample(plan, samplers.noised(plan, image, key_noise), key_steps)
        distances.append(float(jnp.sqrt(jnp.mean((out - image) ** 2))))
    assert (np.diff(distances) > 0.02).all()
    # All of it: a draw of the data, whatever the image.
    np.testing.assert_allclose(np.cov(out.T), COVARIANCE, atol=0.03)


def test_noised_is_a_draw_of_q_at_the_plans_start(key):
    plan = samplers.plan('ddim', CHAIN, 10, strength=0.5)
    noisy = samplers.noised(plan, jnp.full((5000, 2), 0.4), key)
    np.testing.assert_allclose(noisy.mean(axis=0), 0.4 * plan.alpha[0], atol=0.03)
    np.testing.assert_allclose(noisy.std(axis=0), plan.sigma[0], rtol=0.05)
    keys = jax.random.split(key, 3)
    alone = samplers.noised(plan, jnp.ones((1, 2)), keys[2:])
    np.testing.assert_array_equal(samplers.noised(plan, jnp.ones((3, 2)), keys)[2:], alone)


def test_slerp_keeps_the_norm_and_the_ends(key):
    a, b = jax.random.normal(key, (2, 3, 50, 40))
    np.testing.assert_allclose(samplers.slerp(a, b, 0.0), a, atol=1e-6)
    np.testing.assert_allclose(samplers.slerp(a, b, 1.0), b, atol=1e-5)
    middle = samplers.slerp(a, b, 0.5)
    np.testing.assert_allclose(middle.std(axis=(1, 2)), 1, atol=0.05)
    assert ((a + b) / 2).std() < 0.75  # what a straight line does
    mixed = samplers.slerp(a, b, jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(mixed[1], middle[1], atol=1e-6)
    np.testing.assert_allclose(mixed[2], b[2], atol=1e-5)
    np.testing.assert_allclose(samplers.slerp(a, a, 0.3), a, atol=1e-5)
    assert jnp.isfinite(samplers.slerp(a, -a, 0.3)).all()
    # Equal angles: the arc from x to y at a third.
    third = samplers.slerp(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), 1 / 3)
    np.testing.assert_allclose(third, [[np.cos(np.pi / 6), np.sin(np.pi / 6)]], rtol=1e-5)


def posterior(value):
    """Mean and standard deviation of the second coordinate of PAIR given the first."""
    slope = COVARIANCE[0, 1] / COVARIANCE[0, 0]
    return -0.1 + slope * (value - 0.2), np.sqrt(COVARIANCE[1, 1] - slope * COVARIANCE[0, 1])


def test_repaint_draws_from_the_posterior_and_plain_masking_does_not_quite(key):
    """What is filled in is correlated with what is known; resampling is what makes it so."""
    known = samplers.Known(jnp.array([0.8, 0.0]), jnp.array([1, 0]))
    sample = run(PAIR.denoiser(CHAIN))
    mean, std = posterior(0.8)
    errors = {}
    for resamples in (1, 10):
        plan = samplers.repaint(CHAIN, samplers.time_grid(CHAIN, 50), resamples=resamples, jump=5)
        assert plan.num_calls == 49 * resamples + 1
        x = samplers.prior(plan, key, (4000, 2))
        out = sample(plan, x, jax.random.key(1), known)
        np.testing.assert_array_equal(out[:, 0], jnp.float32(0.8))
        errors[resamples] = abs(float(out[:, 1].mean()) - mean)
    assert errors[10] < 0.06
    assert errors[1] > 2 * errors[10]
    assert float(out[:, 1].std()) == pytest.approx(std, abs=0.06)


def test_going_back_and_forth_keeps_the_exact_marginals_of_a_single_point(key):
    """As the posterior's variance is exact for it, x_t is N(alpha m, sigma^2) at every call, forth and back."""
    plan = samplers.repaint(CHAIN, samplers.time_grid(CHAIN, 12), resamples=3, jump=4, variance='small')
    assert (np.diff(plan.times) > 0).sum() == 2 * 3  # three segments, each begun again twice
    x = plan.alpha[0] * 0.4 + plan.sigma[0] * jax.random.normal(key, (20_000, 1))
    xs = samplers.sample_trajectory(oracles.gaussian(0.4, 0.0).denoiser(CHAIN), plan, x, jax.random.key(1)).x
    np.testing.assert_allclose(xs.mean(axis=(1, 2)), 0.4 * plan.alpha, atol=0.03)
    np.testing.assert_allclose(xs.std(axis=(1, 2)), plan.sigma, atol=0.02)


@pytest.mark.parametrize('solver', ['ddim', 'dpmpp_2m', 'heun', 'dpmpp_2m_sde', 'unipc'])
def test_masking_keeps_what_is_known_with_every_solver(solver, key):
    known = samplers.Known(jnp.array([[0.8, 0.0]]), jnp.array([True, False]))
    plan = samplers.plan(solver, CHAIN, 30)
    out = run(PAIR.denoiser(CHAIN))(plan, samplers.prior(plan, key, (500, 2)), key, known)
    np.testing.assert_array_equal(out[:, 0], jnp.float32(0.8))
    assert float(out[:, 1].mean()) > 0.05  # pulled towards the known: the unconditional mean is -0.1


def test_masking_with_a_key_per_sample_depends_on_it_alone(key):
    known = samplers.Known(jnp.array([[0.8, 0.0]]), jnp.array([True, False]))
    plan = samplers.plan('ddim', CHAIN, 5)
    keys = jax.random.split(key, 3)
    x = samplers.prior(plan, keys, (3, 2))
    sample = run(PAIR.denoiser(CHAIN))
    np.testing.assert_allclose(
        sample(plan, x, keys, known)[1:2], sample(plan, x[1:2], keys[1:2], known), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize('schedule', [CHAIN, schedules.flow()], ids=['cosine', 'flow'])
def test_reconstruction_guidance_draws_from_the_posterior(schedule, key):
    """Super-resolution of standard normal images from their means over 2 x 2 pixels, with noise: all in closed form."""
    noise_std = 0.1
    operator = guidance.average_pool(2)
    measured = jnp.array([0.5, -0.3, 0.0, 0.2]).reshape(1, 2, 2, 1)
    num = 2000
    denoiser = guidance.reconstruction(
        oracles.gaussian(np.zeros((4, 4, 1)), 1.0).denoiser(schedule),
        operator,
        jnp.broadcast_to(measured, (num, 2, 2, 1)),
        noise_std,
        iterations=2,
    )
    plan = samplers.plan('ddpm', schedule, 150, 'log_snr', variance='small')
    out = run(denoiser)(plan, samplers.prior(plan, key, (num, 4, 4, 1)), key)
    # A mean of four has variance 1/4: the posterior's mean of it is y / (1 + 4 noise_std^2).
    mean = operator(out)
    np.testing.assert_allclose(mean.mean(axis=0), measured[0] / (1 + 4 * noise_std**2), atol=0.02)
    expected = np.sqrt(1 / (4 + 1 / noise_std**2))
    np.testing.assert_allclose(mean.std(axis=0), expected, atol=0.02)
    # And the differences within the square are as free as before.
    np.testing.assert_allclose((out[:, 0, 0] - out[:, 0, 1]).std(), np.sqrt(2), rtol=0.1)


@pytest.mark.parametrize('schedule', [CHAIN, schedules.edm(), schedules.flow()], ids=['cosine', 'edm', 'flow'])
@pytest.mark.parametrize('order', [2, 3])
@pytest.mark.usefixtures('x64')
def test_adaptive_steps_reach_the_exact_flow_within_the_tolerance(schedule, order):
    denoiser = MIXTURE.denoiser(schedule)
    low, high = -6.0, 5.0
    start = np.random.default_rng(0).normal(size=(5, 2)) * np.exp(-low / 2)
    exact = MIXTURE.probability_flow(start, [low, high])[-1]
    t_start, t_end = schedule.time_of_log_snr(np.array([low, high]))

    @jax.jit
    def solve(x, tolerance):
        return samplers.sample_adaptive(
            denoiser,
            schedule,
            x,
            order=order,
            atol=tolerance,
            rtol=tolerance,
            t_start=t_start,
            t_end=t_end,
            denoise_to_zero=False,
        )

    errors, calls = [], []
    for tolerance in (1e-2, 1e-4):
        result = solve(jnp.asarray(schedule.alpha(t_start) * start), tolerance)
        assert result.finished
        assert result.calls >= order * result.steps
        errors.append(float(jnp.abs(result.x / schedule.alpha(t_end) - exact).max()))
        calls.append(int(result.calls))
    assert solve._cache_size() == 1
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 10
    assert calls[0] < calls[1] < 1000


@pytest.mark.parametrize('order', [2, 3])
@pytest.mark.usefixtures('x64')
def test_one_adaptive_step_is_one_step_of_the_single_step_solver(order):
    """With a tolerance that nothing exceeds and a first step over the whole range."""
    denoiser = MIXTURE.denoiser(CHAIN)
    times = CHAIN.time_of_log_snr(np.linspace(-2.0, 2.0, order + 1))
    x = jax.random.normal(jax.random.key(0), (4, 2))
    plan = samplers.singlestep(CHAIN, times, order, 'eps', lower_order_final=False)
    result = samplers.sample_adaptive(
        denoiser,
        CHAIN,
        x,
        order=order,
        atol=1e9,
        t_start=times[0],
        t_end=times[-1],
        first_step=10.0,
        denoise_to_zero=False,
    )
    assert result.steps == 1
    assert result.calls == order
    np.testing.assert_allclose(result.x, samplers.sample(denoiser, plan, x, jax.random.key(0)), rtol=1e-8)


def test_adaptive_steps_in_float32_from_noise_to_data(key):
    x = jax.random.normal(key, (2000, 2))
    result = jax.jit(lambda x: samplers.sample_adaptive(PAIR.denoiser(CHAIN), CHAIN, x))(x)
    assert result.x.dtype == jnp.float32
    np.testing.assert_allclose(np.cov(result.x.T), COVARIANCE, atol=0.03)
    assert result.calls < 100
    held = jax.jit(lambda x: samplers.sample_adaptive(PAIR.denoiser(CHAIN), CHAIN, x, clip=True))(3 * x).x
    assert jnp.abs(held).max() <= 1


def test_adaptive_steps_that_cannot_finish_say_so(key):
    x = jax.random.normal(key, (4, 2))
    result = jax.jit(lambda x: samplers.sample_adaptive(PAIR.denoiser(CHAIN), CHAIN, x, max_calls=6))(x)
    assert not result.finished
    assert jnp.isnan(result.x).all()
    with pytest.raises(SamplingDiverged):
        samplers.sample_adaptive(oracles.gaussian([float('nan')] * 2, 1.0).denoiser(CHAIN), CHAIN, x, max_calls=30)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: samplers.sample_adaptive(None, CHAIN, jnp.ones((1, 2)), order=4), 'order of sample_adaptive'),
        (lambda: samplers.sample_adaptive(None, CHAIN, jnp.ones((1, 2)), t_end=0.0), '0 < t_end < t_start'),
        (lambda: samplers.sample_adaptive(None, CHAIN, jnp.ones((1, 2)), safety=2.0), '0 < safety < 1'),
        (lambda: samplers.partial_grid([1.0, 0.5, 0.0], 0.0), r'strength must be in \(0, 1\]'),
        (lambda: samplers.repaint(CHAIN, [1.0, 0.0], resamples=0), 'resamples >= 1'),
        (lambda: samplers.repaint(CHAIN, [1.0, 0.0], variance='learned'), "'small' or 'large'"),
        (lambda: samplers.slerp(jnp.ones((1, 2)), jnp.ones((1, 3)), 0.5), 'one shape'),
        (
            lambda: samplers.sample(
                PAIR.denoiser(CHAIN),
                samplers.plan('ddim', CHAIN, 2),
                jnp.ones((3, 2)),
                jax.random.key(0),
                known=samplers.Known(jnp.ones((4, 2)), jnp.ones(2)),
            ),
            'must broadcast to x',
        ),
    ],
)
def test_what_cannot_be_done_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
