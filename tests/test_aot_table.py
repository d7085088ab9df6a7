"""The table of plans: which settings a cell tries, what it keeps, and that a failed cell stops no other."""

import json
import subprocess
import sys

import pytest

from scaling_dit import config as config_lib
from scaling_dit.parallel.topologies import GIB
from tests.support.paths import ROOT

PLAN: dict = {
    "topology": "v5p:4x4x4",
    "chips": 64,
    "mesh": {"data": 1, "fsdp": 64, "context": 1, "tensor": 1},
    "settings": {"batch": 2048, "microbatches": 1, "remat": "products", "gather_once": True},
    "memory": {"arguments": GIB, "peak": 2 * GIB, "limit": 95 * GIB, "fits": True},
    "model_flops": 64 * 10**12,
    "statistics": None,
    "compile_seconds": 3.0,
    "roofline": None,
}


@pytest.fixture(scope="module")
def table():
    """benchmarks/aot_table.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import aot_table

    return aot_table


@pytest.fixture
def planned(table, monkeypatch):
    """(calls, answers) instead of planning: a command gets the answer to words that it holds, else a plan that fits."""
    calls, answers = [], {}

    def run(command, **_):
        calls.append(command)
        for words, (code, memory, fault) in answers.items():
            if set(words) <= set(command):
                text = json.dumps([PLAN | {"memory": PLAN["memory"] | memory}]) if code < 2 else ""
                return subprocess.CompletedProcess(command, code, text, fault)
        return subprocess.CompletedProcess(command, 0, json.dumps([PLAN]), "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls, answers


def run(table, monkeypatch, folder, *flags, what="run"):
    monkeypatch.setattr(sys, "argv", ["aot_table.py", what, f"--cells={folder}", *flags])
    table.main()


def test_each_attempt_is_a_config_that_splits_the_parameters_over_all_chips(table):
    for topology, attempts in table.ATTEMPTS.items():
        once = [any("gather_once" in flag for flag in flags) for flags in attempts]
        assert once[0] == (topology != "v5e:16x16") and not any(once[1:])
        assert len(once) == (4 if topology.endswith("16x16") else 3)
        assert "--config.backbone.remat=products" in attempts[0]
    for size in ("uvit-h2048-d42-n16", "sdxl", "if-xl-c512"):
        for flags in {flags for attempts in table.ATTEMPTS.values() for flags in attempts}:
            mesh = config_lib.load(table.CONFIGS[size], [*table.PAPER, *flags]).mesh
            data = 4 if "--config.mesh.data=4" in flags else 1
            assert (mesh.data, mesh.fsdp, mesh.context, mesh.tensor) == (data, -1, 1, 1)


def test_a_cell_is_tried_until_it_fits_and_its_settings_are_printed(
    table, planned, monkeypatch, tmp_path, capsys
):
    calls, answers = planned
    answers["--config.sharding.gather_once=True",] = (1, {"fits": False}, "")
    run(table, monkeypatch, tmp_path, "--sizes=sdxl", "--slices=v5p:4x4x4")
    assert len(calls) == 2 and "--config.backbone.remat=full" in calls[1]
    assert "--config.optim.accumulate=4" not in calls[1]
    kept = json.loads((tmp_path / "sdxl@v5p-4x4x4.json").read_text())
    assert kept["flags"] == ["--config.backbone.remat=full"] and kept["memory"]["fits"] and not kept["failed"]
    # As the plan itself has it.
    assert "gather_once True, remat products" in capsys.readouterr().out
    run(table, monkeypatch, tmp_path, "--sizes=sdxl", "--slices=v5p:4x4x4")
    # What is there is not planned again.
    assert len(calls) == 2


def test_a_cell_that_fails_is_named_and_the_others_go_on(table, planned, monkeypatch, tmp_path, capsys):
    calls, answers = planned
    answers["--config=unet_scaling:sdxl", "--topology=v5e:16x16"] = (
        2,
        {},
        "noise\nscaling-dit: it | fails\n",
    )
    chosen = ("--sizes=uvit-h2048-d42-n16,sdxl", "--slices=v5e:16x16,v6e:16x16")
    with pytest.raises(SystemExit, match="failed: sdxl@v5e:16x16$"):
        run(table, monkeypatch, tmp_path, *chosen)
    assert len(calls) == 3 + 4 and len(list(tmp_path.glob("*.json"))) == 4
    kept = json.loads((tmp_path / "sdxl@v5e-16x16.json").read_text())
    assert kept["error"] == "scaling-dit: it | fails" and len(kept["failed"]) == 4
    run(table, monkeypatch, tmp_path, f"--note={tmp_path / 'note.md'}", what="write")
    lines = [line for line in (tmp_path / "note.md").read_text().splitlines() if line.startswith("|")]
    cells = len(table.CONFIGS) * len(table.SLICES)
    assert f"{cells - 4} of {cells} plans are missing" in (tmp_path / "note.md").read_text()
    assert len(lines) == 2 + 4 and {line.count("|") for line in lines} == {len(table.HEADS) + 1}
    (shown,) = [line for line in lines if "it / fails" in line]
    assert shown.startswith("| sdxl | v5e:16x16 | --config.backbone.remat=full --config.optim.accumulate=4: ")
    answers.clear()
    # Tries the failed one again, and no other.
    run(table, monkeypatch, tmp_path, *chosen)
    assert len(calls) == 8 and "error" not in json.loads((tmp_path / "sdxl@v5e-16x16.json").read_text())


def test_an_error_of_one_attempt_is_kept_beside_the_plan_of_another(table, planned, monkeypatch, tmp_path):
    _, answers = planned
    answers["--config.sharding.gather_once=True",] = (-9, {}, "")
    run(table, monkeypatch, tmp_path, "--sizes=sdxl", "--slices=v4:4x4x4")
    kept = json.loads((tmp_path / "sdxl@v4-4x4x4.json").read_text())
    assert kept["memory"]["fits"]
    assert kept["failed"] == [
        "--config.sharding.gather_once=True --config.backbone.remat=products: exit code -9"
    ]


def test_an_unknown_size_or_slice_is_one_line(table, planned, monkeypatch, tmp_path, capsys):
    for flag, hint in (
        ("--sizes=sdx", "did you mean 'sdxl'"),
        ("--slices=v5p:4x4x", "did you mean 'v5p:4x4x4'"),
    ):
        with pytest.raises(SystemExit):
            run(table, monkeypatch, tmp_path, flag)
        assert hint in capsys.readouterr().err
    assert not planned[0]


def test_a_quick_cell_has_no_cycles_and_is_made_whole_by_a_run_without(table, planned, monkeypatch, tmp_path):
    calls, _ = planned
    chosen = ("--sizes=sdxl", "--slices=v5p:4x4x4")
    counted = {"flops": 10**12, "cycles": 0, "collectives": []}
    monkeypatch.setitem(PLAN, "statistics", counted)
    monkeypatch.setitem(PLAN, "roofline", {"limit": 0.02, "estimate": None})
    monkeypatch.setitem(PLAN, "kernels", False)
    # The second has nothing to do.
    for _ in range(2):
        run(table, monkeypatch, tmp_path, "--quick", *chosen)
    assert ["--quick" in call for call in calls] == [True]
    run(table, monkeypatch, tmp_path, f"--note={tmp_path / 'note.md'}", what="write")
    (line,) = [line for line in (tmp_path / "note.md").read_text().splitlines() if line.startswith("| sdxl")]
    cells = dict(zip(table.HEADS, [cell.strip() for cell in line.strip("|").split("|")], strict=True))
    assert cells["TFLOP program"] == "1.00" and cells["ms limit"] == "20"
    assert not any(cells[name] for name in ("M cycles", "ms estimate", "MFU estimate", "chip-hours"))
    monkeypatch.setitem(PLAN, "statistics", counted | {"cycles": 3_000_000})
    estimated = {"estimate": 0.03, "mfu_estimate": 0.5, "chip_hours_estimate": 1234.0}
    monkeypatch.setitem(PLAN, "roofline", {"limit": 0.02} | estimated)
    monkeypatch.setitem(PLAN, "kernels", True)
    for _ in range(2):
        run(table, monkeypatch, tmp_path, *chosen)
    assert ["--quick" in call for call in calls] == [True, False]
    assert json.loads((tmp_path / "sdxl@v5p-4x4x4.json").read_text())["kernels"]


def test_a_quick_cell_outlives_a_run_that_fails(table, planned, monkeypatch, tmp_path, capsys):
    _, answers = planned
    chosen = ("--sizes=sdxl", "--slices=v5p:4x4x4")
    monkeypatch.setitem(PLAN, "kernels", False)
    run(table, monkeypatch, tmp_path, "--quick", *chosen)
    before = (tmp_path / "sdxl@v5p-4x4x4.json").read_text()
    answers["--config=unet_scaling:sdxl",] = (2, {}, "scaling-dit: it fails\n")
    with pytest.raises(SystemExit, match="failed: sdxl@v5p:4x4x4$"):
        run(table, monkeypatch, tmp_path, *chosen)
    assert (tmp_path / "sdxl@v5p-4x4x4.json").read_text() == before
    assert "it fails; the quick plan is kept" in capsys.readouterr().out
