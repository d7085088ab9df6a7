"""IF's UNet as diffusers' UNet2DConditionModel with SimpleCrossAttn blocks: names and arguments."""

from typing import Any

from scaling_dit.backbones.unet_if import UNetIF
from scaling_dit.backbones.unet_weights import (
    IF_MIDDLE,
    UNET_DEFAULTS,
    UNET_FREE,
    Place,
    ends,
    places,
    res_block,
    shared_arguments,
    shared_fields,
)
from scaling_dit.weights.diffusers_class import Arguments, DiffusersClass
from scaling_dit.weights.table import Row, Table, linear, norm


def rows(backbone: UNetIF) -> Table:
    """The table of one backbone; its fields decide which entries there are."""
    shape = backbone.shape
    table = ends(backbone)
    for place in places(len(shape.widths), shape.res_blocks):
        # Residual blocks change the resolution as well.
        if place.kind != "attn":
            table += res_block(place, shape.widths, scale_shift=True)
        elif place.level is None or place.level in shape.attention_levels:
            table += _attention(place)
    return table


def _attention(place: Place) -> list[Row]:
    upstream, ours = place.upstream, place.ours
    image = tuple(f"{upstream}.to_{n}" for n in "qkv")
    text = tuple(f"{upstream}.add_{n}_proj" for n in "kv")
    table = norm(f"{upstream}.group_norm", f"{ours}/norm") + linear(f"{upstream}.to_out.0", f"{ours}/proj")
    return table + linear(image, f"{ours}/qkv", bias=True) + linear(text, f"{ours}/text_kv", bias=True)


def _to_arguments(backbone: UNetIF, latents: tuple[int, int]) -> dict[str, Any]:
    shape = backbone.shape
    attended = [level in shape.attention_levels for level in range(len(shape.widths))]
    return shared_arguments(backbone, shape.widths, shape.res_blocks, latents) | {
        "down_block_types": [
            "SimpleCrossAttnDownBlock2D" if has else "ResnetDownsampleBlock2D" for has in attended
        ],
        "mid_block_type": IF_MIDDLE,
        "up_block_types": [
            "SimpleCrossAttnUpBlock2D" if has else "ResnetUpsampleBlock2D" for has in reversed(attended)
        ],
        "attention_head_dim": shape.head_dim,
        "act_fn": "gelu",
        "resnet_time_scale_shift": "scale_shift",
    }


def _to_fields(arguments: Arguments) -> dict[str, Any]:
    names = arguments["down_block_types"]
    head_dim = arguments["attention_head_dim"]
    return shared_fields(arguments) | {
        "attention_levels": tuple(
            level for level, name in enumerate(names) if name == "SimpleCrossAttnDownBlock2D"
        ),
        "head_dim": head_dim[0] if isinstance(head_dim, tuple) else head_dim,
    }


DIFFUSERS = DiffusersClass(
    "UNet2DConditionModel",
    UNET_DEFAULTS,
    _to_arguments,
    _to_fields,
    free=UNET_FREE | {"transformer_layers_per_block", "use_linear_projection"},
    matches=lambda arguments: arguments["mid_block_type"] == IF_MIDDLE,
)
