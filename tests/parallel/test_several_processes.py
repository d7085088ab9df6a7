"""One run by several real processes on this machine: the same losses, the same end, and no hanging on."""

import os
import pathlib
import re
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
from scaling_dit.errors import UserError
from scaling_dit.monitor import heartbeat
from scaling_dit.parallel import processes
from scaling_dit.sampling import pipeline
from scaling_dit.training import loop
from tests.support import xla

HEARTBEAT = 20
COMMAND = [
    sys.executable, "-m", "scaling_dit", "train", "--config=experiments/shapes.py:smoke", "--config.mesh.data=2",
    "--config.mesh.fsdp=2", "--config.log.every=1", "--config.log.tensorboard=false", "--config.checkpoint.every=5",
    f"--config.processes.heartbeat={HEARTBEAT}", "--config.backbone.depth=1",
]  # fmt: skip


def start(workdir: pathlib.Path, count: int, *overrides: str) -> list[subprocess.Popen]:
    """`count` processes with four devices together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "XLA_FLAGS": xla.flags(devices=4 // count)}
    command = [*COMMAND, f"--workdir={workdir}", *overrides]
    joined = [f"--coordinator=localhost:{port}", f"--processes={count}"] if count > 1 else []
    return [
        subprocess.Popen(
            [*command, *joined, *([f"--process={process}"] if joined else [])],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
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


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_same_losses_by_one_two_and_four_processes(tmp_path):
    for name, count in {"one": 1, "two": 2, "two again": 2, "four": 4}.items():
        finish(start(tmp_path / name, count, "--config.steps=20"))
    reference = losses(tmp_path / "one")
    assert len(reference) == 20
    for name in ("two", "four"):
        np.testing.assert_allclose(losses(tmp_path / name), reference, rtol=0, atol=1e-5)
    assert losses(tmp_path / "two") == losses(tmp_path / "two again")
    for ema in (None, 0.995):
        first, again = (pipeline.load(tmp_path / name, ema=ema).params for name in ("two", "two again"))
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    # Validation loss, sample grid and evaluation are made by all processes together.
    last = {name: read_metrics(tmp_path / name)[-1] for name in ("one", "two")}
    several = {"speed/slowest_process", "speed/slowest_host_wait"}
    assert last["one"].keys() | several == last["two"].keys()
    assert last["two"]["speed/slowest_process"] in (0, 1) and last["two"]["speed/slowest_host_wait"] >= 0
    beats = heartbeat.read(Workdir(tmp_path / "two").heartbeats)
    assert [(beat["process"], beat["state"], beat["step"]) for beat in beats] == [
        (0, "done", 20),
        (1, "done", 20),
    ]
    assert last["two"]["validation/loss"] == pytest.approx(last["one"]["validation/loss"], abs=1e-5)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_with_image_conditions(tmp_path):
    """Each makes the masks and edges of its own rows, which follow from their positions."""
    changes = [
        "--config.conditioning.names=('inpaint','edges')",
        "--config.conditions.edges.concat=channel",
        "--config.backbone.depth=1",
        "--config.checkpoint.every=100",
        "--config.eval.every=0",
        "--config.steps=3",
    ]
    finish(start(tmp_path / "two", 2, *changes))
    mesh = [word for word in COMMAND if word.startswith("--config.") and "processes" not in word]
    config = config_lib.load("experiments/shapes.py:smoke", [*mesh, *changes])
    state = loop.train(config, tmp_path / "one", jax.devices()[:4])
    reference = losses(tmp_path / "one")
    assert len(reference) == 3
    np.testing.assert_allclose(losses(tmp_path / "two"), reference, rtol=0, atol=1e-5)
    found = pipeline.load(tmp_path / "two").params["backbone"]["condition_embed"]
    wanted = state.params["backbone"]["condition_embed"]
    assert set(found) == {"inpaint", "edges"} and np.abs(found["edges"]["kernel"]).max() > 0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        # Adam's first steps follow the sign of a gradient, which rounding may turn.
        np.testing.assert_allclose(a, b, rtol=0, atol=2 * 3 * config.optim.learning_rate)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("lost", [1, 0])
def test_a_lost_process_ends_the_others_and_another_count_goes_on(tmp_path, lost):
    started = start(tmp_path, 2, "--config.steps=100000", "--config.eval.every=0")
    wait_for_step(tmp_path, 5, started)
    os.kill(child(started[lost]), signal.SIGKILL)
    began = time.monotonic()
    other = started[1 - lost]
    output = other.communicate(timeout=3 * HEARTBEAT)[1]
    # Some seconds for what the machine does besides.
    assert time.monotonic() - began < HEARTBEAT + 10
    assert other.returncode == 75
    (line,) = re.findall(r"scaling-dit: .*lost.*", output)
    assert line.startswith(f"scaling-dit: process {lost} is lost: ")
    assert "Check failure" not in output and "Traceback" not in output
    assert "ended by SIGKILL" in started[lost].communicate(timeout=60)[1]
    assert started[lost].returncode == 137

    step = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    before = losses(tmp_path)
    resumed = start(tmp_path, 4 if lost else 1, "--config.steps=100000", "--config.eval.every=0")
    wait_for_step(tmp_path, step + 5, resumed)
    resumed[0].send_signal(signal.SIGTERM)
    finish(resumed, code=75)
    after = losses(tmp_path)
    assert len(after) >= step + 5
    np.testing.assert_allclose(after[:step], before[:step], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_sigterm_at_one_process_saves_the_same_step_in_all(tmp_path):
    started = start(tmp_path, 2, "--config.steps=100000", "--config.eval.every=0")
    wait_for_step(tmp_path, 5, started)
    started[1].send_signal(signal.SIGTERM)
    steps = [re.findall(r"SIGTERM: saved step (\d+);", output) for output in finish(started, code=75)]
    assert len(steps[0]) == 1 and steps[0] == steps[1]
    assert pipeline.load(tmp_path).step == int(steps[0][0])


@pytest.mark.slow
def test_a_mistake_of_one_process_and_a_missing_process_are_reported(tmp_path):
    started = start(tmp_path, 2, "--config.processes.start_up=15")
    started[1].kill()
    started[1].communicate()
    output = started[0].communicate(timeout=120)[1]
    assert started[0].returncode == 75
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
    assert processes.run_supervised(lambda: 7, None, {"heartbeat": 100, "start_up": 300}, []) == 7


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
    from scaling_dit.cli import main as cli

    codes = []
    monkeypatch.setattr(processes, "run_supervised", lambda main, *_: codes.append(main()) or codes[-1])
    for error in (UserError("wrong"), OSError(28, "full", "disk"), KeyboardInterrupt()):
        monkeypatch.setattr(loop, "main", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        cli.main(["train", "--config=experiments/shapes.py:smoke", f"--workdir={tmp_path}"])
    assert codes == [2, 74, 130]
    assert capsys.readouterr().err.splitlines() == [
        "scaling-dit: error: wrong", "scaling-dit: error: full: disk", "scaling-dit: interrupted",
    ]  # fmt: skip
