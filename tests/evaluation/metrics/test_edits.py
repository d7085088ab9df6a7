"""The metric `edits`: exact on true, unedited and half-right images, by kind, with intervals and rows."""

import json

import numpy as np
import pytest

from scaling_dit.data.shapes import edit_oracle
from scaling_dit.data.shapes.edit_source import ShapesEditsSource
from scaling_dit.data.shapes.scenes import render
from scaling_dit.data.shapes.source import ShapesSource
from scaling_dit.errors import UserError
from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.metric import Item
from scaling_dit.evaluation.scoring import Scoring, score


def scored(images, items, seed=0):
    return score(Scoring("edits", METRICS["edits"](), items, batch=16), [np.stack(images)], seed)


@pytest.fixture(scope="module")
def items():
    return list(METRICS["edits"]().items(ShapesEditsSource(preset="grid8"), 60))


def test_items_are_distinct_held_out_edits_of_every_kind(items):
    source = ShapesEditsSource(preset="grid8")
    assert len({item.id for item in items}) == 60
    assert {item.meta["kind"] for item in items} == set(source.kinds)
    for item in items:
        np.testing.assert_array_equal(item.conditions["edit"], render(item.edit.source))
        np.testing.assert_array_equal(item.truth, render(item.edit.target))


def test_true_images_score_1_and_unedited_ones_0_with_everything_kept(items):
    result, rows = scored([item.truth for item in items], items)
    assert result["scalars"]["edits"] == 1.0 and next(iter(result["scalars"])) == "edits"
    assert result["interval"] == [1.0, 1.0] and result["n"] == 60
    unedited, _ = scored([item.conditions["edit"] for item in items], items)
    scalars = unedited["scalars"]
    assert (scalars["edits"], scalars["edits_success"], scalars["edits_kept"]) == (0.0, 0.0, 1.0)
    assert [row["id"] for row in rows] == [item.id for item in items]
    assert {row["score"] for row in rows} == {1.0}


def test_means_are_those_of_the_marks_and_kinds_stand_apart(items):
    # The edits of one kind done, the others not.
    images = [item.truth if item.meta["kind"] == "colour" else item.conditions["edit"] for item in items]
    result, rows = scored(images, items)
    marks = [edit_oracle.score(image, item.edit) for image, item in zip(images, items, strict=True)]
    assert result["scalars"]["edits"] == pytest.approx(np.mean([mark.product for mark in marks]))
    share = np.mean([item.meta["kind"] == "colour" for item in items])
    assert result["scalars"]["edits"] == pytest.approx(share)
    assert result["scalars"]["edits_colour"] == 1.0 and result["scalars"]["edits_swap_success"] == 0.0
    low, high = result["interval"]
    assert low < share < high
    assert result["by_kind"]["swap"]["n"] == 12
    table = METRICS["edits"]().table(result)
    assert len(table.split("\n")) == 1 + 5 + 1 + 1 and "colour" in table
    assert json.loads(json.dumps(result))["all"]["n"] == 60
    assert [row["score"] for row in rows] == [mark.product for mark in marks]


def test_another_source_is_one_line():
    with pytest.raises(
        UserError, match="metric 'edits' needs edits .* source shapes_edits, not compositional"
    ):
        METRICS["edits"]().items(ShapesSource(), 3)


def test_items_of_a_prompt_set_are_one_line(items):
    METRICS["edits"]().check_items(items, "x")
    with pytest.raises(
        UserError, match="prompt set x has no edits whose pixels can be read; .*leave out prompt_set"
    ):
        METRICS["edits"]().check_items([Item("a", "b")], "prompt set x")
