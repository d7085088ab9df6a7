"""The count of every family: against closed forms, and against what XLA says of the unrolled program."""

import jax
import pytest

from scaling_dit import backbones
from scaling_dit.backbones import contract
from scaling_dit.costs.count import count

H, D, TEXT_LENGTH, TEXT_DIM = 48, 2, 9, 20
# Of tokens.
ROWS, COLUMNS = 4, 6
SHAPES = {"latents": (2 * ROWS, 2 * COLUMNS, 4), "text": (TEXT_LENGTH, TEXT_DIM)}
T = ROWS * COLUMNS
# Patches of 2x2x4 to tokens and back.
IN_AND_OUT = 2 * T * 16 * H


def small(name, **fields):
    return count(backbones.create(name, size=f"h{H}-d{D}-n4", text_dim=TEXT_DIM, **fields), **SHAPES)


def test_pixart():
    """Self- and cross-attention 6 h^2 an image token, the MLP 8, text to k and v; one modulation for all blocks."""
    found = small("pixart")
    time = 256 * H + H * H + 6 * H * H
    caption = TEXT_LENGTH * (TEXT_DIM * H + H * H)
    assert found.macs_paper == D * (T * 14 + TEXT_LENGTH * 2) * H * H + IN_AND_OUT + time + caption
    assert found.macs_attention == D * (T * 6 + TEXT_LENGTH * 2) * H * H
    assert found.macs_total - found.macs_paper == D * 2 * T * (T + TEXT_LENGTH) * H
    ends = 17 * H + (H * H + 258 * H) + (6 * H * H + 6 * H) + 2 * H + (4 * H + 4) * 4
    assert found.params == D * (16 * H * H + 19 * H) + ends + H * H + (TEXT_DIM + 2) * H


@pytest.mark.parametrize("name", ["large_dit", "next_dit"])
def test_large_dit_and_next_dit(name):
    """Attention 4 h^2 a token, text to k and v at its own width, a gated MLP of 3 h F, a modulation in every block."""
    found = small(name)
    large = name == "large_dit"
    # Large-DiT's rows end in a token of their own.
    tokens = ROWS * (COLUMNS + 1) if large else T
    parts, head_parts = (6, 2) if large else (4, 1)
    # 8 h / 3 = 128, up to a multiple of 256.
    ffn = 256
    attention = tokens * 4 * H * H + 2 * TEXT_LENGTH * TEXT_DIM * H
    block = attention + tokens * 3 * H * ffn + parts * H * H
    conditioning = 256 * H + H * H + TEXT_DIM * H
    assert found.macs_paper == D * block + IN_AND_OUT + conditioning + head_parts * H * H
    assert found.macs_attention == D * attention
    assert found.macs_total - found.macs_paper == D * 2 * tokens * (tokens + TEXT_LENGTH) * H
    if large:
        # With 4 gates and the joint norms of q, k and the text's k.
        block = 4 * H * H + 2 * TEXT_DIM * H + 4 + 6 * H + 3 * H * ffn + 6 * H * (H + 1) + 2 * H + TEXT_DIM
        time = 256 * H + H + H * H + H
        pooled = 2 * TEXT_DIM + TEXT_DIM * H + H
        assert found.params == D * block + 17 * H + time + pooled + 16 * (H + 1) + 2 * H * (H + 1) + H


UNET = {"size": None, "channels": 64, "channel_mult": (1, 2), "res_blocks": 1, "head_dim": 32}


def test_convolutions_and_attention_of_a_unet():
    """At 1/1 two convolutions of 64 channels, at 1/2 transformers of one block: a few modules written out."""
    found = count(
        backbones.create("unet", **UNET, transformer_depth=(0, 1), text_time=False, text_dim=TEXT_DIM),
        latents=(8, 12, 4),
        text=(TEXT_LENGTH, TEXT_DIM),
    ).modules
    pixels, width = 4 * 6, 128
    assert found["conv_in"].macs_total == 96 * 9 * 4 * 64
    # A ResBlock, and the projection of time.
    assert found["down_0_res"].macs_total == 96 * 2 * 9 * 64 * 64 + 256 * 64
    assert found["down_0_sample"].macs_total == pixels * 9 * 64 * 64
    own, cross, ff = 4 * width * width, 2 * width * width, 12 * width * width
    linear = pixels * (2 * width * width + own + cross + ff) + TEXT_LENGTH * TEXT_DIM * 2 * width
    attention = found["down_1_attn"]
    assert attention.macs_attention == attention.macs_paper == linear
    assert attention.macs_total == linear + 2 * pixels * (pixels + TEXT_LENGTH) * width
    assert found["mid_attn"] == attention


@pytest.mark.parametrize(
    "name, fields, low, high",
    [
        ("uvit", {"size": "h256-d3-n4"}, 1.0, 1.05),
        # These two have closed forms above that need no second trace.
        pytest.param("pixart", {"size": "h256-d2-n4"}, 1.0, 1.02, marks=pytest.mark.slow),
        pytest.param("large_dit", {"size": "h256-d2-n4"}, 1.0, 1.02, marks=pytest.mark.slow),
        ("next_dit", {"size": "h256-d2-n4"}, 1.0, 1.02),
        pytest.param(
            "unet",
            {**UNET, "transformer_depth": (0, 2), "text_time": False},
            0.97,
            1.05,
            marks=pytest.mark.slow,
        ),
        pytest.param("unet_if", {**UNET, "attention_levels": (0, 1)}, 0.97, 1.05, marks=pytest.mark.slow),
    ],
)
def test_against_xla(name, fields, low, high):
    """FLOPs of the unrolled program by XLA = 2 x MACs + elementwise work, some per cent at these widths.

    Of a convolution XLA leaves out what meets the zeros around the image, which counting includes, as the papers'
    figures do: 1.5 % of a 3x3 convolution at 64x64, 3 % at 32x32.
    """
    backbone = backbones.create(name, text_dim=64, attention="xla", **fields)
    shapes = {"latents": (64, 64, 4), "text": (15, 64)}
    inputs = contract.example_inputs(backbone, **shapes)
    variables = contract.abstract_variables(backbone, inputs)
    flops = jax.jit(backbone.apply).lower(variables, *inputs).cost_analysis()["flops"]
    assert low < flops / (2 * count(backbone, **shapes).macs_total) < high
