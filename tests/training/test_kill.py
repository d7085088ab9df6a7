"""kill -9 at any moment, then the same command again: the parameters end bit for bit as if nothing had happened."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from scaling_dit.checkpoints.workdir import read_metrics
from scaling_dit.cli import main as cli
from scaling_dit.sampling import pipeline
from tests.support import xla

# One device: the quickest layout.
pytestmark = pytest.mark.usefixtures("verbs_on_one_device")

STEPS = 30
ARGUMENTS = [
    "train", "--config=experiments/shapes.py:smoke", f"--config.steps={STEPS}", "--config.eval.every=0",
    "--config.checkpoint.every=4", "--config.log.every=1", "--config.log.tensorboard=false",
    "--config.backbone.depth=1",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "XLA_FLAGS": xla.flags(devices=1)}


def run(workdir: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "scaling_dit", *ARGUMENTS, f"--workdir={workdir}"]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def finish(workdir: pathlib.Path) -> None:
    """The same command, which nobody ends."""
    assert cli.main([*ARGUMENTS, f"--workdir={workdir}"]) == 0


def kill_when(workdir: pathlib.Path, moment) -> None:
    """Starts the run and kills it as soon as `moment()` is true."""
    process = run(workdir)
    deadline = time.monotonic() + 300
    while not moment():
        assert process.poll() is None, f"ended before it was killed: {process.stderr.read()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def saving(workdir: pathlib.Path) -> bool:
    """Whether a checkpoint is being written: it lies under another name until it is complete."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return any(name.isdigit() for name in names) and any("tmp" in name for name in names)


def result(workdir: pathlib.Path):
    return pipeline.load(workdir, step=STEPS), pipeline.load(workdir, step=STEPS, ema=0.995)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    finish(workdir)
    return workdir


def assert_same(workdir: pathlib.Path, other: pathlib.Path) -> None:
    for ours, theirs in zip(result(workdir), result(other), strict=True):
        for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    kept = ("step", "train/loss", "train/grad_norm")
    rows = [[{key: row.get(key) for key in kept} for row in read_metrics(path)] for path in (workdir, other)]
    assert rows[0] == rows[1] and len(rows[0]) == STEPS


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save(uninterrupted, tmp_path):
    """tests/test_drill.py stops a run by SIGTERM too, and tests/scaling/test_study.py kills one before it has saved."""
    kill_when(tmp_path, lambda: saving(tmp_path))
    finish(tmp_path)
    assert_same(tmp_path, uninterrupted)
