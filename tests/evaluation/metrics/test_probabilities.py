"""`soft_tifa`, `vqa_score` and `dpg` against closed forms on made logits and answers."""

import math

import numpy as np
import pytest

from scaling_dit.errors import UserError
from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.metric import Item, Skipped
from scaling_dit.evaluation.metrics.dpg import depending
from scaling_dit.evaluation.metrics.soft_tifa import means
from scaling_dit.evaluation.prompt_sets import open_prompt_set
from scaling_dit.evaluation.scoring import Scoring, score
from scaling_dit.evaluation.vqa import Likelihood
from scaling_dit.evaluation.vqa.forms import accepted_forms
from scaling_dit.evaluation.vqa.transformers_models import first_token
from tests.support.chat_server import running, says
from tests.support.judges import Table, named
from tests.support.prompt_files import DPG, GENEVAL2, write_dpg, write_geneval2

IMAGES = np.zeros((8, 4, 4, 3), np.uint8)


def run(name, items, **fields):
    return score(Scoring(name, METRICS[name](**fields), items), [IMAGES[: len(items)]], 0)


@pytest.fixture
def judges(monkeypatch):
    return named(monkeypatch)


def test_the_probability_of_first_tokens_counts_an_id_once():
    logits = np.array([1.0, 2.0, 3.0, 0.5])
    p = np.exp(logits) / np.exp(logits).sum()
    assert math.exp(first_token(logits, [1, 2])) == pytest.approx(p[1] + p[2], rel=1e-14)
    assert first_token(logits, [1, 1, 2, 1]) == first_token(logits, [1, 2])
    assert first_token(logits, [0, 1, 2, 3]) == 0 and first_token(logits, []) == -math.inf
    # No underflow: its probability is 0 in float64.
    assert first_token(np.array([0.0, -2000.0]), [1]) == pytest.approx(-2000)


def test_means_are_those_of_probabilities():
    p = [0.5, 0.25, 1.0]
    am, gm = means(np.log(p))
    assert am == pytest.approx(100 * np.mean(p)) and gm == pytest.approx(100 * np.prod(p) ** (1 / 3))
    am, gm = means([-2000.0, 0.0])
    assert am == 50 and gm == pytest.approx(100 * math.exp(-1000), abs=1e-300)
    assert means([-1500.0] + [0.0] * 9)[1] == pytest.approx(100 * math.exp(-150), rel=1e-12)
    assert means([-math.inf, 0.0]) == (50, 0) and means([]) == (None, None)


def test_soft_tifa_on_geneval_2(tmp_path, judges):
    path = tmp_path / "geneval2_data.jsonl"
    other = {
        "prompt": "a cow",
        "atom_count": 1,
        "vqa_list": [["Is there a cow?", "Yes"]],
        "skills": ["object"],
    }
    write_geneval2(path, [GENEVAL2, other])
    items = open_prompt_set(f"geneval2:{path}").items
    questions = [question for question, _ in GENEVAL2["vqa_list"]]
    p = {f"{questions[0]} Answer in one word.": 0.5, f"{questions[1]} Answer in one word.": 0.125}
    judges += [
        Table(p | {"Is there a cow? Answer in one word.": 0.75}),
        Table(dict.fromkeys(p, 0.9) | {"Is there a cow? Answer in one word.": 0.2}),
    ]
    result, rows = run("soft_tifa", items, judge="table_judges:first", second_judge="table_judges:second")
    assert result["scalars"]["soft_tifa_am"] == pytest.approx(100 * (0.3125 + 0.75) / 2)
    assert result["scalars"]["soft_tifa_gm"] == pytest.approx(100 * (0.25 + 0.75) / 2)
    assert result["am_by_type"] == pytest.approx({"attribute": 12.5, "count": 50, "object": 75})
    assert result["n"] == 2 and result["bounded"] == result["unanswered"] == 0
    assert result["gm_if_zero"] == pytest.approx(result["scalars"]["soft_tifa_gm"])
    # More than half, by either: no, no, yes; and yes, yes, no.
    assert result["agreement"]["observed"] == 0 and result["agreement"]["kappa"] < 0
    assert [row["score"] for row in rows] == pytest.approx([31.25, 75])


def test_probabilities_that_a_server_does_not_list_are_bounds(tmp_path):
    path = tmp_path / "geneval2_data.jsonl"
    write_geneval2(path)
    items = open_prompt_set(f"geneval2:{path}").items
    # Four is not among the listed tokens, of which the least probable has 0.2.
    with running(lambda image, text, request: says("Yes", {"Yes": 0.6, "three": 0.2})) as server:
        options = ("model=vlm", "threads=1")
        result, _ = run("soft_tifa", items, judge=f"openai:{server.url}", judge_options=options)
    assert result["bounded"] == 1 and result["gm_if_zero"] == 0
    assert result["scalars"]["soft_tifa_gm"] == pytest.approx(100 * math.sqrt(0.6 * 0.2))
    text = METRICS["soft_tifa"]().table(result)
    assert "probabilities that the server does not list: 1; GM with 0 for them: 0" in text


def test_unanswered_questions_are_left_out_and_counted(tmp_path):
    path = tmp_path / "geneval2_data.jsonl"
    write_geneval2(path)
    items = open_prompt_set(f"geneval2:{path}").items
    fields = {"judge_options": ("model=vlm", "threads=1", "tries=1")}
    with running(lambda *_: says("Yes", {"Yes": 0.5, "four": 0.25})) as server:
        server.faults = [400]
        result, rows = run("soft_tifa", items, judge=f"openai:{server.url}", **fields)
        assert result["unanswered"] == 1 and result["scalars"]["soft_tifa_gm"] == pytest.approx(50)
        assert next(iter(rows))["unanswered"] == [GENEVAL2["vqa_list"][0][0]]
        server.faults = [400, 400]
        with pytest.raises(Skipped, match="the judge answered no question"):
            run("soft_tifa", items, judge=f"openai:{server.url}", **fields)


def test_vqa_score_asks_about_the_prompt(judges):
    items = [Item(f"i{i}", f'prompt "{i}"') for i in range(3)]
    asked = [f'Does this figure show "{item.prompt}"? Please answer yes or no.' for item in items]
    judges.append(Table(dict(zip(asked, (0.25, 0.5, 1.0), strict=True))))
    result, rows = run("vqa_score", items, judge="table_judges:first")
    assert result["scalars"] == {"vqa_score": pytest.approx(1.75 / 3)} and result["n"] == 3
    assert [row["score"] for row in rows] == pytest.approx([0.25, 0.5, 1])
    assert judges[0].asked == asked


@pytest.mark.parametrize(
    "right, counts",
    [
        ({1: 1, 2: 1, 3: 1}, [1, 1, 1]),
        # What depends on a no does not count, nor what depends on that.
        ({1: 0, 2: 1, 3: 1}, [0, 0, 0]),
        ({1: 1, 2: 0, 3: 1}, [1, 0, 0]),
        ({1: 1, 2: 1, 3: 0}, [1, 1, 0]),
    ],
)
def test_the_dependency_rule(right, counts):
    assert list(depending(right, {1: [], 2: [1], 3: [2]}).values()) == counts


def test_a_question_that_depends_on_none_of_its_prompt_is_refused():
    with pytest.raises(UserError, match="question 2 depends on question 9, which its prompt has not"):
        depending({1: 1, 2: 1}, {1: [], 2: [9]})


def test_dpg_by_prompt_and_category(tmp_path, judges):
    write_dpg(tmp_path)
    items = open_prompt_set(f"dpg:{tmp_path}").items
    given = ["yes", "No.", "yes", "a photo"]
    answers = {f"{row[4]} Answer yes or no.": answer for row, answer in zip(DPG, given, strict=True)}
    judges.append(Table(answers))
    result, rows = run("dpg", items, judge="table_judges:first")
    # The third is right, but depends on the second.
    assert [row["score"] for row in rows] == pytest.approx([100 / 3, 0])
    assert result["scalars"]["dpg"] == pytest.approx(100 / 6)
    # As answered.
    assert result["accuracy_by_type"] == {"attribute": 0, "entity": 100, "global": 0, "relation": 100}
    assert result["accuracy_by_detail"]["relation - spatial"] == 100
    assert [q["counts"] for row in rows for q in row["questions"]] == [1, 0, 0, 0]
    with pytest.raises(Skipped, match="metric 'dpg' needs its prompt set: --prompt_set=dpg:FOLDER"):
        METRICS["dpg"]().items(None, 3)


def test_forms_and_likelihoods_are_plain():
    assert Likelihood(-1.0) == (-1.0, False)
    assert len(set(accepted_forms("ten"))) == 6
