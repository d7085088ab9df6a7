"""Intervals of distances between sets: their width is the spread of the distance over other generated images."""

import numpy as np
import pytest

from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.features import gaussians, influence, kernels, moments
from scaling_dit.evaluation.features.moments import Gaussian
from scaling_dit.evaluation.features.references import Reference
from scaling_dit.evaluation.features.tables import FeatureTable

WIDTH, COUNT, TRIALS = 6, 300, 60


def features(seed, count, shift=0.25):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, WIDTH)) @ np.random.default_rng(7).normal(size=(WIDTH, WIDTH)) / 3
    return (np.abs(mixed) + shift).astype(np.float32)


def table(array):
    return FeatureTable.spill([array], WIDTH)


REAL = features(10_000, 400, shift=0.0)


def spread(distance):
    """(standard deviation over trials, mean of half the widths / 1.96) of distance(table) -> (value, interval)."""
    values, errors = [], []
    for seed in range(TRIALS):
        value, (low, high) = distance(table(features(seed, COUNT)), seed)
        assert low < value < high
        values.append(value)
        errors.append((high - low) / 2 / 1.96)
    return np.std(values, ddof=1), np.mean(errors)


def kid(ours, seed):
    # One subset of all images: the unbiased estimate itself.
    found = kernels.kid(ours, table(REAL), subsets=1, size=COUNT, seed=seed)[0]
    psi = influence.kernel(ours, table(REAL), seed, kernels.cubic)
    return found, influence.interval(found, psi, COUNT)


def cmmd(ours, seed):
    found = kernels.cmmd(ours, table(REAL))
    psi = influence.kernel(ours, table(REAL), seed, kernels.nearness, kernels.SCALE)
    return found, influence.interval(found, psi, COUNT)


def mind(ours, seed):
    real = table(REAL[:COUNT])
    found, psi = kernels.sliced(ours, real, directions=20, seed=0)
    return found, influence.interval(found, psi, COUNT)


def fid(ours, seed):
    real = Gaussian.of(moments.of(REAL))
    result = gaussians.compare("fid", ours, real, seed, points=0, resamples=0)
    return result["scalars"]["fid"], result["interval"]


@pytest.mark.parametrize("distance", [pytest.param(cmmd, marks=pytest.mark.slow), mind, fid])
def test_the_width_is_the_spread_over_other_images(distance):
    real, told = spread(distance)
    # Sixty trials know a standard deviation to a tenth.
    assert told == pytest.approx(real, rel=0.3)


@pytest.mark.slow
def test_the_width_of_kid_is_its_spread(monkeypatch):
    # Of a larger reference its random subset would move it too.
    monkeypatch.setitem(globals(), "REAL", REAL[:COUNT])
    real, told = spread(kid)
    assert told == pytest.approx(real, rel=0.3)


def test_a_part_of_the_images_tells_the_same_width(monkeypatch):
    ours = table(features(0, COUNT))
    whole = influence.kernel(ours, table(REAL), 0, kernels.nearness).std()
    monkeypatch.setattr(influence, "SEEN", 200)
    part = influence.kernel(ours, table(REAL), 0, kernels.nearness)
    assert len(part) == 200 and part.std() == pytest.approx(whole, rel=0.25)


def test_the_chance_of_subsets_widens():
    psi = np.random.default_rng(0).normal(size=100)
    low, high = influence.interval(1.0, psi, 100)
    assert high - 1 == pytest.approx(1.96 * psi.std(ddof=1) / 10, rel=1e-3) and 1 - low == pytest.approx(
        high - 1
    )
    wide = influence.interval(1.0, psi, 100, extra=psi.var(ddof=1) / 100)
    assert wide[1] - 1 == pytest.approx(np.sqrt(2) * (high - 1))


def test_fid_of_few_images_has_no_interval():
    real = Gaussian.of(moments.of(REAL))
    few = gaussians.compare("fid", table(features(0, 2 * WIDTH)), real, 0, points=0, resamples=0)
    assert "interval" not in few
    assert "interval" in gaussians.compare("fid", table(features(0, 12)), real, 0, points=0, resamples=20)


@pytest.mark.parametrize("name", ["kid", "cmmd", "mind"])
def test_each_metric_has_an_interval(name):
    fields = {"kid": {"subsets": 3, "subset_size": 50}, "mind": {"directions": 5}}.get(name, {})
    metric = METRICS[name](**fields)
    result = metric.compare(table(features(0, COUNT)), Reference.of_table(table(REAL)), 0)
    low, high = result["interval"]
    assert low < result["scalars"][name] < high


@pytest.mark.parametrize("name", ["cmmd", "mind"])
def test_one_image_has_no_interval(name):
    result = METRICS[name]().compare(table(features(0, 1)), Reference.of_table(table(REAL)), 0)
    assert result["interval"] is None and np.isfinite(result["scalars"][name])
