"""The UNets of SD2 and SDXL, in all of their modes, against diffusers."""

import functools

import jax
import numpy as np
import pytest

from scaling_dit import backbones, trees
from scaling_dit.backbones import contract, unet
from scaling_dit.errors import UserError
from scaling_dit.nn import unet_layers
from tests.support import parity, unet_reference
from tests.support.unet_reference import (
    ONE_LEVEL,
    SCANNED_DOTS,
    SD2_CUT,
    SDXL,
    SDXL_CUT,
    TD_CUT,
    TEXT_TIME,
    inputs,
    small,
)
from tests.support.uvit_golden import fill, initial

CASES = [
    pytest.param(SD2_CUT | {"remat": "full"}, (4, 8), id="sd2_cut", marks=pytest.mark.slow),
    pytest.param(TD_CUT | SCANNED_DOTS | {"out_channels": 3}, (12, 4), id="td_cut", marks=pytest.mark.slow),
    pytest.param(SDXL | TEXT_TIME, (8, 8), id="official", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("fields, size", CASES)
def test_outputs_and_all_gradients_equal_diffusers(fields, size):
    unet_reference.check(small(**fields), *size)


def test_outputs_of_sd2s_form_equal_diffusers():
    unet_reference.check(small(**SD2_CUT), 4, 8, gradients=False)


@pytest.mark.slow
def test_bfloat16_is_close_to_float32():
    one_block = ONE_LEVEL | {"transformer_depth": (1,)}
    backbone, half = (small(**one_block, dtype=dtype) for dtype in ("float32", "bfloat16"))
    unet_reference.check_bfloat16(backbone, half)


@pytest.mark.slow
@pytest.mark.parametrize("mode, depth", [("remat dots", 1), ("scanned", 2)])
def test_modes_of_no_case_above_equal_diffusers(mode, depth):
    backbone = small(**ONE_LEVEL | {"transformer_depth": (depth,)} | parity.MODES[mode])
    unet_reference.check(backbone, 4, 4, tolerance=1e-4)


def test_scanned_parameters_are_stacked_and_every_parameter_names_its_axes():
    backbone = small(**SDXL_CUT, **TEXT_TIME, scan_layers=True)
    params = jax.eval_shape(backbone.init, jax.random.key(0), *inputs(backbone, 4, 4))["params"]
    kernel = params["mid_attn_0"]["blocks"]["attn"]["qkv"]["kernel"]
    assert kernel.names == ("layers", "embed", None, "heads")
    assert kernel.value.shape == (2, 64, 3, 64)
    assert params["up_1_res_0"]["conv1"]["kernel"].names == (None, None, "embed", "mlp")
    for box in jax.tree.leaves(params, is_leaf=trees.is_box):
        assert len(box.names) == box.value.ndim
        # None twice.
        assert len({n for n in box.names if n}) == len([n for n in box.names if n])


def test_initial_values_are_pytorchs():
    x, text = np.zeros((1, 2, 2, 64), "f4"), np.zeros((1, 5, 12), "f4")
    transformer, res = (
        initial(module, args, *names)
        for module, args, names in (
            (unet_layers.Transformer2D(1, 16), (x, text, None), ("norm", "proj_in", "blocks_0")),
            (
                unet_layers.ResBlock(32),
                (x, np.zeros((1, 256), "f4")),
                ("norm1", "conv1", "time_proj", "shortcut"),
            ),
        )
    )
    block = transformer["blocks_0"]
    for module, fan_in in (
        (res["conv1"], 9 * 64),
        (res["time_proj"], 256),
        (res["shortcut"], 64),
        (transformer["proj_in"], 64),
        (block["attn"]["qkv"], 64),
        (block["attn"]["proj"], 64),
        (block["cross_attn"]["q"], 64),
        (block["cross_attn"]["kv"], 12),
        (block["fc1"], 64),
        (block["fc2"], 256),
    ):
        for leaf in jax.tree.leaves(module):
            assert 0.8 * fan_in**-0.5 < np.abs(leaf).max() <= fan_in**-0.5
    assert set(block["attn"]["qkv"]) == {"kernel"}
    assert set(block["fc2"]) == {"kernel", "bias"}
    for norm in (res["norm1"], transformer["norm"], block["norm3"]):
        assert (norm["scale"] == 1).all() and not norm["bias"].any()


def test_param_dtype():
    backbone = small(**SDXL_CUT, **TEXT_TIME, param_dtype="bfloat16")
    variables = contract.abstract_variables(backbone, inputs(backbone, 4, 4))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"bfloat16"}


def test_sizes_and_overrides():
    shape = backbones.create("unet", size="sd2").shape
    assert shape == unet.Shape((320, 640, 1280, 1280), 2, (1, 1, 1, 0), 1, 64, False)
    shape = backbones.create(
        "unet", size="sdxl", channels=192, transformer_depth=[0, 1, 3], head_dim=32
    ).shape
    assert shape == unet.Shape((192, 384, 768), 2, (0, 1, 3), 3, 32, False)
    explicit = backbones.create(
        "unet",
        size=None,
        channels=32,
        channel_mult=(1,),
        res_blocks=3,
        transformer_depth=(2,),
        head_dim=8,
        text_time=True,
    )
    assert explicit.shape == unet.Shape((32,), 3, (2,), 2, 8, True)


def test_extras_are_declared_with_text_time_only():
    assert contract.extra_shapes(small()) == {}
    assert contract.extra_shapes(small(**TEXT_TIME)) == {"pooled": (10,), "sizes": (6,)}
    assert contract.extra_shapes(backbones.create("unet", size="sdxl-official"))["pooled"] == (1280,)
    assert contract.extra_shapes(backbones.create("unet", size="sdxl-official", text_time=False)) == {}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"size": "sdxl-td44"}, "did you mean 'sdxl-td4_4'"),
        ({"size": None}, "text_time must be given"),
        ({"channels": 33}, "level 0 has 33 channels; GroupNorm needs a multiple of 32"),
        ({"head_dim": 24}, "level 1 has 64 channels, no multiple of head_dim=24"),
        ({"channels": 32.0}, "channels must be integers of at least 1, got 32.0"),
        ({"res_blocks": 0}, "res_blocks must be integers of at least 1, got 0"),
        ({"channel_mult": ()}, r"channel_mult must be integers of at least 1, got \(\)"),
        ({"channel_mult": 2}, r"channel_mult must have an integer for each level, such as \(2,\), got 2"),
        ({"transformer_depth": 2}, r"transformer_depth must have an integer for each level, such as \(2,\)"),
        ({"transformer_depth": (0, -1)}, r"transformer_depth must be integers of at least 0, got \(0, -1\)"),
        ({"transformer_depth": (1, 1, 0)}, "end in at least 1"),
        ({"transformer_depth": (1, 1, 1, 1)}, "at most 3 entries"),
        ({"out_channels": 0}, "out_channels must be an integer of at least 1"),
        ({"attention": "xle"}, "did you mean 'xla'"),
        ({"remat": "ful"}, "did you mean 'full'"),
        ({"dtype": "bfloat"}, "did you mean 'bfloat16'"),
        ({"param_dtype": "int8"}, "param_dtype='int8'"),
    ],
)
def test_wrong_fields_are_told_when_the_backbone_is_made(fields, message):
    with pytest.raises(UserError, match=message) as error:
        small(**fields)
    assert "\n" not in str(error.value)


@functools.cache
def with_text_time():
    """A small backbone that reads extras, and variables for it: they are looked at after the first parameters."""
    backbone = small(**ONE_LEVEL, **TEXT_TIME)
    return backbone, fill(contract.abstract_variables(backbone, inputs(backbone, 8, 8)))


POOLED, SIZES = ("pooled", (2, 10)), ("sizes", (2, 6))


@pytest.mark.parametrize(
    "fields, change, message",
    [
        ({}, {"latents": (2, 8, 8, 4)}, "in_channels=3"),
        ({}, {"text": (2, 5, 16)}, "text_dim=12"),
        ({}, {"latents": (2, 8, 10, 3)}, r"UNet of 3 levels needs .* multiples of 4, got \(8, 10\)"),
        ({}, {"conditions": {"mask": None}}, r"no conditions, got \['mask'\]"),
        ({}, {"extras": [POOLED]}, "the extra 'pooled'; it reads none"),
        (TEXT_TIME, {"extras": [POOLED, ("size", (2, 6))]}, "the extra 'size'; did you mean 'sizes'"),
        (TEXT_TIME, {}, r"needs the extra 'pooled' of shape \(2, 10\), got none"),
        (TEXT_TIME, {"extras": [POOLED, ("sizes", (2, 4))]}, r"'sizes' of shape \(2, 6\), got \(2, 4\)"),
        (TEXT_TIME, {"extras": [("pooled", (1, 10)), SIZES]}, r"'pooled' of shape \(2, 10\), got \(1, 10\)"),
    ],
)
def test_wrong_inputs_are_told_in_one_line(fields, change, message):
    backbone, variables = with_text_time() if "text_time" in fields else (small(), {"params": {}})
    call = {"latents": (2, 8, 8, 3), "text": (2, 5, 12), "conditions": None, "extras": []} | change
    extras = {name: np.zeros(shape, "f4") for name, shape in call["extras"]}
    with pytest.raises(UserError, match=message) as error:
        backbone.apply(
            variables,
            np.zeros(call["latents"], "f4"),
            np.zeros(2, "f4"),
            np.zeros(call["text"], "f4"),
            None,
            call["conditions"],
            extras or None,
        )
    assert "\n" not in str(error.value)
