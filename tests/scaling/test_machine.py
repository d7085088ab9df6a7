"""What a study ran on is noted at each start, and told in the report."""

import datetime
import json
import sys

import pytest

from scaling_dit.errors import UserError
from scaling_dit.scaling import machine
from scaling_dit.scaling.folder import StudyFolder


def test_each_start_is_noted(tmp_path, monkeypatch):
    folder = StudyFolder(tmp_path)
    assert machine.read(folder) == [] and machine.lines([]) == []
    monkeypatch.setattr(machine, "_now", lambda: moment[0])
    moment = [datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)]
    for config in ("a", "b"):
        monkeypatch.setattr(
            sys, "argv", ["/somewhere/bin/scaling-dit", "study", f"--config={config}", "--workdir=x y"]
        )
        machine.note(folder)
        moment[0] += datetime.timedelta(minutes=70)
    starts = machine.read(folder)
    assert [one["command"] for one in starts] == [
        f"scaling-dit study --config={config} '--workdir=x y'" for config in "ab"
    ]
    assert (
        starts[0]["devices"].endswith("x cpu") and {"jax", "numpy", "python"} <= starts[0]["versions"].keys()
    )
    # Two that start at the same time have a file each.
    machine.note(folder)
    machine.note(folder)
    assert len(machine.read(folder)) == 4
    for damaged in ("[]", "{", "{}"):
        (folder.starts / "x.json").write_text(damaged)
        with pytest.raises(UserError, match=r"x\.json is damaged"):
            machine.read(folder)


def test_starts_that_an_earlier_version_noted(tmp_path):
    folder = StudyFolder(tmp_path)
    old = machine.about() | {"began": "2026-01-01T00:00:00+00:00"}
    folder.machines.write_text(json.dumps({"starts": [old]}))
    machine.note(folder)
    first, second = machine.read(folder)
    assert first == old and second["began"] > "2026-01-02"
    for damaged in ("[]", '{"starts": 1}', '{"starts": [1]}', '{"starts": [{}]}'):
        folder.machines.write_text(damaged)
        with pytest.raises(UserError, match=r"machines\.json is damaged"):
            machine.read(folder)


def test_what_is_told(tmp_path):
    one = {"began": "2026-01-02T03:04:05+00:00", "command": "scaling-dit study", "processor": "A", "cores": 1,
           "devices": "1 x cpu", "versions": {"jax": "1"}}  # fmt: skip
    told = " ".join(machine.lines([one]))
    assert told == (
        "Run on 2026-01-02, started once, on A (1 core; devices: 1 x cpu). Command: scaling-dit study. Versions: jax 1."
    )
    other = one | {"began": "2026-01-03T00:00:00+00:00", "cores": 2}
    told = " ".join(machine.lines([one, other]))
    assert "2026-01-02 to 2026-01-03, started 2 times, on A (1 core; devices: 1 x cpu); A (2 cores" in told
    # What is equal is said once, in whatever order.
    assert told.count("scaling-dit study") == 1
    assert "2026-01-02 to 2026-01-03" in machine.lines([other, one])[0]
    queue = [one | {"command": f"scaling-dit study --workdir=x --member={name}"} for name in ("a", "'b c'")]
    assert machine.lines(queue)[1] == "Command: scaling-dit study --workdir=x --member=NAME."
