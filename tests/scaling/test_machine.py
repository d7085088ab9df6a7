"""What a study ran on is noted at each start, and told in the report."""

import json
import sys

import pytest
from etils import epath

from scaling_dit.errors import UserError
from scaling_dit.scaling import machine


def test_each_start_is_noted(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "machines.json"
    assert machine.read(path) == [] and machine.lines([]) == []
    for config in ("a", "b"):
        monkeypatch.setattr(
            sys, "argv", ["/somewhere/bin/scaling-dit", "study", f"--config={config}", "--workdir=x y"]
        )
        machine.note(path)
    starts = machine.read(path)
    assert [one["command"] for one in starts] == [
        f"scaling-dit study --config={config} '--workdir=x y'" for config in "ab"
    ]
    assert (
        starts[0]["devices"].endswith("x cpu") and {"jax", "numpy", "python"} <= starts[0]["versions"].keys()
    )
    path.write_text("[]")
    with pytest.raises(UserError, match=r"machines\.json"):
        machine.read(path)


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
    # What is equal is said once.
    assert told.count("scaling-dit study") == 1 and json.dumps(told)
