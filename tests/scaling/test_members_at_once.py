"""Members trained at the same time: shares of cores, the order of bases, failures, signals, and the same table."""

import dataclasses
import os
import signal
import subprocess
import sys

import pytest

from scaling_dit.cli import main as cli
from scaling_dit.errors import UserError
from scaling_dit.scaling import members_at_once
from scaling_dit.scaling import spec as spec_lib
from scaling_dit.scaling import study as study_lib
from scaling_dit.scaling.folder import StudyFolder
from scaling_dit.scaling.spec import StudySpec
from scaling_dit.training.loop import Stopped
from tests.support import simulated_study, study_tables, xla
from tests.support.paths import ROOT

SMOKE = "experiments/studies/shapes_core.py:smoke"
# What a process does in the place of the command: the member's name says what.
STAND_IN = """
import os, signal, sys, time
name = sys.argv[1]
print("begins on", os.environ["SCALING_DIT_AT_ONCE"])
if name.startswith("waits"):
    signal.signal(signal.SIGTERM, lambda *args: (print("saved", flush=True), os._exit(75)))
    signal.signal(signal.SIGINT, lambda *args: os._exit(130))
    print("ready", flush=True)
    time.sleep(60)
if name.startswith("fails"):
    print("scaling-dit: error: no such thing")
    sys.exit(2)
if name.startswith("dies"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def members(monkeypatch):
    """A function: members of these names, whose processes run the stand-in."""

    def command(member, folder, own_code):
        return [sys.executable, "-c", STAND_IN, member.name]

    def make(*names, **bases):
        some = simulated_study.members(len(names))
        return [
            dataclasses.replace(one, name=name, base=bases.get(name, ""))
            for one, name in zip(some, names, strict=True)
        ]

    monkeypatch.setattr(members_at_once, "_command", command)
    # Two, whatever this machine has.
    monkeypatch.setattr(members_at_once.host, "cores", lambda: sorted(os.sched_getaffinity(0))[:1] * 2)
    return make


@pytest.mark.parametrize(
    ("cores", "at_once", "wanted"),
    [
        (range(2), 2, [[0], [1]]),
        (range(5), 2, [[0, 1], [2, 3, 4]]),
        ((3, 7, 8), 3, [[3], [7], [8]]),
        (range(4), 1, [[0, 1, 2, 3]]),
    ],
)
def test_every_core_belongs_to_one_process(cores, at_once, wanted):
    assert members_at_once.shares(tuple(cores), at_once) == wanted


def test_more_processes_than_cores_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(members_at_once.host, "cores", lambda: [0, 1])
    with pytest.raises(UserError, match="--at_once=3 is more than the 2 CPU cores"):
        members_at_once.check(3)
    members_at_once.check(2)
    monkeypatch.setattr(members_at_once.jax, "default_backend", lambda: "tpu")
    with pytest.raises(UserError, match="shares the CPU cores of one host, and this start has 8 tpu devices"):
        members_at_once.check(2)
    assert cli.main(["study", f"--config={SMOKE}", f"--workdir={tmp_path}", "--at_once=2"]) == 2
    assert "leave it out" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_all_members_end_and_what_they_print_has_their_name(members, tmp_path, capsys):
    ended = []
    members_at_once.run(
        members("a", "b", "c"),
        StudyFolder(tmp_path),
        2,
        lambda one, seconds: ended.append((one.name, seconds)),
    )
    assert sorted(name for name, _ in ended) == ["a", "b", "c"] and all(seconds > 0 for _, seconds in ended)
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.partition(": ")[0] for line in lines) == ["a", "b", "c"]
    assert all(f": begins on {os.getpid()} " in line for line in lines)


@pytest.mark.slow
def test_a_process_keeps_to_its_cores_and_dies_with_its_parent(monkeypatch):
    """In a process of its own, whose parent is this one, and in one whose parent has died before."""
    code = (
        "import os; from scaling_dit.scaling import members_at_once; members_at_once.settle(); "
        "print(sorted(os.sched_getaffinity(0)), 'SCALING_DIT_AT_ONCE' in os.environ)"
    )
    core = min(os.sched_getaffinity(0))
    for parent, printed, ended in ((os.getpid(), f"[{core}] False\n", 0), (1, "", 137)):
        environment = os.environ | {"SCALING_DIT_AT_ONCE": f"{parent} {core}", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT
        )
        assert (done.stdout, done.returncode) == (printed, ended), done.stderr


def test_a_member_begins_after_its_base(members, tmp_path):
    ended = []
    some = members("base", "stage", "other", stage="base")
    members_at_once.run(some, StudyFolder(tmp_path), 2, lambda one, seconds: ended.append(one.name))
    assert ended.index("base") < ended.index("stage")
    # One whose base is over already waits for nobody.
    members_at_once.run([some[1]], StudyFolder(tmp_path), 2, lambda one, seconds: ended.append(one.name))
    assert ended[3:] == ["stage"]


@pytest.mark.parametrize(("name", "code"), [("fails", 2), ("dies", 137)])
def test_one_that_fails_lets_the_others_save(name, code, members, tmp_path, capsys):
    ended = []
    with pytest.raises(
        Stopped, match=f"member {name} ended with exit code {code}, see its lines above"
    ) as stop:
        members_at_once.run(
            members("waits", name, "never"), StudyFolder(tmp_path), 2, lambda one, _: ended.append(one.name)
        )
    assert stop.value.code == code and ended == []
    shown = capsys.readouterr().err
    assert "never: " not in shown


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_reaches_every_process(number, code, members, tmp_path, capsys):
    begun = []
    monkey = members_at_once._pass_on

    def when_both_are_ready(stream, name):
        for line in stream:
            if line.startswith("ready"):
                begun.append(name)
                if len(begun) == 2:
                    os.kill(os.getpid(), number)

    members_at_once._pass_on = when_both_are_ready
    try:
        with pytest.raises(Stopped, match=f"{number.name}: the same command resumes the study") as stop:
            members_at_once.run(
                members("waits1", "waits2", "never"), StudyFolder(tmp_path), 2, lambda one, _: None
            )
    finally:
        members_at_once._pass_on = monkey
    assert stop.value.code == code and sorted(begun) == ["waits1", "waits2"]


def test_members_of_another_study(tmp_path, capsys):
    spec = StudySpec("Is a better?", simulated_study.members(2), (0,), claims=())
    study_lib.register(spec, StudyFolder(tmp_path), lambda: 0)
    assert cli.main(["study", f"--workdir={tmp_path}", "--member=x"]) == 2
    assert "has no member 'x'; it has uvit-000, pixart-001" in capsys.readouterr().err
    for more in (f"--config={SMOKE}", "--at_once=2"):
        assert cli.main(["study", f"--workdir={tmp_path}", "--member=uvit-000", more]) == 2
        assert "--member goes with --workdir alone" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("verbs_on_one_device")
def test_two_at_once_make_the_table_of_one_after_another(smoke_study, tmp_path):
    """Stopped in the middle by SIGTERM, and killed with its processes, too."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla.flags(devices=1)}
    together = tmp_path / "together"
    spec = dataclasses.replace(spec_lib.load(SMOKE), seeds=(0,), claims=())
    study_lib.register(spec, StudyFolder(together), lambda: 0)
    command = ["study", f"--workdir={together}", "--at_once=2"]
    for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)):
        two = subprocess.Popen(
            [sys.executable, "-m", "scaling_dit", *command],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        stopping = False
        # Until its processes have ended as well.
        for line in two.stderr:
            # The first step of either member.
            if ": step " in line and not stopping:
                stopping = True
                two.send_signal(number)
        assert stopping and two.wait(300) == code
    with pytest.MonkeyPatch.context() as patch:
        # That of the members' processes.
        for name in ("PYTHONPATH", "XLA_FLAGS"):
            patch.setenv(name, environment[name])
        assert cli.main(command) == 0
    for name in ("table", "scores"):
        wanted = study_tables.written(smoke_study, name, tmp_path, seed=0)
        assert (together / f"{name}.parquet").read_bytes() == wanted
    assert len(list((together / "tensorboard").glob("*/events*"))) == 2
