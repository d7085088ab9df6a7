"""Which diffusers class computes what one of our backbones does, and its arguments from our fields and back.

Facts of diffusers 0.42.1. A backbone that is not here has no class there: U-ViT (its `UVit2DModel` is another model)
and Large-DiT.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from scaling_dit.backbones.next_dit import NextDiT
from scaling_dit.backbones.pixart import PixArt
from scaling_dit.backbones.unet import SIZE_FEATURES, UNet
from scaling_dit.backbones.unet_if import UNetIF
from scaling_dit.errors import UserError

Arguments = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """One diffusers class, or one form of it, and the backbone that computes the same.

    Attributes:
      name: of our backbone.
      class_name: of diffusers' model.
      defaults: every constructor argument with its default.
      to_arguments: (backbone, height and width of the latents) -> the arguments that differ from `defaults`.
      to_fields: all arguments -> fields of our backbone, `in_channels` and `text_dim` among them.
      free: arguments that change nothing in what our backbone computes.
      aliases: older names of the class in published files.
      matches: whether all arguments are of this form, where one class has several.
    """

    name: str
    class_name: str
    defaults: Arguments
    to_arguments: Callable[[Any, tuple[int, int]], dict[str, Any]]
    to_fields: Callable[[Arguments], dict[str, Any]]
    free: frozenset[str] = frozenset()
    aliases: tuple[str, ...] = ()
    matches: Callable[[Arguments], bool] = lambda arguments: True


PIXART_DEFAULTS: Arguments = {
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


def _pixart_arguments(backbone: PixArt, latents: tuple[int, int]) -> dict[str, Any]:
    del latents  # positions follow from the backbone's own base size
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


def _pixart_fields(arguments: Arguments) -> dict[str, Any]:
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


NEXT_DIT_DEFAULTS: Arguments = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 2304,
    "num_layers": 32,
    "num_attention_heads": 32,
    "num_kv_heads": None,
    "multiple_of": 256,
    "ffn_dim_multiplier": None,
    "norm_eps": 1e-5,
    "learn_sigma": True,
    "qk_norm": True,
    "cross_attention_dim": 2048,
    "scaling_factor": 1.0,
}


def _next_dit_arguments(backbone: NextDiT, latents: tuple[int, int]) -> dict[str, Any]:
    _own_channels(backbone)
    hidden, depth, heads = backbone.widths
    return {
        "sample_size": max(latents),
        "patch_size": backbone.patch,
        "in_channels": backbone.in_channels,
        "hidden_size": hidden,
        "num_layers": depth,
        "num_attention_heads": heads,
        "num_kv_heads": backbone.kv_heads or heads,  # None, its default, makes the class fail with qk_norm
        "learn_sigma": backbone.learn_sigma,
        "qk_norm": backbone.qk_norm,
        "cross_attention_dim": backbone.text_dim,
    }


def _next_dit_fields(arguments: Arguments) -> dict[str, Any]:
    return {
        "in_channels": arguments["in_channels"],
        "text_dim": arguments["cross_attention_dim"],
        "hidden": arguments["hidden_size"],
        "depth": arguments["num_layers"],
        "heads": arguments["num_attention_heads"],
        "kv_heads": arguments["num_kv_heads"],
        "patch": arguments["patch_size"],
        "qk_norm": bool(arguments["qk_norm"]),
        "learn_sigma": bool(arguments["learn_sigma"]),
    }


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
# attention in float32 or not, and what only other embeddings read
_UNET_FREE = frozenset({"sample_size", "upcast_attention", "addition_embed_type_num_heads"})


def _unet_arguments(backbone: UNet, latents: tuple[int, int]) -> dict[str, Any]:
    shape = backbone.shape
    attended = [depth > 0 for depth in shape.depths]
    # A level without attention has a number all the same; that of the last level is also the middle's.
    depths = [depth or 1 for depth in shape.depths[:-1]] + [shape.mid_depth]
    arguments = _both_unets(backbone, shape.widths, shape.res_blocks, latents) | {
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


def _unet_fields(arguments: Arguments) -> dict[str, Any]:
    widths = arguments["block_out_channels"]
    attended = [name == "CrossAttnDownBlock2D" for name in arguments["down_block_types"]]
    layers = _per_level(arguments, "transformer_layers_per_block", len(widths))
    depths = [depth if has else 0 for depth, has in zip(layers, attended, strict=True)]
    while depths and not depths[-1]:
        depths.pop()
    heads = _per_level(arguments, "attention_head_dim", len(widths))
    last = max((level for level, has in enumerate(attended) if has), default=0)
    fields = _both_unets_fields(arguments) | {
        "transformer_depth": tuple(depths),
        "head_dim": widths[last] // heads[last],
        "text_time": arguments["addition_embed_type"] == "text_time",
    }
    if fields["text_time"]:
        fields["pooled_dim"] = arguments["projection_class_embeddings_input_dim"] - 6 * SIZE_FEATURES
    return fields


def _unet_if_arguments(backbone: UNetIF, latents: tuple[int, int]) -> dict[str, Any]:
    shape = backbone.shape
    attended = [level in shape.attention_levels for level in range(len(shape.widths))]
    return _both_unets(backbone, shape.widths, shape.res_blocks, latents) | {
        "down_block_types": [
            "SimpleCrossAttnDownBlock2D" if has else "ResnetDownsampleBlock2D" for has in attended
        ],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": [
            "SimpleCrossAttnUpBlock2D" if has else "ResnetUpsampleBlock2D" for has in reversed(attended)
        ],
        "attention_head_dim": shape.head_dim,
        "act_fn": "gelu",
        "resnet_time_scale_shift": "scale_shift",
    }


def _unet_if_fields(arguments: Arguments) -> dict[str, Any]:
    names = arguments["down_block_types"]
    head_dim = arguments["attention_head_dim"]
    return _both_unets_fields(arguments) | {
        "attention_levels": tuple(
            level for level, name in enumerate(names) if name == "SimpleCrossAttnDownBlock2D"
        ),
        "head_dim": head_dim[0] if isinstance(head_dim, tuple) else head_dim,
    }


def _both_unets(
    backbone: UNet | UNetIF, widths: tuple[int, ...], res_blocks: int, latents: tuple[int, int]
) -> dict[str, Any]:
    return {
        "sample_size": max(latents),
        "in_channels": backbone.in_channels,
        "out_channels": backbone.out_channels or backbone.in_channels,
        "block_out_channels": list(widths),
        "layers_per_block": res_blocks,
        "cross_attention_dim": backbone.text_dim,
    }


def _both_unets_fields(arguments: Arguments) -> dict[str, Any]:
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


def _per_level(arguments: Arguments, name: str, levels: int) -> tuple[Any, ...]:
    value = arguments[name]
    return value if isinstance(value, tuple) else (value,) * levels


def _own_channels(backbone: Any) -> None:
    """Makes sure that a backbone returns as many channels as come in, as its diffusers class always does."""
    if backbone.out_channels not in (None, backbone.in_channels):
        raise UserError(
            f"out_channels is {backbone.out_channels}, but diffusers' model returns the {backbone.in_channels} that "
            "come in; use --to=safetensors"
        )


def _is_if(arguments: Arguments) -> bool:
    return arguments["mid_block_type"] == "UNetMidBlock2DSimpleCrossAttn"


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "pixart",
            "PixArtTransformer2DModel",
            PIXART_DEFAULTS,
            _pixart_arguments,
            _pixart_fields,
            # Positions and the extra conditions are read by `_pixart_fields`; nothing reads the others.
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
        ),
        Family(
            "next_dit",
            "LuminaNextDiT2DModel",
            NEXT_DIT_DEFAULTS,
            _next_dit_arguments,
            _next_dit_fields,
            free=frozenset({"sample_size", "scaling_factor", "num_kv_heads"}),  # the last: `_next_dit_fields`
        ),
        Family(
            "unet",
            "UNet2DConditionModel",
            UNET_DEFAULTS,
            _unet_arguments,
            _unet_fields,
            free=_UNET_FREE,
            matches=lambda arguments: not _is_if(arguments),
        ),
        Family(
            "unet_if",
            "UNet2DConditionModel",
            UNET_DEFAULTS,
            _unet_if_arguments,
            _unet_if_fields,
            free=_UNET_FREE | {"transformer_layers_per_block", "use_linear_projection"},
            matches=_is_if,
        ),
    )
}
