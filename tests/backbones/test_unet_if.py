"""IF's UNet, in all of its modes, against diffusers."""

import jax
import numpy as np
import pytest

from scaling_dit import backbones, trees
from scaling_dit.backbones import unet_if
from scaling_dit.errors import UserError
from tests.support import unet_reference
from tests.support.unet_reference import IF, IF_CUT, IF_ONE_LEVEL, inputs, small_if


@pytest.mark.slow
def test_outputs_and_all_gradients_equal_diffusers():
    unet_reference.check(small_if(**IF | {"remat": "full", "res_blocks": 2}), 12, 4)


def test_outputs_equal_diffusers():
    unet_reference.check(small_if(**IF_CUT), 4, 8, gradients=False)


@pytest.mark.slow
def test_bfloat16_is_close_to_float32():
    backbone, half = (small_if(**IF_ONE_LEVEL, dtype=dtype) for dtype in ("float32", "bfloat16"))
    unet_reference.check_bfloat16(backbone, half)


@pytest.mark.slow
def test_the_mode_that_is_in_no_other_case_equals_diffusers():
    unet_reference.check(small_if(**IF_ONE_LEVEL, remat="dots"), 4, 4, tolerance=1e-4)


def test_every_parameter_names_its_axes():
    backbone = small_if(**IF_CUT)
    params = jax.eval_shape(backbone.init, jax.random.key(0), *inputs(backbone, 4, 4))["params"]
    assert params["mid_attn_0"]["text_kv"]["kernel"].names == ("text", None, "heads")
    assert params["down_1_res_0"]["time_proj"]["kernel"].value.shape == (128, 2, 64)
    for box in jax.tree.leaves(params, is_leaf=trees.is_box):
        assert len(box.names) == box.value.ndim
        # None twice.
        assert len({n for n in box.names if n}) == len([n for n in box.names if n])


def test_sizes_and_overrides():
    assert backbones.create("unet_if", size="if-xl").shape == unet_if.Shape(
        (704, 1408, 2112, 2816), 3, (0, 1, 2), 64
    )
    shape = backbones.create("unet_if", channels=64, attention_levels=[], res_blocks=1).shape
    assert shape == unet_if.Shape((64, 128, 192, 256), 1, (), 64)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"size": "if-xxl"}, "did you mean 'if-xl'"),
        ({"attention_levels": (0, 3)}, r"attention_levels=\(0, 3\) must lie in 0 to 2"),
        ({"head_dim": 24}, "level 0 has 32 channels, no multiple of head_dim=24"),
        ({"out_channels": 0}, "out_channels must be an integer of at least 1"),
        ({"attention": "xle"}, "did you mean 'xla'"),
        ({"remat": "ful"}, "did you mean 'full'"),
        ({"dtype": "bfloat"}, "did you mean 'bfloat16'"),
    ],
)
def test_wrong_fields_are_told_when_the_backbone_is_made(fields, message):
    with pytest.raises(UserError, match=message) as error:
        small_if(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "latents, extras, message",
    [
        ((2, 6, 8, 3), None, r"UNetIF of 3 levels needs .* multiples of 4, got \(6, 8\)"),
        ((2, 8, 8, 4), None, "in_channels=3"),
        ((2, 8, 8, 3), {"pooled": None}, "the extra 'pooled'; it reads none"),
    ],
)
def test_wrong_inputs_are_told_in_one_line(latents, extras, message):
    """Before any parameter is read."""
    with pytest.raises(UserError, match=message) as error:
        small_if().apply(
            {"params": {}},
            np.zeros(latents, "f4"),
            np.zeros(2, "f4"),
            np.zeros((2, 5, 12), "f4"),
            None,
            None,
            extras,
        )
    assert "\n" not in str(error.value)
