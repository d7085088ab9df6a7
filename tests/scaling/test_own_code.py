"""A study's folder may come from a stranger: no verb runs code that only its study.json names."""

import json
import sys

import pytest

from scaling_dit.cli import main as cli
from scaling_dit.config import own_code
from scaling_dit.scaling import study as study_lib
from tests.support import simulated_study

VERBS = (
    ["report", "STRANGER"],
    ["report", "OWN", "STRANGER"],
    ["advise", "--workdir=STRANGER", "--budget=1e12"],
    ["study", "--workdir=STRANGER"],
    ["study", "--workdir=STRANGER", "--member=uvit-000"],
    ["study", "--workdir=STRANGER", "--tables"],
    ["study", "--workdir=STRANGER", "--queue"],
    # The user's own study, whose folder has been changed.
    ["study", "--config=OWN_FILE", "--workdir=STRANGER"],
)
OWN_FILE = """
from tests.support import simulated_study

def get_study():
    return simulated_study.study("nowhere", count=2, seeds=1, claims=()).spec
"""


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(own_code, "_TRUSTED", set())
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own", "stranger"):
        made = simulated_study.study(tmp_path / name, count=2, seeds=1, claims=())
        # No run lies in the folder.
        simulated_study.write(simulated_study.with_rows(made, []))
    path = tmp_path / "stranger" / "study.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metrics": ["strange_metric:Score"]}))
    (tmp_path / "strange_metric.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('RAN').touch()\n"
    )
    (tmp_path / "own_study.py").write_text(OWN_FILE)
    yield tmp_path
    sys.modules.pop("strange_metric", None)


def test_no_verb_runs_a_strangers_metric(folders, capsys):
    for verb in VERBS:
        words = {
            "STRANGER": folders / "stranger",
            "OWN_FILE": folders / "own_study.py",
            "OWN": folders / "own",
        }
        command = list(verb)
        for word, path in words.items():
            command = [one.replace(word, str(path)) for one in command]
        assert cli.main(command) == 2
        said = capsys.readouterr().err
        line = "study.json names code outside of scaling_dit, which would run here: metrics[0] 'strange_metric:Score'"
        assert line in said and "--own_code" in said and said.count("\n") == 1
    assert not (folders / "RAN").exists()
    # It runs where the user says so.
    assert cli.main(["report", "--own_code", str(folders / "stranger")]) == 2
    assert (folders / "RAN").exists() and "metric" in capsys.readouterr().err


def test_a_metric_of_ones_own_study_needs_no_word(folders):
    own = simulated_study.study(folders / "mine", count=2, seeds=1, claims=()).spec
    spec = type(own)(own.question, own.members, metrics=("strange_metric:Score",))
    for _ in range(2):
        study_lib.register(spec, study_lib.StudyFolder(folders / "mine"), lambda: 0)
    assert study_lib.read_spec(folders / "mine").metrics == ("strange_metric:Score",)
