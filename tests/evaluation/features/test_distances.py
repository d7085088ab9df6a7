"""FID, KID, MIND and CMMD of features, against torch-fidelity and closed forms; moments that merge."""

import functools
import tracemalloc

import numpy as np
import pytest
import torch

from scaling_dit.errors import UserError
from scaling_dit.evaluation.features import kernels, moments
from scaling_dit.evaluation.features.moments import Gaussian, frechet
from scaling_dit.evaluation.features.tables import FeatureTable
from tests.support import fidelity

WIDTH = 24


def features(seed, count, shift=0.0):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, WIDTH)) @ np.random.default_rng(7).normal(size=(WIDTH, WIDTH)) / 5
    return np.abs(mixed + shift).astype(np.float32)


ONE, OTHER = features(0, 700), features(1, 500, 0.1)


def table(array):
    return FeatureTable.spill(np.array_split(array, 3), array.shape[1])


def gaussian(array):
    return Gaussian.of(moments.of(array))


def test_fid_is_torch_fidelity_s():
    ours = frechet(gaussian(ONE), gaussian(OTHER))
    assert ours == pytest.approx(fidelity.fid(ONE, OTHER), rel=1e-6)
    assert frechet(gaussian(ONE), gaussian(ONE)) == pytest.approx(0, abs=1e-9)


def test_fid_of_fewer_images_than_features():
    few, other = ONE[:9], OTHER[:11]
    assert frechet(gaussian(few), gaussian(other)) == pytest.approx(fidelity.fid(few, other), rel=1e-6)
    with pytest.raises(UserError, match="a covariance needs at least 2 images, here 1"):
        gaussian(ONE[:1])


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_merged_parts_give_the_same_fid(parts):
    states = [moments.of(part) for part in np.array_split(ONE, parts)]
    merged = Gaussian.of(functools.reduce(moments.merge, states))
    assert frechet(merged, gaussian(OTHER)) == pytest.approx(
        frechet(gaussian(ONE), gaussian(OTHER)), abs=1e-9
    )
    np.testing.assert_allclose(merged.covariance, np.cov(ONE.astype(float), rowvar=False), atol=1e-12)


def test_counted_images_are_repeated_images():
    counts = np.random.default_rng(0).integers(0, 3, len(ONE))
    ours, repeated = moments.of(ONE, counts), moments.of(np.repeat(ONE, counts, axis=0))
    for key in repeated:
        np.testing.assert_allclose(ours[key], repeated[key], rtol=1e-10, atol=1e-10)


def test_a_large_mean_costs_no_precision():
    far = ONE.astype(np.float64) + 1e6
    merged = functools.reduce(moments.merge, (moments.of(part) for part in np.array_split(far, 7)))
    np.testing.assert_allclose(
        Gaussian.of(merged).covariance, np.cov(far, rowvar=False), rtol=1e-6, atol=1e-8
    )


def test_the_line_through_fids_meets_its_start():
    counts = [100, 200, 500]
    assert moments.extrapolate(counts, [3 + 50 / n for n in counts]) == pytest.approx(3, abs=1e-10)


def test_kid_is_torch_fidelity_s():
    ours = kernels.kid(table(ONE), table(OTHER), subsets=5, size=100, seed=2020)
    theirs = fidelity.kid(ONE.astype(np.float64), OTHER.astype(np.float64), subsets=5, size=100)
    assert ours.mean() == pytest.approx(theirs[0], rel=1e-6) and ours.std() == pytest.approx(
        theirs[1], rel=1e-6
    )
    # In the float32 that it computes in by itself.
    assert ours.mean() == pytest.approx(fidelity.kid(ONE, OTHER, subsets=5, size=100)[0], abs=1e-6)
    with pytest.raises(
        UserError, match="subset_size is 501, with 700 images and 500 of the reference; it must be"
    ):
        kernels.kid(table(ONE), table(OTHER), subsets=1, size=501, seed=0)


def test_mind_is_torch_fidelity_s():
    """Its function is in no release yet; tests/support/fidelity.py computes the definition with torch."""
    ours = kernels.mind(table(ONE), table(OTHER), directions=50, seed=2020)
    assert ours == pytest.approx(fidelity.mind(ONE, OTHER, directions=50), rel=1e-6)
    swapped = kernels.mind(table(OTHER), table(ONE), directions=50, seed=2020)
    assert swapped == pytest.approx(fidelity.mind(OTHER, ONE, directions=50), rel=1e-6)
    assert kernels.mind(table(ONE), table(ONE), directions=9, seed=0) == 0


def test_projections_are_sorted_some_at_a_time(monkeypatch):
    whole = kernels.mind(table(ONE), table(OTHER), directions=50, seed=1)
    monkeypatch.setattr(kernels, "_AT_ONCE", 3000)
    assert kernels.mind(table(ONE), table(OTHER), directions=50, seed=1) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("seed", [0, 2020])
def test_random_numbers_are_torch_s(seed):
    theirs = torch.Generator().manual_seed(seed)
    ours = kernels.TorchGenerator(seed)
    np.testing.assert_array_equal(ours.permutation(1001), torch.randperm(1001, generator=theirs).numpy())
    for shape in ((5, 7), (4, 16), (3, 33)):
        np.testing.assert_allclose(
            ours.normal(shape), torch.randn(shape, generator=theirs).numpy(), rtol=2e-5, atol=2e-6
        )


def test_cmmd_is_the_mean_over_all_pairs(monkeypatch):
    monkeypatch.setattr(kernels, "_ROWS", 64)
    x, y = (a[:150] / np.linalg.norm(a[:150], axis=1, keepdims=True) for a in (ONE, OTHER))

    def mean(a, b):
        return np.exp(-((a[:, None] - b) ** 2).sum(-1) / 200).mean()

    a, b = x.astype(np.float64), y.astype(np.float64)
    expected = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    ours = kernels.cmmd(table(x), table(y))
    assert ours == pytest.approx(expected, rel=1e-9) and ours > 0
    within = kernels.kernel_mean(table(y), table(y))
    assert kernels.cmmd(table(x), table(y), other_mean=within) == pytest.approx(ours, rel=1e-12)


def test_cmmd_of_two_points_is_known():
    x, y = np.float32([[1, 0]]), np.float32([[0, 1]])
    expected = 1000 * 2 * (1 - np.exp(-2 / 200))
    assert kernels.cmmd(table(x), table(y)) == pytest.approx(expected, rel=1e-12)


def test_a_table_gives_its_rows_in_any_order():
    found = table(ONE)
    assert len(found) == 700
    np.testing.assert_array_equal(np.concatenate(list(found.blocks(64))), ONE)
    order = np.array([5, 699, 0, 5])
    np.testing.assert_array_equal(found.take(order), ONE[order])
    cut = FeatureTable(found.file, 0, 701, WIDTH)
    with pytest.raises(ValueError, match="before row 701"):
        cut.take(np.array([700]))


def test_memory_does_not_grow_with_the_features_of_more_images():
    width = 256

    def peak(count):
        block = np.random.default_rng(0).normal(size=(1000, width)).astype(np.float32)
        tracemalloc.start()
        spilled = FeatureTable.spill((block + i for i in range(count // 1000)), width)
        moments.of_blocks(spilled.blocks(), width)
        kernels.kid(spilled, spilled, subsets=2, size=100, seed=0)
        kernels.mind(spilled, spilled, directions=4, seed=0)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    few, many = peak(5_000), peak(20_000)
    # Features of an image have 1 KiB. Numbers of the chosen rows and 4 projections of each side are there at once.
    assert many < few + 15_000 * 130, (few, many)
