"""Many Huber fits at once find what scipy finds one by one."""

import numpy as np
import pytest
from scipy import optimize

from scaling_dit.scaling import bootstrap, huber, parametric
from tests.support import simulated_study

DELTA = 1e-3


def points(noise, runs=30, seed=0):
    """Points of runs of three sample counts each: parameters, samples, losses, and the run of each."""
    rng = np.random.default_rng(seed)
    n, d = np.repeat(np.geomspace(1e5, 3e6, 10), 9), np.tile([1e4, 4e4, 16e4], runs)
    shared = np.repeat(rng.normal(0, noise, runs), 3) + rng.normal(0, noise / 3, 3 * runs)
    return n, d, simulated_study.loss(n, d) * np.exp(shared), np.repeat(np.arange(runs), 3)


def resampled(runs, count=20):
    return list(bootstrap.resample_runs(runs, len(runs), count))


def summed(n, d, y, vector):
    """The sum of Huber losses that a vector leaves."""
    scaled = np.abs(parametric._model(n, d, y)(vector)[0]) / DELTA
    return np.where(scaled <= 1, scaled**2 / 2, scaled - 0.5).sum()


@pytest.mark.parametrize("noise", [1e-4, 1e-3, 1e-2, 5e-2])
def test_sums_and_values_are_those_of_scipy(noise):
    n, d, y, runs = points(noise)
    start = parametric._polish(parametric._search(n, d, y), n, d, y)
    samples = resampled(runs)
    found = parametric._refit(start, n, d, y, bootstrap.counts(samples, len(n)))
    for indices, vector in zip(samples, found, strict=True):
        drawn = n[indices], d[indices], y[indices]
        wanted = parametric._polish(start, *drawn)
        assert summed(*drawn, vector) <= summed(*drawn, wanted) * (1 + 1e-6)
        # Where scipy ends no higher, both are at one place, as far as the points determine it.
        if summed(*drawn, wanted) <= summed(*drawn, vector) * (1 + 1e-9):
            model = parametric._model(n, d, y)
            np.testing.assert_allclose(model(vector)[0], model(wanted)[0], atol=3e-3 * noise)


def test_rows_that_do_not_arrive_in_time_are_finished_by_scipy():
    n, d, y, runs = points(1e-2)
    start = parametric._polish(parametric._search(n, d, y), n, d, y)
    counts = bootstrap.counts(resampled(runs, 3), len(n))
    with pytest.MonkeyPatch.context() as patch:
        minimize = huber.minimize
        patch.setattr(huber, "minimize", lambda *args: minimize(*args, most_steps=2))
        assert not huber.minimize(parametric._model(n, d, y), start, counts, DELTA)[1].any()
        found = parametric._refit(start, n, d, y, counts)
    np.testing.assert_allclose(found[:, 3:], parametric._refit(start, n, d, y, counts)[:, 3:], rtol=1e-3)


def test_a_sum_is_found_however_far_the_start():
    n, d, y, runs = points(1e-2)
    best = parametric._polish(parametric._search(n, d, y), n, d, y)
    counts = bootstrap.counts(resampled(runs, 5), len(n))
    near = parametric._refit(best, n, d, y, counts)
    for shift in ([0, 0, 0, 0.1, 0.1], [1, 1, 1, 0, 0], [-2, 3, 0, 0.3, -0.1]):
        far = parametric._refit(best + shift, n, d, y, counts)
        np.testing.assert_allclose(far[:, 3:], near[:, 3:], rtol=1e-3)


def test_steps_that_overflow_are_not_taken():
    n, d, y, _ = points(1e-2)
    start = np.array([0.0, 5000.0, 1.0, 0.5, 0.5])
    with np.errstate(divide="raise"):
        (found,) = parametric._refit(start, n, d, y, np.ones((1, len(n)), int))
    assert np.isfinite(found).all()
    assert summed(n, d, y, found) < summed(n, d, y, start)


def test_a_line_with_outliers_and_with_a_value_that_no_point_depends_on():
    x = np.linspace(0, 1, 20)
    y = 3 * x + 1
    y[[4, 15]] += [5, -7]

    def model(vectors):
        residuals = vectors[:, :1] + vectors[:, 1:2] * x - y
        slopes = np.stack([np.ones_like(x), x, np.zeros_like(x)], axis=-1)
        return residuals, np.broadcast_to(slopes, (len(vectors), *slopes.shape)).copy()

    weights = np.ones((3, len(x)))
    weights[1, 4] = weights[1, 15] = 0
    weights[2] = 7
    found, reached = huber.minimize(model, np.array([0.0, 0.0, 0.25]), weights, DELTA, tolerance=1e-14)
    assert reached.all()
    wanted = optimize.least_squares(
        lambda pair: model(np.array([[*pair, 0]]))[0][0],
        [0, 0],
        loss="huber",
        f_scale=DELTA,
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
    ).x
    np.testing.assert_allclose(found[0, :2], wanted, atol=1e-6)
    np.testing.assert_allclose(found[1, :2], [1, 3], atol=1e-9)
    np.testing.assert_allclose(found[2], found[0], atol=1e-9)
    assert (found[:, 2] == 0.25).all()


def test_rows_are_fitted_alike_in_parts_of_any_size(monkeypatch):
    n, d, y, runs = points(1e-2)
    start = parametric._polish(parametric._search(n, d, y), n, d, y)
    counts = bootstrap.counts(resampled(runs, 7), len(n))
    whole = parametric._refit(start, n, d, y, counts)
    for most in (1, 2 * len(n), 3 * len(n) + 1):
        monkeypatch.setattr(huber, "_MOST_RESIDUALS", most)
        np.testing.assert_allclose(parametric._refit(start, n, d, y, counts), whole, rtol=1e-9)
    assert parametric._refit(start, n, d, y, counts[:0]).shape == (0, 5)
