"""`scaling-dit report`: of a finished run, of one killed twice, and of a folder without a run."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from scaling_dit.checkpoints.workdir import read_metrics
from scaling_dit.cli import main as cli
from scaling_dit.monitor import goodput
from scaling_dit.training import report
from tests.support import xla


def test_a_finished_run(smoke_run, capsys):
    assert cli.main(["report", str(smoke_run), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    metrics = read_metrics(smoke_run)
    last = [row for row in metrics if "train/loss" in row][-1]
    assert facts["steps"] == facts["of"] == last["step"] and facts["checkpoints"][-1] == last["step"]
    assert facts["losses"][str(last["step"])] == last["train/loss"]
    assert (
        facts["evaluation"]["validation/loss"]["value"]
        == [row["validation/loss"] for row in metrics if "validation/loss" in row][-1]
    )
    figures = facts["goodput"]
    seconds = figures["seconds"]
    assert figures["starts"] == 1 and figures["lost_steps"] == 0 and figures["step"] == last["step"]
    assert sum(seconds.values()) == pytest.approx(figures["wall"], rel=1e-6)
    assert all(seconds[part] > 0 for part in ("compile", "start_up", "step", "evaluation", "checkpoint"))
    assert seconds["lost"] == seconds["downtime"] == 0


def test_the_table_and_the_flag(smoke_run, capsys):
    assert cli.main(["report", f"--workdir={smoke_run}"]) == 0
    out = capsys.readouterr().out
    assert "uvit, batch" in out and "validation/loss" in out and "wall time" in out and "goodput" in out


def test_a_run_without_a_record_of_its_time_says_so(smoke_run, tmp_path, capsys):
    (tmp_path / "config.json").write_text((smoke_run / "config.json").read_text())
    assert cli.main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "no record of its time" in out and "0.0%" not in out


@pytest.mark.parametrize(
    "arguments, message",
    [([], "takes one run, not 0"), (["a", "b"], "not 2"), (["nowhere"], "no run in nowhere")],
)
def test_mistakes_take_one_line(arguments, message, capsys):
    assert cli.main(["report", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


@pytest.mark.slow
def test_the_parts_of_a_run_killed_twice_are_its_wall_time(tmp_path):
    """Against a clock outside, from the creation of the first process to the last line of the last one."""
    steps, every = 100, 40
    command = [
        sys.executable, "-m", "scaling_dit", "train", "--config=experiments/shapes.py:smoke", f"--workdir={tmp_path}",
        f"--config.steps={steps}", "--config.eval.every=50", f"--config.checkpoint.every={every}",
        "--config.log.every=1", "--config.log.tensorboard=false",
    ]  # fmt: skip
    environment = {**os.environ, "XLA_FLAGS": xla.flags(devices=1)}

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def kill_after(step: int) -> None:
        process = start()
        while max((row["step"] for row in read_metrics(tmp_path)), default=0) < step:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()

    began = time.monotonic()
    kill_after(11)
    time.sleep(2.0)
    kill_after(every + 11)
    last = start()
    printed = []
    for line in last.stderr:
        printed.append(line)
        ended = time.monotonic()
        if line.startswith("goodput "):
            break
    last.stderr.close()
    assert last.wait(timeout=60) == 0, printed

    figures = report.report(tmp_path)["goodput"]
    assert sum(figures["seconds"].values()) == pytest.approx(figures["wall"], rel=1e-6)
    assert figures["wall"] == pytest.approx(ended - began, rel=0.01)
    assert figures["starts"] == 3 and figures["step"] == steps
    # At most back to the checkpoint before, each time.
    assert 1 <= figures["lost_steps"] <= 2 * every
    assert figures["seconds"]["downtime"] >= 2.0 and figures["seconds"]["lost"] > 0
    assert printed[-1] == goodput.lines(figures)[-1] + "\n"
