"""U-ViT's parameters in the names of its published code (baofff/U-ViT `libs/uvit_t2i.py`)."""

from scaling_dit.backbones.conditions_weights import position_rows, token_rows
from scaling_dit.backbones.uvit import UViT
from scaling_dit.weights.table import Row, conv, fused, leading_axis, linear, norm, patch_conv


def rows(backbone: UViT) -> list[Row]:
    """The table of one backbone; its fields decide which entries there are."""
    depth = backbone.widths[1]
    table = [
        Row("pos_embed", "pos_embed", leading_axis(), free=(0,)),
        Row("patch_embed.proj.weight", "patch_embed/kernel", patch_conv(backbone.patch)),
        Row("patch_embed.proj.bias", "patch_embed/bias"),
        *linear("context_embed", "context_embed"),
        *norm("norm", "norm"),
        *linear("decoder_pred", "decoder_pred"),
        *_block("mid_block", "mid_block", None),
    ]
    table += token_rows(backbone) + position_rows(backbone)
    if backbone.time_mlp:
        table += linear("time_embed.0", "time_embed/fc1") + linear("time_embed.2", "time_embed/fc2")
    if backbone.final_conv:
        table += [
            Row("final_layer.weight", "final_layer/kernel", conv()),
            Row("final_layer.bias", "final_layer/bias"),
        ]
    for stack in ("in_blocks", "out_blocks"):
        table += _block(f"{stack}.{{i}}", f"{stack}_{{i}}", depth // 2)
    if backbone.long_skips:
        table += linear("out_blocks.{i}.skip_linear", "out_blocks_{i}/skip_linear", depth // 2)
    return table


def _block(upstream: str, ours: str, layers: int | None) -> list[Row]:
    return [
        *norm(f"{upstream}.norm1", f"{ours}/norm1", layers),
        Row(f"{upstream}.attn.qkv.weight", f"{ours}/attn/qkv/kernel", fused(3), layers),
        *linear(f"{upstream}.attn.proj", f"{ours}/attn/proj", layers),
        *norm(f"{upstream}.norm2", f"{ours}/norm2", layers),
        *linear(f"{upstream}.mlp.fc1", f"{ours}/mlp/fc1", layers),
        *linear(f"{upstream}.mlp.fc2", f"{ours}/mlp/fc2", layers),
    ]
