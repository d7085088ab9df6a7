"""The UNets' weights in and out in diffusers' names."""

import numpy as np
import pytest

from scaling_dit import interop
from scaling_dit.errors import UserError
from tests.support import unet_reference
from tests.support.unet_reference import (
    IF,
    IF_CUT,
    ONE_LEVEL,
    SD2,
    SD2_CUT,
    SDXL_CUT,
    TD,
    TEXT_TIME,
    small,
    small_if,
)

# No shortcut on the way down, since the channels stay.
EQUAL = {"channel_mult": (1, 1), "transformer_depth": (1, 2)}
SCANNED = {"scan_layers": True}
CASES = [
    pytest.param(small, SD2_CUT, id="sd2_cut", marks=pytest.mark.slow),
    pytest.param(small, SDXL_CUT | TEXT_TIME | SCANNED, id="official_cut"),
    pytest.param(small_if, IF_CUT, id="if_cut"),
    pytest.param(small, EQUAL, id="equal", marks=pytest.mark.slow),
    pytest.param(small, SD2 | SCANNED, id="sd2", marks=pytest.mark.slow),
    pytest.param(small, TD | TEXT_TIME, id="td", marks=pytest.mark.slow),
    pytest.param(small_if, IF | {"res_blocks": 2}, id="if", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("make, fields", CASES)
def test_round_trip_is_identical(make, fields):
    backbone = make(**fields)
    state_dict = unet_reference.state_dict(unet_reference.model(backbone))
    written = interop.to_state_dict(backbone, interop.load_state_dict(backbone, state_dict))
    assert set(written) == set(state_dict)
    for key, value in state_dict.items():
        assert written[key].dtype == value.dtype
        assert written[key].flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(written[key], value, err_msg=key)


def test_one_error_lists_everything():
    backbone = small(**ONE_LEVEL, scan_layers=True)
    state_dict = unet_reference.state_dict(unet_reference.model(backbone))
    block = "mid_block.attentions.0.transformer_blocks.1"
    del state_dict["conv_in.bias"], state_dict[f"{block}.attn1.to_k.weight"]
    state_dict["add_embedding.linear_1.bias"] = np.zeros(3)
    state_dict[f"{block}.ff.net.0.proj.bias"] = np.zeros(7)
    state_dict["up_blocks.0.resnets.0.conv_shortcut.weight"] = np.zeros((32, 64))
    with pytest.raises(UserError) as error:
        interop.load_state_dict(backbone, state_dict)
    message = str(error.value)
    assert f"missing: conv_in.bias, {block}.attn1.to_k.weight" in message
    assert "unknown: add_embedding.linear_1.bias" in message
    assert f"{block}.ff.net.0.proj.bias is (7,), it must be (256,)" in message
    assert "conv_shortcut.weight is (32, 64), it must be (32, 64, 1, 1)" in message
    assert "\n" not in message


def test_wrong_fields_show_in_the_error():
    state_dict = unet_reference.state_dict(unet_reference.model(small(**ONE_LEVEL)))
    deeper = small(**(ONE_LEVEL | {"transformer_depth": (3,)}))
    with pytest.raises(UserError, match=r"missing: down_blocks.0.attentions.0.transformer_blocks.2.attn1"):
        interop.load_state_dict(deeper, state_dict)
    with pytest.raises(UserError, match=r"missing: add_embedding.linear_1.bias"):
        interop.load_state_dict(small(**ONE_LEVEL, **TEXT_TIME), state_dict)


def test_ifs_text_projections_belong_together():
    backbone = small_if(**IF_CUT)
    state_dict = unet_reference.state_dict(unet_reference.model(backbone))
    kernel = interop.load_state_dict(backbone, state_dict)["params"]["mid_attn_0"]["text_kv"]["kernel"]
    np.testing.assert_array_equal(kernel[:, 1], state_dict["mid_block.attentions.0.add_v_proj.weight"].T)
    del state_dict["mid_block.attentions.0.add_v_proj.bias"]
    with pytest.raises(UserError, match=r"missing: mid_block.attentions.0.add_v_proj.bias"):
        interop.load_state_dict(backbone, state_dict)
