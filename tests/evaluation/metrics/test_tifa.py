"""`tifa` as published, on a made question file and on the built-in shapes with the oracle as judge."""

import json
import time

import numpy as np
import pytest

from scaling_dit.data.sources import create_source
from scaling_dit.errors import UserError
from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.metric import Item, Skipped
from scaling_dit.evaluation.prompt_sets import open_prompt_set
from scaling_dit.evaluation.scoring import Scoring, score
from tests.support.judges import Table, named
from tests.support.prompt_files import write_tifa

BLANK = np.zeros((64, 4, 4, 3), np.uint8)


def run(items, images=BLANK, name="tifa", seed=0, **fields):
    return score(Scoring(name, METRICS[name](**fields), items), [images[: len(items)]], seed)


@pytest.fixture
def judges(monkeypatch):
    """Modules with a judge that answers from a table, by question."""
    return named(monkeypatch)


def published(questions, given):
    """TIFA v1.0's formula: macro mean over captions, micro mean over the questions of a type."""
    captions, types = {}, {}
    for row in questions:
        right = int(given[row["question"]] == row["answer"])
        captions.setdefault(row["id"], []).append(right)
        types.setdefault(row["element_type"], []).append(right)
    scores = [np.mean(marks) for marks in captions.values()]
    return np.mean(scores), {kind: np.mean(marks) for kind, marks in types.items()}, np.std(scores, ddof=1)


def test_the_published_formula_by_type(tmp_path, judges):
    _prompts, questions = write_tifa(tmp_path, captions=6, seed=1)
    items = open_prompt_set(f"tifa:{tmp_path}").items
    rng = np.random.default_rng(2)
    given = {row["question"]: str(rng.choice(row["choices"])) for row in questions}
    judges.append(Table(given))
    result, rows = run(items, judge="table_judges:first")
    average, by_type, stdev = published(questions, given)
    assert result["tifa_average"] == pytest.approx(average, abs=1e-12) and 0 < average < 1
    assert result["accuracy_by_type"] == {kind: pytest.approx(value) for kind, value in by_type.items()}
    assert result["tifa_stdev"] == pytest.approx(stdev)
    assert next(iter(result["scalars"])) == "tifa" and result["n"] == 6 and result["unmatched"] == 0
    asked = judges[0].asked[0]
    first = questions[0]
    assert asked == (
        f"Answer the multiple-choice question. Question: {first['question']} "
        f"Choices: {', '.join(first['choices'])} Answer:"
    )
    kept = [question for row in rows for question in row["questions"]]
    assert [question["given"] for question in kept] == [given[row["question"]] for row in questions]


def test_a_free_answer_that_is_no_choice_is_wrong_and_counted(tmp_path, judges):
    _, questions = write_tifa(tmp_path, captions=4)
    items = open_prompt_set(f"tifa:{tmp_path}").items
    right = {row["question"]: row["answer"].upper() + "." for row in questions}
    judges.append(Table(right))
    assert run(items, judge="table_judges:first")[0]["tifa_average"] == 1
    judges[0] = Table(right | {questions[0]["question"]: "something like it"})
    result, _ = run(items, judge="table_judges:first")
    assert result["unmatched"] == 1 and result["tifa_average"] < 1


def test_a_second_judge_and_the_agreement(tmp_path, judges):
    _, questions = write_tifa(tmp_path, captions=4)
    items = open_prompt_set(f"tifa:{tmp_path}").items
    answers = {row["question"]: row["answer"] for row in questions}
    wrong = answers | {questions[0]["question"]: "no way", questions[1]["question"]: "never"}
    judges += [Table(answers), Table(wrong)]
    fields = {"judge": "table_judges:first", "second_judge": "table_judges:second"}
    result, _rows = run(items, **fields)
    agreed = result["agreement"]
    assert result["tifa_average"] == 1 > result["second_average"]
    # The first judge gives one mark only, so chance would agree as often.
    assert (
        agreed["n"] == len(questions) and agreed["observed"] == 1 - 2 / len(questions) == agreed["expected"]
    )
    assert agreed["kappa"] == 0
    metric = METRICS["tifa"](**fields)
    assert "kappa 0.000" in metric.table(result)
    assert metric.about()["second_judge"].startswith("table_judges:second")


@pytest.fixture(scope="module")
def scenes():
    source = create_source("shapes")
    return METRICS["tifa"](judge="shapes").items(source, 40)


def test_the_oracle_gives_true_scenes_1_and_shuffled_ones_the_baseline(scenes):
    images = np.stack([item.truth for item in scenes])
    result, _ = run(scenes, images, judge="shapes")
    assert result["tifa_average"] == 1 and set(result["accuracy_by_type"].values()) == {1}
    assert result["vqa_model"] == "shapes-oracle-1" and result["interval"] == [1, 1]
    # What the exact metric reports as its baseline: the next scene's image.
    exact, _ = run(scenes, images, name="shapes_tifa")
    shuffled, _ = run(scenes, np.roll(images, -1, axis=0), judge="shapes")
    assert shuffled["tifa_average"] == pytest.approx(exact["baseline"]["tifa_average"], abs=1e-12)
    assert 0.1 < shuffled["tifa_average"] < 0.7
    assert shuffled["accuracy_by_type"] == exact["baseline"]["accuracy_by_type"]


def test_soft_tifa_of_the_oracle_is_all_or_nothing(scenes):
    images = np.stack([item.truth for item in scenes])
    result, _rows = run(scenes, images, name="soft_tifa", judge="shapes")
    assert result["scalars"]["soft_tifa_am"] == result["scalars"]["soft_tifa_gm"] == 100
    wrong, _ = run(scenes, np.roll(images, -1, axis=0), name="soft_tifa", judge="shapes")
    tifa, _ = run(scenes, np.roll(images, -1, axis=0), judge="shapes")
    assert wrong["scalars"]["soft_tifa_am"] == pytest.approx(100 * tifa["tifa_average"])
    # A prompt with one answer of probability 0 has the geometric mean 0.
    assert wrong["scalars"]["soft_tifa_gm"] < wrong["scalars"]["soft_tifa_am"]


def test_what_is_missing_is_one_line():
    class Photos:
        def describe(self):
            return "photos"

    with pytest.raises(
        Skipped, match="metric 'tifa' needs prompts with questions, which photos has not; name a set"
    ):
        METRICS["tifa"]().items(Photos(), 3)
    with pytest.raises(Skipped, match="it needs a judge: --judge="):
        METRICS["tifa"]().ready()
    with pytest.raises(UserError, match="judge option 'model': write FIELD=VALUE"):
        METRICS["tifa"](judge="shapes", judge_options=("model",)).ready()
    with pytest.raises(UserError, match="prompt 'a' has no questions; name a set that has them"):
        run([Item("a", "x")], judge="shapes")
    with pytest.raises(UserError, match="question 'q' of 'a' has no choices, answer, element_type"):
        run([Item("a", "x", [{"question": "q"}])], judge="shapes")


@pytest.mark.slow
def test_the_questions_of_4081_prompts_take_seconds_without_the_judge(tmp_path, judges):
    _, questions = write_tifa(tmp_path, captions=4081)
    assert len(questions) > 20_000
    judges.append(Table({row["question"]: row["answer"] for row in questions}))
    began = time.process_time()
    items = open_prompt_set(f"tifa:{tmp_path}").items
    images = (BLANK[:64] for _ in range(63))
    stream = [*images, BLANK[:49]]
    result, _ = score(Scoring("tifa", METRICS["tifa"](judge="table_judges:first"), items), stream, 0)
    assert result["n"] == 4081 and result["tifa_average"] == 1
    assert time.process_time() - began < 20
    assert json.dumps(result)
