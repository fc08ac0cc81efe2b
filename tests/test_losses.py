import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import UsageError, losses, schedules
from diffusion_jax.process import Prediction, expand

CHAIN = schedules.cosine(1000)
LOG_SNR = jnp.linspace(-9, 9, 37)
SNR = np.exp(np.asarray(LOG_SNR, np.float64))


@pytest.mark.parametrize(
    ('weighting', 'prediction', 'expected'),
    [
        (losses.simple(), 'eps', np.ones_like(SNR)),
        (losses.simple(), 'x0', np.ones_like(SNR)),
        (losses.simple(), 'v', np.ones_like(SNR)),
        (losses.min_snr(5.0), 'eps', np.minimum(SNR, 5) / SNR),
        (losses.min_snr(5.0), 'x0', np.minimum(SNR, 5)),
        (losses.min_snr(5.0), 'v', np.minimum(SNR, 5) / (SNR + 1)),
        (losses.truncated_snr(), 'eps', np.maximum(SNR, 1) / SNR),
        (losses.truncated_snr(), 'x0', np.maximum(SNR, 1)),
        (losses.truncated_snr(), 'v', np.maximum(SNR, 1) / (SNR + 1)),
        (losses.p2(1.0, 1.0), 'eps', 1 / (1 + SNR)),
        (losses.p2(0.5, 2.0), 'eps', 1 / (2 + SNR) ** 0.5),
        (losses.p2(0.5, 2.0), 'x0', SNR / (2 + SNR) ** 0.5),
        (losses.edm(0.5), 'x0', (1 / SNR + 0.25) / (0.25 / SNR)),  # (sigma^2 + sigma_data^2) / (sigma sigma_data)^2
        (losses.min_snr(5.0), 'flow', np.minimum(SNR, 5) / (np.sqrt(SNR) + 1) ** 2),
        (losses.simple(), 'flow', np.ones_like(SNR)),
    ],
)
def test_weights_are_those_of_the_papers(weighting, prediction, expected):
    np.testing.assert_allclose(weighting(LOG_SNR, prediction), expected, rtol=1e-4)


@pytest.mark.parametrize('name', ['min_snr', 'truncated_snr', 'p2', 'edm'])
def test_weights_are_finite_at_zero_snr(name):
    """A chain that ends in pure noise: weights of v and x0 stay finite. (For eps they may rightly be infinite.)"""
    weighting = losses.WEIGHTINGS[name]()
    for prediction in ('x0', 'v', 'flow'):
        assert jnp.isfinite(weighting(jnp.array([-jnp.inf]), prediction)).all()


EDM, FLOW = schedules.edm(), schedules.flow(2.0)
LEVELS = {  # (alpha, sigma) by what the network is told of the time
    CHAIN: lambda timestep: (CHAIN.alpha((timestep + 1) / 1000), CHAIN.sigma((timestep + 1) / 1000)),
    EDM: lambda c_noise: (jnp.ones_like(c_noise), jnp.exp(4 * c_noise)),
    FLOW: lambda timestep: (1 - timestep / 1000, timestep / 1000),
}


def loss_of(network_kind, weighting, key, prediction=None, x0_hat=0.2, size=64, schedule=CHAIN):
    """The loss of a network whose x0 is always `x0_hat`, told in `network_kind`."""
    x0 = jnp.full((size, 2, 2, 1), 0.5)

    def apply(params, x_t, timestep):
        alpha, sigma = (expand(level, x_t) for level in LEVELS[schedule](timestep))
        return Prediction(jnp.full_like(x_t, x0_hat), 'x0', x_t, alpha, sigma).read(network_kind)

    return losses.diffusion_loss(
        apply, None, x0, key, schedule=schedule, prediction=prediction or network_kind, weighting=weighting
    )


@pytest.mark.parametrize(
    ('kind', 'schedule'),
    [*((kind, CHAIN) for kind in ('eps', 'x0', 'v', 'flow')), ('v', EDM), ('v', FLOW), ('flow', FLOW)],
)
def test_a_perfect_network_has_no_loss(kind, schedule, key):
    np.testing.assert_allclose(loss_of(kind, losses.simple(), key, x0_hat=0.5, schedule=schedule), 0, atol=1e-5)
    assert loss_of(kind, losses.simple(), key, x0_hat=0.2, schedule=schedule).mean() > 1e-3


@pytest.mark.parametrize('schedule', [EDM, FLOW], ids=['edm', 'flow'])
@pytest.mark.parametrize('weighting', [losses.edm()])
def test_one_error_weighs_the_same_on_schedules_that_do_not_preserve_variance(weighting, schedule, key):
    expected = loss_of('x0', weighting, key, schedule=schedule)
    for kind in ('eps', 'v', 'flow'):
        np.testing.assert_allclose(loss_of(kind, weighting, key, schedule=schedule), expected, rtol=1e-2)


@pytest.mark.parametrize('weighting', [losses.min_snr(), losses.truncated_snr(), losses.p2(), losses.edm()])
def test_one_error_weighs_the_same_in_whatever_it_is_told(weighting, key):
    expected = loss_of('x0', weighting, key)
    np.testing.assert_allclose(loss_of('v', weighting, key), expected, rtol=1e-3)
    np.testing.assert_allclose(loss_of('flow', weighting, key), expected, rtol=1e-2)
    np.testing.assert_allclose(loss_of('eps', weighting, key), expected, rtol=1e-2)


def test_the_simple_x0_loss_is_the_squared_error(key):
    np.testing.assert_allclose(loss_of('x0', None, key), 0.3**2, rtol=1e-5)


def test_indices_of_a_chain_are_drawn_alike(key):
    for sampler in (losses.uniform, losses.stratified):
        t = losses.to_times(schedules.linear(4), sampler(key, 40_000))
        values, counts = np.unique(np.asarray(t), return_counts=True)
        np.testing.assert_allclose(values, [0.25, 0.5, 0.75, 1.0])
        np.testing.assert_allclose(counts, 10_000, rtol=0.05)


def test_continuous_times_never_reach_the_data():
    t = losses.to_times(schedules.linear(None), jnp.array([0.0, 0.5, 1 - 2.0**-24]))
    assert t[0] == pytest.approx(1e-5)
    assert t[2] <= 1


def test_stratified_times_fall_one_in_each_interval_in_random_order(key):
    u = np.asarray(losses.stratified(key, 100))
    np.testing.assert_array_equal(np.sort(np.floor(u * 100)), np.arange(100))
    assert (np.floor(u * 100) != np.arange(100)).mean() > 0.9
    assert u.max() < 1


def test_stratified_times_lower_the_variance_of_the_loss(key):
    def mean_loss(sampler, key):
        return jnp.mean(sampler(key, 32) ** 2)

    spread = [
        float(jnp.std(jax.vmap(lambda k, s=s: mean_loss(s, k))(jax.random.split(key, 200))))
        for s in (losses.stratified, losses.uniform)
    ]
    assert spread[0] < spread[1] / 5


def test_the_condition_is_dropped_as_often_as_asked(key):
    labels = jnp.arange(40_000) % 10
    dropped = losses.drop_condition(key, labels, 10, 0.1)
    assert float((dropped == 10).mean()) == pytest.approx(0.1, abs=0.006)
    assert ((dropped == labels) | (dropped == 10)).all()
    np.testing.assert_array_equal(losses.drop_condition(key, labels, 10, 0.0), labels)
    assert (losses.drop_condition(key, labels, 10, 1.0) == 10).all()


def test_conditioning_reaches_the_network(key):
    def apply(params, x, t, label):
        return x * label[:, None]

    x0 = jnp.ones((2, 3))
    kwargs = {'schedule': CHAIN, 'prediction': 'eps'}
    zero = losses.diffusion_loss(apply, None, x0, key, label=jnp.zeros(2), **kwargs)
    one = losses.diffusion_loss(apply, None, x0, key, label=jnp.ones(2), **kwargs)
    assert not jnp.allclose(zero, one)


# --- the hybrid objective ---------------------------------------------------------------------------------------------

SHORT = schedules.cosine(20)
ALL_TIMES = (jnp.arange(20) + 1) / 20


def hybrid(params, weight, key, prediction='x0'):
    """The loss at every index of a network that says params['mean'], and params['fraction'] of the variance."""

    def apply(params, x_t, timestep):
        mean = jnp.full_like(x_t, params['mean'])
        # What the network gives of the variance is in [-1, 1].
        return jnp.concatenate([mean, jnp.full_like(x_t, 2 * params['fraction'] - 1)], axis=-1) if weight else mean

    return losses.diffusion_loss(
        apply,
        params,
        jnp.full((20, 4, 4, 1), 51 / 127.5 - 1),
        key,
        schedule=SHORT,
        prediction=prediction,
        t=ALL_TIMES,
        vlb_weight=weight,
    )


def test_the_hybrid_objective_is_the_simple_one_and_the_sum_of_the_bounds_terms_in_bits(key):
    """L_simple + lambda L_vlb; the terms are computed here from their definition."""
    x0, mean, fraction, weight = 51 / 127.5 - 1, -0.55, 0.3, 0.001
    betas, alpha_bar = SHORT.betas, SHORT.alphas_cumprod
    before = np.append(1.0, alpha_bar[:-1])
    posterior = betas * (1 - before) / (1 - alpha_bar)
    posterior[0] = posterior[1]
    variance = betas**fraction * posterior ** (1 - fraction)
    difference = np.sqrt(before) * betas / (1 - alpha_bar) * (x0 - mean)
    terms = 0.5 * (np.log(variance / posterior) + posterior / variance - 1 + difference**2 / variance)
    edges = (x0 - mean + np.array([1, -1]) / 255) / np.sqrt(2 * variance[0])
    terms[0] = -np.log(0.5 * (math.erfc(-edges[0]) - math.erfc(-edges[1])))

    got = hybrid({'mean': mean, 'fraction': fraction}, weight, key)
    simple = hybrid({'mean': mean}, 0.0, key)
    np.testing.assert_allclose(simple, (x0 - mean) ** 2, rtol=1e-5)
    np.testing.assert_allclose(got - simple, weight * 20 * terms / np.log(2), rtol=1e-3, atol=1e-8)
    assert float(got.mean()) == pytest.approx((x0 - mean) ** 2 + weight * terms.sum() / np.log(2), rel=1e-4)


@pytest.mark.parametrize('prediction', ['x0', 'v'])
def test_the_bound_trains_the_variance_and_leaves_the_mean_alone(prediction, key):
    params = {'mean': -0.55, 'fraction': 0.3}

    def gradient(weight):
        return jax.grad(lambda p: hybrid(p, weight, key, prediction).mean())(params)

    simple, both = gradient(0.0), gradient(0.1)
    assert both['mean'] == simple['mean'] != 0
    assert simple['fraction'] == 0 != both['fraction']


# --- importance sampling of the index ---------------------------------------------------------------------------------


def full_history(values):
    return losses.LossHistory(jnp.asarray(values, jnp.float32), jnp.full(len(values), 10))


def test_indices_are_drawn_by_the_root_of_their_mean_squared_loss(key):
    values = np.random.default_rng(0).gamma(1.0, 1.0, (8, 10)) * np.geomspace(0.01, 10, 8)[:, None]
    size = np.sqrt((values**2).mean(axis=1))
    expected = 0.999 * size / size.sum() + 0.001 / 8
    history = full_history(values)
    np.testing.assert_allclose(losses.index_probabilities(history), expected, rtol=1e-5)
    indices, t, weights = losses.draw_indices(history, key, 200_000)
    np.testing.assert_allclose(np.bincount(indices, minlength=8) / 200_000, expected, atol=4e-3)
    np.testing.assert_allclose(t, (np.asarray(indices) + 1) / 8, rtol=1e-6)
    np.testing.assert_allclose(weights, 1 / (8 * expected[np.asarray(indices)]), rtol=1e-5)
    # Unbiased, whatever the losses are: E[weight loss] is their mean.
    loss = np.arange(8.0) ** 2
    assert float((expected / (8 * expected) * loss).sum()) == pytest.approx(loss.mean())
    assert float(jnp.mean(weights * loss[np.asarray(indices)])) == pytest.approx(loss.mean(), rel=0.05)


def test_weighted_losses_are_unbiased_and_of_least_spread():
    """Summed over the probabilities, exactly. With p proportional to the loss, weight times loss is a constant."""
    loss = np.array([0.1, 1.0, 3.0, 20.0])
    p = np.asarray(losses.index_probabilities(full_history(np.repeat(loss[:, None], 10, axis=1))), np.float64)
    weight = 1 / (len(loss) * p)
    assert p.sum() == pytest.approx(1, abs=1e-6)
    assert (p * weight * loss).sum() == pytest.approx(loss.mean())
    assert (weight * loss).std() < 0.02 * loss.std()


def test_indices_are_drawn_alike_until_each_has_its_ten_losses():
    values = jnp.ones((4, 10)).at[2].set(5.0)
    young = losses.LossHistory(values, jnp.array([10, 30, 9, 10]))
    np.testing.assert_allclose(losses.index_probabilities(young), 0.25)
    ready = losses.LossHistory(values, jnp.array([10, 30, 10, 10]))
    assert losses.index_probabilities(ready)[2] > 0.6
    np.testing.assert_allclose(losses.index_probabilities(full_history(jnp.zeros((4, 10)))), 0.25)
    np.testing.assert_allclose(losses.index_probabilities(losses.init_history(schedules.linear(5))), 0.2)


def test_the_history_is_the_last_ten_losses_at_each_index_in_the_order_of_the_batch():
    rng = np.random.default_rng(0)
    history = losses.init_history(schedules.linear(4))
    seen = [[] for _ in range(4)]
    update = jax.jit(losses.update_history)
    for size in (3, 40, 1, 64, 7, 7):  # more than ten at one index, too
        indices, values = rng.choice(4, size, p=[0.6, 0.3, 0.1, 0]), rng.random(size).astype(np.float32)
        for index, value in zip(indices, values, strict=True):
            seen[index].append(value)
        history = update(history, jnp.asarray(indices), jnp.asarray(values))
        np.testing.assert_array_equal(history.counts, [len(values) for values in seen])
        for index in range(4):
            last = seen[index][-10:]
            expected = sorted([0.0] * (10 - len(last)) + last)
            np.testing.assert_array_equal(np.sort(history.values[index]), np.asarray(expected, np.float32))
    assert history.counts[0] > 60
    assert history.counts[3] == 0


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: losses.min_snr(0), 'gamma > 0'),
        (lambda: losses.p2(k=0), 'k > 0'),
        (lambda: losses.edm(0.0), 'sigma_data > 0'),
        (lambda: losses.init_history(schedules.flow()), r'give the schedule a num_timesteps.*stratified, uniform'),
        (
            lambda: losses.diffusion_loss(None, None, jnp.ones((1, 1)), None, schedule=CHAIN, vlb_weight=-1.0),
            'must be 0 or more',
        ),
        (
            lambda: losses.diffusion_loss(None, None, jnp.ones((1, 1)), None, schedule=schedules.edm(), vlb_weight=0.1),
            r'give the schedule a num_timesteps, or set vlb_weight=0',
        ),
        (
            lambda: losses.diffusion_loss(None, None, jnp.ones((1, 1)), None, schedule=CHAIN, prediction='score'),
            'Valid choices: eps, flow, v, x0',
        ),
    ],
)
def test_impossible_objectives_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
