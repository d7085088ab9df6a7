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
from scaling_dit.sampling import pipeline
from tests.support import xla

STEPS = 30
COMMAND = [
    sys.executable, "-m", "scaling_dit", "train", "--config=experiments/shapes.py:smoke", f"--config.steps={STEPS}",
    "--config.eval.every=0", "--config.checkpoint.every=4", "--config.log.every=1", "--config.log.tensorboard=false",
    "--config.backbone.depth=1",
]  # fmt: skip
# One device: the quickest layout.
ENVIRONMENT = {**os.environ, "XLA_FLAGS": xla.flags(devices=1)}


def run(workdir: pathlib.Path) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, f"--workdir={workdir}"], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )


def finish(workdir: pathlib.Path) -> None:
    process = run(workdir)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


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


def steps_logged(workdir: pathlib.Path) -> int:
    return (
        max((row["step"] for row in read_metrics(workdir)), default=0)
        if (workdir / "metrics").exists()
        else 0
    )


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
    kill_when(tmp_path, lambda: saving(tmp_path))
    finish(tmp_path)
    assert_same(tmp_path, uninterrupted)


@pytest.mark.slow
def test_killed_at_three_random_moments(uninterrupted, tmp_path):
    moments = np.sort(np.random.default_rng().choice(np.arange(1, STEPS - 4), 3, replace=False))
    print("killed after steps", moments)
    for moment in moments:
        kill_when(tmp_path, lambda moment=moment: steps_logged(tmp_path) >= moment)
    finish(tmp_path)
    assert_same(tmp_path, uninterrupted)


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_its_code(uninterrupted, tmp_path):
    process = run(tmp_path)
    while steps_logged(tmp_path) < 6:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "SIGTERM: saved step" in errors.strip().splitlines()[-1]
    finish(tmp_path)
    assert_same(tmp_path, uninterrupted)
