"""What a run of a study lacks is told before anything is trained, in every process alike."""

import dataclasses

import pytest

from scaling_dit import config as config_lib
from scaling_dit.cli import main as cli
from scaling_dit.errors import UserError
from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.features import published
from scaling_dit.evaluation.metric import Skipped
from scaling_dit.parallel import processes
from scaling_dit.scaling import member_runs
from scaling_dit.scaling.folder import StudyFolder
from scaling_dit.scaling.ladder import Member
from scaling_dit.scaling.spec import StudySpec
from tests.support import simulated_study

OWN_FILE = """
import dataclasses
from tests.support import simulated_study

def get_study(arg=""):
    spec = simulated_study.study("nowhere", count=1, seeds=1, claims=()).spec
    return dataclasses.replace(spec, items=int(arg))
"""


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    monkeypatch.delenv(published.FOLDER, raising=False)


def study_of(metric, **fields):
    """One member, scored by one metric with these fields."""
    (one,) = simulated_study.members(1)
    changes = [f"--config.metrics.{metric}.{key}={value}" for key, value in fields.items()]
    config = config_lib.resolve(one.config, [f"--config.eval.metrics=('{metric}',)", *changes])
    return StudySpec("Is a better?", (Member("one", config, {}, {}),), (0,), metrics=(metric,), items=4)


JUDGED = ("tifa", "soft_tifa", "vqa_score", "dpg")
WEIGHED = ("clip_score", "pickscore", "aesthetic", "hpsv2", "image_reward", "fid", "cmmd", "fd_dinov2")


@pytest.mark.parametrize("metric", ["tifa", "clip_score"])
def test_a_metric_that_lacks_a_judge_or_weights(metric):
    why = "it needs a judge: .*config.metrics.NAME.judge" if metric in JUDGED else "lacks weights"
    # With prompts of a set, for which the metric is not asked.
    spec = study_of(metric, prompt_set="tifa:nowhere")
    with pytest.raises(UserError, match=f"^member 'one': metric '{metric}':? ?{why}"):
        member_runs.check(spec, spec.members)


@pytest.mark.parametrize("metric", [*JUDGED, *WEIGHED])
def test_every_metric_says_what_it_lacks(metric):
    with pytest.raises(Skipped, match="it needs a judge: " if metric in JUDGED else "lacks weights"):
        METRICS[metric]().check_ready()


def test_judges_are_looked_for_and_not_loaded(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"architectures": ["BlipForQuestionAnswering"]}')
    for fields, why in (
        ({"judge": "openai:http://x"}, "needs the model's name on the server"),
        ({"judge": "shapes", "second_judge": "transformers:nowhere"}, "no model in 'nowhere'"),
        ({"judge": "shapes", "matcher": "nowhere"}, "no folder 'nowhere' with a sentence encoder"),
        ({"judge": f"transformers:{tmp_path}", "judge_options": "('dtpye=x',)"}, "did you mean 'dtype'"),
    ):
        spec = study_of("tifa", **fields)
        with pytest.raises(UserError, match=f"^member 'one': .*{why}"):
            member_runs.check(spec, spec.members)
    # There is a model, whose weights are not read.
    spec = study_of("tifa", judge=f"transformers:{tmp_path}")
    member_runs.check(spec, spec.members)


def test_what_one_process_lacks_ends_all_with_one_line(monkeypatch, tmp_path):
    """Weights or data on one host of two: each process is told, as if the gather had come from both."""
    missing = Member(
        "late", config_lib.load("shapes:smoke", [f"--config.source.name=folder:{tmp_path}/no"]), {}, {}
    )
    spec = study_of("clip_score")
    for one, line in (
        (spec, "member 'one': metric 'clip_score' lacks weights"),
        (dataclasses.replace(spec, members=(missing,), metrics=()), "member 'late': .*/no"),
    ):
        told = []
        with monkeypatch.context() as patch:
            patch.setattr(processes, "gather_bytes", lambda data, told=told: told.append(data) or [b"", data])
            with pytest.raises(UserError, match=f"^{line}") as here:
                member_runs.check(one, one.members)
        # It has told the other process, which lacks nothing, before it ended.
        assert len(told) == 1 and told[0]
        with monkeypatch.context() as patch:
            patch.setattr(member_runs, "_check_member", lambda *_: None)
            patch.setattr(processes, "gather_bytes", lambda data, told=told: [data, *told])
            with pytest.raises(UserError) as there:
                member_runs.check(one, one.members)
        assert str(there.value) == str(here.value)


def test_a_queue_gets_no_study_that_cannot_be_scored(tmp_path, capsys):
    (tmp_path / "own_study.py").write_text(OWN_FILE)
    command = ["study", f"--config={tmp_path}/own_study.py:640", f"--workdir={tmp_path}/study", "--queue"]
    assert cli.main(command) == 2
    said = capsys.readouterr()
    assert "640 held-out scenes wanted" in said.err and said.err.count("\n") == 1 and not said.out
    assert not StudyFolder(tmp_path / "study").folder.exists()
    # Corrected, it is registered.
    assert cli.main([one.replace(":640", ":4") for one in command]) == 0
    assert StudyFolder(tmp_path / "study").study.exists() and '"--member=uvit-000"' in capsys.readouterr().out
