"""PixArt as diffusers' `PixArtTransformer2DModel`: the names of its parameters and the arguments of the class.

Its positions are computed, not stored. Files that do store them, under `pos_embed.pos_embed`, are of another class.
"""

from typing import Any

from scaling_dit.backbones.conditions_weights import refuse, token_rows
from scaling_dit.backbones.pixart import PixArt
from scaling_dit.errors import UserError
from scaling_dit.weights.diffusers_class import Arguments, DiffusersClass
from scaling_dit.weights.table import Copy, Row, Table, Unread, linear, patch_conv


def rows(backbone: PixArt) -> Table:
    """The table of one backbone; its fields decide which entries there are."""
    depth = backbone.widths[1]
    block, time = "transformer_blocks.{i}", "adaln_single.emb.timestep_embedder"
    table: list[Row | Copy | Unread] = [
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
        *token_rows(backbone),
    ]
    if backbone.embeds_caption:
        table += linear("caption_projection.linear_1", "caption_embed/fc1")
        table += linear("caption_projection.linear_2", "caption_embed/fc2")
        # The learned empty caption, of any length, which training put in place of captions.
        table.append(Unread("caption_projection.y_embedding", (None, backbone.text_dim)))
    return table


_DEFAULTS: Arguments = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 128,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
    "use_additional_conditions": None,
    "caption_channels": None,
    "attention_type": "default",
}


def _to_arguments(backbone: PixArt, latents: tuple[int, int]) -> dict[str, Any]:
    refuse(backbone, "PixArtTransformer2DModel")
    # Positions follow from the backbone's own base size.
    del latents
    hidden, depth, heads = backbone.widths
    return {
        "num_attention_heads": heads,
        "attention_head_dim": hidden // heads,
        "in_channels": backbone.in_channels,
        "out_channels": (backbone.out_channels or backbone.in_channels) * (1 + backbone.learn_sigma),
        "num_layers": depth,
        "cross_attention_dim": hidden,
        "sample_size": backbone.base_size * backbone.patch,
        "patch_size": backbone.patch,
        "interpolation_scale": 1,
        "use_additional_conditions": False,
        "caption_channels": backbone.text_dim if backbone.embeds_caption else None,
    }


def _to_fields(arguments: Arguments) -> dict[str, Any]:
    size, patch = arguments["sample_size"], arguments["patch_size"]
    scale = arguments["interpolation_scale"] or max(size // 64, 1)
    if arguments["use_additional_conditions"] or (
        arguments["use_additional_conditions"] is None and size == 128
    ):
        raise UserError(
            "PixArtTransformer2DModel with use_additional_conditions reads sizes, which pixart does not"
        )
    if size // patch % scale:
        raise UserError(f"sample_size {size} and interpolation_scale {scale} make no whole number of tokens")
    hidden = arguments["num_attention_heads"] * arguments["attention_head_dim"]
    channels = arguments["in_channels"]
    returned = arguments["out_channels"] or channels
    learn_sigma = returned == 2 * channels
    return {
        "in_channels": channels,
        "out_channels": None if learn_sigma or returned == channels else returned,
        "text_dim": arguments["caption_channels"] or hidden,
        "hidden": hidden,
        "depth": arguments["num_layers"],
        "heads": arguments["num_attention_heads"],
        "patch": patch,
        "caption_embedding": arguments["caption_channels"] is not None,
        "learn_sigma": learn_sigma,
        "base_size": int(size // patch // scale),
    }


DIFFUSERS = DiffusersClass(
    "PixArtTransformer2DModel",
    _DEFAULTS,
    _to_arguments,
    _to_fields,
    # `_to_fields` reads positions and the extra conditions; nothing reads the others.
    free=frozenset(
        {
            "sample_size",
            "interpolation_scale",
            "use_additional_conditions",
            "norm_num_groups",
            "num_embeds_ada_norm",
            "upcast_attention",
        }
    ),
    aliases=("Transformer2DModel",),
    matches=lambda arguments: arguments["norm_type"] == "ada_norm_single",
)
