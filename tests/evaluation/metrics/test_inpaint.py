"""The metric `inpaint`: exact inside of masks on scenes, errors outside, and what depends on what."""

import numpy as np
import pytest
from PIL import Image

from scaling_dit.data.shapes.source import ShapesSource
from scaling_dit.data.sources import create_source
from scaling_dit.errors import UserError
from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.metric import Item
from scaling_dit.evaluation.metrics import inpaint
from scaling_dit.evaluation.scoring import Scoring, score

SOURCE = ShapesSource(preset="grid16")


def scored(metric, images, items):
    return score(Scoring("inpaint", metric, items, batch=16), [np.stack(images)], 0)


@pytest.fixture(scope="module")
def items():
    return list(METRICS["inpaint"]().items(SOURCE, 60))


def test_true_images_are_right_inside_and_equal_outside(items):
    result, rows = scored(METRICS["inpaint"](), [item.truth for item in items], items)
    scalars = result["scalars"]
    assert next(iter(scalars)) == "inpaint" and scalars["inpaint"] == 1.0
    assert scalars["inpaint_mse"] == 0.0 and scalars["inpaint_psnr"] == inpaint.MOST_DB
    assert result["n"] == 60 and sum(result["n_by_mask"].values()) == 60
    assert all(row["score"] == 1.0 for row in rows)


def test_masks_that_stay_grey_lose_every_object_they_hide(items):
    grey = [item.conditions["inpaint"][..., :3] for item in items]
    result, rows = scored(METRICS["inpaint"](), grey, items)
    assert result["scalars"]["inpaint_mse"] == 0.0
    asked = {"object", "color", "shape"}
    for row, item in zip(rows, items, strict=True):
        given = [q["right"] for q in row["questions"] if q["element_type"] == "object"]
        mask = item.conditions["inpaint"][..., 3] == 255
        # An object of which less than the whole is hidden may still be read.
        whole = [bool((one & ~mask).sum() == 0) for one in SOURCE.held_out()[_index(item)]["objects"]]
        if all(whole):
            assert not any(given)
    assert result["scalars"]["inpaint"] < 0.5
    assert asked <= set(result["accuracy_by_type"])


def _index(item):
    return int(item.id.rpartition("-")[2])


def test_questions_are_about_hidden_objects_and_their_number(items):
    for item in items:
        mask = item.conditions["inpaint"][..., 3] == 255
        objects = list(SOURCE.held_out()[_index(item)]["objects"])
        hidden = {i for i, one in enumerate(objects) if (one & mask).sum() >= 0.5 * one.sum()}
        assert hidden
        queries = [row["about"]["query"] for row in item.questions]
        assert ["count"] in queries
        assert all(query[0] == "count" or hidden & set(query[1:]) for query in queries)
        named = {query[1] for query in queries if query[0] == "object"}
        assert named == hidden


def test_errors_outside_are_those_of_the_given_pixels(items):
    images = []
    for item in items:
        mask = item.conditions["inpaint"][..., 3] == 255
        changed = item.truth.astype(int)
        # 51 is a fifth of 255; what is masked may be anything.
        changed = np.where(mask[..., None], 7, np.where(changed > 127, changed - 51, changed + 51))
        images.append(changed.astype(np.uint8))
    result, _ = scored(METRICS["inpaint"](), images, items)
    assert result["scalars"]["inpaint_mse"] == pytest.approx(0.04)
    assert result["scalars"]["inpaint_psnr"] == pytest.approx(10 * np.log10(1 / 0.04))


def test_masks_depend_on_the_fields_of_the_metric_and_its_seed_alone(items):
    again = METRICS["inpaint"]().items(SOURCE, 60)
    other = METRICS["inpaint"](mask_seed=1).items(SOURCE, 60)
    same = [
        (a.conditions["inpaint"] == b.conditions["inpaint"]).all() for a, b in zip(items, again, strict=True)
    ]
    assert all(same)
    changed = [
        (a.conditions["inpaint"] != b.conditions["inpaint"]).any() for a, b in zip(items, other, strict=True)
    ]
    assert np.mean(changed) > 0.8
    named = METRICS["inpaint"](condition="hole").items(SOURCE, 2)
    assert set(named[0].conditions) == {"hole"}


def test_images_of_files_are_scored_outside_of_their_masks(tmp_path):
    lines = []
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        lines.append(f'{{"file_name": "{i}.png", "text": "number {i}"}}')
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = create_source(f"folder:{tmp_path}", image_size=16, held_out_fraction=0.4)
    metric = METRICS["inpaint"]()
    found = metric.items(source, len(source.held_out()))
    result, rows = scored(metric, [item.truth for item in found], found)
    assert next(iter(result["scalars"])) == "inpaint_psnr" and "inpaint" not in result["scalars"]
    assert [row["score"] for row in rows] == [inpaint.MOST_DB] * len(found)
    # The interval is that of the first scalar, the PSNR of the mean error, and not of a mean of PSNRs.
    other = [255 - item.truth if number else item.truth for number, item in enumerate(found)]
    result, _ = scored(metric, other, found)
    low, high = result["interval"]
    assert low <= result["scalars"]["inpaint_psnr"] <= high <= inpaint.MOST_DB
    assert len(found) > 1 and low < 10
    with pytest.raises(UserError, match="ask for at most"):
        metric.items(source, 50)


def test_the_crop_is_the_box_around_the_mask():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    mask = np.zeros((16, 16), bool)
    mask[3, 5] = mask[10, 12] = True
    np.testing.assert_array_equal(inpaint.crop(image, mask, 8), image[3:11, 5:13])


def test_clip_without_weights_is_skipped_and_other_mistakes_are_one_line(monkeypatch, tmp_path):
    from scaling_dit.evaluation.metric import Skipped

    monkeypatch.setenv("SCALING_DIT_WEIGHTS", str(tmp_path))
    with pytest.raises(Skipped, match="clip-vit-large-patch14"):
        METRICS["inpaint"](clip=True).items(SOURCE, 2)
    with pytest.raises(UserError, match="clip_size is 'clip-xl'"):
        METRICS["inpaint"](clip_size="clip-xl")
    with pytest.raises(UserError, match="has no images and masks"):
        METRICS["inpaint"]().check_items([Item("a", "b")], "prompt set x")


class _Pairs:
    """Cosines that tell the brightness of what they are given."""

    side = 8

    def cosines(self, images, captions):
        assert images.shape[1:] == (8, 8, 3) and len(captions) == len(images)
        return images.mean((1, 2, 3)) / 255


def test_clip_scores_the_crop(items, monkeypatch):
    monkeypatch.setattr(inpaint.clip_pairs, "open_pairs", lambda *_: _Pairs())
    monkeypatch.setattr(inpaint.InpaintMetric, "_place", lambda self: "x")
    white = [np.full((16, 16, 3), 255, np.uint8)] * len(items)
    result, rows = scored(METRICS["inpaint"](clip=True), white, items)
    assert result["scalars"]["inpaint_clip"] == pytest.approx(100)
    assert all(row["clip"] == pytest.approx(100) for row in rows)


def test_mistakes_in_the_masks_name_the_metric():
    for fields, message in (
        ({"boxes": -1.0}, r"^metrics.inpaint.boxes is -1.0"),
        ({"smallest": 0.7}, r"^metrics.inpaint.smallest and largest are 0.7 and 0.6"),
    ):
        with pytest.raises(UserError, match=message):
            METRICS["inpaint"](**fields)
