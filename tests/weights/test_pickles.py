"""Pickles to safetensors: what torch saved comes back bit for bit, and what needs code is refused."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import safetensors
import torch

from scaling_dit.cli import main as cli
from scaling_dit.weights import files, places


def convert(source, out):
    return cli.main(["import", "--to=safetensors", f"--from={source}", f"--out={out}"])


def metadata(path):
    with safetensors.safe_open(str(path), framework="np") as file:
        return file.metadata()


def test_types_views_and_shared_tensors_come_back(tmp_path, capsys):
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    weights = {
        "a": base,
        "tied": base,
        "row": base[1],
        "turned": base.T,
        "half": base.half(),
        "brain": base.bfloat16(),
        "ids": torch.arange(5),
    }
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "last.ckpt")
    assert convert(tmp_path / "last.ckpt", tmp_path / "model.safetensors") == 0
    assert "7 tensors" in (out := capsys.readouterr().out) and "left out: epoch" in out
    found = files.read(tmp_path / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert str(found[name].dtype) == str(value.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found[name].astype(np.float32), value.float().numpy())
    metadata_of_file = metadata(tmp_path / "model.safetensors")
    assert (
        metadata_of_file["source_sha256"] == hashlib.sha256((tmp_path / "last.ckpt").read_bytes()).hexdigest()
    )
    assert (metadata_of_file["source"], metadata_of_file["format"]) == ("last.ckpt", "pt")


def test_shards_get_an_index_and_are_read_as_a_place(tmp_path, capsys):
    source, out = tmp_path / "there", tmp_path / "here"
    source.mkdir()
    shards = {"pytorch_model-00001-of-00002.bin": "one", "pytorch_model-00002-of-00002.bin": "two"}
    for file, name in shards.items():
        torch.save({name: torch.ones(3)}, source / file)
    index = {"metadata": {}, "weight_map": {name: file for file, name in shards.items()}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (source / "config.json").write_text('{"architectures": ["T5EncoderModel"]}')
    assert convert(source / "pytorch_model.bin.index.json", out) == 0
    found = places.open_weights(str(out), part="", classes=("T5EncoderModel",), field="text_encoder.weights")
    assert set(found.tensors) == {"one", "two"}
    assert (out / "model-00002-of-00002.safetensors").exists()
    np.testing.assert_array_equal(found.tensors["two"], np.ones(3))
    assert convert(source / "pytorch_model.bin.index.json", out) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_torchscript_archive_gives_its_state_dict(tmp_path):
    module = torch.nn.Linear(2, 3)
    torch.jit.script(module).save(str(tmp_path / "script.pt"))
    assert convert(tmp_path / "script.pt", tmp_path / "model.safetensors") == 0
    found = files.read(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(found["weight"], module.weight.detach().numpy())


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("unpickled!",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.ones(2), "trap": Trap()}, "could run any code"),
        (torch.ones(2), "holds a Tensor, not a state dict"),
        ({"epoch": 3}, "holds no tensors"),
        ({"model": {"a": torch.ones(1)}, "ema": {"a": torch.ones(1)}}, "several sets of tensors: model, ema"),
        ({"a": torch.ones(2).to_sparse()}, "sparse"),
    ],
)
def test_files_that_cannot_be_converted_are_reported_in_one_line(content, message, tmp_path, capsys):
    torch.save(content, tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt", tmp_path / "model.safetensors") == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1
    assert "unpickled!" not in printed.out
    assert not (tmp_path / "model.safetensors").exists()


def test_files_that_are_damaged_or_misplaced(tmp_path, capsys):
    torch.save({"a": torch.ones(64)}, tmp_path / "whole.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "whole.bin").read_bytes()[:300])
    (tmp_path / "text.bin").write_text("hello")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"a": np.ones(2)}))
    (tmp_path / "there.safetensors").write_bytes(b"")
    for source, out, message in (
        ("cut.bin", "x.safetensors", "damaged"),
        ("text.bin", "x.safetensors", "damaged"),
        ("plain.bin", "x.safetensors", "no file of PyTorch"),
        ("none.bin", "x.safetensors", "no file"),
        ("whole.bin", "x.bin", "must end in .safetensors"),
        ("whole.bin", "there.safetensors", "is there already"),
        (".", "x.safetensors", "is a folder"),
    ):
        assert convert(tmp_path / source, tmp_path / out) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, (source, error)
    assert cli.main(["import", "--to=safetensors", "--from=a", "--out=b", "--workdir=c"]) == 2
    assert cli.main(["import", "--out=b", "--from=a"]) == 2
