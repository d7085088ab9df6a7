"""Weights of Large-DiT and Next-DiT: names that upstream has twice or never reads, and what does not fit."""

import diffusers
import jax
import numpy as np
import pytest
import torch

from scaling_dit import backbones, interop
from scaling_dit.errors import UserError
from tests.support import uvit_golden


@pytest.mark.parametrize("name", uvit_golden.LARGE_DIT_NAMES)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_large_dit_round_trip_is_identical_but_for_the_padding_token(name, scan_layers):
    golden = uvit_golden.load(name)
    backbone = golden.backbone(scan_layers=scan_layers)
    variables = interop.load_state_dict(backbone, golden.params)
    written = interop.to_state_dict(backbone, variables)
    assert set(written) == set(golden.params) - {"pad_token"}
    for key, value in written.items():
        assert value.dtype == golden.params[key].dtype and value.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(value, golden.params[key], err_msg=key)
    # So the padding token may be missing.
    without = interop.load_state_dict(backbone, written)
    jax.tree.map(np.testing.assert_array_equal, without, variables)


def test_large_dit_lists_all_that_does_not_fit():
    golden = uvit_golden.load("large_dit_tiny_gqa")
    params = dict(golden.params, pad_token=np.zeros(63), other=np.zeros(2))
    # Ungrouped.
    params["layers.1.attention.wv.weight"] = np.zeros((64, 64))
    del params["eol_token"], params["layers.0.attention.wk.weight"]
    with pytest.raises(UserError) as error:
        interop.load_state_dict(golden.backbone(), params)
    message = str(error.value)
    for part in (
        "missing: eol_token, layers.0.attention.wk.weight",
        "unknown: other",
        "pad_token is (63,), it must be (64,)",
        "layers.1.attention.wv.weight is (64, 64), it must be (32, 64)",
    ):
        assert part in message
    assert "\n" not in message
    with pytest.raises(UserError, match=r"missing: layers.0.attention.k_norm.bias"):
        interop.load_state_dict(golden.backbone(qk_norm=True), golden.params)


def next_dit(qk_norm=True, kv_heads=2, **fields):
    """Ours, and a state dict of diffusers' model with random weights, equal where the published model is."""
    backbone = backbones.create(
        "next_dit", size="h32-d2-n4", text_dim=12, qk_norm=qk_norm, kv_heads=kv_heads, **fields
    )
    torch.manual_seed(0)
    model = diffusers.LuminaNextDiT2DModel(
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=kv_heads or 4,
        cross_attention_dim=12,
        qk_norm=qk_norm,
        learn_sigma=False,
    )
    state_dict = {name: torch.randn(value.shape).numpy() for name, value in model.state_dict().items()}
    for name in state_dict:
        if ".attn2.to_q." in name or ".attn2.norm_q." in name:
            state_dict[name] = state_dict[name.replace("attn2", "attn1")].copy()
    return backbone, state_dict


@pytest.mark.parametrize(
    "fields", [{}, {"scan_layers": True}, {"qk_norm": False}, {"kv_heads": None, "scan_layers": True}]
)
def test_next_dit_round_trip_is_identical(fields):
    backbone, state_dict = next_dit(**fields)
    written = interop.to_state_dict(backbone, interop.load_state_dict(backbone, state_dict))
    assert set(written) == set(state_dict)
    for key, value in state_dict.items():
        assert written[key].dtype == value.dtype and written[key].flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(written[key], value, err_msg=key)


def test_next_dit_refuses_text_queries_of_their_own():
    backbone, state_dict = next_dit()
    state_dict["layers.1.attn2.to_q.weight"] += 1
    state_dict["layers.0.attn2.norm_q.bias"][3] = 7
    state_dict["stray"] = np.zeros(1)
    with pytest.raises(UserError) as error:
        interop.load_state_dict(backbone, state_dict)
    message = str(error.value)
    assert "layers.1.attn2.to_q.weight differs from layers.1.attn1.to_q.weight" in message
    assert "layers.0.attn2.norm_q.bias differs from layers.0.attn1.norm_q.bias" in message
    assert message.count("differs") == 2
    assert "unknown: stray" in message
    assert "\n" not in message


def test_next_dit_misses_the_copies_too():
    backbone, state_dict = next_dit()
    del state_dict["layers.0.attn2.to_q.weight"], state_dict["norm_out.linear_2.bias"]
    with pytest.raises(UserError, match="missing: layers.0.attn2.to_q.weight, norm_out.linear_2.bias$"):
        interop.load_state_dict(backbone, state_dict)
