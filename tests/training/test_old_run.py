"""A run that an earlier version began: it opens, resumes and samples as that version did.

`golden/old_run` has the workdir at step 3, in run.tar.xz, and what the version that wrote it (commit f07845f) computed
from there: parameters and average at step 6, losses, and images of both steps. Its config.json has the field names of
its time. What is read must be equal to the last bit. What is computed may differ by rounding on another processor.
"""

import hashlib
import json
import subprocess
import sys
import tarfile

import jax
import numpy as np
import pytest
from etils import epath

import scaling_dit
from scaling_dit import config as config_lib
from scaling_dit.checkpoints.workdir import read_config, read_metrics
from scaling_dit.config import renamed
from scaling_dit.monitor.grid import read_png
from tests.support import xla
from tests.support.paths import GOLDEN, ROOT

OLD = GOLDEN / "old_run"
RECORDED = json.loads((OLD / "recorded.json").read_text())
EMA = 0.995
PROMPT = "a small red circle above a large blue square"
# How the run was started, in the names of this version.
OVERRIDES = (
    "--config.checkpoint.every=3",
    "--config.checkpoint.keep_last=1",
    "--config.optim.decay=constant",
    "--config.backbone.hidden=8",
    "--config.backbone.depth=2",
    "--config.backbone.heads=1",
    "--config.text_encoder.dim=8",
    "--config.text_encoder.heads=1",
    "--config.text_encoder.depth=1",
    "--config.eval.every=0",
    "--config.log.tensorboard=false",
    "--config.batch=4",
)


@pytest.fixture
def workdir(tmp_path):
    with tarfile.open(OLD / "run.tar.xz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    return tmp_path / "run"


def weights(workdir, ema=None):
    """Path -> array of the parameters, or of an average, of the newest checkpoint."""
    params = scaling_dit.load(workdir, ema=ema).params
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves}


def sha256(arrays):
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    return digest.hexdigest()


def test_the_config_has_the_names_of_its_time_and_is_the_same_run(workdir):
    saved = json.loads((workdir / "config.json").read_text())
    for key in renamed.FIELDS:
        section, _, name = key.rpartition(".")
        assert name in saved[section], key
    assert saved["eval"]["metrics"] == ["tifa"] and "sharding" not in saved
    config = read_config(workdir)
    assert config.eval.metrics == ("shapes_tifa",)
    config_lib.check_same_run(
        config, config_lib.load("experiments/shapes.py:smoke", [*OVERRIDES, "--config.steps=6"])
    )


def test_it_opens_with_the_very_weights(workdir):
    assert sha256(weights(workdir)) == RECORDED["sha256"]["step 3 params"]
    assert sha256(weights(workdir, EMA)) == RECORDED["sha256"]["step 3 ema"]


@pytest.mark.slow
def test_it_resumes_and_samples_as_the_version_that_wrote_it(workdir):
    train = ["train", "--config=experiments/shapes.py:smoke", f"--workdir={workdir}", "--config.steps=6"]
    run([sampling(workdir, 3), [*train, *OVERRIDES], sampling(workdir, 6)], workdir.parent / "compiled")
    losses = {row["step"]: row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row}
    assert losses == pytest.approx({int(step): loss for step, loss in RECORDED["losses"].items()}, rel=1e-5)
    for label, ema in (("params", None), ("ema", EMA)):
        found, wanted = weights(workdir, ema), np.load(OLD / f"{label}_6.npz")
        assert found.keys() == set(wanted)
        for name, array in found.items():
            np.testing.assert_allclose(array, wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for step in (3, 6):
        image = read_png(epath.Path(workdir.parent / f"sample_{step}" / "00000.png")).astype(int)
        recorded = read_png(epath.Path(OLD / f"sample_{step}.png")).astype(int)
        assert image.shape == recorded.shape
        # Of 256 levels, one by rounding.
        assert np.abs(image - recorded).max() <= 1
    # From now on it is a run of this version.
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["sharding"] == {"gather_once": False, "sparse_core": False}
    assert "mask_text" not in saved["backbone"] and saved["eval"]["metrics"] == ["shapes_tifa"]


def sampling(workdir, step):
    out = workdir.parent / f"sample_{step}"
    return ["sample", f"--workdir={workdir}", "--steps=4", "--guidance=3", "--seed=7", f"--out={out}", PROMPT]


def run(commands, cache):
    """Runs commands as the recorded ones were: on one device, compiled with all of XLA's optimizations."""
    code = f"from scaling_dit.cli import main as cli; assert not any(map(cli.main, {commands!r}))"
    # Those of the tests (conftest.py) are others, and what they compiled has other rounding.
    environment = xla.plain_environment() | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    # Both samples are of one program.
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
