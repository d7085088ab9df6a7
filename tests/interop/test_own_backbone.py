"""The weight table and the diffusers class that a user's own backbone declares."""

import json
import sys

import jax
import numpy as np
import pytest
from etils import epath

import scaling_dit
from scaling_dit import backbones, config, interop
from scaling_dit.backbones import contract
from scaling_dit.backbones.declared import diffusers_class
from scaling_dit.cli import main as cli
from scaling_dit.errors import UserError
from scaling_dit.interop.diffusers import config as diffusers_config
from scaling_dit.weights import files
from scaling_dit.weights.table import Row, Transform
from tests.support.uvit_golden import fill

pytestmark = pytest.mark.usefixtures("on_one_device")

BACKBONES = '''
import flax.linen as nn


class Mine(nn.Module):
    width: int = 8
    in_channels: int = 3
    text_dim: int = 16
    WEIGHTS = "own_weights:rows"
    DIFFUSERS = "own_weights:DIFFUSERS"

    @nn.compact
    def __call__(self, latents, timesteps, text, text_mask=None, conditions=None, extras=None, *, train=False):
        x = nn.Conv(self.width, (3, 3))(latents) + nn.Dense(self.width)(text.mean(1))[:, None, None]
        return nn.Dense(latents.shape[-1])(x)


class FromInputs(nn.Module):
    """The same without fields for the widths."""

    WEIGHTS = "own_weights:rows"
    __call__ = nn.compact(lambda self, latents, timesteps, text, text_mask=None, conditions=None, extras=None, *,
                          train=False: Mine(name="inner")(latents, timesteps, text))


class Silent(Mine):
    WEIGHTS = None
'''
WEIGHTS = """
from scaling_dit.weights.diffusers_class import DiffusersClass
from scaling_dit.weights.table import convolution, linear


def rows(backbone):
    start = "" if hasattr(backbone, "width") else "inner/"
    return [*convolution("conv", f"{start}Conv_0"), *linear("text", f"{start}Dense_0"),
            *linear("out", f"{start}Dense_1")]


DIFFUSERS = DiffusersClass(
    "MineModel",
    {"channels": 3, "inner": 8, "cross_attention_dim": 16, "dropout": 0.0},
    lambda backbone, latents: {"channels": backbone.in_channels, "inner": backbone.width,
                               "cross_attention_dim": backbone.text_dim},
    lambda arguments: {"in_channels": arguments["channels"], "width": arguments["inner"],
                       "text_dim": arguments["cross_attention_dim"]},
)
NOT_A_FUNCTION = 3
"""
NAMES = {f"{module}.{end}" for module in ("conv", "text", "out") for end in ("weight", "bias")}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The modules of a user, and the module of the backbones."""
    (tmp_path / "own_backbones.py").write_text(BACKBONES)
    (tmp_path / "own_weights.py").write_text(WEIGHTS)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_backbones", "own_weights"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield __import__("own_backbones")
    for name in ("own_backbones", "own_weights"):
        sys.modules.pop(name, None)


def variables_of(backbone):
    inputs = contract.example_inputs(backbone, (8, 8, 3), (5, 16))
    return fill(contract.abstract_variables(backbone, inputs)), inputs


def test_there_and_back(own):
    backbone = backbones.create("own_backbones:Mine")
    variables, _ = variables_of(backbone)
    state_dict = interop.to_state_dict(backbone, variables)
    assert set(state_dict) == NAMES and state_dict["conv.weight"].shape == (8, 3, 3, 3)
    np.testing.assert_array_equal(state_dict["text.weight"], variables["params"]["Dense_0"]["kernel"].T)
    again = interop.load_state_dict(backbone, state_dict)
    jax.tree.map(np.testing.assert_array_equal, again, dict(variables))


def test_widths_that_follow_from_the_inputs_need_inputs(own):
    backbone = own.FromInputs()
    variables, inputs = variables_of(backbone)
    state_dict = interop.to_state_dict(backbone, variables, inputs=inputs)
    assert set(state_dict) == NAMES
    jax.tree.map(
        np.testing.assert_array_equal,
        interop.load_state_dict(backbone, state_dict, inputs=inputs),
        dict(variables),
    )
    with pytest.raises(UserError, match="FromInputs lacks the field in_channels or text_dim.*give inputs="):
        interop.load_state_dict(backbone, state_dict)


def test_without_a_table(own):
    with pytest.raises(
        UserError, match="Silent has no weight table; .*WEIGHTS = 'package.module:function'.*uvit"
    ):
        interop.load_state_dict(own.Silent(), {})


@pytest.mark.parametrize(
    "place, message",
    [
        (
            len,
            "WEIGHTS of Mine must be a text, 'package.module:function', it is a builtin_function_or_method",
        ),
        ("rows", "unknown WEIGHTS of Mine 'rows'; write package.module:function"),
        (
            "no_such:rows",
            "WEIGHTS of Mine 'no_such:rows': no module 'no_such' in .* on the Python path; .*; write package",
        ),
        ("own_weights:row", "own_weights has no function 'row'; did you mean 'rows'"),
        ("own_weights:NOT_A_FUNCTION", "own_weights has no function 'NOT_A_FUNCTION'; known: "),
    ],
)
def test_a_table_that_is_not_found_is_one_line(own, monkeypatch, place, message):
    monkeypatch.setattr(own.Mine, "WEIGHTS", place)
    with pytest.raises(UserError, match=message) as error:
        interop.load_state_dict(own.Mine(), {})
    assert "\n" not in str(error.value)


CONV = [Row("conv.weight", "Conv_0/kernel", Transform(lambda w: w.transpose(2, 3, 1, 0), lambda p: (p.T,)))]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: None, "the weight table of Mine must be a list of Row, Copy and Unread, it is a NoneType"),
        (lambda rows: [*rows, ("a", "b")], "item 6 is a tuple"),
        (lambda rows: rows[1:], "does not fit its parameters: without a row: Conv_0/kernel"),
        (lambda rows: [*rows, Row("more", "Dense_9/bias")], "no parameter: Dense_9/bias"),
        (lambda rows: [*rows, Row("more", "Dense_1/bias")], "in several rows: Dense_1/bias"),
        (lambda rows: [*rows[:-1], Row("text.bias", "Dense_1/bias")], "read by several rows: text.bias"),
        (
            lambda rows: [Row("conv.weight", "Conv_0/kernel", Transform(lambda w: w, lambda p: (p, p))), *rows[1:]],
            "the row of Conv_0/kernel has 1 upstream names, its transform saves 2 arrays",
        ),
        (
            lambda rows: [Row("conv.weight", "Conv_0/kernel", Transform(lambda w: w, lambda p: 1 / 0)), *rows[1:]],
            r"the row of Conv_0/kernel cannot save \(3, 3, 3, 8\): ZeroDivisionError",
        ),
        (
            lambda rows: [Row("conv.weight", "Conv_0/kernel", Transform(lambda w: w.T, lambda p: (p,))), *rows[1:]],
            r"the row of Conv_0/kernel makes \(8, 3, 3, 3\) of .*, it must make \(3, 3, 3, 8\)",
        ),
        (
            lambda rows: [
                Row("conv.weight", "Conv_0/kernel", Transform(lambda w: w[::-1], lambda p: (p,))), *rows[1:]
            ],
            "the row of Conv_0/kernel is wrong: its save does not give back what its load read",
        ),
    ],
)  # fmt: skip
def test_a_wrong_table_is_one_line(own, monkeypatch, change, message):
    backbone = own.Mine()
    variables, _ = variables_of(backbone)
    state_dict = interop.to_state_dict(backbone, variables)
    state_dict["conv.weight"] = np.random.default_rng(0).normal(size=(3, 3, 3, 8)).astype(np.float32)
    right = sys.modules["own_weights"].rows
    monkeypatch.setattr(sys.modules["own_weights"], "rows", lambda backbone: change(right(backbone)))
    with pytest.raises(UserError, match=message) as error:
        interop.load_state_dict(backbone, state_dict)
    assert "\n" not in str(error.value)


def test_a_diffusers_class_of_ones_own(own, monkeypatch):
    backbone = own.Mine(width=4)
    written = json.loads(json.dumps(diffusers_config.write_config("own_backbones:Mine", backbone, (8, 8))))
    assert written["_class_name"] == "MineModel" and written["inner"] == 4
    with pytest.raises(UserError, match="is of a MineModel, which no backbone here computes"):
        diffusers_config.family_of(written, "it")
    name, family = diffusers_config.family_of(written, "it", configured="own_backbones:Mine")
    assert name == "own_backbones:Mine" and family is diffusers_class(own.Mine)
    assert own.Mine(**diffusers_config.read_fields(family, written, "it")) == backbone
    monkeypatch.setattr(own.Mine, "DIFFUSERS", "own_weights:rows")
    with pytest.raises(UserError, match="must be a DiffusersClass, not a function"):
        diffusers_class(own.Mine)


@pytest.mark.parametrize(
    "to, stem",
    [("safetensors", "model"), pytest.param("diffusers", "diffusion_pytorch_model", marks=pytest.mark.slow)],
)
def test_import_and_export_of_a_run(own, tmp_path, monkeypatch, capsys, to, stem):
    monkeypatch.chdir(tmp_path)
    run = config.load(
        "shapes:smoke", ["--config.backbone.name=own_backbones:Mine", "--config.backbone.width=4"]
    )
    backbone = own.Mine(width=4, text_dim=run.text_encoder.dim)
    inputs = contract.example_inputs(backbone, (16, 16, 3), (5, run.text_encoder.dim))
    variables = fill(contract.abstract_variables(backbone, inputs))
    weights = interop.to_state_dict(backbone, variables)
    (tmp_path / "published").mkdir()
    files.write(epath.Path("published"), stem, weights, 10**9)
    if to == "diffusers":
        described = diffusers_config.write_config("own_backbones:Mine", backbone, (16, 16))
        (tmp_path / "published" / "config.json").write_text(json.dumps(described))
    command = ["import", "--from=published", "--workdir=run", "--config=shapes:smoke"]
    fields = ["--config.backbone.name=own_backbones:Mine"]
    fields += ["--config.backbone.width=4"] if to == "safetensors" else []
    assert cli.main(command + fields) == 0, capsys.readouterr().err
    params = scaling_dit.load("run").params["backbone"]
    jax.tree.map(np.testing.assert_array_equal, dict(params), dict(variables["params"]))
    assert cli.main(["export", "--workdir=run", "--out=out", f"--to={to}"]) == 0, capsys.readouterr().err
    written = files.read(epath.Path("out"))
    assert set(written) == NAMES
    for name, array in weights.items():
        np.testing.assert_array_equal(written[name], array)
