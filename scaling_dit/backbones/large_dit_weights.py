"""Large-DiT's parameters in the names of its published code (LLaMA2-Accessory `Large-DiT-T2I/models/model.py`).

Its `pad_token`, which only fills sequences up, is dropped from what is read, and not written.
"""

from scaling_dit.backbones.conditions_weights import token_rows
from scaling_dit.backbones.large_dit import LargeDiT
from scaling_dit.weights.table import Row, Table, Unread, linear, norm, patch_linear, query_key_value


def rows(backbone: LargeDiT) -> Table:
    """The table of one backbone; its fields decide which entries there are."""
    hidden, depth, _ = backbone.widths
    return [
        Unread("pad_token", (hidden,)),
        Row("eol_token", "eol_token"),
        Row("x_embedder.weight", "patch_embed/kernel", patch_linear(backbone.patch)),
        Row("x_embedder.bias", "patch_embed/bias"),
        *linear("t_embedder.mlp.0", "conditioning/time_fc1"),
        *linear("t_embedder.mlp.2", "conditioning/time_fc2"),
        *norm("cap_embedder.0", "conditioning/text_norm"),
        *linear("cap_embedder.1", "conditioning/text_embed"),
        *linear("layers.{i}.adaLN_modulation.1", "layers_{i}/modulation/linear", depth, parts=6),
        *norm("layers.{i}.attention_norm", "layers_{i}/attention_norm", depth, bias=False),
        *norm("layers.{i}.attention_y_norm", "layers_{i}/text_norm", depth, bias=False),
        *_attention("layers.{i}.attention", "layers_{i}/attention", depth, backbone),
        *norm("layers.{i}.ffn_norm", "layers_{i}/ffn_norm", depth, bias=False),
        *linear(
            ("layers.{i}.feed_forward.w1", "layers.{i}.feed_forward.w3"),
            "layers_{i}/feed_forward/w13",
            depth,
            apart=True,
        ),
        *linear("layers.{i}.feed_forward.w2", "layers_{i}/feed_forward/w2", depth, bias=False),
        *linear("final_layer.adaLN_modulation.1", "head/modulation/linear", parts=2),
        *linear("final_layer.linear", "head/linear"),
        *token_rows(backbone),
    ]


def _attention(upstream: str, ours: str, layers: int, backbone: LargeDiT) -> list[Row]:
    q, k, v = (f"{upstream}.w{name}" for name in "qkv")
    table = [
        Row(f"{upstream}.gate", f"{ours}/gate", layers=layers),
        *linear((f"{upstream}.wk_y", f"{upstream}.wv_y"), f"{ours}/text_kv", layers, apart=True),
        *linear(f"{upstream}.wo", f"{ours}/out", layers, bias=False),
    ]
    table += query_key_value(q, k, v, ours, layers, grouped=backbone.grouped)
    if backbone.qk_norm:
        for theirs, name in (("q", "q"), ("k", "k"), ("ky", "text_k")):
            table += norm(f"{upstream}.{theirs}_norm", f"{ours}/{name}_norm", layers)
    return table
