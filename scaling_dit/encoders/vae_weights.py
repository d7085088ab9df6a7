"""The weight table of the autoencoder, for three spellings of its names.

Files have diffusers' current names (`encoder.down_blocks.0.resnets.1`, attention as `to_q`), diffusers' older names
(`query`, `key`, `value`, `proj_attn`) or those of the latent-diffusion code (`encoder.down.0.block.1`, `mid.attn_1.q`).
Whole checkpoints of that code hold the autoencoder under `first_stage_model.`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import rearrange

from scaling_dit.encoders.vae_config import Architecture
from scaling_dit.weights import inert, state_dicts, table
from scaling_dit.weights.table import Row, Transform, convolution, norm, pointwise, stacked

# Prefix of the autoencoder in a whole checkpoint.
_PREFIX = "first_stage_model."


@dataclasses.dataclass(frozen=True)
class Names:
    """One spelling: names of the parts, with {side} for encoder or decoder, {b} for a level and {i} for a block.

    `ups_from_finest`: whether the decoder numbers its levels from the finest, else from the coarsest.
    """

    down_res: str = "{side}.down_blocks.{b}.resnets.{i}"
    down: str = "{side}.down_blocks.{b}.downsamplers.0.conv"
    up_res: str = "{side}.up_blocks.{b}.resnets.{i}"
    up: str = "{side}.up_blocks.{b}.upsamplers.0.conv"
    ups_from_finest: bool = False
    mid_res: str = "{side}.mid_block.resnets.{i}"
    first_mid: int = 0
    attention: str = "{side}.mid_block.attentions.0"
    attention_parts: tuple[str, ...] = ("group_norm", "to_q", "to_k", "to_v", "to_out.0")
    shortcut: str = "conv_shortcut"
    last_norm: str = "{side}.conv_norm_out"


CURRENT = Names()
OLDER = Names(attention_parts=("group_norm", "query", "key", "value", "proj_attn"))
ORIGINAL = Names(
    down_res="{side}.down.{b}.block.{i}",
    down="{side}.down.{b}.downsample.conv",
    up_res="{side}.up.{b}.block.{i}",
    up="{side}.up.{b}.upsample.conv",
    ups_from_finest=True,
    mid_res="{side}.mid.block_{i}",
    first_mid=1,
    attention="{side}.mid.attn_1",
    attention_parts=("norm", "q", "k", "v", "proj_out"),
    shortcut="nin_shortcut",
    last_norm="{side}.norm_out",
)


def load(
    architecture: Architecture, abstract: Mapping[str, Any], tensors: Mapping[str, np.ndarray], what: str
) -> dict[str, Any]:
    """Weights with any of the spellings as our tree of parameters, with the dtypes of `abstract`.

    Raises:
      UserError: unknown, missing or misshapen entries, all in one message.
    """
    inside = {name.removeprefix(_PREFIX): name for name in tensors if name.startswith(_PREFIX)}
    if inside:
        tensors = state_dicts.Renamed(tensors, inside)
    names = spelling(tensors)
    query = f"{names.attention}.{names.attention_parts[1]}.weight".replace("{side}", "encoder")
    as_convolutions = query in tensors and tensors[query].ndim == 4
    table_rows = rows(architecture, names, as_convolutions)
    return state_dicts.load(table_rows, abstract, tensors, what, training_only=inert.AUTOENCODER)


def spelling(tensors: Mapping[str, Any]) -> Names:
    """The spelling of a set of names."""
    if any(name.startswith(("encoder.down.", "decoder.up.")) for name in tensors):
        return ORIGINAL
    older = any(".mid_block.attentions.0.query." in name for name in tensors)
    return OLDER if older else CURRENT


def rows(
    architecture: Architecture, names: Names = CURRENT, attention_as_convolutions: bool = False
) -> table.Table:
    """The table of an autoencoder. The linear maps of its attention may be stored as 1x1 convolutions."""
    table_rows = [
        row
        for side, architecture_levels in (
            ("encoder", architecture.widths),
            ("decoder", architecture.widths[::-1]),
        )
        for row in _half(side, architecture, architecture_levels, names, attention_as_convolutions)
    ]
    present = {"quant_conv": architecture.quant_conv, "post_quant_conv": architecture.post_quant_conv}
    for name, there in present.items():
        table_rows += _pointwise(name, name) if there else []
    return table_rows


def _half(
    side: str, architecture: Architecture, widths: tuple[int, ...], names: Names, as_convolutions: bool
) -> list[Row]:
    encodes, last = side == "encoder", len(widths) - 1
    name, ours = ("down", "down") if encodes else ("up", "up")
    found = [*convolution(f"{side}.conv_in", f"{side}/conv_in")]
    before = widths[0]
    for level, width in enumerate(widths):
        b = last - level if not encodes and names.ups_from_finest else level
        for i in range(architecture.res_blocks + (not encodes)):
            theirs = getattr(names, f"{name}_res").format(side=side, b=b, i=i)
            found += _res_block(theirs, f"{side}/{ours}_{level}_res_{i}", names, shortcut=before != width)
            before = width
        if level < last:
            inner = "" if encodes else "/conv"
            theirs = getattr(names, name).format(side=side, b=b)
            found += convolution(theirs, f"{side}/{ours}_{level}_sample{inner}")
    for i in range(2):
        theirs = names.mid_res.format(side=side, i=i + names.first_mid)
        found += _res_block(theirs, f"{side}/mid/res_{i}", names, shortcut=False)
    if architecture.mid_attention:
        found += _attention(names, side, as_convolutions)
    found += norm(names.last_norm.format(side=side), f"{side}/norm_out")
    return [*found, *convolution(f"{side}.conv_out", f"{side}/conv_out")]


def _res_block(upstream: str, ours: str, names: Names, *, shortcut: bool) -> list[Row]:
    found = []
    for i in (1, 2):
        found += norm(f"{upstream}.norm{i}", f"{ours}/norm{i}")
        found += convolution(f"{upstream}.conv{i}", f"{ours}/conv{i}")
    return found + (_pointwise(f"{upstream}.{names.shortcut}", f"{ours}/shortcut") if shortcut else [])


def _attention(names: Names, side: str, as_convolutions: bool) -> list[Row]:
    upstream, ours = names.attention.format(side=side), f"{side}/mid/attn"
    group_norm, *qkv, out = (f"{upstream}.{part}" for part in names.attention_parts)
    weights, biases = (tuple(f"{name}.{end}" for name in qkv) for end in ("weight", "bias"))
    return [
        *norm(group_norm, f"{ours}/norm"),
        Row(weights, f"{ours}/attn/qkv/kernel", _JOINED_POINTWISE if as_convolutions else table.joined(3)),
        Row(biases, f"{ours}/attn/qkv/bias", stacked(3)),
        *(_pointwise if as_convolutions else table.linear)(out, f"{ours}/attn/proj"),
    ]


def _pointwise(upstream: str, ours: str) -> list[Row]:
    """The rows of a 1x1 convolution."""
    return [Row(f"{upstream}.weight", f"{ours}/kernel", pointwise()), Row(f"{upstream}.bias", f"{ours}/bias")]


# Weights [out, in, 1, 1] of several 1x1 convolutions <-> our kernel [in, parts, out].
_JOINED_POINTWISE = Transform(
    load=lambda *w: np.stack([part[:, :, 0, 0].T for part in w], axis=1),
    save=lambda p: tuple(rearrange(p, "i n o -> n o i 1 1")),
)
