"""Frozen and pretrained weights in a run: where they come from, what is kept, and that others are refused."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from scaling_dit import config as config_lib
from scaling_dit import trees
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.checkpoints.workdir import Workdir, read_config
from scaling_dit.cli import main as cli
from scaling_dit.encoders.scratch import Scratch
from scaling_dit.errors import UserError
from scaling_dit.model.build import abstract_params, build_model, make_tokenizer
from scaling_dit.model.frozen import frozen_hash, open_frozen, save_frozen
from scaling_dit.parallel.mesh import make_mesh
from scaling_dit.sampling import pipeline
from scaling_dit.training.loop import train
from scaling_dit.training.start import Run

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Given(Scratch):
    """The scratch encoder from a file: every parameter is the number in it."""

    weights: str = ""

    def load(self):
        value = np.float32(pathlib.Path(self.weights).read_text())
        abstract = trees.unbox(jax.eval_shape(self.init, KEY))
        return jax.tree.map(lambda leaf: np.full(leaf.shape, value, leaf.dtype), abstract)


class Wrong(Given):
    """One that loads less than it needs."""

    def load(self):
        return {"embedding": np.zeros((2, 2), np.float32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny autoencoder as diffusers saves it."""
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 3}
    path = tmp_path_factory.mktemp("vae")
    AutoencoderKL(**kinds, **sizes).save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    (tmp_path / "half.txt").write_text("0.5")
    return tmp_path / "half.txt"


def config(codec="", text="", **changes):
    """A run of seconds; the places of its codec and text encoder."""
    found = config_lib.load("experiments/shapes.py:smoke").copy_and_resolve_references().unlock()
    found.codec = {"name": "vae", "weights": str(codec)}
    found.text_encoder = {
        "name": f"{__name__}:Given",
        "weights": str(text),
        "dim": 32,
        "depth": 1,
        "heads": 2,
    }
    found.train_text_encoder = False
    found.update_from_flattened_dict(
        {
            "steps": 1,
            "optim.decay": "constant",
            "optim.warmup_steps": 0,
            "backbone.patch": 2,
            "eval.every": 0,
            "checkpoint.every": 1,
            "log.tensorboard": False,
            **changes,
        }
    )
    return config_lib.resolve(found)


# Widths of the autoencoder, the one part here whose shapes differ -> the shapes of a model, (parameters, frozen).
TRACED = {}


def shapes(model):
    """Those of `model.init`, traced once: a text encoder of a user's own is traced for each model by itself."""
    widths = model.codec.architecture.widths
    if widths not in TRACED:
        TRACED[widths] = jax.eval_shape(model.init, KEY)
    return TRACED[widths]


def opened(workdir, *places, mesh=None, **changes):
    """(model, frozen weights, their logical axes, those of the parameters) of a run, opened without compiling it."""
    settings = config(*places, **changes)
    model = build_model(settings, make_tokenizer(settings))
    boxed_params, boxed = shapes(model)
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    return model, open_frozen(Workdir(workdir).frozen, model, settings.seed, mesh, boxed), boxed, boxed_params


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_pretrained_weights_are_loaded_and_only_initialised_ones_kept(folder, text, tmp_path):
    model, frozen, _, _ = opened(tmp_path, folder, "random")
    equal(frozen["codec"], model.codec.load())
    save_frozen(Workdir(tmp_path).frozen, model, frozen)
    with np.load(Workdir(tmp_path).frozen) as kept:
        assert all(name.startswith("text_encoder/") for name in kept) and len(kept.files)
    # Kept ones are read back.
    equal(opened(tmp_path, folder, "random", seed=1)[1], frozen)
    initialised = opened(tmp_path / "other", folder, "random", seed=1)[1]
    assert (
        np.abs(
            np.asarray(initialised["text_encoder"]["embedding"]) - frozen["text_encoder"]["embedding"]
        ).max()
        > 0
    )
    (tmp_path / "none").mkdir()
    model, frozen, _, _ = opened(tmp_path / "none", folder, text)
    assert np.unique(frozen["text_encoder"]["embedding"]).tolist() == [0.5]
    save_frozen(Workdir(tmp_path / "none").frozen, model, frozen)
    assert not list((tmp_path / "none").iterdir())


def test_weights_lie_in_their_shardings(folder, text, tmp_path):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    _, frozen, _, _ = opened(tmp_path, folder, text, mesh=mesh)
    kernel = frozen["codec"]["encoder"]["mid"]["res_0"]["conv1"]["kernel"]
    assert kernel.sharding.spec[2:] == ("fsdp", "tensor")
    equal(frozen, opened(tmp_path, folder, text)[1])


def test_the_hash_is_of_what_the_weights_mean(folder, text, tmp_path):
    def digest(codec, text=text):
        model, frozen, _, _ = opened(tmp_path / "new", codec, text)
        return frozen_hash(frozen, *model.encoders)

    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    (tmp_path / "one.txt").write_text("1")
    first = digest(folder)
    assert first == digest(moved)
    assert first != digest(folder, tmp_path / "one.txt")
    described = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(described | {"scaling_factor": 0.5}))
    assert first != digest(moved)


@pytest.mark.parametrize(
    ("field", "size"),
    [pytest.param("codec", 83_653_863, marks=pytest.mark.slow), ("text_encoder", 13_920)],
)
def test_a_run_needs_weights_that_counting_does_not(field, size, folder, tmp_path):
    places = ("", "random") if field == "codec" else (folder, "")
    with pytest.raises(UserError, match=f"config.{field}.weights is empty"):
        opened(tmp_path, *places)
    counted = abstract_params(config(*places))[field]
    assert sum(leaf.size for leaf in jax.tree.leaves(counted)) == size


def test_a_load_that_does_not_fit_its_init_is_refused(folder, text, tmp_path):
    with pytest.raises(UserError, match=r"text_encoder.load gives other parameters than its init: blocks_0/"):
        opened(tmp_path, folder, text, **{"text_encoder.name": f"{__name__}:Wrong"})


@pytest.mark.slow
def test_a_run_resumes_wherever_its_weights_have_moved_but_not_with_others(folder, text, tmp_path, capsys):
    workdir, devices = tmp_path / "run", jax.devices()[:1]
    train(config(folder, text), workdir, devices=devices)
    assert not Workdir(workdir).frozen.exists()
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    text.rename(tmp_path / "here.txt")
    (tmp_path / "one.txt").write_text("1")
    other = config(moved, tmp_path / "one.txt", steps=2)
    with pytest.raises(UserError, match="trained with other frozen weights"):
        train(other, workdir, devices=devices)
    # A start that was refused changes nothing.
    assert read_config(workdir).codec.weights == str(folder)
    train(config(moved, tmp_path / "here.txt"), workdir, devices=devices)
    pipe = pipeline.load(workdir)
    assert pipe.config.codec.weights == str(moved)
    assert np.unique(pipe.frozen["text_encoder"]["embedding"]).tolist() == [0.5]
    assert pipe.sample(["a red circle"], steps=2).shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_training_starts_from_pretrained_weights(folder, text, tmp_path):
    settings = config(folder, text, train_text_encoder=True)
    run = Run.open(settings, Workdir(tmp_path / "run"), jax.devices()[:1])
    with Checkpoints(run.workdir.checkpoints) as store:
        state, _, loader = run.begin(store, ())
        loader.close()
    for tree in (state.params, *state.emas.values()):
        assert all(np.unique(leaf).tolist() == [0.5] for leaf in jax.tree.leaves(tree["text_encoder"]))
    fresh = run.program.init(jax.random.key(settings.seed))
    equal(state.params["backbone"], fresh.params["backbone"])


def test_the_command_reports_it_in_one_line(tmp_path, capsys):
    arguments = ["train", "--config=experiments/shapes.py:smoke", f"--workdir={tmp_path / 'run'}"]
    assert cli.main([*arguments, "--config.codec.name=vae", "--config.backbone.patch=2"]) == 2
    error = capsys.readouterr().err
    assert "config.codec.weights is empty" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
