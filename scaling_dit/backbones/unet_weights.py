"""The UNets' parameters in the names of diffusers' UNet2DConditionModel.

diffusers numbers the blocks on the way up from the coarsest level on; ours carry the number of their level.
"""

from collections.abc import Iterator
from typing import NamedTuple

from scaling_dit.backbones.unet import UNet
from scaling_dit.weights.table import POINTWISE, Row, Table, convolution, linear, norm


class Place(NamedTuple):
    """A part of the U: "res", "attn" or "sample", its two names, and its level (None in the middle)."""

    kind: str
    upstream: str
    ours: str
    level: int | None


def rows(backbone: UNet) -> Table:
    """The table of one backbone; its fields decide which entries there are."""
    shape = backbone.shape
    table = ends()
    if shape.text_time:
        table += linear("add_embedding.linear_1", "extra_embed/fc1")
        table += linear("add_embedding.linear_2", "extra_embed/fc2")
    for place in places(len(shape.widths), shape.res_blocks):
        if place.kind == "res":
            table += res_block(place, shape.widths)
        elif place.kind == "attn":
            depth = shape.mid_depth if place.level is None else shape.depths[place.level]
            table += _transformer(place, depth) if depth else []
        else:
            inner = "" if place.ours.startswith("down") else "/conv"
            table += convolution(f"{place.upstream}.conv", f"{place.ours}{inner}")
    return table


def places(levels: int, res_blocks: int) -> Iterator[Place]:
    """Every residual block, every place after one where attention may stand, and every change of resolution."""
    for level in range(levels):
        upstream, ours = f"down_blocks.{level}", f"down_{level}"
        for i in range(res_blocks):
            yield Place("res", f"{upstream}.resnets.{i}", f"{ours}_res_{i}", level)
            yield Place("attn", f"{upstream}.attentions.{i}", f"{ours}_attn_{i}", level)
        if level < levels - 1:
            yield Place("sample", f"{upstream}.downsamplers.0", f"{ours}_sample", level)
        upstream, ours = f"up_blocks.{levels - 1 - level}", f"up_{level}"
        for i in range(res_blocks + 1):
            yield Place("res", f"{upstream}.resnets.{i}", f"{ours}_res_{i}", level)
            yield Place("attn", f"{upstream}.attentions.{i}", f"{ours}_attn_{i}", level)
        if level:
            yield Place("sample", f"{upstream}.upsamplers.0", f"{ours}_sample", level)
    yield Place("res", "mid_block.resnets.0", "mid_res_0", None)
    yield Place("attn", "mid_block.attentions.0", "mid_attn_0", None)
    yield Place("res", "mid_block.resnets.1", "mid_res_1", None)


def ends() -> list[Row]:
    """What comes before and after the U: first and last convolution, time embedding, last norm."""
    return [
        *convolution("conv_in", "conv_in"),
        *linear("time_embedding.linear_1", "time_embed/fc1"),
        *linear("time_embedding.linear_2", "time_embed/fc2"),
        *norm("conv_norm_out", "norm_out"),
        *convolution("conv_out", "conv_out"),
    ]


def res_block(place: Place, widths: tuple[int, ...], *, scale_shift: bool = False) -> list[Row]:
    """A residual block; it has a shortcut where its input has other channels than its output."""
    upstream, ours = place.upstream, place.ours
    table = [
        *norm(f"{upstream}.norm1", f"{ours}/norm1"),
        *convolution(f"{upstream}.conv1", f"{ours}/conv1"),
        *linear(f"{upstream}.time_emb_proj", f"{ours}/time_proj", parts=2 if scale_shift else None),
        *norm(f"{upstream}.norm2", f"{ours}/norm2"),
        *convolution(f"{upstream}.conv2", f"{ours}/conv2"),
    ]
    if place.kind == "res" and place.level is not None:
        entered = ours.endswith("res_0") and place.level and widths[place.level] != widths[place.level - 1]
        if ours.startswith("up") or entered:  # on the way up a skip is concatenated
            table += [
                Row(f"{upstream}.conv_shortcut.weight", f"{ours}/shortcut/kernel", POINTWISE),
                Row(f"{upstream}.conv_shortcut.bias", f"{ours}/shortcut/bias"),
            ]
    return table


def _transformer(place: Place, depth: int) -> list[Row]:
    theirs, mine = f"{place.upstream}.transformer_blocks.{{i}}", f"{place.ours}/blocks_{{i}}"
    return [
        *norm(f"{place.upstream}.norm", f"{place.ours}/norm"),
        *linear(f"{place.upstream}.proj_in", f"{place.ours}/proj_in"),
        *norm(f"{theirs}.norm1", f"{mine}/norm1", depth),
        *linear(tuple(f"{theirs}.attn1.to_{n}" for n in "qkv"), f"{mine}/attn/qkv", depth),
        *linear(f"{theirs}.attn1.to_out.0", f"{mine}/attn/proj", depth),
        *norm(f"{theirs}.norm2", f"{mine}/norm2", depth),
        *linear(f"{theirs}.attn2.to_q", f"{mine}/cross_attn/q", depth, bias=False),
        *linear(tuple(f"{theirs}.attn2.to_{n}" for n in "kv"), f"{mine}/cross_attn/kv", depth, apart=True),
        *linear(f"{theirs}.attn2.to_out.0", f"{mine}/cross_attn/proj", depth),
        *norm(f"{theirs}.norm3", f"{mine}/norm3", depth),
        *linear(f"{theirs}.ff.net.0.proj", f"{mine}/fc1", depth, parts=2, apart=True),
        *linear(f"{theirs}.ff.net.2", f"{mine}/fc2", depth),
        *linear(f"{place.upstream}.proj_out", f"{place.ours}/proj_out"),
    ]
