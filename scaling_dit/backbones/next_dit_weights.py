"""Next-DiT as diffusers' `LuminaNextDiT2DModel`: the names of its parameters and the arguments of the class.

In the published model the text is read by the queries that the image is read by. diffusers has them twice, in attn1 and
attn2: a file where they differ is refused, and both are written.
"""

from typing import Any

from scaling_dit.backbones.conditions_weights import refuse, token_rows
from scaling_dit.backbones.next_dit import NextDiT
from scaling_dit.errors import UserError
from scaling_dit.weights.diffusers_class import Arguments, DiffusersClass
from scaling_dit.weights.table import Copy, Row, Table, linear, norm, patch_linear, query_key_value


def rows(backbone: NextDiT) -> Table:
    """The table of one backbone; its fields decide which entries there are."""
    depth = backbone.widths[1]
    time_and_text, block, ffn = "time_caption_embed", "layers.{i}", "layers.{i}.feed_forward"
    return [
        Row("pad_token", "pad_token"),
        Row("patch_embedder.proj.weight", "patch_embed/kernel", patch_linear(backbone.patch)),
        Row("patch_embedder.proj.bias", "patch_embed/bias"),
        *linear(f"{time_and_text}.timestep_embedder.linear_1", "conditioning/time_fc1"),
        *linear(f"{time_and_text}.timestep_embedder.linear_2", "conditioning/time_fc2"),
        *norm(f"{time_and_text}.caption_embedder.0", "conditioning/text_norm"),
        *linear(f"{time_and_text}.caption_embedder.1", "conditioning/text_embed"),
        *linear(f"{block}.norm1.linear", "layers_{i}/modulation/linear", depth, parts=4),
        *norm(f"{block}.norm1.norm", "layers_{i}/attention_norm", depth, bias=False),
        *norm(f"{block}.norm1_context", "layers_{i}/text_norm", depth, bias=False),
        *_attention(block, "layers_{i}/attention", depth, backbone),
        *norm(f"{block}.norm2", "layers_{i}/attention_out_norm", depth, bias=False),
        *norm(f"{block}.ffn_norm1", "layers_{i}/ffn_norm", depth, bias=False),
        *linear((f"{ffn}.linear_1", f"{ffn}.linear_3"), "layers_{i}/feed_forward/w13", depth, apart=True),
        *linear(f"{ffn}.linear_2", "layers_{i}/feed_forward/w2", depth, bias=False),
        *norm(f"{block}.ffn_norm2", "layers_{i}/ffn_out_norm", depth, bias=False),
        *linear("norm_out.linear_1", "head/modulation/linear", parts=1),
        *linear("norm_out.linear_2", "head/linear"),
        *token_rows(backbone),
    ]


def _attention(block: str, ours: str, layers: int, backbone: NextDiT) -> Table:
    image, text = f"{block}.attn1", f"{block}.attn2"
    q, k, v = (f"{image}.to_{name}" for name in "qkv")
    shared = [f"{name}.weight" for name in (("to_q", "norm_q") if backbone.qk_norm else ("to_q",))]
    table: list[Row | Copy] = [
        Row(f"{block}.gate", f"{ours}/gate", layers=layers),
        *linear((f"{text}.to_k", f"{text}.to_v"), f"{ours}/text_kv", layers, apart=True),
        *linear(f"{text}.to_out.0", f"{ours}/out", layers, bias=False),
    ]
    table += query_key_value(q, k, v, ours, layers, grouped=backbone.grouped)
    if backbone.qk_norm:
        table += norm(f"{image}.norm_q", f"{ours}/q_norm", layers)
        table += norm(f"{image}.norm_k", f"{ours}/k_norm", layers)
        table += norm(f"{text}.norm_k", f"{ours}/text_k_norm", layers)
        shared.append("norm_q.bias")
    return [*table, *(Copy(f"{text}.{name}", f"{image}.{name}", layers) for name in shared)]


_DEFAULTS: Arguments = {
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


def _to_arguments(backbone: NextDiT, latents: tuple[int, int]) -> dict[str, Any]:
    refuse(backbone, "LuminaNextDiT2DModel")
    # diffusers' model has no argument for the channels that it returns.
    if backbone.out_channels not in (None, backbone.in_channels):
        raise UserError(
            f"out_channels is {backbone.out_channels}, but diffusers' model returns the {backbone.in_channels} that "
            "come in; use --to=safetensors"
        )
    if backbone.rope_scaling != "none":
        raise UserError(
            f"rope_scaling is {backbone.rope_scaling!r}, which diffusers' model has no argument for: its pipeline "
            "hands it the positions; use --to=safetensors"
        )
    hidden, depth, heads = backbone.widths
    return {
        "sample_size": max(latents),
        "patch_size": backbone.patch,
        "in_channels": backbone.in_channels,
        "hidden_size": hidden,
        "num_layers": depth,
        "num_attention_heads": heads,
        # None, its default, makes the class fail with qk_norm.
        "num_kv_heads": backbone.kv_heads or heads,
        "learn_sigma": backbone.learn_sigma,
        "qk_norm": backbone.qk_norm,
        "cross_attention_dim": backbone.text_dim,
    }


def _to_fields(arguments: Arguments) -> dict[str, Any]:
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


DIFFUSERS = DiffusersClass(
    "LuminaNextDiT2DModel",
    _DEFAULTS,
    _to_arguments,
    _to_fields,
    # `_to_fields` reads num_kv_heads.
    free=frozenset({"sample_size", "scaling_factor", "num_kv_heads"}),
)
