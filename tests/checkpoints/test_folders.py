"""Folders of checkpoints: names that Orbax misreads, and where damaged ones go."""

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from scaling_dit.checkpoints.folders import set_aside, spelled_for_orbax
from scaling_dit.checkpoints.store import Checkpoints

STATE = {"params": {"w": jnp.arange(4.0)}}
NAMES = ["lr[1e-3]", "a\\b", "[!a]", "a?b", "a*b", "a#b", "a%20b", "a b", "größe", "a\nb", "{x}", "\udcff"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_every_name_is_written_and_read(tmp_path, name):
    with Checkpoints(tmp_path / name / "checkpoints", verify_first=True) as store:
        store.save(1, STATE, {"a": 1}, wait=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with Checkpoints(tmp_path / name / "checkpoints", read_only=True) as store:
        got, extra = store.restore(None, STATE)
    np.testing.assert_array_equal(got["params"]["w"], np.arange(4.0))
    assert extra == {"a": 1}


def test_plain_names_are_used_as_they_are(tmp_path):
    for path in (epath.Path("/runs/lr=1e-3, b"), epath.Path("gs://bucket/lr[1e-3]"), tmp_path / "none[1]"):
        assert spelled_for_orbax(epath.Path(path), make=False)[0] == epath.Path(path)
    assert not (tmp_path / "none[1]").exists()


def test_nothing_set_aside_replaces_what_is_there(tmp_path):
    aside = epath.Path(tmp_path / "aside")
    for content in "abc":
        (tmp_path / "7").mkdir()
        (tmp_path / "7" / "x").write_text(content)
        set_aside(epath.Path(tmp_path / "7"), aside)
    assert {path.name: (path / "x").read_text() for path in aside.iterdir()} == {
        "7": "a",
        "7-2": "b",
        "7-3": "c",
    }
    assert not (tmp_path / "7").exists()


def test_a_store_that_cannot_move_removes(tmp_path, monkeypatch):
    folder = epath.Path(tmp_path / "7")
    folder.mkdir()

    def refuse(self, target):
        raise NotImplementedError

    monkeypatch.setattr(type(folder), "rename", refuse)
    assert set_aside(folder, epath.Path(tmp_path / "aside")) is None
    assert not folder.exists()
