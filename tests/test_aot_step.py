"""benchmarks/aot_step.py: the numbers of a step compiled for a TPU, and the same numbers from a saved program."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from tests.support import xla
from tests.support.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "aot_step.py"


@pytest.fixture
def script(monkeypatch):
    for name in (
        "TPU_SKIP_MDS_QUERY",
        "TPU_WORKER_HOSTNAMES",
        "TPU_ACCELERATOR_TYPE",
        "ALLOW_MULTIPLE_LIBTPU_LOAD",
    ):
        # The script sets what is missing; that ends with the test.
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("aot_step")


def test_the_command_of_a_row_is_what_decides_its_program(script):
    kept = ["--backbone", "uvit", "--set", "remat=none", "depth=2", "--gather-once"]
    assert script.program_arguments(
        [*kept, "--json", "a.json", "--hlo=b.gz", "--label", "a b", "--again", "c.gz"]
    ) == " ".join(kept)


def test_evaluating_again_needs_the_old_numbers(script, capsys):
    with pytest.raises(SystemExit):
        script.parse(["--again", "program.gz"])
    assert "--again needs --json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_saved_program_gives_the_same_numbers_again(tmp_path, script):
    numbers, program = tmp_path / "numbers.json", tmp_path / "program.gz"
    command = [
        sys.executable, str(SCRIPT), "--backbone=uvit", "--size=h1024-d20-n16", "--topology=v5e:2x4", "--batch=8",
        # A small batch, and no kernels of attention: both compile for longer than all the rest.
        f"--json={numbers}", "--set", "hidden=128", "depth=2", "heads=2", "attention=xla",
    ]  # fmt: skip
    environment = xla.plain_environment()
    subprocess.run([*command, f"--hlo={program}"], check=True, capture_output=True, env=environment)
    first = json.loads(numbers.read_text())
    assert first["cycles_m"] > 0 and first["peak_gib"] > first["arguments_gib"] > 0
    assert first["wire_sync_gb"] > 0 and 0 < first["mfu_estimate"] < 1
    subprocess.run([*command, f"--again={program}"], check=True, capture_output=True, env=environment)
    assert json.loads(numbers.read_text()) == first
    assert script.table([numbers]).splitlines()[2].startswith("| uvit h1024-d20-n16 | v5e:2x4, batch 8 | ")
