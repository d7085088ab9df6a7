"""The benchmarks' scripts run as their first lines say, each in a process of its own."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from scaling_dit import backbones
from tests.support import xla
from tests.support.paths import ROOT

FEW = ROOT / "tests/support/few_packages.py"


def run(*command):
    """What a command prints; one device, as a user has it who simulates none."""
    environment = {**os.environ, "XLA_FLAGS": xla.flags(devices=1)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_few_packages_are_few(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import einops, jax\nfrom scaling_dit import backbones\n"
        "for name in backbones.BACKBONES: backbones.backbone_class(name)\n"
        "print('few')\nimport ml_collections\nprint('others')\n"
    )
    done = subprocess.run([sys.executable, FEW, script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0 and done.stdout == "few\n", done.stderr
    assert "No module named 'ml_collections'" in done.stderr


def test_step_time_starts_with_few_packages():
    assert "--families" in run(FEW, "benchmarks/step_time.py", "--help")


@pytest.mark.parametrize("size", ["tiny", "large"])
def test_step_time_s_sizes_are_of_every_family_and_can_be_made(size, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    step_time = importlib.import_module("step_time")
    assert set(step_time.SIZES[size]) == set(backbones.BACKBONES)
    for name, fields in step_time.SIZES[size].items():
        backbones.create_for(name, in_channels=4, text_dim=1024, **fields)


def test_a_page_s_requests_are_told_from_the_browser_s(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    report_page = importlib.import_module("report_page")
    own = {"params": {"initiator": "not an origin", "url": "https://browser.example/update"}}
    begun = {"params": {"url": "https://page.example/font"}}
    page = {"params": {"initiator": "null", "url": "https://page.example/font"}}
    log = json.dumps({"constants": {}, "events": [own, begun, {"type": 1}, page, page]})
    assert report_page.asked(log) == ["https://page.example/font"]
    # As a browser leaves it that was ended.
    assert report_page.asked(log.removesuffix("]}") + ",\n") == ["https://page.example/font"]
    assert report_page.asked(json.dumps({"events": [own]})) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_step_time_measures_backbones_with_few_packages(tmp_path):
    """Of two families, the transformers that compile at once."""
    families = ("uvit", "pixart")
    flags = [f"--families={','.join(families)}", "--steps=1", f"--note={tmp_path / 'note.md'}"]
    lines = run(FEW, "benchmarks/step_time.py", *flags).splitlines()
    assert [line.split(",")[0] for line in lines] == [f"backbone {name}" for name in families]
    rows = [line for line in (tmp_path / "note.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(families)
    for row in rows[1:]:
        _, parameters, batch, milliseconds, *rest = row.strip("| ").split(" | ")
        assert float(parameters.split()[0]) < 3 and batch == "4" and float(milliseconds) > 0
        # A CPU has no peak.
        assert all(float(value) > 0 for value in rest[:3]) and rest[3:] == ["-", "-"]
