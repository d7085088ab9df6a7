"""Checkpoints that a disk damages: never read in silence, set aside by name, and older ones kept till then."""

import os
import random
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from scaling_dit.checkpoints.store import Checkpoints, Damaged
from scaling_dit.errors import StorageError, UserError
from tests.support.damage import flip, flip_of_data
from tests.support.paths import ROOT

RANDOM = np.random.default_rng(0).normal(size=(2, 64, 16)).astype(np.float32)
STATE = {
    "params": {"a": jnp.asarray(RANDOM[0]), "b": jnp.asarray(RANDOM[1], jnp.bfloat16)},
    "emas": {"0.9": {"a": jnp.ones((64, 16)), "b": jnp.zeros((64, 16))}},
    "step": jnp.int32(3),
}
# TensorStore finishes a second read after the first has failed, and finds nobody waiting.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of steps 1 to 3, to be copied."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, keep_last=9) as store:
        for step in (1, 2, 3):
            store.save(step, STATE, {"rewinds": step})
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return epath.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def same(got):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(STATE), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_no_flipped_bit_is_loaded_in_silence(copied):
    """Random bits all over the files of a checkpoint: what is read is what was saved, or it is refused."""
    found = [*sorted((copied / "3").glob("*/*")), *sorted((copied / "3").glob("*/*/d/*"))]
    files = [path for path in found if path.is_file()]
    draw, refused = random.Random(0), 0
    assert len(files) > 3
    for number in range(36):
        path = files[number % len(files)]
        whole = path.read_bytes()
        flip(path, draw.randrange(len(whole) * 8))
        with Checkpoints(copied, read_only=True) as store:
            try:
                got, extra = store.restore(3, STATE)
                same(got)
                assert extra == {"rewinds": 3}
            except UserError:
                # In one line, as every UserError.
                refused += 1
        path.write_bytes(whole)
    assert refused > 10


@pytest.mark.parametrize("ema, name", [(None, "params/b"), ("0.9", "emas/0.9/b")])
def test_parameters_alone_are_compared_as_well(copied, ema, name):
    with Checkpoints(copied, read_only=True) as store:
        target = STATE["params"] if ema is None else STATE["emas"][ema]
        store.restore_params(3, target, ema=ema)
        sealed = store._sealed(3)
        sealed.arrays[name] = (sealed.arrays[name][0], "0" * 16)
        store._sealed = lambda step: sealed
        with pytest.raises(Damaged, match=f"/3 is damaged.*{name} has another checksum than was saved"):
            store.restore_params(3, target, ema=ema)


def test_damaged_ones_are_set_aside_and_named(copied, tmp_path, capsys):
    flip_of_data(copied / "3")
    (copied / "2" / "state" / "manifest.ocdbt").unlink()
    aside = epath.Path(tmp_path / "aside")
    with Checkpoints(copied, keep_last=9) as store:
        got, extra = store.restore_newest(STATE, aside)
        assert extra == {"rewinds": 1} and store.all_steps() == [1]
        # The step can be saved again.
        assert store.save(3, STATE, wait=True) and store.all_steps() == [1, 3]
    same(got)
    assert sorted(path.name for path in aside.iterdir()) == ["2", "3"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for step, line in zip((3, 2), lines, strict=True):
        assert f"{copied}/{step} is damaged" in line and f"now {aside}/{step}" in line


def test_strict_refuses_and_touches_nothing(copied, tmp_path):
    flip_of_data(copied / "3")
    with Checkpoints(copied, keep_last=9) as store, pytest.raises(Damaged, match="/3 is damaged"):
        store.restore_newest(STATE, epath.Path(tmp_path / "aside"), strict=True)
    assert sorted(path.name for path in copied.iterdir()) == ["1", "2", "3"]
    assert not (tmp_path / "aside").exists()


def test_where_all_are_damaged_nothing_is_moved_and_nothing_starts_over(copied, tmp_path):
    for step in "123":
        flip_of_data(copied / step)
    with Checkpoints(copied, keep_last=9) as store:
        with pytest.raises(Damaged, match=r"none of the 3 checkpoints in .* can be used: .*/3 is damaged"):
            store.restore_newest(STATE, epath.Path(tmp_path / "aside"))
        assert store.all_steps() == [1, 2, 3]


def test_another_shape_is_a_mistake_and_no_damage(copied, tmp_path):
    wide = {**STATE, "params": {**STATE["params"], "a": jnp.ones((64, 17))}}
    with Checkpoints(copied, keep_last=9) as store:
        with pytest.raises(UserError, match="params/a is float32") as error:
            store.restore_newest(wide, epath.Path(tmp_path / "aside"))
        assert not isinstance(error.value, Damaged)
        assert store.all_steps() == [1, 2, 3]


def test_a_disk_that_cannot_be_reached_is_no_damage(copied, tmp_path, monkeypatch):
    with Checkpoints(copied, keep_last=9) as store:
        refusal = ValueError(
            "PERMISSION_DENIED: Error reading local file: Permission denied [os_error_code='13']"
        )
        monkeypatch.setattr(store._manager, "restore", lambda *_, **__: (_ for _ in ()).throw(refusal))
        with pytest.raises(StorageError, match="cannot read checkpoint .*/3: Permission denied"):
            store.restore_newest(STATE, epath.Path(tmp_path / "aside"))
        assert store.all_steps() == [1, 2, 3]


def test_nothing_is_removed_before_the_first_save_of_a_start_was_read_back(copied):
    with Checkpoints(copied, keep_last=1, verify_first=True) as store:
        store.save(4, STATE)
        # It has been read back by now, so the next save removes the others.
        assert store.all_steps() == [1, 2, 3, 4]
        store.save(5, STATE, wait=True)
        assert store.all_steps() == [5]


def test_a_first_save_that_reads_back_otherwise_stops_the_run(copied, monkeypatch):
    with Checkpoints(copied, keep_last=1, verify_first=True) as store:
        finish = store._manager.wait_until_finished

        def damage():
            finish()
            if (copied / "4").exists():
                flip_of_data(copied / "4")

        monkeypatch.setattr(store._manager, "wait_until_finished", damage)
        with pytest.raises(
            StorageError, match="/4 is damaged.*as soon as it was written; older checkpoints are kept"
        ):
            store.save(4, STATE)
        assert store.all_steps() == [1, 2, 3, 4]


FULL = """
    import resource, sys, threading, time
    import jax.numpy as jnp, numpy as np
    from scaling_dit.checkpoints.store import Checkpoints
    from scaling_dit.errors import StorageError

    folder, noise = sys.argv[1], jnp.asarray(np.random.default_rng(0).normal(size=(256, 256)), jnp.float32)
    # Several, of which the disk refuses each.
    state = {str(i): noise + i for i in range(12)}
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(folder, keep_last=1) as store:
        store.save(1, state, wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, whole[1]))
        for wait in (True, False):
            try:
                store.save(2, state, wait=wait)
                store.wait()
            except StorageError as error:
                print(error.exit_code, error)
        assert store.all_steps() == [1], store.all_steps()
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
        store.restore(1, state)
    with Checkpoints(folder, keep_last=1, patience=60) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, whole[1]))
        threading.Timer(1.0, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, whole)).start()
        # The first one fails in the background; the next one takes its place.
        store.save(2, state)
        store.save(3, state, wait=True)
        assert store.all_steps() == [3], store.all_steps()
        store.restore(3, state)

    # Parts that Orbax had not begun when another one was refused, which a real save seldom leaves behind.
    def async_serialize_from_host():
        async def write_fragment(): ...
        return write_fragment()
    async def ours(): ...
    async_serialize_from_host()
    ours()
"""


def test_a_full_disk_costs_no_checkpoint_and_prints_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL), tmp_path],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(
        line.startswith("74 cannot write ") and "File too large" in line for line in lines
    )
    assert "Traceback" not in done.stderr
    # On a busy machine Orbax says that a save waited for the one before.
    expected = "trying again", "Waiting for previous save"
    printed = [line for line in done.stderr.splitlines() if not any(text in line for text in expected)]
    # A coroutine of our own that is forgotten is a fault, and is still said.
    assert len(printed) == 2 and "coroutine 'ours' was never awaited" in printed[0], printed
