"""The metric `edges_f1`: F1 with tolerance against counts by hand, SSIM against scikit-image, and items."""

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from scaling_dit.data.shapes.source import ShapesSource
from scaling_dit.errors import UserError
from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.metric import Batch, Item, Skipped
from scaling_dit.evaluation.metrics import edges_f1
from scaling_dit.evaluation.scoring import Scoring, score


def lines(*rows, side=16):
    found = np.zeros((side, side), bool)
    found[list(rows)] = True
    return found


def test_edges_count_within_the_tolerance_and_not_beyond():
    wanted = lines(5, 10)
    assert edges_f1.overlap(wanted, wanted, 1) == (1, 1, 1)
    assert edges_f1.overlap(lines(6, 9), wanted, 1) == (1, 1, 1)
    assert edges_f1.overlap(lines(6, 9), wanted, 0) == (0, 0, 0)
    # Of three lines two are near, of two wanted both are met.
    precision, recall, f1 = edges_f1.overlap(lines(4, 11, 15), wanted, 1)
    assert (precision, recall) == (pytest.approx(2 / 3), 1.0)
    assert f1 == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))
    assert edges_f1.overlap(lines(5), wanted, 1)[:2] == (1.0, 0.5)
    diagonal = np.zeros((16, 16), bool)
    diagonal[4, 4] = True
    beside = np.zeros((16, 16), bool)
    beside[5, 5] = True
    assert edges_f1.overlap(diagonal, beside, 1)[2] == 1.0


def test_empty_maps_agree_with_each_other_alone():
    empty, some = lines(), lines(3)
    assert edges_f1.overlap(empty, empty, 1) == (1, 1, 1)
    assert edges_f1.overlap(empty, some, 1) == (0, 0, 0) == edges_f1.overlap(some, empty, 1)


def test_ssim_is_scikit_image_s():
    rng = np.random.default_rng(0)
    one, other = rng.random((40, 40)) > 0.8, rng.random((40, 40)) > 0.8
    _, by_pixel = structural_similarity(
        one.astype(float), other.astype(float), data_range=1.0, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, full=True,
    )  # fmt: skip
    assert edges_f1.ssim(one, other) == pytest.approx(by_pixel.mean(), abs=1e-6)
    assert edges_f1.ssim(one, one) == pytest.approx(1.0)


def test_true_images_have_their_edges_and_grey_ones_none():
    metric = METRICS["edges_f1"]()
    items = list(metric.items(ShapesSource(preset="grid16"), 12))
    assert len({item.id for item in items}) == 12
    for item in items:
        edges = item.conditions["edges"]
        assert edges.shape == (16, 16, 3) and set(np.unique(edges)) == {0, 255}
    scoring = Scoring("edges_f1", metric, items)
    true, rows = score(scoring, [np.stack([item.truth for item in items])], 0)
    assert true["scalars"] == {
        "edges_f1": 1.0, "edges_f1_ssim": pytest.approx(1.0), "edges_f1_precision": 1.0, "edges_f1_recall": 1.0,
    }  # fmt: skip
    assert true["interval"] == [1.0, 1.0] and [row["score"] for row in rows] == [1.0] * 12
    grey, _ = score(scoring, [np.full((12, 16, 16, 3), 128, np.uint8)], 0)
    assert grey["scalars"]["edges_f1"] == 0.0 and grey["scalars"]["edges_f1_ssim"] < 1
    assert "edges_f1" in metric.table(true)


def test_what_is_missing_skips_and_mistakes_are_one_line(monkeypatch):
    monkeypatch.setattr(edges_f1.edges_lib, "is_installed", lambda: False)
    with pytest.raises(Skipped, match=r"pip install 'scaling-dit\[edit\]'"):
        METRICS["edges_f1"]().items(ShapesSource(), 2)
    with pytest.raises(UserError, match="tolerance is -1"):
        METRICS["edges_f1"](tolerance=-1)


def test_items_without_edges_and_images_of_another_size_are_one_line():
    metric = METRICS["edges_f1"]()
    items = metric.items(ShapesSource(preset="grid16"), 2)
    metric.check_items(items, "x")
    with pytest.raises(UserError, match="prompt set x has no condition 'edges'; .*leave out prompt_set"):
        metric.check_items([Item("a", "b")], "prompt set x")
    with pytest.raises(UserError, match="has 24x20 pixels and its edges 16x16"):
        metric.rows(Batch(np.zeros((1, 20, 24, 3), np.uint8), [items[0]]))


def test_mistakes_in_the_detector_name_the_metric():
    with pytest.raises(UserError, match=r"^metrics.edges_f1.sigma is -1.0"):
        METRICS["edges_f1"](sigma=-1.0)
