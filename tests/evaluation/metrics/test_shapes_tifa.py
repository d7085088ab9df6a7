"""The exact TIFA on built-in scenes: 1 on true images, far lower on those of other captions."""

import json

import numpy as np
import pytest

from scaling_dit.data import digits
from scaling_dit.data.shapes import oracle
from scaling_dit.data.shapes.source import ShapesSource
from scaling_dit.data.sources import create_source
from scaling_dit.errors import UserError
from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.scoring import Scoring, score


def scored(metric, items, images, seed=0):
    return score(Scoring("shapes_tifa", metric, items), [np.stack(images)], seed)


def test_true_images_score_1_and_the_baseline_is_low():
    metric = METRICS["shapes_tifa"]()
    items = metric.items(create_source("shapes"), 100)
    assert len({item.prompt + str(item.truth.tobytes()) for item in items}) == 100
    result, rows = scored(metric, items, [item.truth for item in items])
    assert result["tifa_average"] == 1.0 and result["interval"] == [1.0, 1.0]
    assert next(iter(result["scalars"])) == "shapes_tifa" and result["scalars"]["shapes_tifa_spatial"] == 1.0
    assert 0.15 < result["baseline"]["tifa_average"] < 0.5
    assert "wrong scenes" in metric.table(result)
    assert result["vqa_model"] == metric.about()["judge"] == oracle.VQA_MODEL
    assert [row["id"] for row in rows] == [item.id for item in items]
    assert json.loads(json.dumps(result))["scalars"]["shapes_tifa"] == 1.0


def test_the_baseline_is_what_true_images_of_the_next_caption_score():
    source = ShapesSource(shapes=("circle", "square", "triangle"), colours=("red", "green", "blue", "yellow"))
    metric = METRICS["shapes_tifa"]()
    items = metric.items(source, 200)
    truths = [item.truth for item in items]
    shifted, _ = scored(metric, items, truths[1:] + truths[:1])
    assert shifted["baseline"] == {
        "tifa_average": shifted["tifa_average"], "accuracy_by_type": shifted["accuracy_by_type"],
    }  # fmt: skip
    assert 0.2 < shifted["tifa_average"] < 0.45 and shifted["accuracy_by_type"]["spatial"] < 0.05
    low, high = shifted["interval"]
    assert low < shifted["tifa_average"] < high < low + 0.1


def test_the_baseline_can_be_left_out():
    metric = METRICS["shapes_tifa"](baseline=False)
    items = metric.items(ShapesSource(preset="grid8"), 20)
    result, rows = scored(metric, items, [item.truth for item in items])
    assert "baseline" not in result and not any("baseline" in row for row in rows)
    assert "wrong scenes" not in metric.table(result)


def test_held_out_prompts_never_occur_in_training():
    source = create_source("shapes", shapes=("circle", "square"), colours=("red", "blue"))
    asked = {item.truth.tobytes() for item in METRICS["shapes_tifa"]().items(source, 40)}
    trained = {source[i]["image"].tobytes() for i in range(1500)}
    assert not asked & trained


def test_another_source_is_refused(tmp_path):
    with pytest.raises(UserError, match="metric 'shapes_tifa' needs scenes"):
        METRICS["shapes_tifa"]().items(create_source(f"folder:{digits.write(tmp_path)}", image_size=16), 4)
