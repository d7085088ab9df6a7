"""A study runs its members into one table, resumes after a kill to the same bytes, extends and merges."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time

import jax
import pytest

from scaling_dit import config as config_lib
from scaling_dit.cli import main as cli
from scaling_dit.errors import UserError
from scaling_dit.planning.plan import abstract_model
from scaling_dit.scaling import ladder, member_runs, report, table
from scaling_dit.scaling import spec as spec_lib
from scaling_dit.scaling import study as study_lib
from scaling_dit.scaling import tensorboard as curves
from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.folder import StudyFolder
from scaling_dit.scaling.spec import StudySpec
from scaling_dit.training.program import StepProgram, run_mesh
from tests.support import image_sets, simulated_study, study_tables, study_worker
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("verbs_on_one_device")

SMOKE = "experiments/studies/shapes_core.py:smoke"
WORKER = "tests/support/study_worker.py"


@pytest.fixture(autouse=True)
def programs_stay(monkeypatch):
    """A study drops the programs of a member that is done, and here those that all other tests compiled as well."""
    monkeypatch.setattr(jax, "clear_caches", lambda: None)


def none_finished():
    return 0


@pytest.fixture
def spec():
    return StudySpec(
        "Is a better?", simulated_study.members(3), (0, 1), claims=(Claim("c", "uvit-000", "pixart-001"),)
    )


def test_claims_are_registered_before_the_first_run(spec, tmp_path):
    folder = StudyFolder(tmp_path)
    assert study_lib.register(spec, folder, none_finished) == {"c": 0}
    more = dataclasses.replace(spec, claims=(*spec.claims, Claim("late", "uvit-002", "uvit-000")))
    assert study_lib.register(more, folder, lambda: 4) == {"c": 0, "late": 4}
    # Resumed with fewer: a registered claim cannot be dropped.
    with pytest.raises(UserError, match="claim 'late' was registered in .* and is gone now"):
        study_lib.register(spec, folder, none_finished)
    changed = dataclasses.replace(
        more, claims=(dataclasses.replace(more.claims[0], margin=0.1), more.claims[1])
    )
    with pytest.raises(UserError, match="claim 'c' was registered in .* and is another now"):
        study_lib.register(changed, folder, none_finished)
    assert study_lib.read_spec(tmp_path).claims == more.claims


def test_what_cannot_be_scored_is_refused_before_anything_is_trained(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(member_runs, "finish", lambda *_, **__: pytest.fail("a run was trained"))
    line = "member 'uvit-000': 640 held-out scenes wanted, but preset 'grid16' .* gave 631; ask for fewer"
    with pytest.raises(UserError, match=line):
        study_lib.study(dataclasses.replace(spec, items=640), tmp_path / "many")
    with pytest.raises(UserError, match="member 'uvit-000': metric 'inpaint' .*condition"):
        study_lib.study(dataclasses.replace(spec, items=4, metrics=("inpaint",)), tmp_path / "many")
    # Not even the study is written, so that it may have another number the next time.
    assert not (tmp_path / "many").exists()
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        (images / f"{number}.png").write_bytes(image_sets.picture(number))
        (images / f"{number}.txt").write_text(f"number {number}")
    changes = [
        f"--config.source.name=folder:{images}",
        "--config.source.image_size=16",
        "--config.eval.loss_images=8",
    ]
    missing = ladder.Member("last", config_lib.load("shapes:smoke", changes), {}, {})
    shutil.rmtree(images)
    late = dataclasses.replace(spec, members=(*spec.members, missing), metrics=(), claims=())
    with pytest.raises(UserError, match="member 'last': .*images"):
        study_lib.study(late, tmp_path / "late")
    study_lib.register(late, StudyFolder(tmp_path / "late"), none_finished)
    with pytest.raises(UserError, match="member 'last': .*images"):
        study_lib.member("last", tmp_path / "late")


def test_what_is_no_study_is_one_line(tmp_path):
    for wrong, message in (
        (3, "a study is named by a text such as 'shapes_core:smoke'"),
        ("..", "not a study"),
    ):
        with pytest.raises(UserError, match=message):
            study_lib.study(wrong, tmp_path)


def test_data_are_opened_once_and_not_for_runs_that_are_over(spec, tmp_path, monkeypatch):
    opened, open_source = [], member_runs.open_source
    monkeypatch.setattr(member_runs, "open_source", lambda config: opened.append(1) or open_source(config))
    monkeypatch.setattr(study_lib.table, "status_of", lambda *_: table.WAITING)
    study_lib._Runner(spec, StudyFolder(tmp_path)).check()
    # Of three members, two of them of one experiment.
    assert len(opened) == 2
    monkeypatch.setattr(study_lib.table, "status_of", lambda *_: table.DONE)
    study_lib._Runner(spec, StudyFolder(tmp_path)).check()
    assert len(opened) == 2


def test_members_and_seeds_extend_a_study(spec, tmp_path):
    folder = StudyFolder(tmp_path)
    few = dataclasses.replace(spec, members=spec.members[:2])
    study_lib.register(few, folder, none_finished)
    study_lib.register(dataclasses.replace(spec, seeds=(0, 1, 2)), folder, none_finished)
    assert len(study_lib.read_spec(tmp_path).members) == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"members": 2}, "has member 'uvit-002', which the spec lacks"),
        ({"items": 7}, "items is 200 in .* and 7 here, so its runs would not compare"),
        ({"seeds": (1, 2)}, r"has seeds \[0\], which the spec lacks"),
        ({"batch": 4}, "member 'uvit-000' had another config"),
    ],
)
def test_another_study_is_refused(spec, tmp_path, change, message):
    folder = StudyFolder(tmp_path)
    study_lib.register(spec, folder, none_finished)
    if "members" in change:
        other = dataclasses.replace(spec, members=spec.members[:2])
    elif "batch" in change:
        config = config_lib.resolve(spec.members[0].config, ["--config.batch=4"])
        other = dataclasses.replace(
            spec, members=(dataclasses.replace(spec.members[0], config=config), *spec.members[1:])
        )
    else:
        other = dataclasses.replace(spec, **change)
    with pytest.raises(UserError, match=message):
        study_lib.register(other, folder, none_finished)


def test_a_stage_begins_from_the_run_of_its_seed_and_not_from_one_that_stopped(spec, tmp_path, monkeypatch):
    stage = dataclasses.replace(spec.members[0], name="stage", base="uvit-000")
    spec = dataclasses.replace(spec, members=(*spec.members, stage))
    folder, begun = StudyFolder(tmp_path), []

    def train(config, workdir, start=None):
        begun.append((workdir.name, start and start.place))
        raise member_runs.loop.Stopped(member_runs.loop.SPIKE, "no training here")

    monkeypatch.setattr(member_runs.loop, "train", train)
    member_runs.finish(spec, folder, stage, 1)
    assert begun == [(folder.run("stage", 1).folder.name, str(folder.run("uvit-000", 1)))]
    # TensorBoard takes longer to import than all of this.
    monkeypatch.setattr(curves, "write", lambda *_: None)
    # Its base has stopped: it is over too, and nothing is trained.
    member_runs.finish(spec, folder, spec.members[0], 0)
    study_lib._Runner(spec, folder).work_on(stage)
    assert begun[1:] == [("seed0", None)]
    note = json.loads(folder.stopped("stage", 0).read_text())
    assert note["reason"] == "uvit-000, which it begins from, has stopped"


@pytest.mark.parametrize("rank", [0, 2])
def test_a_stage_that_has_begun_needs_its_base_no_more_where_the_study_lies_now(
    rank, spec, tmp_path, monkeypatch
):
    stage = ladder.derive(spec.members[0].config, {"adapter.rank": rank}, "stage")
    spec = dataclasses.replace(spec, members=(*spec.members, dataclasses.replace(stage, base="uvit-000")))
    begun = []

    def train(config, workdir, start=None):
        begun.append(start and start.place)
        raise member_runs.loop.Stopped(member_runs.loop.SPIKE, "no training here")

    monkeypatch.setattr(member_runs.loop, "train", train)
    monkeypatch.chdir(tmp_path)
    # Given once from its parent, and once from elsewhere.
    for folder in (StudyFolder("here"), StudyFolder(tmp_path / "here")):
        member_runs.finish(spec, folder, spec.members[-1], 1)
        place = str(tmp_path / "here/runs/uvit-000/seed1")
        assert begun.pop() == place
    run = folder.run("stage", 1)
    run.folder.mkdir(parents=True)
    run.config.write_text("{}")
    member_runs.finish(spec, folder, spec.members[-1], 1)
    # Adapters read their base at each start.
    assert begun == [place if rank else None]


def test_a_folder_without_a_study(tmp_path, capsys):
    assert cli.main(["study", f"--workdir={tmp_path}"]) == 2
    assert "holds no study, so study needs --config" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no study in .*: study\.json is missing"):
        study_lib.open_study(tmp_path)
    for damaged in (b"{", b"[]", b"{}", b'{"registered": []}', b"\x80", b"[" * 100_000):
        (tmp_path / "study.json").write_bytes(damaged)
        with pytest.raises(UserError, match=r"study\.json is damaged"):
            study_lib.read_spec(tmp_path)


def test_tables_are_read_back_and_equal_rows_are_equal_bytes(tmp_path):
    made = simulated_study.study(tmp_path / "a", count=4, seeds=2)
    for name in "ab":
        simulated_study.write(dataclasses.replace(made, folder=StudyFolder(tmp_path / name)))
    again = study_lib.open_study(tmp_path / "a")
    assert again.rows == made.rows and again.scores == made.scores
    assert (tmp_path / "a/table.parquet").read_bytes() == (tmp_path / "b/table.parquet").read_bytes()
    (tmp_path / "a/table.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"table\.parquet is damaged"):
        study_lib.open_study(tmp_path / "a")


def test_tables_of_the_runs_so_far(spec, tmp_path, monkeypatch, capsys):
    """By hand, for a study whose members run by themselves."""
    assert cli.main(["study", f"--workdir={tmp_path}", "--tables"]) == 2
    assert "holds no study, so study needs --config" in capsys.readouterr().err
    study_lib.register(spec, StudyFolder(tmp_path), none_finished)
    assert cli.main(["report", str(tmp_path)]) == 2
    assert f"`scaling-dit study --workdir={tmp_path} --tables` writes it" in capsys.readouterr().err
    assert cli.main(["study", f"--workdir={tmp_path}", "--tables"]) == 0
    assert "0 of 6 runs are over, 0 points" in capsys.readouterr().out
    folder = StudyFolder(tmp_path)
    assert study_lib.open_study(tmp_path).rows == [] and not folder.starts.exists()
    # A table is all that is left of a run that was removed.
    made = simulated_study.study(tmp_path, count=2, seeds=2)
    table.write_parquet(folder.table, made.rows)
    assert cli.main(["study", f"--workdir={tmp_path}", "--tables"]) == 2
    assert "uvit-000/seed0, which is gone; the tables stay as they are" in capsys.readouterr().err
    assert study_lib.open_study(tmp_path).rows == made.rows
    for more in ("--member=uvit-000", "--at_once=2", "--config=shapes_core"):
        assert cli.main(["study", f"--workdir={tmp_path}", "--tables", more]) == 2
        assert "goes with --workdir alone" in capsys.readouterr().err


def test_the_time_to_go_follows_the_flops_that_are_left(spec):
    moments = iter((0.0, 0.0, 10.0))
    progress = study_lib._Progress(spec, spec.members, lambda member, seed: False, lambda: next(moments))
    assert progress.eta_text(spec.members) == "time to go is known after the first run"
    progress.begin(spec.members[0], 0)
    progress.end(spec.members[0])
    one, other = (ladder.cost(member.config).train_flops() for member in spec.members[:2])
    # The other family has no rate yet, so it has that of all.
    assert progress.eta(spec.members[:2]) == pytest.approx(10 * (1 + other / one))


def test_a_study_of_a_hundred_members_decides_in_less_than_50_ms(tmp_path, capsys):
    """What it does between two runs: which is next, the time to go, the tables of all that are over."""
    made = simulated_study.study(tmp_path, count=100, seeds=3)
    runner = study_lib._Runner(made.spec, made.folder)
    parts = {}
    for place, rows in enumerate((made.rows, made.measured, made.scores)):
        for row in rows:
            parts.setdefault((row["member"], row["seed"]), ([], [], []))[place].append(row)
    # All runs but one are over, so the tables are as long as they get.
    last = made.spec.members[-1]
    runner._over = {key: found for key, found in parts.items() if key != (last.name, 2)}
    runner._status = dict.fromkeys(runner._over, table.DONE) | {(last.name, 2): table.WAITING}
    # The first counts every member.
    seconds = []
    for _ in range(6):
        began = time.process_time()
        assert runner._left(last) == [2]
        runner._progress.begin(last, 2)
        runner._progress.end(last)
        assert len(runner.study({}).rows) == 299 * 4
        seconds.append(time.process_time() - began)
    assert "run 300 of 300: " in capsys.readouterr().err
    assert min(seconds[1:]) < 0.05, seconds


def test_hyperparameters_are_what_members_differ_in(spec):
    found = curves.hparams(spec, spec.members[1], 1)
    assert found["member"] == "pixart-001" and found["seed"] == 1 and found["backbone.name"] == "pixart"
    assert found["params"] > 0 and "optim.decay" not in found


@pytest.mark.slow
def test_seeds_of_a_member_are_one_program():
    """The step takes the seed as an input, so what is compiled for one seed serves all."""
    spec, texts = spec_lib.load(SMOKE), []
    for seed in (0, 1):
        config = spec.run_config(spec.members[0], seed)
        texts.append(StepProgram.build(config, abstract_model(config), run_mesh(config)).lower().as_text())
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def finished(smoke_study, tmp_path_factory):
    """A copy of the miniature study that this file may write to."""
    return shutil.copytree(smoke_study, tmp_path_factory.mktemp("study"), dirs_exist_ok=True)


def of_tensorboard(folder):
    """The hyperparameters in a log folder, and the steps of each curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    curves = {tag: [event.step for event in events.Tensors(tag)] for tag in events.Tags()["tensors"]}
    summary = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG)
    fields = metadata.parse_session_start_info_plugin_data(summary.plugin_data.content).hparams
    return curves | {name: getattr(field, field.WhichOneof("kind")) for name, field in fields.items()}


@pytest.mark.slow
def test_the_core_study_in_miniature(finished, capsys):
    """Two members of two seeds, end to end: table, claim, TensorBoard, report, and nothing left to do."""
    study = study_lib.open_study(finished)
    rows = study.rows
    assert [(row["member"], row["seed"], row["step"]) for row in rows] == [
        (member, seed, step)
        for member in ("pixart-tiny", "large_dit-tiny")
        for seed in (0, 1)
        for step in (3, 6)
    ]
    for row in rows:
        one = ladder.cost(study.spec.member(row["member"]).config)
        assert row["train_flops"] == one.train_flops(row["step"]) and row["samples"] == row["step"] * 8
        assert row["status"] == "done" and row["endpoint"] == (row["step"] > 50 or row["step"] == 6)
        assert row["shapes_tifa_low"] <= row["shapes_tifa"] <= row["shapes_tifa_high"]
        bins = [row[name] for name in row if name.startswith("loss_t")]
        assert len(bins) == 5 and min(bins) < row["loss"] < max(bins)
    # Seeds differ in what they compute, members in their hash.
    assert len({row["loss"] for row in rows}) == 8 and len({row["config_hash"] for row in rows}) == 2
    assert len(list((finished / "tensorboard").glob("*/events*"))) == 4
    shown = of_tensorboard(finished / "tensorboard" / "large_dit-tiny-seed1")
    assert (shown["backbone.name"], shown["member"], shown["seed"]) == ("large_dit", "large_dit-tiny", 1.0)
    gflops = [round(row["train_flops"] / 1e9) for row in rows[-2:]]
    assert shown["evaluation/shapes_tifa"] == [3, 6] and shown["by_gflop/shapes_tifa"] == gflops
    before = (finished / "table.parquet").read_bytes()
    capsys.readouterr()
    assert cli.main(["study", f"--workdir={finished}"]) == 0
    assert "4 runs, 8 points" in capsys.readouterr().out
    assert (finished / "table.parquet").read_bytes() == before
    assert cli.main(["report", str(finished), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["claims"][0]["registered_after"] == 0 and len(facts["members"]) == 2
    page = (finished / "report" / report.PAGE).read_text()
    assert page.count("data-grids=") == 2 and "PixArt beats Large-DiT" in page


@pytest.mark.slow
def test_a_killed_study_ends_with_the_same_table(finished, tmp_path, monkeypatch):
    """Killed while training, between scores, and while it writes tables; the last start ends it."""
    spec = study_worker.one_member()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for moment in (("log", "1"), ("score", "2"), ("table", "5")):
        command = [sys.executable, WORKER, str(tmp_path), *moment]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 9, done.stderr[-2000:]
    monkeypatch.setattr(curves, "write", lambda *_: None)
    study_lib.study(spec, tmp_path)
    for name in ("table", "scores"):
        wanted = study_tables.written(finished, name, tmp_path, member=spec.members[0].name)
        assert (tmp_path / f"{name}.parquet").read_bytes() == wanted
    measured = table.read_parquet(StudyFolder(tmp_path).measured)
    assert sum(row["starts"] for row in measured) > len(measured)


@pytest.mark.slow
def test_a_run_that_diverges_does_not_stop_the_study(tmp_path):
    small = spec_lib.load(SMOKE)
    wild_rate = "--config.optim.learning_rate=1e30"
    config = config_lib.resolve(
        small.members[0].config, [wild_rate, "--config.optim.max_nonfinite=1", "--config.log.every=1"]
    )
    wild = dataclasses.replace(small.members[0], name="wild", config=config)
    found = study_lib.study(dataclasses.replace(small, members=(wild,), claims=()), tmp_path)
    assert [row["status"] for row in found.measured] == ["stopped"] * 2 and found.rows == []
    assert "not finite" in json.loads(StudyFolder(tmp_path).stopped("wild", 0).read_text())["reason"]
