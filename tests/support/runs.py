"""Runs of a few seconds, and comparisons of what they leave."""

import functools
import pathlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import scaling_dit
from scaling_dit import config as config_lib
from scaling_dit.checkpoints.workdir import read_metrics
from scaling_dit.interop import importing
from scaling_dit.parallel.mesh import make_mesh
from scaling_dit.sampling import pipeline
from scaling_dit.training import loop, program

STEPS = 20
# Tests make runs of the same programs by turns, on one device and on several: those of one file are those of others.
program.KEPT = 24


def tiny(steps: int = STEPS, **changes) -> ConfigDict:
    """A run of seconds; `changes` are dotted keys with __ for the dot.

    The learning rate is constant after warm-up, so that runs of any number of steps share one compiled step. The
    backbone has one block: what is traced, compiled and saved takes the time. `smoke_run` has three, and so must what
    begins with its weights.
    """
    config = config_lib.load("experiments/shapes.py:smoke")
    overrides = {
        "steps": steps,
        "eval.every": 0,
        "checkpoint.every": 1000,
        "log.every": 1,
        "log.tensorboard": False,
        "optim.decay": "constant",
        "backbone.depth": 1,
    }
    overrides |= {key.replace("__", "."): value for key, value in changes.items()}
    with config.unlocked():
        config.update_from_flattened_dict(overrides)
        if "eval.metrics" in overrides:
            # Only metrics that are named have a section; `resolve` adds those.
            del config["metrics"]
    return config_lib.resolve(config)


def open_on_one_device(patch: pytest.MonkeyPatch, count: int = 1) -> None:
    """Until the patch ends, runs are opened, and imported, on one device: it compiles faster, and writes less.

    `count` says on how many, for tests of which several devices are the subject but eight are not.
    """
    patch.setattr(pipeline, "make_mesh", lambda devices: make_mesh(devices=devices[:count]))
    patch.setattr(importing, "run_mesh", functools.partial(program.run_mesh, devices=jax.devices()[:count]))


def train_on_one_device(patch: pytest.MonkeyPatch) -> None:
    """Until the patch ends, verbs and `scaling_dit.train` take one device by default, and not all that there are."""
    alone = functools.partial(loop.train, devices=jax.devices()[:1])
    # The package first: it takes its `train` from the loop when it is asked for it.
    for module in (scaling_dit, loop):
        patch.setattr(module, "train", alone)


def open_once(patch: pytest.MonkeyPatch) -> None:
    """Until the patch ends, a run is read, and what samples from it compiled, once for all that open it alike.

    On one device. For runs that do not change: what is asked for is its folder, the step and the average, and those
    sections of the config that say how images are made.
    """
    open_on_one_device(patch)
    real, found = pipeline.open_run, dict[tuple, pipeline.Pipeline]()

    def open_run(config, workdir, step=None, ema=None):
        known = {name: value for name, value in config.to_dict().items() if name not in ("eval", "metrics")}
        key = str(workdir), step, ema, repr(known)
        if key not in found:
            found[key] = real(config, workdir, step, ema)
        return found[key]

    patch.setattr(pipeline, "open_run", open_run)


def leaves(state):
    return {
        jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)
    }


def losses(workdir: pathlib.Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row]


def assert_same_bits(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
