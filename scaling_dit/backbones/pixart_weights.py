"""PixArt's parameters in the names of diffusers' `PixArtTransformer2DModel`.

Its positions are computed, not stored. Files that do store them, under `pos_embed.pos_embed`, are of another class.
"""

from scaling_dit.backbones.pixart import PixArt
from scaling_dit.weights.table import Row, Table, linear, patch_conv


def rows(backbone: PixArt) -> Table:
    """The table of one backbone; its fields decide which entries there are."""
    depth = backbone.widths[1]
    block, time = "transformer_blocks.{i}", "adaln_single.emb.timestep_embedder"
    table = [
        Row("pos_embed.proj.weight", "patch_embed/kernel", patch_conv(backbone.patch)),
        Row("pos_embed.proj.bias", "patch_embed/bias"),
        *linear(f"{time}.linear_1", "time/fc1"),
        *linear(f"{time}.linear_2", "time/fc2"),
        *linear("adaln_single.linear", "time/modulation", parts=6),
        Row(f"{block}.scale_shift_table", "blocks_{i}/table", layers=depth),
        *linear(tuple(f"{block}.attn1.to_{n}" for n in "qkv"), "blocks_{i}/attn/qkv", depth, bias=True),
        *linear(f"{block}.attn1.to_out.0", "blocks_{i}/attn/proj", depth),
        *linear(f"{block}.attn2.to_q", "blocks_{i}/cross_attn/q", depth),
        *linear(
            tuple(f"{block}.attn2.to_{n}" for n in "kv"),
            "blocks_{i}/cross_attn/kv",
            depth,
            bias=True,
            apart=True,
        ),
        *linear(f"{block}.attn2.to_out.0", "blocks_{i}/cross_attn/proj", depth),
        *linear(f"{block}.ff.net.0.proj", "blocks_{i}/mlp/fc1", depth),
        *linear(f"{block}.ff.net.2", "blocks_{i}/mlp/fc2", depth),
        Row("scale_shift_table", "head/table"),
        *linear("proj_out", "head/linear"),
    ]
    if backbone.embeds_caption:
        table += linear("caption_projection.linear_1", "caption_embed/fc1")
        table += linear("caption_projection.linear_2", "caption_embed/fc2")
    return table
