"""The UNets as diffusers' UNet2DConditionModel: the names of their parameters and the arguments of the class.

diffusers numbers the blocks on the way up from the coarsest level on; ours carry the number of their level.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from scaling_dit.backbones.conditions_weights import first_convolution, input_channels
from scaling_dit.backbones.unet import SIZE_FEATURES, UNet
from scaling_dit.weights.diffusers_class import Arguments, DiffusersClass
from scaling_dit.weights.table import Row, Slices, Table, convolution, linear, norm, pointwise


class Place(NamedTuple):
    """A part of the U: "res", "attn" or "sample", its two names, and its level (None in the middle)."""

    kind: str
    upstream: str
    ours: str
    level: int | None


def rows(backbone: UNet) -> Table:
    """The table of one backbone; its fields decide which entries there are."""
    shape = backbone.shape
    table = ends(backbone)
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


def ends(backbone: Any) -> list[Row | Slices]:
    """What comes before and after the U: first and last convolution, time embedding, last norm."""
    return [
        *first_convolution(backbone),
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
        # On the way up a skip is concatenated.
        if ours.startswith("up") or entered:
            table += [
                Row(f"{upstream}.conv_shortcut.weight", f"{ours}/shortcut/kernel", pointwise()),
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


# Facts of both forms of UNet2DConditionModel, this one and IF's (unet_if_weights.py).
UNET_DEFAULTS: Arguments = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "only_cross_attention": False,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "use_linear_projection": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "upcast_attention": False,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
}
# Attention in float32 or not, and what only other embeddings read.
UNET_FREE = frozenset({"sample_size", "upcast_attention", "addition_embed_type_num_heads"})
IF_MIDDLE = "UNetMidBlock2DSimpleCrossAttn"


def shared_arguments(
    backbone: Any, widths: tuple[int, ...], res_blocks: int, latents: tuple[int, int]
) -> dict[str, Any]:
    """The arguments that follow from the fields alike in both forms."""
    return {
        "sample_size": max(latents),
        "in_channels": input_channels(backbone),
        "out_channels": backbone.out_channels or backbone.in_channels,
        "block_out_channels": list(widths),
        "layers_per_block": res_blocks,
        "cross_attention_dim": backbone.text_dim,
    }


def shared_fields(arguments: Arguments) -> dict[str, Any]:
    """The fields that follow from the arguments alike in both forms."""
    widths = arguments["block_out_channels"]
    text_dim, blocks = arguments["cross_attention_dim"], arguments["layers_per_block"]
    same = arguments["out_channels"] == arguments["in_channels"]
    return {
        "in_channels": arguments["in_channels"],
        "out_channels": None if same else arguments["out_channels"],
        "text_dim": text_dim[0] if isinstance(text_dim, tuple) else text_dim,
        "channels": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "res_blocks": blocks[0] if isinstance(blocks, tuple) else blocks,
    }


def _to_arguments(backbone: UNet, latents: tuple[int, int]) -> dict[str, Any]:
    shape = backbone.shape
    attended = [depth > 0 for depth in shape.depths]
    # A level without attention has a number all the same; that of the last level is also the middle's.
    depths = [depth or 1 for depth in shape.depths[:-1]] + [shape.mid_depth]
    arguments = shared_arguments(backbone, shape.widths, shape.res_blocks, latents) | {
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attended)],
        "transformer_layers_per_block": depths,
        # diffusers calls it so, and counts heads.
        "attention_head_dim": [max(1, width // shape.head_dim) for width in shape.widths],
        "use_linear_projection": True,
    }
    if shape.text_time:
        arguments |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_FEATURES,
            "projection_class_embeddings_input_dim": backbone.pooled_dim + 6 * SIZE_FEATURES,
        }
    return arguments


def _to_fields(arguments: Arguments) -> dict[str, Any]:
    widths = arguments["block_out_channels"]
    attended = [name == "CrossAttnDownBlock2D" for name in arguments["down_block_types"]]
    layers = _per_level(arguments, "transformer_layers_per_block", len(widths))
    depths = [depth if has else 0 for depth, has in zip(layers, attended, strict=True)]
    while depths and not depths[-1]:
        depths.pop()
    heads = _per_level(arguments, "attention_head_dim", len(widths))
    last = max((level for level, has in enumerate(attended) if has), default=0)
    fields = shared_fields(arguments) | {
        "transformer_depth": tuple(depths),
        "head_dim": widths[last] // heads[last],
        "text_time": arguments["addition_embed_type"] == "text_time",
    }
    if fields["text_time"]:
        fields["pooled_dim"] = arguments["projection_class_embeddings_input_dim"] - 6 * SIZE_FEATURES
    return fields


def _per_level(arguments: Arguments, name: str, levels: int) -> tuple[Any, ...]:
    value = arguments[name]
    return value if isinstance(value, tuple) else (value,) * levels


DIFFUSERS = DiffusersClass(
    "UNet2DConditionModel",
    UNET_DEFAULTS,
    _to_arguments,
    _to_fields,
    free=UNET_FREE,
    matches=lambda arguments: arguments["mid_block_type"] != IF_MIDDLE,
)
