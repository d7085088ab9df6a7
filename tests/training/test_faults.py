"""Runs that meet damage, other processes, leftovers and devices that are too small."""

import os
import shutil
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from scaling_dit import storage
from scaling_dit.checkpoints.lease import Held
from scaling_dit.checkpoints.workdir import (
    Workdir,
    claim_workdir,
    load_tokenizer,
    open_workdir,
    tokenizer_hash,
)
from scaling_dit.errors import StorageError, UserError
from scaling_dit.training import loop
from scaling_dit.training.loop import train
from tests.support.damage import flip_of_data
from tests.support.paths import ROOT
from tests.support.runs import assert_same_bits, losses, tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(workdir, final state) of a run with checkpoints at steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(tiny(steps=4, checkpoint__every=2), workdir, devices=jax.devices()[:1])


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(whole, tmp_path, capsys):
    run = Workdir(shutil.copytree(whole[0], tmp_path / "run"))
    flip_of_data(run.checkpoints / "4")
    with pytest.raises(UserError, match="4 is damaged"):
        train(tiny(steps=4, checkpoint__every=2), run, devices=jax.devices()[:1], strict=True)
    state = train(tiny(steps=4, checkpoint__every=2), run, devices=jax.devices()[:1])
    assert_same_bits(state, whole[1])
    assert losses(run.folder) == losses(whole[0])
    assert [path.name for path in run.damaged_checkpoints.iterdir()] == ["4"]
    assert f"it is now {run.damaged_checkpoints}/4" in capsys.readouterr().err


HOLDER = """
    import sys, time
    from etils import epath
    from scaling_dit.checkpoints.lease import Lease
    lease = Lease(epath.Path(sys.argv[1]) / "lease.json", sys.argv[1])
    lease.acquire()
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_workdir_that_another_process_writes_is_refused_before_anything_is_built(whole):
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), whole[0]],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout.readline() == "held\n"
        with pytest.raises(Held, match=rf"is written by process {other.pid} on host .*, for \d+ s"):
            train(tiny(steps=4, checkpoint__every=2), whole[0], devices=jax.devices()[:1])
        other.kill()


def test_a_run_that_began_meanwhile_is_not_mixed_with(tmp_path, monkeypatch):
    """Two starts in one new folder: the second claims it while the first one builds."""
    run, build = Workdir(tmp_path), loop.Run.open.__globals__["build_model"]

    def slow(*args):
        run.config.write_text("{}")
        return build(*args)

    monkeypatch.setitem(loop.Run.open.__globals__, "build_model", slow)
    with pytest.raises(UserError, match="another process began a run in"):
        train(tiny(), tmp_path, devices=jax.devices()[:1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_what_a_start_left_that_failed_half_way_is_not_trusted(tmp_path):
    """A tokenizer without a config: of another experiment, cut short, or of nobody."""
    config, run = tiny(), Workdir(tmp_path)
    fresh = open_workdir(run, config)
    new = tokenizer_hash(run, fresh)
    for left in (b"", b'{"words": [', b'["of", "another", "experiment"]'):
        run.tokenizer.write_bytes(left)
        tokenizer = open_workdir(run, config)
        assert tokenizer_hash(run, tokenizer) == new
    claim_workdir(run, config, tokenizer)
    assert load_tokenizer(config, run) == fresh and tokenizer_hash(run, fresh) == new


def test_a_disk_that_is_full_at_the_start_claims_nothing(tmp_path, monkeypatch):
    def full(path, data):
        if path.name == "config.json":
            raise StorageError(f"cannot write {path}: No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr("scaling_dit.files.write_whole", full)
    with pytest.raises(StorageError, match="No space left on device"):
        train(tiny(checkpoint__retry=0.0), tmp_path / "run", devices=jax.devices()[:1])
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["tokenizer.json"]


def test_a_folder_that_vanishes_is_noticed_before_the_next_save(tmp_path, monkeypatch, capsys):
    shown = loop.Progress.update

    def vanish(self, step, loss=None):
        shown(self, step, loss)
        if step == 3:
            (tmp_path / "run").rename(tmp_path / "moved")

    monkeypatch.setattr(loop.Progress, "update", vanish)
    with pytest.raises(StorageError, match="cannot write to .*run: .*run is gone, or was replaced"):
        train(
            tiny(steps=6, checkpoint__every=2, checkpoint__retry=0.0),
            tmp_path / "run",
            devices=jax.devices()[:1],
        )
    assert not (tmp_path / "run").exists()
    assert [path.name for path in (tmp_path / "moved" / "checkpoints").iterdir()] == ["2"]


def test_devices_without_memory_are_one_line():
    with (
        pytest.raises(
            UserError, match=r"batch 8 .*optim\.accumulate.*backbone\.remat.*`scaling-dit plan`"
        ) as error,
        loop.memory_explained(tiny()),
    ):
        jnp.ones((2**45,)).block_until_ready()
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_several_processes_wait_together_before_a_save(tmp_path, monkeypatch, capsys):
    """What refuses shows before any process has begun its part of the checkpoint."""
    flushed, refusals = [], ["once", "twice"]
    probe = tmp_path / "writable"

    class Refusing:
        def write_bytes(self, data):
            if refusals:
                refusals.pop()
                raise OSError(28, "No space left on device")
            probe.write_bytes(data)

        def __str__(self):
            return str(probe)

    run = SimpleNamespace(
        workdir=SimpleNamespace(writable=Refusing()),
        config=SimpleNamespace(checkpoint=SimpleNamespace(retry=30.0)),
    )
    outputs = SimpleNamespace(
        lease=SimpleNamespace(check=lambda: None),
        writer=SimpleNamespace(flush=lambda: flushed.append(True)),
    )
    monkeypatch.setattr(storage, "_FIRST", 0.01)
    loop.check_writable(run, outputs)
    assert flushed and not probe.exists(), "one process tries the save itself again"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    loop.check_writable(run, outputs)
    assert probe.read_bytes() == b"" and not refusals
    assert f"cannot write {probe}: No space left on device; trying again for 30 s" in capsys.readouterr().err
    refusals.append("for good")
    run.config.checkpoint.retry = 0.0
    with pytest.raises(StorageError, match="writable: No space left"):
        loop.check_writable(run, outputs)
