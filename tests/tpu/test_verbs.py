"""The verbs of `scaling-dit tpu`, on a simulated cloud in this process."""

import os
import pathlib
import subprocess
import sys
import tarfile
import time

import pytest
from scaling_dit.tpu import commands, inventory, launcher, outside, screen, store, verbs
from scaling_dit.tpu.state import Limits, Stage
from scaling_dit.tpu.store import Store

from scaling_dit.cli import main as cli
from tests.support.tpu_cloud import Cloud
from tests.support.tpu_model_workers import ModelWorkers

SECRET = "not-a-known-pattern-4711"


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A simulated cloud as gcloud of the verbs, in which time passes while they sleep."""
    made = Cloud(5, now=time.time(), workers=ModelWorkers(total=60))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("MY_TOKEN", SECRET)
    monkeypatch.setattr(outside, "RUN", made)
    monkeypatch.setattr(outside, "SLEEP", made.advance)
    monkeypatch.setattr(screen, "read", lambda workdir: f"{workdir}: training, step 10 of 60")
    monkeypatch.setattr(
        outside, "PLAN", lambda config, overrides, job: (True, "peak 1.00 of 15.75 GiB: fits")
    )
    monkeypatch.setattr(verbs.getpass, "getuser", lambda: "Ann Other")
    monkeypatch.setattr(time, "time", lambda: made.now)
    monkeypatch.setattr(
        launcher.Launcher.__init__, "__defaults__", (Limits(), lambda: made.now, launcher.no_startup)
    )
    made.buckets["bucket"] = "US-EAST5"
    return made


def launch(verb="launch", *flags, name="first", **changes):
    values = {"topology": "v5p:2x2x2", "zones": "us-east5-a", "hours": 9, "price": 2, **changes}
    train = [] if "--" in flags else ["--config=shapes", "--workdir=gs://bucket/first"]
    return [
        "tpu",
        verb,
        f"--name={name}",
        *train,
        *(f"--{key}={value}" for key, value in values.items()),
        *flags,
    ]


def said(capsys):
    out, err = capsys.readouterr()
    assert SECRET not in out + err and "Traceback" not in err
    return out + err


def test_launch_does_all_of_it_in_one_command(cloud, capsys):
    assert cli.main(launch()) == 0
    text = said(capsys)
    assert "plan of v5p:2x2x2: peak 1.00 of 15.75 GiB: fits" in text and "the job finished" in text
    assert not cloud.made and Store("first").read_state().stage is Stage.DONE
    job = Store("first").read_job()
    assert job.command == ("scaling-dit", "train", "--config=shapes", "--workdir=gs://bucket/first")
    assert job.owner == "ann-other"


def test_a_command_of_ones_own_keeps_all_its_words(cloud):
    words = ["train", "--config=mine", "--config.steps=3", "--dry-run", "--", "--name=x"]
    assert cli.main(launch("launch", "--", *words)) == 0
    assert list(Store("first").read_job().command) == words


def test_each_step_by_itself(cloud, capsys):
    assert cli.main(launch("create")) == 0
    assert "costs $16.00 an hour" in said(capsys) and len(cloud.made) == 1 and not cloud.workers.starts
    cloud.workers.broken = 1
    assert cli.main(["tpu", "setup", "--name=first"]) == 2
    assert cli.main(["tpu", "setup", "--name=first"]) == 0
    assert "the set-up of first failed" in (text := said(capsys)) and "all 2 workers are prepared" in text
    assert cli.main(["tpu", "run", "--name=first"]) == 0
    assert len(cloud.workers.starts) == 2
    cloud.advance(300)
    said(capsys)
    assert cli.main(["tpu", "status", "--name=first"]) == 0
    text = said(capsys)
    assert "worker    first-0000: attempt 1: runs, step 10" in text and "used      $" in text
    assert "resource  us-east5-a: its machines run" in text
    assert cli.main(["tpu", "drill", "--name=first", "--event=kill", "--worker=1"]) == 0
    assert cli.main(["tpu", "drill", "--name=first", "--worker=2"]) == 2
    assert cli.main(["tpu", "babysit", "--name=first"]) == 0
    assert not cloud.made and cloud.created == 1 and len(cloud.workers.starts) == 2
    assert cli.main(["tpu", "status", "--name=first"]) == 0
    assert "the job is done; the job finished" in said(capsys)
    assert cli.main(["tpu", "logs", "--name=first"]) == 2
    assert "there are no workers to reach" in said(capsys)


def test_a_drill_is_survived(cloud, capsys):
    assert cli.main(launch("create")) == 0
    assert cli.main(["tpu", "drill", "--name=first"]) == 0
    assert any("simulate-maintenance-event" in call and call[1] == "alpha" for call in cloud.calls)
    assert cli.main(["tpu", "babysit", "--name=first"]) == 0
    assert "its machines run, unhealthy, for 30 minutes" in said(capsys) and cloud.created == 2


def test_delete_has_the_job_save_first(cloud, capsys):
    cli.main(launch("create"))
    cli.main(["tpu", "setup", "--name=first"])
    cli.main(["tpu", "run", "--name=first"])
    cloud.advance(630)
    assert cli.main(["tpu", "delete", "--name=first"]) == 0
    assert cloud.workers.saved == 21 and not cloud.made
    assert "stopped by the user" in said(capsys)
    calls = len(cloud.calls)
    assert cli.main(["tpu", "delete", "--name=first"]) == 0
    assert not any("create" in call for call in cloud.calls[calls:])


def test_launching_again_goes_on_or_begins_anew(cloud, capsys):
    cli.main(launch("create"))
    assert cli.main(launch(hours=5)) == 2
    assert "with other settings (budget" in said(capsys)
    assert cli.main(launch()) == 0 and cloud.created == 1
    assert "continues; used so far" in said(capsys)
    cloud.workers.saved = 0
    assert cli.main(launch(hours=5)) == 0 and cloud.created == 2


def test_a_second_launcher_is_refused(cloud, capsys):
    cli.main(launch("create"))
    with Store("first").locked() as alone:
        assert alone
        assert cli.main(["tpu", "babysit", "--name=first"]) == 2
    assert "is watched by another launcher" in said(capsys)


@pytest.mark.parametrize(
    "flags", [(), ("--backend=compute",), ("--slices=2",), ("--source=.", "--secret=MY_TOKEN", "--project=p")]
)
def test_a_dry_run_prints_commands_and_does_nothing(cloud, capsys, flags, tmp_path):
    assert cli.main(launch("launch", *flags, "--dry-run")) == 0
    text = said(capsys)
    lines = [line for line in text.splitlines() if line.startswith("gcloud ")]
    assert any(" create " in line for line in lines) and any(" delete " in line for line in lines)
    assert "storage buckets describe gs://bucket" in text and "# the end" in text
    assert not cloud.calls and not (tmp_path / "state").exists()


def test_dry_runs_of_the_other_verbs(cloud, capsys):
    cli.main(launch("create"))
    calls, state = len(cloud.calls), Store("first").read_state()
    said(capsys)
    for verb in ("status", "setup", "run", "logs", "tensorboard", "babysit", "delete", "drill"):
        assert cli.main(["tpu", verb, "--name=first", "--dry-run"]) == 0, verb
        text = said(capsys)
        assert "gcloud" in text or (
            verb == "tensorboard" and "tensorboard --logdir=gs://bucket/first" in text
        )
    for verb in ("list", "sweep"):
        assert cli.main(["tpu", verb, "--zones=us-east5-a", "--dry-run"]) == 0
        assert said(capsys).count("gcloud") == 2
    assert len(cloud.calls) == calls and Store("first").read_state() == state


def test_what_dry_run_prints_is_what_launch_runs(cloud, capsys):
    assert cli.main(launch("launch", "--dry-run")) == 0
    printed = [line for line in said(capsys).splitlines() if line.startswith("gcloud ")]
    assert cli.main(launch()) == 0
    ran = [commands.shown(call).splitlines()[0] for call in cloud.calls]
    for line in printed:
        line = line.partition("scaling-dit-expires")[0]
        assert any(one.startswith(line) for one in ran), line


def test_a_secret_goes_as_a_file(cloud, capsys, monkeypatch):
    copied = []
    monkeypatch.setattr(
        cloud.workers,
        "copy",
        lambda cloud, made, machine, local, remote: (
            copied.append((remote, pathlib.Path(local).read_text(), os.stat(local).st_mode & 0o777)) or 0
        ),
    )
    assert cli.main(launch("launch", "--secret=MY_TOKEN", "--", "echo", "hello")) == 0
    assert set(copied) == {(".scaling-dit/first/env", f"MY_TOKEN={SECRET}\n", 0o600)}
    assert not any(SECRET in word for call in cloud.calls for word in call)
    said(capsys)
    assert cli.main(launch("launch", "--env=HF_TOKEN=abc", "--", "true", name="second")) == 2
    assert "a secret is given by --secret=HF_TOKEN" in said(capsys)
    assert cli.main(launch("launch", "--secret=NOT_THERE", "--", "true", name="third")) == 2
    assert "there is no such variable" in said(capsys) and not cloud.made


def test_what_speaks_against_a_launch(cloud, capsys, monkeypatch):
    monkeypatch.setattr(outside, "PLAN", lambda config, overrides, job: (False, "needs 99 GiB"))
    assert cli.main(launch()) == 2
    assert "the run does not fit v5p:2x2x2: needs 99 GiB; --force launches nevertheless" in said(capsys)
    assert cloud.created == 0
    assert cli.main(launch("launch", "--force")) == 0
    assert "--force: the run does not fit" in said(capsys)
    cloud.buckets["bucket"] = "EU"
    assert cli.main(launch(name="second")) == 2
    assert "gs://bucket lies in eu, and zone us-east5-a in us-east5" in said(capsys)
    del cloud.buckets["bucket"]
    assert cli.main(launch(name="second")) == 2
    assert "gs://bucket cannot be asked where it lies" in said(capsys)
    assert (
        cli.main(
            [
                "tpu",
                "launch",
                "--name=x",
                "--config=shapes",
                "--workdir=runs/x",
                "--topology=v5p:2x2x2",
                "--zones=us-east5-a",
                "--hours=1",
            ]
        )
        == 2
    )
    assert "the 2 workers have separate disks" in said(capsys)


def quota(name, value, zone="us-east5-a"):
    return {
        "quotaId": name,
        "dimensionsInfos": [{"dimensions": {"zone": zone}, "details": {"value": str(value)}}],
    }


def test_quota(cloud, capsys):
    cloud.quotas = [quota("TPUV5pPreemptiblePerProjectPerZone", 8), quota("TPUV5pPerProjectPerZone", 999)]
    flags = ("--project=p", "--", "true")
    assert cli.main(launch("launch", *flags)) == 2
    assert "quota TPUV5pPreemptiblePerProjectPerZone is 8, and the job needs 16 cores" in said(capsys)
    cloud.quotas[0] = quota("TPUV5pPreemptiblePerProjectPerZone", 16)
    assert cli.main(launch("launch", *flags)) == 0
    cloud.quotas = [quota("TPUV5pPreemptiblePerProjectPerZone", -1), quota("Other", 1)]
    assert cli.main(launch("launch", *flags)) == 0
    said(capsys)
    cloud.quotas = []
    assert cli.main(launch("launch", *flags)) == 0
    assert "quota not checked in us-east5-a: none is listed for v5p as spot" in said(capsys)


def test_status_ends_with_the_screen_of_the_run_or_says_why_it_cannot(cloud, capsys, monkeypatch):
    assert cli.main(launch("create", "--workdir=gs://bucket/first", "--config=shapes")) == 0
    said(capsys)
    assert cli.main(["tpu", "status", "--name=first"]) == 0
    assert said(capsys).splitlines()[-1] == "gs://bucket/first: training, step 10 of 60"

    def fail(workdir):
        raise RuntimeError("no such host\nand many lines more")

    monkeypatch.setattr(screen, "read", fail)
    assert cli.main(["tpu", "status", "--name=first"]) == 0
    assert said(capsys).splitlines()[-1] == "gs://bucket/first cannot be read from here: no such host"


def test_the_machines_of_a_job_get_its_switch(cloud):
    assert (
        cli.main(launch("create", "--workdir=gs://bucket/first", "--config=shapes", "--quiet_minutes=7")) == 0
    )
    script = Store("first").startup.read_text()
    assert "heartbeats=gs://bucket/first/heartbeats\n" in script and "quiet_seconds=420\n" in script
    assert "delete=(gcloud compute tpus queued-resources delete first --zone=us-east5-a" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_list_and_sweep(cloud, capsys, monkeypatch):
    # The switches on the machines fail, so that something is left over.
    monkeypatch.setattr(outside, "STARTUP", launcher.no_startup)
    for name, flags in (
        ("one", ()),
        ("two", ("--study=widths",)),
        ("three", ("--backend=compute",)),
        ("four", ("--owner=bob",)),
    ):
        assert cli.main(launch("create", *flags, "--", "true", name=name)) == 0
    cloud.made[("queued", "us-east5-a", "foreign")] = other = cloud.made[("queued", "us-east5-a", "one")]
    cloud.fail(cloud.made[("queued", "us-east5-a", "two")])
    cloud.fail(cloud.made[("queued", "us-east5-a", "four")])
    del cloud.made[("queued", "us-east5-a", "foreign")]
    assert other.state == "ACTIVE"
    cloud.advance(3600)
    said(capsys)
    assert cli.main(["tpu", "list"]) == 0
    table = {line.split()[0]: line for line in said(capsys).splitlines() if line}
    assert "v5p:2x2x2" in table["one"] and "<= $" in table["one"] and "ACTIVE" in table["one"]
    assert "widths" in table["two"] and "FAILED" in table["two"] and "holds quota" in table["two"]
    assert "stable" in table["three"] and "bob" in table["four"]
    assert "upper bounds" in table["Costs"] and "nobody verified" in table["Costs"]
    assert cli.main(["tpu", "sweep", "--zones=us-east5-a"]) == 0
    assert "two in us-east5-a: FAILED" in said(capsys) and len(cloud.made) == 4
    assert cli.main(["tpu", "sweep", "--zones=us-east5-a", "--yes"]) == 0
    cloud.advance(600)
    assert {key[2] for key in cloud.made} == {"one", "three", "four"}
    assert cli.main(["tpu", "sweep", "--zones=us-east5-a", "--yes", "--all"]) == 0
    cloud.advance(600)
    assert {key[2] for key in cloud.made} == {"one", "three"}
    # Their time is over, whatever they do.
    cloud.advance(40 * 24 * 3600)
    said(capsys)
    assert cli.main(["tpu", "sweep", "--zones=us-east5-a", "--yes"]) == 0
    assert "its time is over" in said(capsys)
    cloud.advance(600)
    assert not cloud.made
    cloud.deaf = 5
    assert cli.main(["tpu", "list", "--zones=us-east5-a"]) == 1
    assert "could not be asked: queued in us-east5-a" in said(capsys)


def test_costs_of_a_listing_say_what_they_rest_on(cloud):
    assert "at $2.50 a chip-hour" in inventory.table([], 2.5)


@pytest.mark.parametrize(
    "command, line",
    [
        (["tpu"], "tpu needs a verb; known: launch"),
        (["tpu", "lanch"], "no verb 'tpu lanch'; did you mean 'launch'?"),
        (["tpu", "launch"], "tpu launch needs --name"),
        (
            ["tpu", "launch", "--name=a", "--topology=v5e:4x4", "--zones=us-a1-a", "--hours=1"],
            "needs --config and --workdir",
        ),
        ([*launch("launch", "--config.steps=3", "--", "true")], "leave out --config"),
        (launch("launch", "job"), "'job' is no flag; a command for the workers follows --"),
        (["tpu", "delete", "--name=first", "--", "job"], "tpu delete takes no command after --"),
        (launch("launch", "--hourss=3"), "tpu launch has no flag --hourss; did you mean 'hours'?"),
        (launch("launch", "--env=A"), "--env=A: give NAME=VALUE"),
        (launch("launch", "--setup=/no/file"), "no such file"),
        (launch("launch", "--source=/no/folder"), "no such folder"),
        (["tpu", "status", "--name=nobody"], "no such job on this machine; none was launched from here"),
        (["tpu", "status", "--name=../x"], "no such job on this machine"),
        (["tpu", "list"], "--zones missing"),
    ],
)
def test_mistakes_are_one_line(cloud, capsys, command, line):
    assert cli.main(command) == 2
    text = said(capsys)
    assert line in text and text.strip().count("\n") == text.count("quota not checked") + text.count(
        "plan of"
    )


def test_the_folder_is_a_program(tmp_path):
    command = [sys.executable, "-m", "scaling_dit.tpu", "sweep", "--dry-run", "--zones=us-east5-a"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("gcloud compute") == 2, done.stderr


def test_help(capsys):
    assert cli.main(["tpu", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in verbs.VERBS)
    assert cli.main(["tpu", "launch", "--help"]) == 0
    assert "usage: scaling-dit tpu launch [-- COMMAND ...] [flags]" in capsys.readouterr().out
    for verb in verbs.VERBS.values():
        assert verb.summary().endswith(".") and verb.EXAMPLE.startswith(f"scaling-dit {verb.name()} ")
        assert verb.parse(verb.EXAMPLE.split()[3:])


def test_a_packed_source_is_the_same_for_the_same_files(tmp_path):
    folder = tmp_path / "src"
    (folder / "runs").mkdir(parents=True)
    (folder / "a.py").write_text("1")
    (folder / "runs" / "big").write_text("2")
    store.pack(str(folder), tmp_path / "one.tgz")
    os.utime(folder / "a.py", (1, 1))
    store.pack(str(folder), tmp_path / "two.tgz")
    assert (tmp_path / "one.tgz").read_bytes() == (tmp_path / "two.tgz").read_bytes()
    with tarfile.open(tmp_path / "one.tgz") as packed:
        assert packed.getnames() == ["a.py"]
