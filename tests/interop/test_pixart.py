"""PixArt's weights in diffusers' names; torch's tensors as they are."""

import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel

from scaling_dit import backbones, interop
from scaling_dit.errors import UserError
from tests.support.parity import randomise_


@pytest.fixture(scope="module")
def model():
    made = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=32,
        use_additional_conditions=False,
    )
    return randomise_(made, 1)


def small(**fields):
    return backbones.create("pixart", size="h16-d2-n2", text_dim=12, learn_sigma=True, **fields)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_round_trip_is_identical(model, scan_layers):
    backbone = small(scan_layers=scan_layers)
    source = {name: value.numpy() for name, value in model.state_dict().items()}
    written = interop.to_state_dict(backbone, interop.load_state_dict(backbone, source))
    assert set(written) == set(source)
    for name, value in source.items():
        assert written[name].dtype == value.dtype
        assert written[name].flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    torch_weights = {name: torch.from_numpy(value) for name, value in written.items()}
    model.load_state_dict(torch_weights, strict=True)


def test_one_error_lists_everything(model):
    source = dict(model.state_dict())
    del source["proj_out.bias"], source["transformer_blocks.1.attn1.to_k.bias"]
    source["pos_embed.pos_embed"] = torch.zeros(1, 256, 16)
    source["transformer_blocks.0.attn2.to_v.weight"] = torch.zeros(16, 17)
    source["scale_shift_table"] = torch.zeros(3, 16)
    with pytest.raises(UserError) as error:
        interop.load_state_dict(small(), source)
    for part in (
        "missing: proj_out.bias, transformer_blocks.1.attn1.to_k.bias",
        "unknown: pos_embed.pos_embed",
        "transformer_blocks.0.attn2.to_v.weight is (16, 17), it must be (16, 16)",
        "scale_shift_table is (3, 16), it must be (2, 16)",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_field_shows_in_the_error(model):
    backbone = backbones.create(
        "pixart", size="h16-d2-n2", text_dim=16, caption_embedding=False, learn_sigma=True
    )
    with pytest.raises(UserError, match=r"unknown: caption_projection.linear_1.bias"):
        interop.load_state_dict(backbone, model.state_dict())
    backbone = backbones.create("pixart", size="h16-d2-n2", text_dim=12)
    with pytest.raises(UserError, match=r"proj_out.weight is \(32, 16\), it must be \(16, 16\)"):
        interop.load_state_dict(backbone, model.state_dict())


def test_parameters_and_half_precision_of_torch(model):
    backbone = small()
    plain = interop.load_state_dict(backbone, model.state_dict())["params"]["patch_embed"]["kernel"]
    # These require gradients.
    parameters = dict(model.named_parameters())
    kernel = interop.load_state_dict(backbone, parameters)["params"]["patch_embed"]["kernel"]
    np.testing.assert_array_equal(kernel, plain)
    halves = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    kernel = interop.load_state_dict(backbone, halves)["params"]["patch_embed"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel.ravel()[0], float(halves["pos_embed.proj.weight"].ravel()[0]))
    assert 0 < np.abs(kernel - plain).max() < 0.01


@pytest.mark.parametrize("value", ["a path", None, {"nested": 1}, [object()]])
def test_what_is_no_array_is_told(model, value):
    source = dict(model.state_dict()) | {"proj_out.bias": value}
    with pytest.raises(
        UserError, match="entry proj_out.bias of the state dict is a .*, not an array"
    ) as error:
        interop.load_state_dict(small(), source)
    assert "\n" not in str(error.value)
