"""The TIFA scorer against figures worked out by hand, its interval, and its files."""

import json
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from scaling_dit.data.shapes import oracle
from scaling_dit.data.shapes.source import ShapesSource
from scaling_dit.errors import UserError
from scaling_dit.evaluation import METRICS, tifa


def row(key: str, question: str, answer: str, kind: str) -> dict[str, Any]:
    fields = {"id": key, "caption": f"caption {key}", "question": question, "choices": ["yes", "no", "red"]}
    return fields | {"answer": answer, "element_type": kind, "element": answer}


QUESTIONS = [
    [row("a", "a1", "yes", "object"), row("a", "a2", "red", "color")],
    [row("b", "b1", "yes", "object")],
    [row("c", f"c{i}", "yes", "object") for i in range(3)] + [row("c", "c3", "red", "color")],
]
IMAGES = [np.full((2, 2, 3), value, np.uint8) for value in (0, 1, 2)]
ANSWERS = {0: ["yes", "yes"], 1: ["yes"], 2: ["no", "yes", "no", "no"]}  # right: 1 of 2, 1 of 1, 1 of 4


def vqa(image: np.ndarray, rows: Sequence[dict[str, Any]]) -> list[str]:
    return ANSWERS[int(image[0, 0, 0])]


def scored(seed: int = 0) -> dict[str, Any]:
    return tifa.score(IMAGES, QUESTIONS, vqa, "test-vqa", seed)


def test_scores_by_hand():
    result = scored()
    assert result["caption_scores"] == {"a": 0.5, "b": 1.0, "c": 0.25}
    assert result["tifa_average"] == pytest.approx((0.5 + 1 + 0.25) / 3)  # over captions, not 3 of 7
    assert result["tifa_stdev"] == pytest.approx(statistics.stdev([0.5, 1, 0.25]))
    assert result["accuracy_by_type"] == {"object": pytest.approx(3 / 5), "color": 0.0}  # over questions
    assert result["n"] == 3 and result["n_by_type"] == {"object": 5, "color": 2}
    assert result["vqa_model"] == "test-vqa"
    detail = result["question_details"]["a"]["a2"]
    assert detail["multiple_choice_vqa"] == detail["free_form_vqa"] == "yes"
    assert detail["scores"] == 0 and detail["answer"] == "red" and detail["caption"] == "caption a"
    assert "scores" not in QUESTIONS[0][1]  # the rows given are left as they were


def test_one_caption_has_no_spread():
    result = tifa.score(IMAGES[:1], QUESTIONS[:1], vqa, "test-vqa", 0)
    assert result["tifa_stdev"] == 0.0 and result["interval"] == [0.5, 0.5]


def test_the_interval_is_that_of_a_mean():
    rng = np.random.default_rng(1)
    scores = rng.binomial(1, 0.7, 400).astype(float)
    by_type = {"all": [(i, int(value)) for i, value in enumerate(scores)]}
    (low, high), found = tifa.bootstrap(list(scores), by_type, seed=0)
    half = 1.96 * scores.std() / 20
    assert low == pytest.approx(scores.mean() - half, abs=0.012)
    assert high == pytest.approx(scores.mean() + half, abs=0.012)
    assert found["all"] == pytest.approx([low, high])  # one question a caption: the same resamples


def test_the_interval_depends_on_its_seed_only():
    scores = list(np.random.default_rng(2).random(50))
    assert tifa.bootstrap(scores, {}, seed=0) == tifa.bootstrap(scores, {}, seed=0)
    assert tifa.bootstrap(scores, {}, seed=0) != tifa.bootstrap(scores, {}, seed=1)


def test_questions_of_one_caption_are_resampled_together():
    """Ten questions with one fate carry the information of one: the interval must not shrink."""
    fates = [i % 2 for i in range(40)]
    one = {"x": [(i, fate) for i, fate in enumerate(fates)]}
    ten = {"x": [(i, fate) for i, fate in enumerate(fates) for _ in range(10)]}
    scores = [float(fate) for fate in fates]
    assert tifa.bootstrap(scores, ten, 0)[1]["x"] == pytest.approx(tifa.bootstrap(scores, one, 0)[1]["x"])


def test_a_rare_type_has_a_finite_interval():
    scores = [1.0] * 30
    found = tifa.bootstrap(scores, {"rare": [(0, 1)], "all": [(i, 1) for i in range(30)]}, 0)[1]
    assert found == {"rare": [1.0, 1.0], "all": [1.0, 1.0]}


def test_table():
    lines = tifa.table(scored()).splitlines()
    assert [line.split()[0] for line in lines] == ["element", "color", "object", "TIFA", "n:"]
    assert lines[2].split()[1:3] == ["5", "0.600"] and lines[3].split()[1:3] == ["3", "0.583"]
    assert "test-vqa" in lines[-1]


def test_files_are_laid_out_as_tifas_own(tmp_path):
    tifa.write_questions(tmp_path / "q.json", QUESTIONS)
    assert json.loads((tmp_path / "q.json").read_text()) == [row for rows in QUESTIONS for row in rows]
    tifa.write_image_map(tmp_path / "map.json", {"a": "pictures/a.png", "b": "/elsewhere/b.png"})
    assert json.loads((tmp_path / "map.json").read_text()) == {"a": "pictures/a.png", "b": "/elsewhere/b.png"}


def test_misuse_is_told():
    with pytest.raises(UserError, match="picture per caption, got 2 and 3"):
        tifa.score(IMAGES[:2], QUESTIONS, vqa, "", 0)
    with pytest.raises(UserError, match="got 0 and 0"):
        tifa.score([], [], vqa, "", 0)
    with pytest.raises(UserError, match="caption 1 has no questions"):
        tifa.score(IMAGES[:2], [QUESTIONS[0], []], vqa, "", 0)
    with pytest.raises(UserError, match="'a' occurs twice"):
        tifa.score(IMAGES[:2], [QUESTIONS[0]] * 2, lambda image, rows: ["yes"] * 2, "", 0)


def test_the_wrong_scene_baseline_shifts_by_one():
    seen: list[int] = []

    def spy(image: np.ndarray, rows: Sequence[dict[str, Any]]) -> list[str]:
        seen.append(int(image[0, 0, 0]))
        return ["yes"] * len(rows)

    tifa.wrong_scene_baseline(IMAGES, QUESTIONS, spy, "spy", 0)
    assert seen == [1, 2, 0]


def test_right_and_wrong_scenes_of_the_built_in_data():
    """1 on true pictures, far lower on those of other captions."""
    source = ShapesSource(shapes=("circle", "square", "triangle"), colours=("red", "green", "blue", "yellow"))
    chosen = source.distinct(200)
    held_out = source.held_out()
    images = [held_out[i]["image"] for i in chosen]
    rows = [held_out.questions(i) for i in chosen]
    assert tifa.score(images, rows, oracle.answer, oracle.VQA_MODEL, 0)["interval"] == [1.0, 1.0]
    wrong = tifa.wrong_scene_baseline(images, rows, oracle.answer, oracle.VQA_MODEL, 0)
    assert 0.2 < wrong["tifa_average"] < 0.45
    assert wrong["accuracy_by_type"]["spatial"] < 0.05
    low, high = wrong["interval"]
    assert low < wrong["tifa_average"] < high < low + 0.1


def test_the_registry_has_it():
    metric = METRICS["tifa"]
    items = metric.items(ShapesSource(preset="grid8"), 20)
    pictures = [item.truth for item in items if item.truth is not None]
    result = metric.score(pictures, items, seed=0)
    assert len(pictures) == 20 and result["tifa_average"] == 1.0 and result["vqa_model"] == oracle.VQA_MODEL
    assert json.loads(json.dumps(result))["scalars"]["tifa"] == 1.0
