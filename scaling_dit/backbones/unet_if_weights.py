"""IF's UNet in the names of diffusers' UNet2DConditionModel with SimpleCrossAttn blocks."""

import numpy as np

from scaling_dit.backbones.unet_if import UNetIF
from scaling_dit.backbones.unet_weights import Place, ends, places, res_block
from scaling_dit.weights.table import Row, Table, Transform, linear, norm


def rows(backbone: UNetIF) -> Table:
    """The table of one backbone; its fields decide which entries there are."""
    shape = backbone.shape
    table = ends()
    for place in places(len(shape.widths), shape.res_blocks):
        if place.kind != "attn":  # residual blocks change the resolution as well
            table += res_block(place, shape.widths, scale_shift=True)
        elif place.level is None or place.level in shape.attention_levels:
            table += _attention(place)
    return table


def _attention(place: Place) -> list[Row]:
    upstream, ours = place.upstream, place.ours
    image = tuple(f"{upstream}.to_{n}" for n in "qkv")
    text = tuple(f"{upstream}.add_{n}_proj" for n in "kv")
    table = norm(f"{upstream}.group_norm", f"{ours}/norm") + linear(f"{upstream}.to_out.0", f"{ours}/proj")
    for names, module in ((image, f"{ours}/qkv"), (text, f"{ours}/text_kv")):
        table += linear(names, module)
        table.append(Row(tuple(f"{name}.bias" for name in names), f"{module}/bias", _STACKED))
    return table


# Biases [out] of several linear maps <-> ours [parts, out].
_STACKED = Transform(load=lambda *b: np.stack(b), save=tuple)
