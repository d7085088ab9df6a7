"""Backbones by name, and the checks of a user's own."""

import jax
import pytest

from scaling_dit import backbones
from scaling_dit.backbones import contract
from scaling_dit.errors import UserError

SOURCE = """
import dataclasses

import flax.linen as nn
import jax.numpy as jnp


class Mine(nn.Module):
    width: int = 8
    widths: tuple = (4, 8)
    pooled_dim: int = 6
    act: object = nn.gelu
    rates: tuple = dataclasses.field(default_factory=lambda: (0.5,))

    EXTRAS = {"pooled": ("pooled_dim",), "sizes": (6,)}

    @nn.compact
    def __call__(self, latents, timesteps, text, text_mask=None, conditions=None, extras=None, *, train=False):
        x = nn.Dense(self.width)(latents) + nn.Dense(self.width)(extras["pooled"])[:, None, None]
        return nn.Dense(latents.shape[-1])(x)


class NoCall(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x


class NoDefault(nn.Module):
    width: int

    def __call__(self, latents, timesteps, text, text_mask=None, conditions=None, extras=None, *, train=False):
        return latents


class NotAModule:
    pass


def function(latents, timesteps, text, text_mask=None, conditions=None, extras=None, *, train=False):
    return latents
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "user_backbones.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)


def test_create_by_name():
    backbone = backbones.create("uvit", size="h32-d2-n2", text_dim=8)
    assert isinstance(backbone, backbones.backbone_class("uvit"))
    assert backbone.widths == (32, 2, 2)
    assert isinstance(backbone, contract.Backbone)


def test_fields_are_config_values():
    fields = backbones.backbone_fields("uvit")
    assert {"in_channels", "out_channels", "text_dim", "dtype", "param_dtype", "remat", "scan_layers"} <= set(
        fields
    )
    assert {"attention", "size", "hidden", "depth", "heads", "patch", "long_skips"} <= set(fields)
    assert not {"parent", "name"} & set(fields)
    assert backbones.create("uvit", **fields) == backbones.create("uvit")


@pytest.mark.usefixtures("user_module")
def test_users_own():
    backbone = backbones.create("user_backbones:Mine", width=4, widths=[1, [2, 3]])
    assert backbone.widths == (1, (2, 3))
    assert backbones.backbone_fields("user_backbones:Mine") == {
        "width": 8, "widths": (4, 8), "pooled_dim": 6, "rates": (0.5,)
    }  # fmt: skip
    inputs = contract.example_inputs(backbone, (8, 8, 3), (5, 7), batch=2)
    assert {name: value.shape for name, value in inputs[5].items()} == {"pooled": (2, 6), "sizes": (2, 6)}
    assert [x.shape for x in inputs[:4]] == [(2, 8, 8, 3), (2,), (2, 5, 7), (2, 5)]
    variables = contract.abstract_variables(backbone, inputs)
    assert jax.eval_shape(backbone.apply, variables, *inputs).shape == (2, 8, 8, 3)


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("uvti", {}, "unknown backbone 'uvti'.*did you mean 'uvit'"),
        ("uvit", {"hiden": 8}, "has no field 'hiden'; did you mean 'hidden'"),
        (
            "no_such_file:Mine",
            {},
            "no module 'no_such_file' in .* or elsewhere on the Python path; .*; known: .*uvit",
        ),
        ("user_backbones:Mine", {"widht": 3}, "has no field 'widht'; did you mean 'width'"),
        ("user_backbones:NotAModule", {}, "must be a flax.linen.Module class, it is the class NotAModule"),
        ("user_backbones:function", {}, "must be a flax.linen.Module class, it is a function"),
        ("user_backbones:NoCall", {}, r"has the call \(self, x\); it must take \(latents"),
        ("user_backbones:NoDefault", {}, "needs a value for width"),
    ],
)
def test_mistakes_are_told_in_one_line(name, fields, message):
    with pytest.raises(UserError, match=message) as error:
        backbones.create(name, **fields)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("user_module")
def test_a_config_needs_defaults():
    assert backbones.create("user_backbones:NoDefault", width=3).width == 3
    with pytest.raises(UserError, match="field 'width' needs a default"):
        backbones.backbone_fields("user_backbones:NoDefault")


def test_check_backbone_wants_an_instance():
    with pytest.raises(UserError, match="instance, this is the class UViT"):
        contract.check_backbone(backbones.backbone_class("uvit"))
    with pytest.raises(UserError, match="this is a dict"):
        contract.check_backbone({})


@pytest.mark.usefixtures("user_module")
def test_widths_of_a_run_go_where_there_are_fields_for_them():
    backbone = backbones.create_for("uvit", in_channels=3, text_dim=16, size="h32-d2-n2")
    assert (backbone.in_channels, backbone.text_dim, backbone.widths) == (3, 16, (32, 2, 2))
    assert backbones.create_for("user_backbones:Mine", in_channels=3, text_dim=16, width=4).width == 4
    with pytest.raises(UserError, match="has no field 'hiden'; did you mean 'hidden'"):
        backbones.create_for("uvit", in_channels=3, text_dim=16, hiden=8)
