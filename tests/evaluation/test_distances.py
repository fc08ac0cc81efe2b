"""The formulas behind the scores, against closed forms and brute force."""

import numpy as np
import pytest

from diffusion_jax.evaluation.frechet_distance import Moments, distance
from diffusion_jax.evaluation.inception_score import InceptionScore
from diffusion_jax.evaluation.kernel_distance import kernel_distance, squared_mmd
from diffusion_jax.evaluation.precision_recall import neighbourhoods
from diffusion_jax.evaluation.result import Kept

RNG = np.random.default_rng(0)


def moments_of(rows, size=None):
    moments = Moments()
    for start in range(0, len(rows), size or len(rows)):
        moments.update(rows[start : start + (size or len(rows))])
    return moments


@pytest.mark.parametrize('size', [1, 7, 100, 1000])
def test_moments_of_a_stream_are_those_of_the_whole_even_far_from_0(size):
    rows = np.float32(RNG.normal(3000, 0.1, (1000, 5)))
    moments = moments_of(rows, size)
    np.testing.assert_allclose(moments.mean, rows.astype(np.float64).mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-9)


def test_frechet_distance_of_normal_distributions_is_the_closed_form():
    # Of commuting covariances: |m - m'|^2 + sum (sqrt(v) - sqrt(v'))^2.
    rotation, _ = np.linalg.qr(RNG.normal(size=(6, 6)))
    v, w = np.array([1.0, 2, 3, 4, 0, 0]), np.array([4.0, 3, 2, 1, 5, 0])
    means = RNG.normal(size=(2, 6))
    a, b = (Moments(mean, rotation * values @ rotation.T, 9) for mean, values in zip(means, (v, w), strict=True))
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((np.sqrt(v) - np.sqrt(w)) ** 2)
    assert distance(a, b) == pytest.approx(expected, rel=1e-7)
    assert distance(b, a) == pytest.approx(expected, rel=1e-7)
    assert distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_covariances_that_do_not_commute():
    from scipy.linalg import sqrtm

    x, y = RNG.normal(size=(50, 4)), RNG.normal(size=(60, 4)) @ RNG.normal(size=(4, 4))
    c, d = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(c + d - 2 * sqrtm(c @ d).real)
    assert distance(moments_of(x), moments_of(y)) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    x, y = RNG.normal(size=(2, 400, 6))
    estimates = [squared_mmd(*RNG.normal(size=(2, 50, 6))) for _ in range(300)]
    assert abs(np.mean(estimates)) < 4 * np.std(estimates) / np.sqrt(300)
    assert min(estimates) < 0
    assert kernel_distance(x, y + 1).mean > 20 * abs(kernel_distance(x, y).mean)


def test_squared_mmd_is_the_double_sum():
    x, y = RNG.normal(size=(2, 5, 3))

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    pairs = [(i, j) for i in range(5) for j in range(5)]
    apart = [(i, j) for i, j in pairs if i != j]
    expected = np.mean([k(x[i], x[j]) + k(y[i], y[j]) for i, j in apart])
    expected -= 2 * np.mean([k(x[i], y[j]) for i, j in pairs])
    assert squared_mmd(x, y) == pytest.approx(expected)


def test_subsets_are_what_was_asked_for_and_repeat():
    x, y = RNG.normal(size=(2, 300, 4))
    assert kernel_distance(x, y, 10, 100) == kernel_distance(x, y, 10, 100)
    assert kernel_distance(x, y, 10, 100).std > 0
    assert kernel_distance(x, y, 10, 300).std == 0  # all there is, once


def test_inception_score_of_certain_and_uncertain_logits():
    certain = 50.0 * np.eye(4)[np.tile(np.arange(4), 100)]
    score = InceptionScore(400, shuffle=False)
    for start in range(0, 400, 37):
        score.update(certain[start : start + 37])
    assert score.score() == pytest.approx((4, 0), abs=1e-6)
    score = InceptionScore(400)
    score.update(np.zeros((400, 4)))
    assert score.score() == pytest.approx((1, 0))
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    score = InceptionScore(2)
    score.update(np.log(np.tile(p, (1, 1))) + 5)  # each a split of its own: no diversity in it
    assert score.score().mean == pytest.approx(1)


def brute_force(real, generated, k, density_k):
    def radius(points, i, k):
        return sorted(np.linalg.norm(points[i] - other) for j, other in enumerate(points) if j != i)[k - 1]

    def inside(point, points, k):
        return [np.linalg.norm(point - center) <= radius(points, i, k) for i, center in enumerate(points)]

    within = np.array([inside(point, real, density_k) for point in generated])
    return (
        np.mean([any(inside(point, real, k)) for point in generated]),
        np.mean([any(inside(point, generated, k)) for point in real]),
        within.sum() / (density_k * len(generated)),
        within.any(axis=0).mean(),
    )


def test_neighbourhoods_are_those_of_brute_force(monkeypatch):
    from diffusion_jax.evaluation import precision_recall

    monkeypatch.setattr(precision_recall, 'ROWS', 7)
    real, generated = RNG.normal(size=(40, 3)), RNG.normal(0.7, 0.8, size=(30, 3))
    ours = neighbourhoods(real, generated)
    assert ours == pytest.approx(brute_force(real, generated, 3, 5))
    assert 0 < ours.recall < ours.precision < 1


def test_one_repeated_sample_is_precise_and_covers_nothing():
    real = RNG.normal(size=(200, 2))
    ours = neighbourhoods(real, np.repeat(real[:1], 200, axis=0))
    assert ours.precision == 1
    assert ours.recall <= 0.01
    assert ours.coverage < 0.1


def test_kept_rows_are_spread_evenly_over_the_stream():
    kept = Kept(1000, 11)
    for start in range(0, 1000, 30):
        kept.update(np.arange(start, min(start + 30, 1000)))
    np.testing.assert_array_equal(kept.rows(), np.round(np.linspace(0, 999, 11)))
