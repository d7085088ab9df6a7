"""Judges: an endpoint that fails in every way, the oracle, a user's own, and what is kept of their answers."""

import json
import math
import re
import sys
import threading
import types

import numpy as np
import pytest
from etils import epath

from scaling_dit.curation.captioning import chat
from scaling_dit.data.sources import create_source
from scaling_dit.errors import UserError
from scaling_dit.evaluation.metric import Skipped
from scaling_dit.evaluation.vqa import Asked, fill
from scaling_dit.evaluation.vqa.agreement import agreement
from scaling_dit.evaluation.vqa.answers import Answers
from scaling_dit.evaluation.vqa.choices import create_matcher, literal
from scaling_dit.evaluation.vqa.endpoint import first_token
from scaling_dit.evaluation.vqa.forms import accepted_forms
from scaling_dit.evaluation.vqa.panel import check_judge_named, open_judge
from tests.support.chat_server import running, says

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), np.uint8)
TOP = {"Yes": 0.5, "yes": 0.25, " no": 0.125, "No": 0.0625}


def brightness(image, text, request):
    return says(f" {int(image.mean())} {text} ", TOP)


@pytest.fixture
def server():
    with running(brightness) as found:
        yield found


def asked(count=4, text="bright?", options=("yes", "no")):
    return [Asked(IMAGES[i], text, options, {"id": str(i)}) for i in range(count)]


def panel(server, kept=None, **fields):
    given = {"model": "vlm", "pause": 0.001, "threads": 1} | fields
    return open_judge(f"openai:{server.url}", {k: str(v) for k, v in given.items()}, kept or Answers())


def test_an_endpoint_answers_and_gives_probabilities(server):
    judge = panel(server, threads=3)
    assert judge.answers(asked()) == [f"{int(image.mean())} bright?" for image in IMAGES]
    request = server.requests[0]
    assert request["temperature"] == 0 and request["max_tokens"] == 16 and "logprobs" not in request
    (one,) = judge.likelihoods(asked(1, options=accepted_forms("yes")))
    assert math.exp(one.log_p) == pytest.approx(0.75) and not one.bound
    assert server.requests[-1]["top_logprobs"] == 20 and server.requests[-1]["max_tokens"] == 1
    assert judge.judge.probability(IMAGES[0], "?", ("No", "no", " no")) == pytest.approx(0.1875)
    assert judge.judge.answer(IMAGES[0], "x", ()) == f"{int(IMAGES[0].mean())} x"


@pytest.mark.parametrize(
    "fault", [429, 500, "{", '{"choices": []}', '{"choices": [3]}', "[]", "hang up", "null"]
)
def test_what_may_pass_is_tried_again(server, fault):
    server.faults = [fault, fault]
    assert panel(server).answers(asked(1)) == [f"{int(IMAGES[0].mean())} bright?"]
    assert len(server.requests) == 3


def test_a_servers_wish_for_a_pause_counts(server, monkeypatch):
    pauses = []
    monkeypatch.setattr(chat.time, "sleep", pauses.append)
    server.faults = [429, 500]
    panel(server).answers(asked(1))
    assert pauses == [0.05, 0.002]


def test_a_question_without_an_answer_is_left_out_and_the_rest_answered(server):
    server.faults = [400, None, "nonsense", "nonsense"]
    judge = panel(server, tries=2)
    assert [answer is None for answer in judge.answers(asked())] == [True, False, True, False]
    # Only these are asked again.
    before = len(server.requests)
    assert None not in judge.answers(asked()) and len(server.requests) == before + 2


def test_a_judge_that_is_out_of_reach_is_skipped_and_what_it_said_is_kept(server):
    kept = Answers()
    assert None not in panel(server, kept).answers(asked(2))
    server.faults = [503] * 6
    with pytest.raises(Skipped, match=r"out of reach; answers so far are kept, run the same command"):
        panel(server, kept, tries=2).answers(asked(4) + asked(4, "dark?"))
    server.faults = [401]
    with pytest.raises(Skipped, match="status 401, no; the key is read from OPENAI_API_KEY"):
        panel(server).answers(asked(1))


def test_missing_or_senseless_log_probabilities(server):
    server.answer = lambda *_: says("Yes")
    with pytest.raises(Skipped, match="have no top_logprobs"):
        panel(server).likelihoods(asked(1))
    server.answer = lambda *_: says("Yes") | {"logprobs": {"content": [{"top_logprobs": [{"token": "Yes"}]}]}}
    assert panel(server, tries=2).likelihoods(asked(1)) == [None]
    assert len(server.requests) == 3


def test_a_slow_server_times_out(server, monkeypatch):
    held = threading.Event()
    server.answer = lambda *_: held.wait(2) and says("late")
    assert panel(server, tries=1, timeout=0.05).answers(asked(1)) == [None]
    held.set()


def test_first_tokens_of_a_list():
    def p(accepted, top):
        found = first_token({token: math.log(value) for token, value in top.items()}, accepted)
        return math.exp(found.log_p), found.bound

    assert p(("Yes", "yes", " yes"), {"Yes": 0.5, " yes": 0.25, "No": 0.25}) == (pytest.approx(0.75), False)
    # Of "bicycle" the beginning is listed; one letter is none, and a token counts once for two forms.
    assert p(("bicycle", "bicycles"), {"bic": 0.5, "b": 0.25, "x": 0.25}) == (pytest.approx(0.5), False)
    # Not listed: at most what the least probable token has, and at most what is left.
    assert p(("four",), {"three": 0.5, "f": 0.25}) == (pytest.approx(0.25), True)
    assert p(("four",), {"three": 0.9, "f": 0.09}) == (pytest.approx(0.01), True)


def test_accepted_forms_are_those_of_geneval_2():
    assert accepted_forms("Yes") == ("Yes", "yes", " Yes", " yes")
    assert accepted_forms("four") == accepted_forms("4") == ("four", "Four", " four", " Four", "4", " 4")
    assert accepted_forms("red") == ("red", "Red", " red", " Red")


def test_the_oracle_reads_scenes(tmp_path):
    source = create_source("shapes").held_out()
    rows, image = source.questions(0), source[0]["image"]
    judge = open_judge("shapes", {}, Answers())
    asked = [Asked(image, row["question"], tuple(row["choices"]), row) for row in rows]
    assert judge.answers(asked) == [row["answer"] for row in rows]
    right = [one._replace(options=accepted_forms(one.row["answer"])) for one in asked]
    assert {one.log_p for one in judge.likelihoods(right)} == {0.0}
    wrong = [one._replace(options=accepted_forms("blue-ish")) for one in asked]
    assert {one.log_p for one in judge.likelihoods(wrong)} == {-math.inf}
    with pytest.raises(UserError, match="answers only questions that scaling_dit wrote"):
        judge.judge.answer(image, "what?", ())


class Mine:
    def __init__(self, word: str = "yes"):
        self.word = word

    def answer(self, image, question, choices):
        return self.word

    def probability(self, image, question, accepted):
        return 0.25 if self.word in accepted else 0


def test_a_judge_of_ones_own_is_checked(monkeypatch):
    module = types.SimpleNamespace(Mine=Mine, Half=type("Half", (), {"answer": Mine.answer}))
    monkeypatch.setitem(sys.modules, "my_judge", module)
    judge = open_judge("my_judge:Mine", {"word": "no"}, Answers())
    assert re.fullmatch(r"my_judge:Mine\(word=no\), [0-9a-f]{12}", judge.identity)
    assert judge.answers(asked(2)) == ["no", "no"]
    assert judge.likelihoods(asked(1)) == [(math.log(0.25), False)]
    assert judge.likelihoods(asked(1, options=("x",))) == [(-math.inf, False)]
    for answer, message in ((3, "answer\\(\\) returned a int; it must return a string"),):
        monkeypatch.setattr(Mine, "answer", lambda *_, value=answer: value)
        with pytest.raises(UserError, match=message):
            open_judge("my_judge:Mine", {}, Answers()).answers(asked(1))
    for value in (1.5, -0.1, float("nan"), True, "1"):
        monkeypatch.setattr(Mine, "probability", lambda *_, value=value: value)
        with pytest.raises(UserError, match="it must return a number from 0 to 1"):
            open_judge("my_judge:Mine", {}, Answers()).likelihoods(asked(1))
    monkeypatch.setattr(Mine, "probability", lambda *_: 1 / 0)
    with pytest.raises(UserError, match=r"probability\(\) raised ZeroDivisionError"):
        open_judge("my_judge:Mine", {}, Answers()).likelihoods(asked(1))
    with pytest.raises(UserError, match=r"has no method probability\(image, question, accepted\)"):
        open_judge("my_judge:Half", {}, Answers())


def test_judges_that_do_not_exist():
    for name, options, message in (
        ("opnai:x", {}, "judge 'opnai:x': no module 'opnai' in .*; did you mean 'openai'"),
        ("openai", {}, "names no url; write openai:URL"),
        ("openai:localhost", {}, "give a URL such as"),
        ("openai:http://x", {}, "--judge_option=model=NAME"),
        ("openai:http://x", {"model": "m", "top": "21"}, "top from 1 to 20"),
        ("openai:http://x", {"model": "m", "tpo": "2"}, "has no field 'tpo'; did you mean 'top'"),
    ):
        with pytest.raises(UserError, match=message) as error:
            open_judge(name, options, Answers())
        assert not isinstance(error.value, Skipped)
        # Alike where nothing is loaded.
        with pytest.raises(UserError, match=message):
            check_judge_named(name, options)
    with pytest.raises(Skipped, match="it needs a judge: --judge=transformers:FOLDER"):
        open_judge("", {}, Answers())
    with pytest.raises(Skipped, match=r"no model in 'nowhere' .config.json is missing.; download one"):
        open_judge("transformers:nowhere", {}, Answers())


def test_answers_are_kept_by_content(server, tmp_path):
    folder = epath.Path(tmp_path / "answers")

    def ask(text="bright?", model="vlm", options=("yes", "no"), images=IMAGES):
        kept = Answers()
        kept.keep_in(folder)
        judge = panel(server, kept, model=model)
        before = len(server.requests)
        some = [Asked(image, text, options, {}) for image in images]
        found = judge.answers(some), judge.likelihoods(some)
        return found, len(server.requests) - before

    first, requests = ask()
    assert requests == 8
    # A new process with copies of the same pixels, and the same question twice.
    assert ask(images=IMAGES.copy()) == (first, 0)
    assert ask(images=np.repeat(IMAGES[:1], 3, axis=0))[1] == 0
    for change in ({"text": "dark?"}, {"model": "other"}, {"options": ("no", "yes")}, {"images": IMAGES + 1}):
        assert ask(**change)[1] == 8, change
    lines = [json.loads(line) for path in folder.glob("*/*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == 40 and {"key", "reply", "judge", "image", "asked"} <= lines[0].keys()
    assert sum("choices" in line for line in lines) == sum("accepted" in line for line in lines) == 20
    # Cut by a kill.
    (path,) = [path for path in folder.glob("*/*.jsonl") if "dark?" in path.read_text()]
    path.write_text(path.read_text()[:-30])
    assert ask(text="dark?")[1] == 1


def test_kappa_of_a_known_table():
    marks = [(1, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 10 + [(0, 0)] * 15
    found = agreement(marks)
    assert found == {"n": 50, "observed": 0.7, "expected": 0.5, "kappa": pytest.approx(0.4)}
    assert agreement([(1, 1)] * 3)["kappa"] is None and agreement([]) is None
    assert agreement([(1, 1), (0, 0)])["kappa"] == 1 and agreement([(1, 0), (0, 1)])["kappa"] == -1


def test_answers_that_are_choices_but_for_their_form():
    assert literal("Yes.", ("yes", "no")) == "yes" and literal(" two  dogs", ("two dogs",)) == "two dogs"
    assert literal("Yes", ("yes", "Yes")) == "Yes" and literal("maybe", ("yes", "no")) is None
    matcher = create_matcher("")
    assert matcher.match(["NO", "a cat"], [("yes", "no"), ("dog",)]) == ["no", None]
    with pytest.raises(Skipped, match="no folder 'nowhere' with a sentence encoder; TIFA's is"):
        create_matcher("nowhere")


def test_a_template_is_filled_once():
    assert (
        fill("Q: {question} of {choices}?", "is {choices} {x}", ("a", "b")) == "Q: is {choices} {x} of a, b?"
    )
