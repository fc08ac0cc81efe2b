"""The engine: one compilation, N calls for N steps, keys, recording, progress."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import SamplingDiverged, denoisers, guidance, oracles, samplers, schedules
from diffusion_jax.denoisers import ModelDenoiser

CHAIN = schedules.cosine(1000)
ORACLE = oracles.gaussian(0.3, 0.5).denoiser(CHAIN)


def apply(params, x, t, label):
    """A network in miniature, which tells labels apart."""
    return params * x + label[:, None] * jnp.sin(t)[:, None]


def test_changing_values_never_compiles_again():
    """Guidance scale, key, initial noise, grid, eta, parameters, labels and schedule are all traced."""

    @jax.jit
    def run(params, plan, x, key, label, scale):
        denoiser = ModelDenoiser(apply, params, CHAIN, 'v', {'label': label})
        denoiser = guidance.classifier_free(denoiser, {'label': jnp.zeros_like(label)}, scale)
        return samplers.sample(ORACLE, plan, x, key)

    outs = []
    for seed, scale, spacing, eta, schedule in [
        (0, 1.0, 'trailing', 0.0, CHAIN),
        (1, 7.5, 'leading', 0.5, CHAIN),
        (2, 0.0, 'linspace', 1.0, CHAIN),
        (3, 3.0, 'trailing', 0.0, schedules.linear(1000)),
    ]:
        plan = samplers.plan('ddim', schedule, 10, spacing, eta=eta)
        x = jax.random.normal(jax.random.key(seed), (4, 3))
        label = jnp.arange(4) + seed
        outs.append(run(jnp.float32(0.1 * seed), plan, x, jax.random.key(seed), label, jnp.float32(scale)))
    run(jnp.float32(0.1), samplers.ddim(CHAIN, np.linspace(0.9, 0, 11)), x, jax.random.key(0), label, jnp.float32(2))
    assert run._cache_size() == 1
    assert len({float(out.sum()) for out in outs}) == 4


@pytest.mark.parametrize('solver', ['heun', 'dpmpp_2m', 'dpmpp_3s', 'dpmpp_2m_sde', 'unipc', 'plms'])
def test_another_grid_of_as_many_steps_never_compiles_again(solver):
    @jax.jit
    def run(plan, x):
        return samplers.sample(ORACLE, plan, x, jax.random.key(0))

    outs = [
        run(samplers.plan(solver, schedule, 12, spacing), jnp.ones((2, 1)))
        for schedule in (CHAIN, schedules.linear(1000))
        for spacing in ('trailing', 'leading', 'log_snr', 'karras')
    ]
    assert run._cache_size() == 1
    assert len({float(out[0, 0]) for out in outs}) == 8


def test_a_thousand_steps_compile_as_ten_do_and_take_no_more_memory():
    """Counted in what is compiled: instructions, and the bytes that XLA sets aside."""

    def compiled(solver, steps, record=False):
        run = samplers.sample_trajectory if record else samplers.sample
        plan = samplers.plan(solver, CHAIN, steps)
        return jax.jit(lambda plan, x: run(ORACLE, plan, x, jax.random.key(0))).lower(plan, x).compile()

    x = jnp.ones((64, 100))
    for solver in ('ddim', 'dpmpp_2m', 'unipc', 'dpmpp_2m_sde'):
        few, many = compiled(solver, 10), compiled(solver, 1000)
        # What varies with the steps is the table of coefficients: 2 KB at 10, at most 100 floats a step.
        assert len(many.as_text().splitlines()) == pytest.approx(len(few.as_text().splitlines()), rel=0.05)
        grown = many.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes
        assert grown < 990 * 100 * 4
    # The measure does see what grows: a trajectory of 1000 x.
    recorded = compiled('ddim', 1000, record=True).memory_analysis()
    assert recorded.output_size_in_bytes > 1000 * x.nbytes


def test_the_grid_itself_may_be_traced():
    @jax.jit
    def run(times, eta):
        plan = samplers.ddim(CHAIN, times, eta)
        return samplers.sample(ORACLE, plan, jnp.ones((2, 1)), jax.random.key(0))

    times = samplers.time_grid(CHAIN, 10)
    traced = run(jnp.asarray(times, jnp.float32), jnp.float32(0.5))
    concrete = samplers.sample(
        ORACLE,
        samplers.ddim(CHAIN, times, 0.5),
        jnp.ones((2, 1)),
        jax.random.key(0),
    )
    np.testing.assert_allclose(traced, concrete, rtol=1e-3)


@pytest.mark.parametrize(
    ('solver', 'spacing', 'steps'),
    [
        *(('ddim', spacing, steps) for spacing in ('leading', 'trailing', 'linspace') for steps in (1, 15, 1000)),
        *((solver, 'trailing', 15) for solver in ('ddpm', 'dpmpp_2m', 'dpmpp_3m_sde', 'unipc', 'lms')),
    ],
)
def test_n_steps_are_n_model_calls_at_the_times_of_the_grid(solver, spacing, steps):
    seen = []

    def denoiser(x_t, t):
        jax.debug.callback(lambda t: seen.append(float(CHAIN.timestep(t))), t, ordered=True)
        return ORACLE(x_t, t)

    samplers.sample(denoiser, samplers.plan(solver, CHAIN, steps, spacing), jnp.ones((1, 1)), jax.random.key(0))
    jax.effects_barrier()
    expected = np.round(samplers.time_grid(CHAIN, steps, spacing)[:-1] * 1000 - 1)
    np.testing.assert_array_equal(np.round(seen), expected)


def test_a_trajectory_starts_at_the_noise_ends_at_the_sample_and_holds_every_x0(key):
    x = jax.random.normal(key, (3, 2))
    plan = samplers.plan('ddim', CHAIN, 7, eta=0.5)
    trajectory = samplers.sample_trajectory(ORACLE, plan, x, key)
    assert trajectory.x.shape == (8, 3, 2)
    assert trajectory.x0.shape == (7, 3, 2)
    np.testing.assert_array_equal(trajectory.x[0], x)
    np.testing.assert_allclose(trajectory.x[-1], samplers.sample(ORACLE, plan, x, key), rtol=1e-6)
    times = samplers.time_grid(CHAIN, 7)
    for i in range(7):
        np.testing.assert_allclose(trajectory.x0[i], ORACLE(trajectory.x[i], times[i]).x0, rtol=1e-4, atol=1e-6)


def test_with_a_key_per_sample_each_depends_on_its_own_alone(key):
    keys = jax.random.split(key, 4)
    x = jax.random.normal(key, (4, 2))
    plan = samplers.plan('ddpm', CHAIN, 5)
    together = samplers.sample(ORACLE, plan, x, keys)
    alone = samplers.sample(ORACLE, plan, x[2:3], keys[2:3])
    np.testing.assert_allclose(together[2:3], alone, rtol=1e-6)
    assert len(np.unique(together)) == 8


def test_every_step_draws_its_own_noise(key):
    """With a network that says x0 = 0 and one x_t, what a DDPM trajectory holds is its noise."""
    plan = samplers.plan('ddpm', CHAIN, 6)
    point = oracles.gaussian(0.0, 0.0).denoiser(CHAIN)
    xs = samplers.sample_trajectory(point, plan, jnp.zeros((1, 5000)), key).x[1:-1, 0]
    c = plan.coefficients
    fresh = [xs[0]] + [xs[i] - c['matrix'][i, 0, 0] * xs[i - 1] for i in range(1, 5)]
    np.testing.assert_allclose(np.corrcoef(np.array(fresh)), np.eye(5), atol=0.05)
    np.testing.assert_allclose(np.std(fresh, axis=1), c['noise'][:5], rtol=0.05)


def test_progress_is_told_of_every_step():
    seen = []
    plan = samplers.plan('ddim', CHAIN, 9)
    jax.jit(
        lambda x: samplers.sample(
            ORACLE,
            plan,
            x,
            jax.random.key(0),
            on_step=lambda step: seen.append(int(step)),
        )
    )(jnp.ones((1, 1)))
    jax.effects_barrier()
    assert sorted(seen) == list(range(9))


def test_clipping_holds_the_prediction_and_so_the_sample_in_range():
    plan = samplers.plan('ddim', CHAIN, 10)
    denoiser = oracles.gaussian(5.0, 0.1).denoiser(CHAIN)
    free = samplers.sample_trajectory(denoiser, plan, jnp.ones((2, 3)), jax.random.key(0))
    held = samplers.sample_trajectory(denoiser, plan, jnp.ones((2, 3)), jax.random.key(0), clip=True)
    assert free.x0.max() > 4
    assert held.x0.max() <= 1
    np.testing.assert_allclose(held.x[-1], 1, atol=1e-6)


@pytest.mark.parametrize('clip', [False, True])
@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
def test_a_network_that_diverges_is_never_an_image(bad, clip):
    """Not even where clipping would make a finite value of it."""

    def denoiser(x_t, t):
        prediction = ORACLE(x_t, t)
        broken = jnp.where((t < 0.5) & (jnp.arange(3)[:, None] == 1), bad, prediction.value)
        return dataclasses.replace(prediction, value=broken)

    plan = samplers.plan('dpmpp_2m', CHAIN, 10)
    with pytest.raises(SamplingDiverged, match='1 of 3 samples are not finite'):
        samplers.sample(denoiser, plan, jnp.ones((3, 2)), jax.random.key(0), clip=clip)
    out = jax.jit(lambda x: samplers.sample(denoiser, plan, x, jax.random.key(0), clip=clip))(jnp.ones((3, 2)))
    np.testing.assert_array_equal(jnp.isfinite(out).all(axis=1), [True, False, True])
    with pytest.raises(SamplingDiverged):
        samplers.check_finite(out)


def test_a_denoiser_with_a_memory_keeps_it_from_call_to_call():
    """One that counts its calls and answers with the count."""

    def call(x_t, t, count):
        prediction = ORACLE(x_t, t)
        return dataclasses.replace(prediction, value=jnp.full_like(x_t, count), kind='x0'), count + 1

    counting = denoisers.Stateful(lambda x: jnp.zeros(()), call)
    for solver, calls in (('ddim', 5), ('heun', 9)):
        trajectory = samplers.sample_trajectory(
            counting, samplers.plan(solver, CHAIN, 5), jnp.ones((1, 1)), jax.random.key(0)
        )
        np.testing.assert_array_equal(trajectory.x0[:, 0, 0], np.arange(calls))
        clipped = samplers.sample_trajectory(
            counting, samplers.plan(solver, CHAIN, 5), jnp.ones((1, 1)), jax.random.key(0), clip=True
        )
        np.testing.assert_array_equal(clipped.x0[:, 0, 0], np.minimum(np.arange(calls), 1))


def test_what_is_known_is_a_fresh_draw_at_every_call(key):
    plan = samplers.plan('ddim', CHAIN, 6)
    known = samplers.Known(jnp.full((1, 5000), 0.4), jnp.ones(()))
    xs = samplers.sample_trajectory(ORACLE, plan, jnp.zeros((1, 5000)), key, known=known).x[:, 0]
    np.testing.assert_array_equal(xs[-1], jnp.float32(0.4))
    noise = (xs[:-1] - 0.4 * plan.alpha[:-1, None]) / plan.sigma[:-1, None]
    np.testing.assert_allclose(np.corrcoef(noise), np.eye(6), atol=0.05)
    np.testing.assert_allclose(noise.std(axis=1), 1, atol=0.04)


def test_noise_to_start_from_has_the_size_that_the_schedule_asks_for(key):
    for schedule, std in ((CHAIN, 1.0), (schedules.edm(), 80.0), (schedules.flow(), 1.0)):
        plan = samplers.plan('dpmpp_2m', schedule, 5)
        x = samplers.prior(plan, key, (1000, 3))
        assert x.shape == (1000, 3)
        assert float(x.std()) == pytest.approx(std, rel=0.05)
        keys = jax.random.split(key, 1000)
        np.testing.assert_allclose(samplers.prior(plan, keys[3:4], (1, 3))[0], samplers.prior(plan, keys, (1000, 3))[3])


def test_samples_have_derivatives():
    plan = samplers.plan('ddim', CHAIN, 5)
    gradient = jax.grad(lambda x: samplers.sample(ORACLE, plan, x, jax.random.key(0)).sum())
    assert jnp.isfinite(gradient(jnp.ones((2, 1)))).all()


@pytest.mark.usefixtures('x64')
def test_float64_noise_is_sampled_in_float64():
    out = samplers.sample(
        ORACLE,
        samplers.plan('ddim', CHAIN, 5),
        jnp.ones((2, 1), jnp.float64),
        jax.random.key(0),
    )
    assert out.dtype == jnp.float64


@pytest.mark.parametrize(
    ('x', 'key', 'message'),
    [
        (jnp.ones((2, 1), jnp.bfloat16), jax.random.key(0), 'float32 or float64'),
        (jnp.ones((2, 1)), jax.random.split(jax.random.key(0), 3), 'one per sample'),
        (jnp.ones((2, 1)), jax.random.PRNGKey(0), 'a typed key'),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, key, message):
    with pytest.raises(ValueError, match=message):
        samplers.sample(ORACLE, samplers.plan('ddim', CHAIN, 5), x, key)


def test_a_network_of_another_shape_is_refused():
    denoiser = ModelDenoiser(lambda params, x, t: x[:, :1], None, CHAIN, 'eps')
    with pytest.raises(ValueError, match=r'returned shape \(2, 1\) for x_t of shape \(2, 3\)'):
        samplers.sample(denoiser, samplers.plan('ddim', CHAIN, 5), jnp.ones((2, 3)), jax.random.key(0))
