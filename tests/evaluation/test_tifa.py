"""TIFA's scores against values worked out by hand, its intervals, and its files."""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from scaling_dit.errors import UserError
from scaling_dit.evaluation import intervals, tifa
from scaling_dit.evaluation.intervals import mean_interval


def row(key: str, question: str, answer: str, kind: str) -> dict[str, Any]:
    fields = {"id": key, "caption": f"caption {key}", "question": question, "choices": ["yes", "no", "red"]}
    return fields | {"answer": answer, "element_type": kind, "element": answer}


QUESTIONS = [
    [row("a", "a1", "yes", "object"), row("a", "a2", "red", "color")],
    [row("b", "b1", "yes", "object")],
    [row("c", f"c{i}", "yes", "object") for i in range(3)] + [row("c", "c3", "red", "color")],
]
IMAGES = [np.full((2, 2, 3), value, np.uint8) for value in (0, 1, 2)]
# Right: 1 of 2, 1 of 1, 1 of 4.
ANSWERS = {0: ["yes", "yes"], 1: ["yes"], 2: ["no", "yes", "no", "no"]}


def vqa(image: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return ANSWERS[int(image[0, 0, 0])]


def rows_of(images, questions, judge=vqa) -> list[dict[str, Any]]:
    return [tifa.caption_row(image, rows, judge) for image, rows in zip(images, questions, strict=True)]


def scored(seed: int = 0) -> dict[str, Any]:
    return tifa.summary(rows_of(IMAGES, QUESTIONS), "test-vqa", seed)


def test_scores_by_hand():
    rows, result = rows_of(IMAGES, QUESTIONS), scored()
    assert [one["score"] for one in rows] == [0.5, 1.0, 0.25]
    # Over captions, not 3 of 7.
    assert result["tifa_average"] == pytest.approx((0.5 + 1 + 0.25) / 3)
    assert result["tifa_stdev"] == pytest.approx(statistics.stdev([0.5, 1, 0.25]))
    # Over questions.
    assert result["accuracy_by_type"] == {"object": pytest.approx(3 / 5), "color": 0.0}
    assert result["n"] == 3 and result["n_by_type"] == {"object": 5, "color": 2}
    assert result["vqa_model"] == "test-vqa"
    assert rows[0]["questions"][1] == {
        "question": "a2", "element_type": "color", "answer": "red", "given": "yes", "right": 0,
    }  # fmt: skip
    assert "right" not in QUESTIONS[0][1]


def test_one_caption_has_no_spread():
    result = tifa.summary(rows_of(IMAGES[:1], QUESTIONS[:1]), "test-vqa", 0)
    assert result["tifa_stdev"] == 0.0 and result["interval"] == [0.5, 0.5]


def marks(pairs) -> np.ndarray:
    return np.asarray(list(pairs), np.int64)


def test_the_interval_is_that_of_a_mean():
    rng = np.random.default_rng(1)
    scores = rng.binomial(1, 0.7, 400).astype(float)
    by_type = {"all": marks((i, int(value)) for i, value in enumerate(scores))}
    (low, high), found = tifa.bootstrap(scores, by_type, seed=0)
    half = 1.96 * scores.std() / 20
    assert low == pytest.approx(scores.mean() - half, abs=0.012)
    assert high == pytest.approx(scores.mean() + half, abs=0.012)
    # One question a caption: the same resamples.
    assert found["all"] == pytest.approx([low, high])
    assert mean_interval(scores, 0) == [low, high]


def test_the_interval_depends_on_its_seed_only():
    scores = np.random.default_rng(2).random(50)
    assert tifa.bootstrap(scores, {}, seed=0) == tifa.bootstrap(scores, {}, seed=0)
    assert tifa.bootstrap(scores, {}, seed=0) != tifa.bootstrap(scores, {}, seed=1)


def test_resamples_do_not_depend_on_how_many_are_in_memory(monkeypatch):
    whole = np.concatenate(list(intervals.resamples(30, 7)))
    assert whole.shape == (intervals.RESAMPLES, 30) and (whole.sum(axis=1) == 30).all()
    assert len(list(intervals.resamples(30, 7))) == 1
    monkeypatch.setattr(intervals, "_AT_ONCE", 30 * 7)
    pieces = list(intervals.resamples(30, 7))
    assert max(map(len, pieces)) == 7
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_questions_of_one_caption_are_resampled_together():
    """Ten questions with one fate carry the information of one: the interval must not shrink."""
    fates = [i % 2 for i in range(40)]
    one = {"x": marks(enumerate(fates))}
    ten = {"x": marks((i, fate) for i, fate in enumerate(fates) for _ in range(10))}
    scores = np.asarray(fates, float)
    assert tifa.bootstrap(scores, ten, 0)[1]["x"] == pytest.approx(tifa.bootstrap(scores, one, 0)[1]["x"])


def test_a_rare_type_has_a_finite_interval():
    found = tifa.bootstrap(
        np.ones(30), {"rare": marks([(0, 1)]), "all": marks((i, 1) for i in range(30))}, 0
    )[1]
    assert found == {"rare": [1.0, 1.0], "all": [1.0, 1.0]}


def test_table():
    lines = tifa.table(scored()).splitlines()
    assert [line.split()[0] for line in lines] == ["element", "color", "object", "TIFA", "n:"]
    assert lines[2].split()[1:3] == ["5", "0.600"] and lines[3].split()[1:3] == ["3", "0.583"]
    assert "test-vqa" in lines[-1]


def test_files_are_laid_out_as_tifas_own(tmp_path):
    tifa.write_questions(tmp_path / "q.json", iter(QUESTIONS))
    flat = [row for rows in QUESTIONS for row in rows]
    assert (tmp_path / "q.json").read_text() == json.dumps(flat, indent=1)
    tifa.write_image_map(tmp_path / "map.json", {"a": "images/a.png", "b": "/elsewhere/b.png"})
    assert json.loads((tmp_path / "map.json").read_text()) == {"a": "images/a.png", "b": "/elsewhere/b.png"}


def test_a_caption_without_questions_is_refused():
    with pytest.raises(UserError, match="a caption has no questions"):
        tifa.caption_row(IMAGES[0], [], vqa)
