"""One run by several real processes on this machine: the same losses, the same end, and no hanging on."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from scaling_dit import config as config_lib
from scaling_dit.checkpoints.workdir import Workdir, read_metrics
from scaling_dit.cli import main as cli
from scaling_dit.errors import UserError
from scaling_dit.monitor import heartbeat
from scaling_dit.parallel import processes
from scaling_dit.sampling import pipeline
from scaling_dit.training import loop
from tests.support import xla
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("on_one_device")

HEARTBEAT = 10
# The learning rate is constant after warm-up, so that runs of any number of steps have the same first ones. Each
# process makes the masks and edges of its own rows, which follow from their positions.
FIELDS = (
    "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.log.every=1", "--config.log.tensorboard=false",
    "--config.checkpoint.every=20", "--config.eval.every=0", "--config.backbone.depth=1",
    "--config.optim.decay=constant", "--config.conditioning.names=('inpaint','edges')",
    "--config.conditions.edges.concat=channel",
)  # fmt: skip
COMMAND = [
    sys.executable, "-m", "scaling_dit", "train", "--config=experiments/shapes.py:smoke",
    f"--config.processes.heartbeat={HEARTBEAT}", *FIELDS,
]  # fmt: skip
FOR_EVER = "--config.steps=100000"


def start(
    workdir: pathlib.Path, count: int, *overrides: str, missing: int | None = None
) -> list[subprocess.Popen]:
    """`count` processes with four devices together, or all of them but one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # One compiles, also where all begin at the same time.
    env = {**xla.one_of_several(devices=4 // count), "JAX_SHARE_BINARY_BETWEEN_HOSTS": "1"}
    command = [*COMMAND, f"--workdir={workdir}", *overrides]
    command += [f"--coordinator=localhost:{port}", f"--processes={count}"]
    return [
        subprocess.Popen(
            [*command, f"--process={process}"],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
        if process != missing
    ]


def finish(started: list[subprocess.Popen], code: int = 0) -> list[str]:
    """What each said on stderr; all must end with `code`."""
    output = [process.communicate(timeout=900)[1] for process in started]
    assert [process.returncode for process in started] == [code] * len(started), "\n----\n".join(output)
    return output


def wait_for_step(workdir: pathlib.Path, step: int, started: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 400
    while not (workdir / "checkpoints" / str(step)).exists():
        assert all(process.poll() is None for process in started), [p.stderr.read() for p in started]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def child(process: subprocess.Popen) -> int:
    """The process that trains; `process` is its supervisor."""
    (number,) = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(number)


def losses(workdir: pathlib.Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row]


def train_alone(workdir: pathlib.Path, *changes: str, stop: int | None = None):
    """A run by this process alone, on as many devices as the others have together; its state at the end.

    With `stop` SIGTERM ends it, and this step is saved.
    """
    config = config_lib.load("experiments/shapes.py:smoke", [*FIELDS, *changes])
    if stop is None:
        return loop.train(config, workdir, jax.devices()[:4])
    write_log = loop.write_log

    def log_and_stop(run, outputs, watch, progress, step, metrics):
        write_log(run, outputs, watch, progress, step, metrics)
        if step == stop - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_log", log_and_stop)
        with pytest.raises(loop.Stopped, match=f"SIGTERM: saved step {stop}"):
            loop.train(config, workdir, jax.devices()[:4])


def assert_losses_of(workdir: pathlib.Path, reference: list[float]) -> None:
    """20 steps from scratch, and those of the start after them."""
    assert len(reference) >= 20
    np.testing.assert_allclose(losses(workdir)[: len(reference)], reference, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of 20 steps by one process."""
    workdir = tmp_path_factory.mktemp("one")
    train_alone(workdir, "--config.steps=20")
    return workdir


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run by two processes that SIGTERM at one of them ends; what they said."""
    workdir = tmp_path_factory.mktemp("stopped")
    started = start(workdir, 2, FOR_EVER)
    wait_for_step(workdir, 20, started)
    started[1].send_signal(signal.SIGTERM)
    return workdir, finish(started, code=75)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sigterm_at_one_process_saves_the_same_step_in_all(stopped):
    workdir, output = stopped
    steps = [re.findall(r"SIGTERM: saved step (\d+);", said) for said in output]
    assert len(steps[0]) == 1 and steps[0] == steps[1], "\n----\n".join(output)
    assert pipeline.load(workdir).step == int(steps[0][0])


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_with_image_conditions(stopped, one):
    assert_losses_of(stopped[0], losses(one))
    found, wanted = (
        pipeline.load(path, step=20).params["backbone"]["condition_embed"] for path in (stopped[0], one)
    )
    assert set(found) == {"inpaint", "edges"} and np.abs(found["edges"]["kernel"]).max() > 0
    rate = config_lib.load("experiments/shapes.py:smoke").optim.learning_rate
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        # Adam's first steps follow the sign of a gradient, which rounding may turn.
        np.testing.assert_allclose(a, b, rtol=0, atol=2 * 3 * rate)


def lose(workdir: pathlib.Path, count: int, lost: int) -> None:
    """Kills one of `count` processes after 20 steps; all others end, and name it."""
    started = start(workdir, count, FOR_EVER)
    wait_for_step(workdir, 20, started)
    os.kill(child(started[lost]), signal.SIGKILL)
    began = time.monotonic()
    for other in started[:lost] + started[lost + 1 :]:
        output = other.communicate(timeout=3 * HEARTBEAT)[1]
        # Some seconds for what the machine does besides.
        assert time.monotonic() - began < HEARTBEAT + 10
        assert other.returncode == 75
        (line,) = re.findall(r"scaling-dit: .*lost.*", output)
        assert line.startswith(f"scaling-dit: process {lost} is lost: ")
        assert "Check failure" not in output and "Traceback" not in output
    assert "ended by SIGKILL" in started[lost].communicate(timeout=60)[1]
    assert started[lost].returncode == 137


def go_on_alone(workdir: pathlib.Path) -> None:
    """One process continues where several were, and its first steps follow from theirs."""
    step = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    before = losses(workdir)
    train_alone(workdir, FOR_EVER, stop=step + 5)
    after = losses(workdir)
    assert len(after) >= step + 5
    np.testing.assert_allclose(after[:step], before[:step], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_second_of_two_is_lost(stopped, tmp_path):
    """Up to there it was the run that SIGTERM ended: the same count of processes gives the same bits."""
    lose(tmp_path, 2, 1)
    assert losses(tmp_path)[:20] == losses(stopped[0])[:20]
    for ema in (None, 0.995):
        first, again = (pipeline.load(path, step=20, ema=ema).params for path in (tmp_path, stopped[0]))
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_first_of_four_is_lost_and_another_count_goes_on(one, tmp_path):
    lose(tmp_path, 4, 0)
    assert_losses_of(tmp_path, losses(one))
    go_on_alone(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_go_on_where_one_was_and_evaluate_together(one, tmp_path):
    """Validation loss, sample grid and evaluation are made by all processes together."""
    shutil.copytree(one, tmp_path / "one")
    shutil.copytree(one, tmp_path / "two")
    changes = ("--config.steps=23", "--config.eval.every=23", "--config.sample.steps=1")
    finish(start(tmp_path / "two", 2, *changes))
    train_alone(tmp_path / "one", *changes)
    reference = losses(tmp_path / "one")
    assert len(reference) == 23
    assert_losses_of(tmp_path / "two", reference)
    last = {name: read_metrics(tmp_path / name)[-1] for name in ("one", "two")}
    several = {"speed/slowest_process", "speed/slowest_host_wait"}
    assert last["one"].keys() | several == last["two"].keys()
    assert last["two"]["speed/slowest_process"] in (0, 1) and last["two"]["speed/slowest_host_wait"] >= 0
    beats = heartbeat.read(Workdir(tmp_path / "two").heartbeats)
    assert [(beat["process"], beat["state"], beat["step"]) for beat in beats] == [
        (0, "done", 23),
        (1, "done", 23),
    ]
    assert last["two"]["validation/loss"] == pytest.approx(last["one"]["validation/loss"], abs=1e-5)


@pytest.mark.slow
def test_a_missing_process_is_reported(tmp_path):
    (output,) = finish(start(tmp_path, 2, "--config.processes.start_up=3", missing=1), code=75)
    assert (
        output.strip()
        .splitlines()[-1]
        .startswith("scaling-dit: error: process 1 of 2 did not come to localhost:")
    )


def test_flags_go_together():
    assert processes.from_flags(None, None, None) is None
    assert processes.from_flags("host:1", 2, 1) == processes.Membership("host:1", 2, 1)
    with pytest.raises(UserError, match="--processes and --process missing"):
        processes.from_flags("host:1", None, None)
    with pytest.raises(UserError, match="--process=2 of --processes=2: it must be 0 to 1"):
        processes.from_flags("host:1", 2, 2)
    with pytest.raises(UserError, match="HOST:PORT"):
        processes.from_flags("host", 2, 0)


def test_what_jax_detects_of_a_slice(monkeypatch):
    from jax._src.clusters import ClusterEnv

    def found(*values):
        monkeypatch.setattr(ClusterEnv, "auto_detect_unset_distributed_params", lambda *_: (*values, None))

    found("10.0.0.2:8482", 4, 3)
    assert processes.detected() == processes.Membership("10.0.0.2:8482", 4, 3)
    found("10.0.0.2:8482", 1, 0)
    assert processes.detected() is None
    found(None, None, None)
    assert processes.detected() is None


def test_tpu_hosts_are_known_by_their_devices(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "_TPU_DEVICES", (str(tmp_path / "accel*"),))
    monkeypatch.delenv("JAX_PLATFORMS")
    assert not processes.on_tpu_host()
    (tmp_path / "accel0").touch()
    assert processes.on_tpu_host()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not processes.on_tpu_host()


def test_one_process_agrees_with_itself():
    assert processes.total({"b": 2, "a": 1}) == {"b": 2, "a": 1}
    assert processes.first_says(True) and not processes.first_says(False)
    assert processes.run_supervised(lambda: 7, None, dict, []) == 7


def test_what_watches_a_process_reads_no_config(monkeypatch, tmp_path):
    """It imports no jax, and starts the process at once, which reports a mistake in the config."""
    started = []
    monkeypatch.setattr(processes.supervise, "run", lambda command: started.append(command) or 75)
    command = ["train", "--config=no_such_experiment", f"--workdir={tmp_path}"]
    command += ["--coordinator=localhost:8000", "--processes=2", "--process=1"]
    assert cli.main(command) == 75
    assert started == [[sys.executable, "-m", "scaling_dit", *command]]


WATCHED = """
import os, sys
from scaling_dit.cli import main as cli
from scaling_dit.parallel import supervise
supervise.run = lambda command: print(command[3], "jax" in sys.modules) or 75
joined = ["--coordinator=localhost:8000", "--processes=2", "--process=1"]
for verb in sys.argv[1:]:
    assert cli.main([verb, *([] if verb == "doctor" else ["--workdir=nowhere"]), *joined]) == 75
assert cli.main(["train", "--config=nope", "--workdir=nowhere"]) == 2
print("loop", "scaling_dit.training.loop" in sys.modules or "jax" in sys.modules)
"""


def test_parents_import_no_jax_and_a_mistake_in_a_config_comes_before_what_is_slow(tmp_path):
    verbs = ["train", "sample", "evaluate", "study", "doctor"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *verbs], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.splitlines() == [*(f"{verb} False" for verb in verbs), "loop False"], done.stderr
    assert "no experiment 'nope'" in done.stderr and done.stderr.count("\n") == 1


def test_sigterm_is_noticed_by_one_process():
    old = signal.getsignal(signal.SIGTERM)
    with processes.preemption() as reached:
        assert not reached()
        os.kill(os.getpid(), signal.SIGTERM)
        assert reached() and reached()
    assert signal.getsignal(signal.SIGTERM) == old


def test_a_process_that_fails_ends_without_jaxs_shutdown(monkeypatch, capsys):
    codes, slept = [], []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(time, "sleep", slept.append)

    def raises(error):
        def main():
            raise error

        return main

    assert processes.together(lambda: 0, 100) == 0 and processes.together(lambda: 75, 100) == 75
    # All processes come to these ends, and jax's shutdown is theirs together.
    assert codes == []
    assert processes.together(lambda: 3, 100) == 3 and codes == [3]
    processes.together(raises(ValueError("unforeseen")), 100)
    processes.together(raises(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: memory")), 100)
    assert codes == [3, 1, 1] and slept == []
    processes.together(raises(jax.errors.JaxRuntimeError("Gloo: connection closed")), 100)
    # The runtime may know better in the meantime.
    assert codes == [3, 1, 1, 1] and slept == [115]
    output = capsys.readouterr().err
    assert output.count("Traceback") == 3 and "ValueError: unforeseen" in output


def test_mistakes_are_reported_by_the_process_that_makes_them(monkeypatch, tmp_path, capsys):
    """What the verb hands over to run in company ends in an exit code, not in an exception that all would wait for."""
    codes = []
    monkeypatch.setattr(processes, "run_supervised", lambda main, *_: codes.append(main()) or codes[-1])
    for error in (UserError("wrong"), OSError(28, "full", "disk"), KeyboardInterrupt()):
        monkeypatch.setattr(loop, "main", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        cli.main(["train", "--config=experiments/shapes.py:smoke", f"--workdir={tmp_path}"])
    assert codes == [2, 74, 130]
    assert capsys.readouterr().err.splitlines() == [
        "scaling-dit: error: wrong", "scaling-dit: error: full: disk", "scaling-dit: interrupted",
    ]  # fmt: skip
