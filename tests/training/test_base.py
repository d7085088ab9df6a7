"""What a run can begin from, as the user names it."""

import shutil
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from scaling_dit import backbones
from scaling_dit.backbones import contract
from scaling_dit.backbones.conditions import condition_of
from scaling_dit.backbones.state_dicts import to_state_dict
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.errors import UserError
from scaling_dit.training.base import FileBase, RunBase, Start, open_base
from tests.support.layouts import FIELDS


def test_a_step_follows_an_at_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", str(tmp_path))
    assert Start.parse("$RUNS/base@500") == Start(f"{tmp_path}/base", 500)
    assert Start.parse(tmp_path / "base/") == Start(f"{tmp_path}/base")
    # A folder whose own name ends so.
    (tmp_path / "base@7").mkdir()
    assert Start.parse(f"{tmp_path}/base@7").step is None
    monkeypatch.chdir(tmp_path)
    assert Start.parse("user@host/run").place == f"{tmp_path}/user@host/run"
    assert Start.parse("gs://bucket/run@12", "0.99") == Start("gs://bucket/run", 12, "0.99")
    assert Start.parse("run", "none") == Start(f"{tmp_path}/run")
    assert str(Start("run", 5)) == "run@5"


def test_a_run_is_read_by_step_and_average(smoke_run):
    newest = open_base(Start(str(smoke_run)))
    assert isinstance(newest, RunBase) and newest.step == 4 and newest.ema is None and newest.trains_text
    older = open_base(Start(str(smoke_run), 2, "0.995"))
    assert (older.step, older.ema, older.text_length) == (2, "0.995", 16)
    with Checkpoints(smoke_run / "checkpoints", read_only=True) as store:
        stored = store.describe_params(2, ema="0.995")
        assert stored["backbone"]["pos_embed"].shape == (1 + 16 + 4, 32)
        assert stored["backbone"]["pos_embed"].dtype == np.float32
        with pytest.raises(UserError, match="no EMA '0.5' in checkpoint"):
            store.describe_params(2, ema="0.5")


@pytest.mark.parametrize(
    "place, step, ema, line",
    [
        ("{run}", 3, None, r"no checkpoint of step 3 in .*; there are: \[2, 4\]"),
        ("{run}", None, "0.5", "keeps no EMA of decay 0.5; it keeps 0.995"),
        ("{here}/nothing", None, None, "no run and no file there"),
        ("{here}/nothing", 5, None, "is no run's folder, so it has no step 5"),
        ("{here}/text.txt", None, None, "is neither .safetensors"),
        ("{here}/broken.safetensors", None, None, "is damaged or no safetensors file"),
        ("{here}/whole.safetensors", None, "0.9", "is no run's folder, so it has no EMA 0.9"),
        ("{here}/model.bin", None, None, "is a pickle"),
        ("{here}/torn", None, None, "has checkpoints but no config.json"),
    ],
)
def test_what_is_no_base(smoke_run, tmp_path, place, step, ema, line):
    (tmp_path / "text.txt").write_text("a run")
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 9)
    (tmp_path / "model.bin").write_bytes(b"")
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "whole.safetensors")
    (tmp_path / "torn/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=line):
        open_base(Start(place.format(run=smoke_run, here=tmp_path), step, ema))


def test_another_tokenizer_than_the_checkpoint_s_is_refused(smoke_run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(smoke_run, copy)
    base = open_base(Start(str(copy)))
    assert len(base.tokenizer()) > 10
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace("red", "rod", 1))
    with pytest.raises(UserError, match="was trained with another tokenizer.json"):
        base.tokenizer()


@pytest.mark.parametrize(
    "name, had, kept",
    [
        ("uvit", (), ()),
        ("uvit", ("b",), ("b",)),
        ("uvit", ("a", "b"), ("a", "b")),
        pytest.param("unet", (), (), marks=pytest.mark.slow),
        pytest.param("unet", ("a", "b"), ("a", "b"), marks=pytest.mark.slow),
    ],
)
def test_a_file_may_lack_conditions_that_are_new(name, had, kept):
    concat, positions = ("token", "shifted") if name == "uvit" else ("channel", "shared")
    both = {"a": ("a", 5, "channel", "shared"), "b": ("b", 4, concat, positions)}
    backbone = backbones.create(name, text_dim=16, conditions=tuple(both.values()), **FIELDS[name])
    there = backbone.clone(conditions=tuple(both[one] for one in had))
    made = contract.abstract_variables(there, contract.example_inputs(there, (8, 8, 4), (5, 16)))
    state = to_state_dict(there, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), made))
    text = types.SimpleNamespace(length=5, dim=16)
    model = types.SimpleNamespace(backbone=backbone, latent_shape=(8, 8, 4), text_encoder=text)
    found = FileBase(Start("file"), state).describe(model)
    assert {condition_of(path) for path in found} - {None} == set(kept)
    assert len(found) == len(jax.tree.leaves(made["params"]))
