"""safetensors files: whole and in shards, as the Hugging Face libraries write and read them."""

import json
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from etils import epath
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors import torch as safetensors_torch

from scaling_dit.errors import UserError
from scaling_dit.weights import files as weight_files

STEM = "diffusion_pytorch_model"


def some_weights():
    rng = np.random.default_rng(0)
    sizes = {"a.weight": (10, 10), "b.weight": (3,), "c.weight": (200,), "d.bias": (), "e": (40, 2)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in sizes.items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype, name
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def test_one_file_says_that_it_is_torchs(tmp_path):
    weights = some_weights()
    assert weight_files.write(epath.Path(tmp_path), STEM, weights, 10**6) == [f"{STEM}.safetensors"]
    with safe_open(tmp_path / f"{STEM}.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    in_torch = safetensors_torch.load_file(tmp_path / f"{STEM}.safetensors")
    assert_same({name: tensor.numpy() for name, tensor in in_torch.items()}, weights)
    assert_same(weight_files.read(epath.Path(tmp_path)), weights)
    assert_same(weight_files.read(epath.Path(tmp_path / f"{STEM}.safetensors")), weights)


@pytest.mark.parametrize("limit", [800, 1200, 1214])
def test_shards_are_those_of_hugging_face(tmp_path, limit):
    weights = some_weights()
    files = weight_files.write(epath.Path(tmp_path), STEM, weights, limit)
    assert sorted(files) == sorted(path.name for path in tmp_path.iterdir())
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=f"{STEM}{{suffix}}.safetensors", max_shard_size=limit
    )
    assert split.is_sharded
    index = json.loads((tmp_path / f"{STEM}.safetensors.index.json").read_text())
    assert index == {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    for file, names in split.filename_to_tensors.items():
        assert safetensors_torch.load_file(tmp_path / file).keys() == set(names)
    assert_same(weight_files.read(epath.Path(tmp_path)), weights)
    assert_same(weight_files.read(epath.Path(tmp_path / f"{STEM}.safetensors.index.json")), weights)


def test_an_entry_over_the_limit_has_its_own_shard(tmp_path):
    weights = some_weights()
    files = weight_files.write(epath.Path(tmp_path), STEM, weights, 1)
    assert len(files) == len(weights) + 1
    assert_same(weight_files.read(epath.Path(tmp_path)), weights)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_keeps_its_bits(tmp_path, dtype):
    weights = {"w": np.arange(6, dtype=np.float32).reshape(2, 3).astype(dtype) / dtype(3)}
    weight_files.write(epath.Path(tmp_path), "model", weights, 10**6)
    found = weight_files.read(epath.Path(tmp_path))["w"]
    assert found.dtype == weights["w"].dtype and found.shape == (2, 3)
    np.testing.assert_array_equal(found.view(np.uint16), weights["w"].view(np.uint16))
    np.testing.assert_array_equal(
        safetensors_torch.load_file(tmp_path / "model.safetensors")["w"].float().numpy(),
        weights["w"].astype(np.float32),
    )


def refused(path, match):
    with pytest.raises(UserError, match=match) as error:
        weight_files.read(epath.Path(path))
    assert "\n" not in str(error.value)


def test_pickles_are_refused_unread(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("opened").touch, ())

    for name in ("pytorch_model.bin", "model.ckpt"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps(Trap()))
        refused(path, rf"{name} is a pickle, .*\.safetensors files only")
    refused(tmp_path, "is a pickle")
    assert not (tmp_path / "opened").exists()


def test_what_is_no_weights_is_one_line(tmp_path):
    refused(tmp_path / "nowhere", "no file or folder .*nowhere")
    refused(tmp_path, r"holds no \.safetensors file")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "neither .safetensors")
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet").mkdir()
    refused(tmp_path, "a whole pipeline; give the folder of its backbone, unet")
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    refused(tmp_path, "several sets of weights: one.safetensors, two.safetensors")


def test_eight_bit_floats_are_one_line(tmp_path):
    tensors = {"a": torch.zeros(2), "w": torch.zeros(2, 2, dtype=torch.float8_e4m3fn)}
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, "model.safetensors holds w as F8_E4M3, which cannot be read; convert it to F32")


def test_damaged_files_are_one_line(tmp_path):
    weight_files.write(epath.Path(tmp_path), "model", some_weights(), 10**6)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (b"", whole[:50], whole[:-4], b"\xff" * 100):
        path.write_bytes(damaged)
        refused(path, "model.safetensors is damaged or no safetensors file: ")


def test_an_index_must_fit_its_shards(tmp_path):
    weight_files.write(epath.Path(tmp_path), "model", some_weights(), 400)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())

    def rewritten(**places):
        changed = index | {"weight_map": index["weight_map"] | places}
        index_path.write_text(json.dumps(changed))

    rewritten(extra=index["weight_map"]["e"])
    refused(tmp_path, "does not hold what model.safetensors.index.json says it holds: extra")
    rewritten(extra="../elsewhere.safetensors")
    refused(tmp_path, "names the shard '../elsewhere.safetensors', which is not beside it")
    rewritten(extra="gone.safetensors")
    refused(tmp_path, "names the shard 'gone.safetensors'")
    index_path.write_text("{")
    refused(tmp_path, "is not valid JSON")
    index_path.write_text("[]")
    refused(tmp_path, "must hold a JSON object, it holds a list")
    index_path.write_text("{}")
    refused(tmp_path, "has no weight_map")


@pytest.mark.parametrize(
    "pattern", ["{stem}-{n:05d}-of-00002.fp16.safetensors", "{stem}.fp16-{n:05d}-of-00002.safetensors"]
)
def test_a_variant_alone_is_read_by_its_index(tmp_path, pattern):
    weights = some_weights()
    names = list(weights)
    places = {}
    for n, part in enumerate((names[:2], names[2:]), start=1):
        file = pattern.format(stem=STEM, n=n)
        safetensors_torch.save_file({name: torch.from_numpy(weights[name]) for name in part}, tmp_path / file)
        places |= dict.fromkeys(part, file)
    with pytest.raises(UserError, match="holds shards, such as .* without their index"):
        weight_files.read(epath.Path(tmp_path))
    index = tmp_path / f"{STEM}.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert_same(weight_files.read(epath.Path(tmp_path)), weights)
    assert_same(weight_files.read(epath.Path(index)), weights)
    # The usual files, where they are, and one variant of two only where it is named.
    (tmp_path / f"{STEM}.safetensors.index.bf16.json").write_text(index.read_text())
    with pytest.raises(UserError, match="several sets of weights"):
        weight_files.read(epath.Path(tmp_path))
    weight_files.write(epath.Path(tmp_path), STEM, {"a": np.zeros(1, np.float32)}, 10**6)
    assert weight_files.read(epath.Path(tmp_path)).keys() == {"a"}
