"""Pretrained text encoders inside runs: sharded, frozen or trained, with the tokenizer that the workdir keeps."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import scaling_dit
from scaling_dit import config as config_lib
from scaling_dit import encoders, trees
from scaling_dit.checkpoints.workdir import Workdir, claim_workdir, open_workdir
from scaling_dit.encoders import clip, clip_vision, t5, vocabularies
from scaling_dit.encoders.clip import ClipText
from scaling_dit.encoders.subwords import SubwordTokenizer
from scaling_dit.encoders.t5 import T5Text
from scaling_dit.errors import UserError
from scaling_dit.model.build import abstract_params, make_tokenizer
from scaling_dit.parallel import rules
from scaling_dit.parallel.mesh import make_mesh
from scaling_dit.training.loop import train
from tests.support import text_towers
from tests.support.paths import DOCS

CLIP = {"text_encoder.name": "clip", "text_encoder.size": "tiny", "text_encoder.length": 16}


def tiny(**changes):
    fields = {"eval.every": 0, "log.tensorboard": False, "train_text_encoder": False, "text_mask": False}
    fields["backbone.depth"] = 1
    fields |= CLIP | {key.replace("__", "."): value for key, value in changes.items()}
    return config_lib.load("shapes:smoke", [f"--config.{key}={value}" for key, value in fields.items()])


@pytest.fixture
def vocabulary(tmp_path):
    """A folder with a tokenizer alone, which a test may take away."""
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    shutil.copy(text_towers.clip_vocabulary(), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ClipText, T5Text])
def test_tokens_and_gradients_on_a_mesh_are_those_of_one_device(kind):
    # No axis of the mesh divides 11.
    encoder = kind(size="tiny", length=11)
    boxed = jax.eval_shape(encoder.init, jax.random.key(0))
    params = trees.unbox(jax.jit(encoder.init)(jax.random.key(0)))
    mask = np.arange(11) < np.arange(4, 12)[:, None]
    ids = np.where(mask, np.random.default_rng(0).integers(5, 30_000, mask.shape), 0).astype(np.int32)

    def outcome(params, ids, mask):
        def loss(params):
            tokens, _, pooled = encoder.apply(params, ids, mask)
            return jnp.mean(jnp.sin(tokens)) + jnp.mean(jnp.cos(pooled)), (tokens, pooled)

        return jax.value_and_grad(loss, has_aux=True)(params)

    alone = jax.device_get(jax.jit(outcome)(params, ids, mask))
    mesh = make_mesh(data=1, fsdp=2, context=2, tensor=2)
    shardings = rules.param_shardings(mesh, boxed)
    split = {str(sharding.spec) for sharding in jax.tree.leaves(shardings)}
    assert any("tensor" in spec and "fsdp" in spec for spec in split)
    inputs = jax.device_put((ids, mask), rules.batch_sharding(mesh))
    with rules.activate(mesh):
        shared = jax.device_get(jax.jit(outcome)(jax.device_put(params, shardings), *inputs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), shared, alone)


def test_sizes_need_no_tokenizer():
    """What counting and planning build."""
    for name, size in (("clip", "openclip-h"), ("t5", "xxl")):
        config = tiny(text_encoder__name=name, text_encoder__size=size)
        assert make_tokenizer(config) is None
        shapes = abstract_params(config)["text_encoder"]
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert count == {"clip": 340_387_840, "t5": 4_762_310_656}[name]


def test_a_workdir_keeps_the_tokenizer(vocabulary, tmp_path):
    config = tiny(text_encoder__weights="random", text_encoder__tokenizer_files=vocabulary)
    workdir = epath.Path(tmp_path / "run")
    tokenizer = open_workdir(workdir, config)
    assert isinstance(tokenizer, SubwordTokenizer)
    assert not workdir.exists()
    claim_workdir(workdir, config, tokenizer)
    shutil.rmtree(vocabulary)
    assert open_workdir(workdir, config) == tokenizer
    # A place may change.
    assert open_workdir(workdir, tiny(text_encoder__weights="random")) == tokenizer
    with pytest.raises(UserError, match=r"text_encoder.size is 'tiny' there and 'clip-l' here"):
        open_workdir(workdir, tiny(text_encoder__weights="random", text_encoder__size="clip-l"))
    Workdir(workdir).tokenizer.write_text(json.dumps({"words": []}))
    with pytest.raises(UserError, match=r"tokenizer.json is damaged or no tokenizer"):
        open_workdir(workdir, config)
    Workdir(workdir).tokenizer.unlink()
    with pytest.raises(UserError, match=r"no tokenizer at .*tokenizer.json; `train` writes it"):
        open_workdir(workdir, config)
    with pytest.raises(UserError, match=r"has no tokenizer: set config.text_encoder.weights"):
        open_workdir(epath.Path(tmp_path / "new"), tiny(text_encoder__weights="random"))


def test_encoders_without_one_of_their_own_get_words_of_the_captions():
    assert encoders.tokenizer_type("scratch") is encoders.scratch.WordTokenizer
    assert encoders.tokenizer_type("clip") is encoders.tokenizer_type("t5") is SubwordTokenizer
    with pytest.raises(UserError, match=r"unknown text encoder 'clipp'; did you mean 'clip'\?"):
        encoders.tokenizer_type("clipp")


@pytest.mark.slow
@pytest.mark.usefixtures("on_one_device")
def test_a_run_with_a_frozen_random_tower(vocabulary, tmp_path):
    """Padding is shown, as Stable Diffusion 2 does; the run can be sampled after the vocabulary is gone."""
    config = tiny(steps=2, text_encoder__weights="random", text_encoder__tokenizer_files=vocabulary)
    train(config, tmp_path / "run", jax.devices()[:1])
    shutil.rmtree(vocabulary)
    pipe = scaling_dit.load(tmp_path / "run")
    assert set(pipe.params) == {"backbone"}
    tokens, mask, pooled = pipe.encode_text(["a red circle", ""])
    assert tokens.shape == (2, 16, 32) and mask is None and pooled.shape == (2, 32)
    ids, _ = pipe.model.text_encoder.tokenize(["a red circle", ""])
    encode = jax.jit(ClipText(size="tiny", length=16).apply)
    alone = encode(pipe.frozen["text_encoder"], ids, None)
    np.testing.assert_allclose(tokens, alone[0], atol=1e-5)
    np.testing.assert_allclose(pooled, alone[2], atol=1e-5)
    images = pipe.sample(["a red circle"], steps=1)
    assert images.shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_a_tower_that_is_trained_starts_at_its_weights(tmp_path):
    text_towers.clip_text(2).save_pretrained(tmp_path / "text_encoder")
    text_towers.save_clip_words(tmp_path / "tokenizer")
    places = {"text_encoder__weights": tmp_path, "optim__learning_rate": 1e-9, "optim__warmup_steps": 0}
    config = tiny(steps=1, train_text_encoder=True, **places)
    state = train(config, tmp_path / "run", jax.devices()[:1])
    loaded = ClipText(weights=str(tmp_path), size="tiny").load()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), state.params["text_encoder"], loaded
    )
    words, start = state.params["text_encoder"]["words"], loaded["words"]
    assert (np.asarray(words) != start).any()


def test_the_page_names_every_size_and_every_file():
    page = (DOCS / "text_encoders.md").read_text()
    for name, module in (("clip", clip), ("t5", t5)):
        (row,) = re.findall(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
        assert re.findall(r"`([\w-]+)`", row.split("|")[3]) == list(module.SIZES)
        fields = encoders.text_encoder_fields(name)
        assert {"weights", "size", "length", "tokenizer_files", "dtype", "param_dtype"} <= set(fields)
    assert clip_vision.SIZES.keys() == clip.SIZES.keys()
    assert clip.SIZES["openclip-h"].pad_id == 0 and clip.SIZES["clip-l"].pad_id == 49_407
    for file in vocabularies._KINDS.replace(" or ", ", ").replace(" with ", ", ").split(", "):
        assert f"`{file}`" in page
