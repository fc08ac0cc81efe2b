"""What every solver keeps to: its description, finite results at the ends of every grid, and errors that say why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import UsageError, denoisers, oracles, samplers, schedules
from diffusion_jax.config import SOLVER_OPTIONS
from diffusion_jax.samplers import DESCRIPTIONS, SOLVERS
from experiments.solvers.convergence import widened

SCHEDULES = {
    'linear': schedules.linear(1000),
    'cosine': schedules.cosine(1000),
    'short': schedules.linear(12),
    'limit': schedules.cosine(None),
    'zero snr': schedules.linear(1000, zero_terminal_snr=True),
    'edm': schedules.edm(),
    've': schedules.ve(),
    'flow': schedules.flow(3.0),
}
SIZES = (32, 2048)


def network(dtype):
    """A network in miniature that computes in `dtype`: v or flow, as both ends of every schedule allow."""

    def apply(params, x, t):
        return jnp.tanh(x.astype(dtype) * params.astype(dtype)) + jnp.sin(t.astype(dtype))[:, None] / 4

    return apply


@pytest.fixture(scope='module')
def programs():
    made = {}

    def program(name, dtype):
        if (name, dtype) not in made:
            denoiser = denoisers.ModelDenoiser(network(dtype), jnp.float32(0.3), SCHEDULES[name], 'v')
            made[name, dtype] = jax.jit(lambda plan, x: samplers.sample(denoiser, plan, x, jax.random.key(0)))
        return made[name, dtype]

    return program


@pytest.mark.parametrize('dtype', ['float32', pytest.param('bfloat16', marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', SCHEDULES)
def test_no_end_of_any_grid_gives_nan(name, dtype, programs):
    schedule = SCHEDULES[name]
    steps = {'short': (1, 2, 7, 12), 'cosine': (1, 2, 5, 1000), 'flow': (1, 3, 1000)}.get(name, (1, 2, 3, 10))
    for solver in SOLVERS:
        for spacing in ('trailing', 'log_snr', 'karras') + (('leading',) if schedule.num_timesteps else ()):
            for num in steps:
                plan = samplers.plan(solver, schedule, num, spacing)
                x = samplers.prior(plan, jax.random.key(1), (3, 2))
                size = next(size for size in SIZES if size >= plan.num_calls)
                out = programs(name, dtype)(widened(plan, size), x)
                assert jnp.isfinite(out).all(), (solver, spacing, num)


@pytest.mark.parametrize('name', ['zero snr', 'flow'])
def test_a_history_that_begins_without_signal_counts_for_nothing(name):
    """No finite difference in log-SNR reaches there: every order is finite, and its second step DDIM's."""
    times = samplers.time_grid(SCHEDULES[name], 20)
    ddim = samplers.ddim(SCHEDULES[name], times).coefficients['matrix']
    for order in (2, 3):
        for form in ('x0', 'eps'):
            samplers.unipc(SCHEDULES[name], times, order, form)  # refuses what is not finite
            matrix = samplers.multistep(SCHEDULES[name], times, order, form).coefficients['matrix']
            np.testing.assert_allclose(matrix[:2, 0, [0, -1]], ddim[:2, 0], atol=1e-12)


@pytest.mark.parametrize('solver', sorted(SOLVERS))
def test_the_catalogue_is_true(solver):
    entry = DESCRIPTIONS[solver]
    for steps in (9, 20):
        plan = samplers.plan(solver, SCHEDULES['cosine'], steps)
        assert plan.num_calls == eval(entry.calls.replace('2 N', '2 * N'), {'N': steps})
        noise = plan.coefficients.get('noise')
        assert (noise is not None and bool(np.any(noise))) == entry.stochastic
    assert solver in samplers.describe()
    assert entry.paper in samplers.describe(solver)


def test_describe_refuses_what_it_does_not_know():
    with pytest.raises(UsageError, match=r"unknown solver 'unpic'\. Did you mean 'unipc'"):
        samplers.describe('unpic')


@pytest.mark.parametrize('name', ['linear', 'edm', 'flow'])
def test_two_names_for_one_method_are_one_method(name):
    """Euler in sigma / alpha is DDIM; SDE-DPM-Solver++ of order 1 is DDIM with eta 1; DPM-Solver-1 is DDIM."""
    schedule = SCHEDULES[name]
    denoiser = oracles.gaussian(0.3, 0.5).denoiser(schedule)
    run = jax.jit(lambda plan, x: samplers.sample(denoiser, plan, x, jax.random.key(0)))
    times = samplers.time_grid(schedule, 10, 'log_snr')

    def out(plan):
        return run(widened(plan, 32), samplers.prior(plan, jax.random.key(1), (5, 2)))

    ddim = out(samplers.ddim(schedule, times))
    for plan in (
        samplers.euler(schedule, times),
        samplers.multistep(schedule, times, 1),
        samplers.multistep(schedule, times, 1, 'eps'),
        samplers.singlestep(schedule, times, 1, 'eps'),
        samplers.lms(schedule, times, order=1),
        samplers.unipc(schedule, times, 1, corrector=False),
    ):
        np.testing.assert_allclose(out(plan), ddim, atol=2e-5)
    ancestral = out(samplers.ddim(schedule, times, eta=1.0))
    assert jnp.abs(ancestral - ddim).max() > 0.01
    for plan in (samplers.euler_ancestral(schedule, times), samplers.dpmpp_sde(schedule, times)):
        np.testing.assert_allclose(out(plan), ancestral, atol=2e-5)


def test_every_option_of_every_solver_can_be_set_in_a_config():
    assert SOLVER_OPTIONS['lower_order_final'] is bool
    assert SOLVER_OPTIONS['order'] is int
    assert SOLVER_OPTIONS['eta'] is float
    assert SOLVER_OPTIONS['method'] is str


OPTIONS = [
    ('ddim', {'eta': [0.0, 0.5]}),
    ('ddpm', {'variance': ['small', 'large']}),
    ('euler_ancestral', {'eta': [1.0, 0.5]}),
    ('heun', {'churn': [0.0, 5.0], 'coordinate': ['sigma', 'flow']}),
    ('edm', {'churn': [40.0, 1.0], 'churn_min': [0.05, 1.0], 'churn_max': [50.0, 1.0], 'churn_noise': [1.003, 1.2]}),
    ('dpmpp_2m', {'method': ['midpoint', 'heun'], 'lower_order_final': [True, False]}),
    ('dpmpp_3m', {'second_difference': ['full', 'published'], 'lower_order_final': [True, False]}),
    ('dpm_2m', {'method': ['midpoint', 'heun'], 'lower_order_final': [True, False]}),
    ('dpm_3m', {'second_difference': ['full', 'published'], 'lower_order_final': [True, False]}),
    ('dpmpp_sde', {'eta': [1.0, 0.5]}),
    ('dpmpp_2m_sde', {'eta': [1.0, 0.5], 'method': ['midpoint', 'heun'], 'lower_order_final': [True, False]}),
    (
        'dpmpp_3m_sde',
        {'eta': [1.0, 0.5], 'second_difference': ['full', 'published'], 'lower_order_final': [True, False]},
    ),
    ('dpm_2', {'stages': ['log_snr', 'grid'], 'lower_order_final': [True, False]}),
    ('dpm_3', {'stages': ['log_snr', 'grid'], 'lower_order_final': [True, False]}),
    ('dpmpp_2s', {'method': ['midpoint', 'heun'], 'stages': ['log_snr', 'grid'], 'lower_order_final': [True, False]}),
    ('dpmpp_3s', {'method': ['midpoint', 'heun'], 'stages': ['log_snr', 'grid'], 'lower_order_final': [True, False]}),
    ('unipc', {'order': [2, 3], 'form': ['x0', 'eps'], 'corrector': [True, False], 'lower_order_final': [True, False]}),
    ('unipc', {'variant': ['bh2', 'bh1']}),
    ('lms', {'order': [4, 2]}),
    ('plms', {'combined': ['eps', 'v']}),
    ('pndm', {'combined': ['eps', 'v']}),
]


@pytest.mark.parametrize(
    ('solver', 'option', 'values'),
    [(solver, option, values) for solver, options in OPTIONS for option, values in options.items()],
)
def test_no_option_is_accepted_and_ignored(solver, option, values):
    plans = [
        samplers.plan(solver, SCHEDULES['linear'], 12, 'trailing', 'sigma_min', **{option: value}) for value in values
    ]
    a, b = (jax.tree.leaves((plan.coefficients, plan.times)) for plan in plans)
    shapes_differ = [np.shape(x) for x in a] != [np.shape(x) for x in b]
    assert shapes_differ or any(not np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_option_is_among_those_tested():
    from diffusion_jax.registry import parameters_of

    for name, solver in SOLVERS.items():
        tested = {option for entry, options in OPTIONS for option in options if entry == name}
        expected = set(parameters_of(solver)) - {'schedule', 'times'}
        if name == 'heun':  # the churn's range and noise are tested where there is churn
            expected -= {'churn_min', 'churn_max', 'churn_noise'}
        assert tested == expected, name


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda c: samplers.plan('unipc', c, 10, order=4), r'order of unipc must be in 1\.\.3, got 4'),
        (lambda c: samplers.plan('unipc', c, 10, form='v'), "unknown form of unipc 'v'.*eps, x0"),
        (lambda c: samplers.plan('unipc', c, 10, variant='bh3'), 'Valid choices: bh1, bh2'),
        (lambda c: samplers.plan('lms', c, 10, order=0), r'order of lms must be in 1\.\.4, got 0'),
        (lambda c: samplers.plan('dpmpp_2m', c, 10, method='taylor'), 'unknown method of multistep.*heun, midpoint'),
        (lambda c: samplers.plan('dpmpp_3m', c, 10, second_difference='half'), 'Valid choices: full, published'),
        (lambda c: samplers.plan('dpmpp_2m_sde', c, 10, eta=-1.0), 'eta must be 0 or more'),
        (lambda c: samplers.multistep(c, [0.9, 0.5, 0.1], form='eps', eta=1.0), "0 for form 'eps'"),
        (lambda c: samplers.plan('dpm_2', c, 10, stages='middle'), 'Valid choices: grid, log_snr'),
        (lambda c: samplers.plan('heun', c, 10, churn=-1.0), 'churn >= 0'),
        (lambda c: samplers.plan('heun', c, 10, coordinate='t'), 'Valid choices: flow, sigma'),
        (lambda c: samplers.plan('dpmpp_2m', c, 10, eta=0.5), "option of solver 'dpmpp_2m'.*'eta'"),
        (lambda c: samplers.plan('dpmpp_2m', c, 10, final='one'), "unknown final 'one'.*sigma_min, zero"),
        (lambda c: samplers.plan('dpmpp_2m', c, 0), r'steps must be in 1\.\.1000, got 0'),
        (lambda c: samplers.plan('dpmpp_2m', c, 1001), r'steps must be in 1\.\.1000, got 1001'),
        (lambda c: samplers.plan('dpmpp_2m', c, 2.5), r'steps must be in 1\.\.1000, got 2.5'),
        (lambda c: samplers.plan('dpmpp_2m', c, 10, strength=1.5), r'strength must be in \(0, 1\], got 1.5'),
        (lambda c: samplers.plan('ddim', c, 10, 'leading', 'sigma_min'), 'visits already'),
        (lambda c: samplers.plan('ddim', c, 400, 'quadratic'), 'no 400 distinct indices'),
        (lambda c: samplers.unipc(c, [0.5, 0.9]), 'strictly decreasing'),
        (lambda c: samplers.unipc(c, [0.9, float('nan'), 0.5]), 'strictly decreasing'),
        (lambda c: jax.jit(lambda t: samplers.unipc(c, t))(jnp.array([0.9, 0.1])), 'make the plan outside jit'),
    ],
)
def test_what_cannot_be_done_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make(SCHEDULES['linear'])
