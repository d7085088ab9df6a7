"""The shapes of a model's weights: those of what it initialises, traced once for equal parts."""

import dataclasses
import json

import jax
import pytest

from scaling_dit.encoders.scratch import Scratch
from scaling_dit.encoders.vae import Autoencoder
from scaling_dit.model.build import build_model, make_tokenizer
from scaling_dit.model.model import Model
from tests.support.runs import tiny

# An autoencoder as diffusers describes it.
SMALL = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [4], "norm_num_groups": 2, "latent_channels": 3, "layers_per_block": 1,
}  # fmt: skip


@pytest.fixture
def traced(monkeypatch):
    """The models whose `init` ran."""
    seen, init = [], Model.init

    def noted(self, rng):
        seen.append(self)
        return init(self, rng)

    monkeypatch.setattr(Model, "init", noted)
    return seen


def model(**changes):
    config = tiny(**changes)
    return build_model(config, make_tokenizer(config))


def test_shapes_are_traced_once_for_equal_parts(traced):
    # A width that no other test has.
    one, same, frozen, wider = (
        model(backbone__hidden=width, train_text_encoder=trained)
        for width, trained in ((24, True), (24, True), (24, False), (40, True))
    )
    assert one.backbone is not same.backbone
    found = one.shapes()
    assert traced == [one]
    found[0]["backbone"].clear()
    assert jax.tree.leaves(same.shapes()[0]["backbone"]) and traced == [one]
    assert "text_encoder" in frozen.shapes()[1] and wider.shapes() != same.shapes()
    assert traced == [one, frozen, wider]
    assert same.shapes() == jax.eval_shape(same.init, jax.random.key(0))


class Own(Scratch):
    """A text encoder of a user's own, whose shapes may follow from more than its fields."""


def test_parts_of_a_users_own_are_traced_each_time(traced):
    one = model(backbone__hidden=24)
    encoder = one.text_encoder
    fields = {field.name: getattr(encoder, field.name) for field in dataclasses.fields(encoder)}
    other = dataclasses.replace(one, text_encoder=Own(**fields))
    assert other.shapes() == other.shapes() == one.shapes()
    assert traced.count(other) == 2


def test_an_architecture_that_is_read_from_a_file_is_one_of_the_parts(tmp_path, traced):
    one = model(backbone__hidden=24)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    for factor, times in ((0.5, 1), (0.25, 2), (0.25, 2)):
        (tmp_path / "config.json").write_text(json.dumps(SMALL | {"scaling_factor": factor}))
        dataclasses.replace(one, codec=Autoencoder(weights=str(tmp_path))).shapes()
        assert len(traced) == times
