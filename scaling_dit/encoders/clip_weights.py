"""The weight tables of CLIP's towers, with the names of transformers and of open_clip."""

import re
from collections.abc import Iterable

from scaling_dit.encoders.transformer import hugging_face_rows, open_clip_rows
from scaling_dit.weights import table

_LAYER = re.compile(r"(?:encoder\.layers|transformer\.resblocks)\.(\d+)\.")


def text_entries(
    tensors: Iterable[str], layers: int, depth: int, project: bool
) -> tuple[dict[str, str], table.Table]:
    """The entries of a text tower in its own file or in a whole CLIP's, and the table that maps them.

    Args:
      tensors: names in the file.
      layers: layers of the whole tower. Files of Stable Diffusion 2 have one less.
      depth: number of layers to load.
      project: whether to load the projection.

    Returns:
      Name in the table -> name in the file, and the table.
    """
    if any(name.endswith("token_embedding.weight") and "embeddings." not in name for name in tensors):
        names = _below(tensors, "text.", others=("visual.", "logit_"))
        rows: list[table.Row | table.Copy | table.Unread] = [
            table.Row("token_embedding.weight", "words"),
            table.Row("positional_embedding", "positions"),
            *open_clip_rows(depth),
            *table.norm("ln_final", "norm"),
            *([table.Row("text_projection", "projection/kernel")] if project else []),
        ]
        unread: set[str] = {"attn_mask"} | (set() if project else {"text_projection"})
    else:
        names = _below(tensors, "text_model.", others=("vision_model.", "visual_projection.", "logit_scale"))
        rows = text_rows(depth)
        rows += table.linear("text_projection", "projection", bias=False) if project else []
        unread = {"embeddings.position_ids"} | (set() if project else {"text_projection.weight"})
    wanted = {to: name for to, name in names.items() if to not in unread and not _beyond(to, depth, layers)}
    return wanted, rows


def text_rows(depth: int) -> list[table.Row | table.Copy | table.Unread]:
    """The table of transformers' CLIPTextModel with `depth` layers, without its prefix `text_model.`."""
    return [
        table.Row("embeddings.token_embedding.weight", "words"),
        table.Row("embeddings.position_embedding.weight", "positions"),
        *hugging_face_rows(depth),
        *table.norm("final_layer_norm", "norm"),
    ]


def vision_entries(tensors: Iterable[str], layers: int, patch: int) -> tuple[dict[str, str], table.Table]:
    """The entries of an image tower in a whole CLIP's file, and the table that maps them; as `text_entries`."""
    if any(name.endswith("visual.conv1.weight") for name in tensors):
        names = {name.removeprefix("visual."): name for name in tensors if name.startswith("visual.")}
        rows = [
            table.Row("conv1.weight", "patches/kernel", table.patch_conv(patch)),
            table.Row("class_embedding", "class"),
            table.Row("positional_embedding", "positions"),
            *table.norm("ln_pre", "norm_in"),
            *open_clip_rows(layers),
            *table.norm("ln_post", "norm_out"),
            table.Row("proj", "projection/kernel"),
        ]
    else:
        others = ("text_model.", "text_projection.", "logit_scale")
        names = _below(tensors, "vision_model.", others)
        rows = [
            table.Row("embeddings.patch_embedding.weight", "patches/kernel", table.patch_conv(patch)),
            table.Row("embeddings.class_embedding", "class"),
            table.Row("embeddings.position_embedding.weight", "positions"),
            # transformers' own misspelling.
            *table.norm("pre_layrnorm", "norm_in"),
            *hugging_face_rows(layers),
            *table.norm("post_layernorm", "norm_out"),
            *table.linear("visual_projection", "projection", bias=False),
        ]
        names.pop("embeddings.position_ids", None)
    return names, rows


def _below(tensors: Iterable[str], prefix: str, others: tuple[str, ...]) -> dict[str, str]:
    """Names without `prefix` -> names in the file, without the entries of a CLIP's other parts."""
    return {name.removeprefix(prefix): name for name in tensors if not name.startswith(others)}


def _beyond(name: str, depth: int, layers: int) -> bool:
    """Whether an entry belongs to a layer of the tower that is not loaded."""
    layer = _LAYER.match(name)
    return layer is not None and depth <= int(layer.group(1)) < layers
