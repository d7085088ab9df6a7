"""A launcher killed at any moment and started again takes the same job over; Ctrl-C says what still costs."""

import os
import signal
import subprocess
import sys
import time

import pytest
from scaling_dit.tpu import launcher, outside
from scaling_dit.tpu.state import Limits, Stage
from scaling_dit.tpu.store import Store

from scaling_dit.cli import main as cli
from tests.support import tpu_jobs
from tests.support.tpu_cloud import Cloud
from tests.support.tpu_model_workers import ModelWorkers


class Killed(BaseException):
    """The launcher is killed."""


class KillingRunner:
    """Runs commands, and kills the launcher at the n-th: before it, or after it is done and before its answer."""

    def __init__(self, at, before):
        self.cloud, self.at, self.before, self.count = None, at, before, 0

    def __call__(self, command, seconds=0.0):
        self.count += 1
        now = self.count == self.at
        if now and self.before:
            raise Killed
        result = self.cloud(command)
        if now:
            raise Killed
        return result


def live(folder, backend, at, before):
    """(the world after a job with one preemption whose launcher was killed once, how many commands it took)."""
    runner = KillingRunner(at, before)
    world = tpu_jobs.World(folder, tpu_jobs.job(backend=backend), 5, runner=runner, total=20, every=4)
    runner.cloud = world.cloud
    world.cloud.lose = "after"
    preempted = False
    for _ in range(400):
        if not preempted and world.workers.saved >= 8 and world.running():
            preempted = True
            world.cloud.preempt(world.running())
        try:
            if world.turn():
                break
        except Killed:
            world.launch()
        assert len(world.cloud.wanted("first")) <= 1 and len(world.cloud.running("first")) <= 1
    return world, runner.count


def kill(backend, folder, monkeypatch, *, both):
    """Kills a launcher at each command of a job's life, before or after it, or `both`; returns how many were killed."""
    monkeypatch.setattr(launcher, "run_all", lambda run, several, seconds=0.0: [run(one) for one in several])
    _, commands = live(folder, backend, 0, True)
    moments = [
        (at, before)
        for at in range(1, commands + 1)
        for before in ((True, False) if both else (at % 2 == 0,))
    ]
    for at, before in moments:
        world, _ = live(folder, backend, at, before)
        assert world.state.stage is Stage.DONE, (at, before, world.said[-3:])
        assert world.cloud.created == 2 and not world.cloud.made, (at, before)
        assert len(world.workers.starts) == len(set(world.workers.starts))
        assert world.cloud.billed("first") <= world.state.used + 1
    return len(moments)


@pytest.mark.parametrize("backend", ["queued", pytest.param("compute", marks=pytest.mark.slow)])
def test_killed_at_fifty_moments(tmp_path, monkeypatch, backend):
    assert kill(backend, tmp_path, monkeypatch, both=False) >= 50


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["queued", "compute"])
def test_killed_at_every_command(tmp_path, monkeypatch, backend):
    assert kill(backend, tmp_path, monkeypatch, both=True) >= 100


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A simulated cloud as gcloud of the verbs, in which time passes while the launcher sleeps."""
    made = Cloud(5, now=time.time(), workers=ModelWorkers(total=60))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(outside, "RUN", made)
    monkeypatch.setattr(outside, "SLEEP", made.advance)
    monkeypatch.setattr(outside, "LIMITS", Limits())
    monkeypatch.setattr(time, "time", lambda: made.now)
    monkeypatch.setattr(
        launcher.Launcher.__init__, "__defaults__", (Limits(), lambda: made.now, launcher.no_startup)
    )
    return made


LAUNCH = [
    "tpu",
    "launch",
    "--name=first",
    "--topology=v5p:2x2x2",
    "--zones=us-east5-a",
    "--hours=9",
    "--price=2",
    "--",
    "job",
]


@pytest.mark.parametrize("at", range(1, 16))
def test_ctrl_c_says_what_still_runs_and_the_command_that_ends_it(cloud, monkeypatch, capsys, at):
    count = [0]

    def interrupted(what):
        def call(*arguments, **keywords):
            count[0] += 1
            if count[0] == at:
                raise KeyboardInterrupt
            return what(*arguments, **keywords)

        return call

    monkeypatch.setattr(outside, "RUN", interrupted(cloud))
    assert cli.main(LAUNCH) == 130
    said = capsys.readouterr().err
    assert "interrupted." in said and "Traceback" not in said
    if cloud.made:
        assert (
            "scaling-dit tpu delete --name=first" in said and "scaling-dit tpu babysit --name=first" in said
        )
        assert "$16.00 an hour (8 chips at $2.00 a chip-hour, given by --price)" in said
    # The command does end it.
    monkeypatch.setattr(outside, "RUN", cloud)
    assert cli.main(["tpu", "delete", "--name=first"]) == 0
    assert not cloud.made
    assert "nothing runs" not in said or cloud.created == 0


def test_ctrl_c_while_it_waits_and_resumes(cloud, monkeypatch, capsys):
    turns = [0]

    def sleep(seconds):
        turns[0] += 1
        if turns[0] == 12:
            raise KeyboardInterrupt
        cloud.advance(seconds)

    monkeypatch.setattr(outside, "SLEEP", sleep)
    assert cli.main(LAUNCH) == 130
    assert "first is running in us-east5-a and costs $16.00 an hour" in capsys.readouterr().err
    assert cli.main(["tpu", "babysit", "--name=first"]) == 0
    assert cloud.created == 1 and not cloud.made and Store("first").read_state().stage is Stage.DONE
    assert cli.main(["tpu", "babysit", "--name=first"]) == 2
    assert "has ended: the job finished" in capsys.readouterr().err


@pytest.mark.slow
def test_launchers_ended_by_sigkill(tmp_path):
    """Real processes: each launcher is killed after a random time, the next one continues."""
    from tests.support import fake_gcloud

    fake = fake_gcloud.install(tmp_path / "cloud", {"PATH": os.environ["PATH"]})
    job = tmp_path / "job"
    script = f"for i in $(seq 40); do echo step $i; sleep 0.2; done; echo done >> {job}"
    environment = {**os.environ, "PATH": f"{fake.bin}:{os.environ['PATH']}", "XDG_STATE_HOME": str(tmp_path)}
    command = [
        sys.executable, "-m", "scaling_dit", "tpu", "launch", "--name=first", "--topology=v5p:2x2x2",
        "--zones=us-east5-a", "--hours=1", "--poll=0.2", f"--setup={tmp_path / 'setup'}", "--", "sh", "-c", script,
    ]  # fmt: skip
    (tmp_path / "setup").write_text("true\n")
    for seconds in (1.0, 2.5, 1.7):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    cloud = fake.cloud()
    assert cloud.created == 1 and not cloud.made
    # Each of the two workers did the job once.
    assert job.read_text() == "done\n" * 2
