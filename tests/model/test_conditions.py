"""Image conditions of a model: encoding without randomness, dropping, shapes of a batch, and mistakes of a config."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_dit import config as config_lib
from scaling_dit.errors import UserError
from scaling_dit.model import build
from scaling_dit.model.build import build_model, make_tokenizer, open_source
from scaling_dit.training.program import batch_shapes, run_mesh
from scaling_dit.training.step import draw_conditions
from tests.support.runs import tiny

NAMES = {"conditioning__names": ("inpaint", "edit")}


def model_of(**changes):
    config = tiny(**changes)
    source = open_source(config)
    return config, build_model(config, make_tokenizer(config, source), source)


@pytest.fixture(scope="module")
def pixels():
    return model_of(**NAMES)


def given(batch=2, side=16, masks=1, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (batch, side, side, 3 + masks), np.uint8)


def test_an_image_is_encoded_and_a_mask_averaged(pixels):
    _, model = pixels
    images = {"inpaint": given(), "edit": given(masks=0)}
    found = jax.jit(lambda x: model.encode_conditions({"codec": {}}, x))(images)
    assert {name: image.shape for name, image in found.items()} == {
        "inpaint": (2, 16, 16, 4),
        "edit": (2, 16, 16, 3),
    }
    np.testing.assert_allclose(found["edit"], images["edit"] / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(found["inpaint"][..., 3:], images["inpaint"][..., 3:] / 255, atol=1e-6)
    _, model = dct()
    found = model.encode_conditions({"codec": {}}, {"inpaint": given()})["inpaint"]
    codec = model.codec
    wanted = codec.encode({}, jnp.asarray(given()[..., :3]), jax.random.key(0))
    np.testing.assert_allclose(found[..., : codec.channels], wanted, atol=1e-5)
    mask = given()[..., 3].reshape(2, 8, 2, 8, 2).mean((2, 4)) / 255
    np.testing.assert_allclose(found[..., codec.channels], mask, atol=1e-6)
    # Of a prepared set: moments of latents with their masks behind.
    stored = jnp.concatenate([wanted, jnp.asarray(mask)[..., None]], axis=-1).astype(jnp.bfloat16)
    again = model.encode_conditions({"codec": {}}, {"inpaint": stored})["inpaint"]
    np.testing.assert_array_equal(again, stored.astype(jnp.float32))


def test_an_image_without_masks_needs_no_sides_that_divide(pixels):
    class Thirds:
        """Latents of 5x5 for images of 16x16."""

        def moments(self, params, images):
            return images[:, :15:3, :15:3].astype(jnp.float32)

        def mean(self, params, moments):
            return moments

    model = dataclasses.replace(pixels[1], codec=Thirds())
    found = model.encode_conditions({"codec": {}}, {"edit": given(masks=0)})["edit"]
    np.testing.assert_array_equal(found, given(masks=0)[:, :15:3, :15:3])


def dct():
    overrides = ["codec.name=dct", "backbone.patch=4", "conditioning.names=('inpaint',)"]
    config = config_lib.load("experiments/shapes.py:smoke", [f"--config.{one}" for one in overrides])
    source = open_source(config)
    return config, build_model(config, make_tokenizer(config, source), source)


def test_the_backbone_is_built_for_the_channels_of_its_conditions(pixels):
    config, model = pixels
    assert model.backbone.conditions == (("inpaint", 4, "token", "shared"), ("edit", 3, "token", "shared"))
    shapes = batch_shapes(config, model, run_mesh(config, jax.devices()[:1]))
    assert {name: leaf.shape for name, leaf in shapes["conditions"].items()} == {
        "inpaint": (8, 16, 16, 4), "edit": (8, 16, 16, 3)
    }  # fmt: skip


def test_each_condition_is_dropped_on_its_own_and_the_share_is_as_asked(pixels):
    _, model = pixels
    batch = {
        "conditions": {
            "inpaint": np.zeros((4000, 1, 1, 4), np.uint8),
            "edit": np.zeros((4000, 1, 1, 3), np.uint8),
        }
    }
    present = {}
    for seed in (0, 1):
        found = draw_conditions(Flat(model), {}, batch, jax.random.key(seed))
        present[seed] = {name: np.asarray(shown) for name, (_, shown) in found.items()}
    for name in ("inpaint", "edit"):
        assert 0.07 < 1 - present[0][name].mean() < 0.13
        assert (present[0][name] != present[1][name]).any()
    both = ~present[0]["inpaint"] & ~present[0]["edit"]
    assert 0.003 < both.mean() < 0.02
    # Without the other condition the same rows are dropped.
    alone = draw_conditions(Flat(model, 1), {}, batch, jax.random.key(0))
    np.testing.assert_array_equal(alone["inpaint"][1], present[0]["inpaint"])


class Flat:
    """A model whose conditions are taken as they are."""

    def __init__(self, model, count=2):
        self.conditions = model.conditions[:count]

    def encode_conditions(self, frozen, given):
        return {name: jnp.asarray(image) for name, image in given.items()}


class NoMean:
    """A codec of a user's own from before conditions."""

    channels = 4

    def shape(self, size):
        return size // 3, size // 3, 4


def test_a_codec_that_cannot_encode_conditions_is_one_line(pixels):
    read = pixels[1].conditions
    with pytest.raises(UserError, match=r"config.codec 'my:Codec' has no mean\(params, moments\)"):
        build._check_conditions(read, NoMean(), "my:Codec", 16)
    build._check_conditions((), NoMean(), "my:Codec", 16)
    NoMean.mean = lambda self, params, moments: moments
    with pytest.raises(
        UserError, match="'inpaint' has a mask, and latents of 5x5 do not divide images of 16x16"
    ):
        build._check_conditions(read, NoMean(), "my:Codec", 16)
