"""A study on slices: as members of a queue, and trained by several processes together."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import pytest
from scaling_dit.tpu import leases, queue

from scaling_dit.cli import main as cli
from scaling_dit.errors import UserError
from scaling_dit.scaling import machine, queue_members
from scaling_dit.scaling import spec as spec_lib
from scaling_dit.scaling import study as study_lib
from scaling_dit.scaling import tensorboard as curves
from scaling_dit.scaling.folder import StudyFolder
from scaling_dit.scaling.spec import StudySpec
from tests.support import simulated_study, study_tables, xla
from tests.support.paths import ROOT

# Several processes have one device each.
pytestmark = pytest.mark.usefixtures("verbs_on_one_device")

SMOKE = "experiments/studies/shapes_core.py:smoke"
SLICE = (
    "import sys; from scaling_dit.tpu import queue_worker as w; w.POLL = w.IDLE = 0.2\n"
    "sys.exit(w.main('run', sys.argv[1], owner=sys.argv[2], logs=sys.argv[3]))"
)


def test_a_queue_gets_every_member_behind_its_base_and_the_tables_behind_all(tmp_path):
    first, second = simulated_study.members(2)
    stage = dataclasses.replace(first, name="tables", base=first.name)
    spec = StudySpec("Is a better?", (first, second, stage), (0,))
    made = queue_members.of(spec, StudyFolder(tmp_path), own_code=True)
    command = ["scaling-dit", "study", f"--workdir={tmp_path}", "--own_code"]
    assert [(one["name"], one["depends_on"]) for one in made] == [
        ("uvit-000", []),
        ("pixart-001", []),
        ("tables", ["uvit-000"]),
        # A member has the name already.
        ("tables-", ["uvit-000", "pixart-001", "tables"]),
    ]
    assert made[1]["command"] == [*command, "--member=pixart-001"] and made[3]["command"] == command
    # As a queue takes them.
    store = leases.open_store(str(tmp_path / "queue"))
    queue.add(store, [queue.from_mapping(one, "the study") for one in made])
    assert len(queue.read_all(store)) == 4


def test_the_command_registers_the_study_and_trains_nothing(tmp_path, capsys):
    spec = StudySpec("Is a better?", simulated_study.members(2), (0,))
    study_lib.register(spec, StudyFolder(tmp_path), lambda: 0)
    assert cli.main(["study", f"--workdir={tmp_path}", "--queue"]) == 0
    names = [one["name"] for one in json.loads(capsys.readouterr().out)]
    assert names == ["uvit-000", "pixart-001", "tables"]
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]
    for flag in ("--member=uvit-000", "--tables"):
        assert cli.main(["study", f"--workdir={tmp_path}", "--queue", flag]) == 2
        assert f"{flag.partition('=')[0]} goes with --workdir alone" in capsys.readouterr().err
    assert cli.main(["study", f"--workdir={tmp_path / 'none'}", "--queue"]) == 2
    assert "holds no study, so study needs --config" in capsys.readouterr().err


@pytest.fixture(scope="module")
def small():
    """Two members of one seed, which `smoke_study` has by one process, one member after another."""
    return dataclasses.replace(spec_lib.load(SMOKE), seeds=(0,), claims=())


def environment(given):
    """One device, and the commands of this environment."""
    bin_folder = os.path.dirname(sys.executable)
    paths = {"PATH": (bin_folder, given["PATH"]), "PYTHONPATH": (str(ROOT), given.get("PYTHONPATH", ""))}
    found = {name: os.pathsep.join(filter(None, several)) for name, several in paths.items()}
    return {**given, **found, "XLA_FLAGS": xla.flags(devices=1)}


@pytest.mark.slow
def test_guidance_is_an_axis_of_the_scores_alone(small, smoke_study, tmp_path, monkeypatch):
    """Runs that are trained are scored at their end with another scale."""
    shutil.copytree(smoke_study / "runs", tmp_path / "runs")
    monkeypatch.setattr(curves, "write", lambda *_: None)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    plain = study_lib.study(dataclasses.replace(small, points=1, guidances=(3.0,)), tmp_path)
    found = {
        (row["member"], row["guidance"]): row["value"]
        for row in plain.scores
        if row["scalar"] == "shapes_tifa"
    }
    own = small.members[0].config.sample.guidance
    assert set(found) == {(one.name, scale) for one in small.members for scale in (own, 3.0)} and own != 3.0
    for row in plain.rows:
        assert row["shapes_tifa"] == found[row["member"], own]


@pytest.mark.slow
def test_two_slices_of_a_queue_make_the_table_of_one_process(small, smoke_study, tmp_path):
    folder = StudyFolder(tmp_path / "study")
    study_lib.register(small, folder, lambda: 0)
    store = leases.open_store(str(tmp_path / "queue"))
    queue.add(store, [queue.from_mapping(one, "it") for one in queue_members.of(small, folder)])
    slices = [
        subprocess.Popen(
            [sys.executable, "-c", SLICE, str(tmp_path / "queue"), f"slice-{i}", str(tmp_path / f"logs{i}")],
            cwd=ROOT,
            env=environment(xla.one_of_several(devices=1)),
        )
        for i in range(2)
    ]
    codes = [one.wait(600) for one in slices]
    said = "\n".join(path.read_text() for path in tmp_path.glob("logs*/*.log"))
    assert codes == [0, 0], said
    done = {held.member.name: held.member for held in queue.read_all(store)}
    assert {one.state for one in done.values()} == {queue.DONE}, said
    # Both took one of the members, for neither waits for the other.
    assert {done["pixart-tiny"].finished_by, done["large_dit-tiny"].finished_by} == {"slice-0", "slice-1"}
    # The report names the machines of all jobs: two members and the tables.
    commands = [one["command"].rpartition(" ")[2] for one in machine.read(folder)]
    assert sorted(commands) == sorted(
        (f"--workdir={folder}", "--member=pixart-tiny", "--member=large_dit-tiny")
    )
    for name in ("table", "scores"):
        assert getattr(folder, name).read_bytes() == study_tables.written(smoke_study, name, tmp_path, seed=0)


@pytest.mark.slow
def test_two_processes_train_and_score_a_member_together(small, smoke_study, tmp_path):
    # Two checkpoints, of which one is removed at the end.
    one = dataclasses.replace(small, members=small.members[:1])
    study_lib.register(one, StudyFolder(tmp_path), lambda: 0)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "scaling_dit", "study", f"--workdir={tmp_path}"]
    started = [
        subprocess.Popen(
            [*command, f"--coordinator=localhost:{port}", "--processes=2", f"--process={process}"],
            cwd=ROOT,
            env=environment(xla.one_of_several(devices=1)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    said = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    # The first one speaks.
    assert "1 runs, 2 points" in said[0][0] and "runs" not in said[1][0]
    _, row = study_lib.open_study(tmp_path).rows
    run = StudyFolder(tmp_path).run(one.members[0].name, 0)
    assert [path.name for path in run.checkpoints.iterdir() if path.name.isdigit()] == [str(row["steps"])]
    (wanted,) = [
        other
        for other in study_lib.open_study(smoke_study).rows
        if all(other[name] == row[name] for name in ("member", "seed", "step"))
    ]
    assert row.keys() == wanted.keys() and row["status"] == "done"
    assert row["loss"] == pytest.approx(wanted["loss"], abs=1e-4)


def test_only_one_host_trains_members_at_once(tmp_path, monkeypatch):
    spec = StudySpec("Is a better?", simulated_study.members(2), (0,))
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(UserError, match="shares the CPU cores of one host, and this start has"):
        study_lib.study(spec, tmp_path, at_once=2)
