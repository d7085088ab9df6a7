"""Places of pretrained weights: folders, pipelines, files, shards and pinned hub ids, and what is wrong with some."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
from etils import epath
from huggingface_hub import constants, utils

from scaling_dit.errors import UserError
from scaling_dit.weights import files as weight_files
from scaling_dit.weights import places
from scaling_dit.weights.places import locate, open_weights, read_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float16)}
PLACE = {"part": "vae", "classes": ("AutoencoderKL",), "field": "codec.weights"}


def write(folder, name="AutoencoderKL", shard_bytes=10**6):
    folder.mkdir(parents=True, exist_ok=True)
    weight_files.write(folder, "diffusion_pytorch_model", WEIGHTS, shard_bytes)
    (folder / "config.json").write_text(json.dumps({"_class_name": name}))
    return folder


def check(found):
    assert set(found.tensors) == {"a", "b"} and len(found.tensors) == 2
    for name, value in WEIGHTS.items():
        assert found.tensors[name].dtype == value.dtype
        np.testing.assert_array_equal(found.tensors[name], value)


def test_a_folder_its_file_its_shards_and_its_pipeline_are_the_same(tmp_path):
    pipeline = tmp_path / "pipeline"
    folder = write(pipeline / "vae")
    (pipeline / "model_index.json").write_text("{}")
    shards = write(tmp_path / "shards", shard_bytes=1)
    assert len(list(shards.glob("*.safetensors"))) == 2
    for place in (
        folder,
        pipeline,
        folder / "diffusion_pytorch_model.safetensors",
        shards,
        shards / "diffusion_pytorch_model.safetensors.index.json",
    ):
        found = open_weights(str(place), **PLACE)
        check(found)
        assert found.config == {"_class_name": "AutoencoderKL"} == read_config(str(place), **PLACE)
    alone = tmp_path / "alone.safetensors"
    shutil.copy(folder / "diffusion_pytorch_model.safetensors", alone)
    assert open_weights(str(alone), **PLACE).config is None


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    folder = write(tmp_path / "vae", shard_bytes=1)
    found = open_weights(str(folder), **PLACE)
    second = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    intact = second.read_bytes()
    # Where the values of b lie.
    second.write_bytes(intact[:-2] + b"\x00\x00")
    np.testing.assert_array_equal(found.tensors["a"], WEIGHTS["a"])
    # Mapped, not copied when it was opened.
    assert found.tensors["b"][-1] == 0


def test_a_remote_folder_is_read_through_copies(tmp_path):
    """A path that only etils can open: its files are copied where safetensors can map them."""
    folder = write(tmp_path / "vae", shard_bytes=1)
    copied = []

    class Remote(type(epath.Path(str(folder)))):
        def __str__(self):
            return f"gs://{super().__str__()}"

        def copy(self, target, **options):
            copied.append(self.name)
            return epath.Path(self.__fspath__().removeprefix("gs://")).copy(target, **options)

        def __fspath__(self):
            return super().__str__()

    tensors = weight_files.open_tensors(Remote(str(folder)))
    np.testing.assert_array_equal(tensors["a"], WEIGHTS["a"])
    np.testing.assert_array_equal(tensors["a"], WEIGHTS["a"])
    assert sorted(copied) == [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of huggingface_hub as a download leaves it, without network; gives the folder of the snapshot."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT


def test_a_pinned_hub_id_is_found_in_the_cache(cache):
    write(cache / "vae")
    (cache / "model_index.json").write_text("{}")
    for place in (f"hub:org/name@{COMMIT}", f"hub:org/name@{COMMIT}/vae"):
        found = open_weights(place, **PLACE)
        check(found)
        assert str(found.path) == str(cache / "vae")
    file = f"hub:org/name@{COMMIT}/vae/diffusion_pytorch_model.safetensors"
    check(open_weights(file, **PLACE))
    assert read_config(file, **PLACE) == {"_class_name": "AutoencoderKL"}
    with pytest.raises(UserError, match="'hub:org/other@0123.*cannot be had: "):
        open_weights(f"hub:org/other@{COMMIT}", **PLACE)


def test_only_what_is_needed_is_downloaded(cache, monkeypatch):
    """Of a repository with a whole pipeline, the small files and the weights of one part."""
    repository = {
        "model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "vae/old/x.safetensors",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin",
    }  # fmt: skip
    seen = set()

    def download(repo, *, revision, allow_patterns, ignore_patterns):
        assert (repo, revision) == ("org/name", COMMIT)
        chosen = utils.filter_repo_objects(
            repository, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for name in chosen:
            seen.add(name)
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            (cache / name).write_text(json.dumps({"_class_name": "AutoencoderKL"}))
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    small = {"model_index.json", "vae/config.json", "unet/config.json"}
    read_config(f"hub:org/name@{COMMIT}", **PLACE)
    assert seen == small
    locate(f"hub:org/name@{COMMIT}", part="vae", field="codec.weights")
    assert seen == small | {"vae/diffusion_pytorch_model.safetensors"}


def test_without_the_extra_a_hub_id_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'scaling-dit\[text\]'"):
        open_weights(f"hub:org/name@{COMMIT}", **PLACE)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("hub:org/name", "pin it"),
        ("hub:org/name@main", "pin it"),
        ("hub:org/name/vae", "pin it"),
        ("hub:name", "a hub id is hub:ORG/NAME@COMMIT"),
        ("nowhere", "no such file or folder"),
        ("pickled", "is a pickle.*scaling-dit import --to=safetensors --from="),
        ("pickled/diffusion_pytorch_model.bin", "is a pickle"),
        ("empty", "holds no .safetensors file"),
        ("unet", "holds a UNet2DConditionModel; it must hold a AutoencoderKL"),
        ("cut", "is damaged or no safetensors file"),
        ("config", "is not valid JSON"),
        ("pipeline", "a pipeline without the folder 'vae'"),
        ("half", "names the shard .* which is not beside it"),
    ],
)
def test_a_wrong_place_is_reported_in_one_line(place, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save({}, pickled / "diffusion_pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "unet", "UNet2DConditionModel")
    file = write(tmp_path / "cut") / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    (write(tmp_path / "config") / "config.json").write_text("{")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    next(write(tmp_path / "half", shard_bytes=1).glob("*-00002-*")).unlink()
    with pytest.raises(UserError, match=message) as error:
        open_weights(place, **PLACE)
    assert "\n" not in str(error.value) and ("codec.weights" in str(error.value) or place == "config")


def test_transformers_name_their_architectures(tmp_path):
    write(tmp_path / "text")
    (tmp_path / "text" / "config.json").write_text('{"architectures": ["CLIPTextModel"]}')
    options = {"part": "text_encoder", "field": "text_encoder.weights"}
    assert open_weights(str(tmp_path / "text"), classes=("CLIPTextModel", "CLIPModel"), **options).config
    with pytest.raises(UserError, match="holds a CLIPTextModel; it must hold a T5EncoderModel"):
        open_weights(str(tmp_path / "text"), classes=("T5EncoderModel",), **options)


def test_what_names_a_place():
    assert [places.is_place(weights) for weights in ("", "random", "vae")] == [False, False, True]
    assert "config.codec.weights is empty" in str(places.missing("codec.weights"))
