"""CLIP and T5 text encoders with their tokenizers as folders that transformers loads, and which of ours one is."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from scaling_dit import trees
from scaling_dit.encoders import clip, clip_weights, t5, transformer, vocabularies
from scaling_dit.encoders.subwords import NO_TOKENIZER
from scaling_dit.errors import UserError
from scaling_dit.weights import state_dicts
from scaling_dit.weights.files import read_json

_CLIP_PREFIX = "text_model."


def describe(encoder: Any) -> dict[str, Any]:
    """The `config.json` of a CLIP or T5 text encoder."""
    if isinstance(encoder, clip.ClipText):
        if encoder.windows > 1:
            raise UserError(
                f"config.text_encoder.length is {encoder.length}, {encoder.windows} windows, which no pipeline of "
                "diffusers reads; --to=diffusers writes the backbone alone"
            )
        size = clip.SIZES[encoder.size]
        end = clip.VOCABULARY - 1
        return {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": clip.VOCABULARY,
            "max_position_embeddings": clip.POSITIONS,
            "hidden_size": size.width,
            "num_hidden_layers": encoder.module.depth,
            "num_attention_heads": size.heads,
            "intermediate_size": size.mlp,
            "projection_dim": size.projection,
            "hidden_act": size.activation,
            "layer_norm_eps": transformer.NORM_EPSILON,
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": _pad_id(encoder),
        }
    shape = t5.SIZES[encoder.size]
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": t5.VOCABULARY,
        "d_model": shape.width,
        "d_kv": shape.head,
        "d_ff": shape.mlp,
        "num_layers": shape.layers,
        "num_heads": shape.heads,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": t5.BUCKETS,
        "relative_attention_max_distance": t5.MAX_DISTANCE,
        "layer_norm_epsilon": t5.EPSILON,
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
        "pad_token_id": t5.PAD,
        "eos_token_id": t5.END,
    }


def state_dict(encoder: Any, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parameters of a CLIP or T5 text encoder by the names of transformers' CLIPTextModel or T5EncoderModel."""
    params, what = trees.unbox(params), f"text encoder {encoder.size!r}"
    if isinstance(encoder, clip.ClipText):
        # The class has no projection.
        params = {name: value for name, value in params.items() if name != "projection"}
        saved = state_dicts.save(clip_weights.text_rows(encoder.module.depth), params, params, what)
        return {_CLIP_PREFIX + name: array for name, array in saved.items()}
    return state_dicts.save(t5.encoder_rows(t5.SIZES[encoder.size].layers), params, params, what)


def write_tokenizer(encoder: Any, folder: epath.Path) -> None:
    """Writes the files of transformers' CLIPTokenizer or T5Tokenizer.

    Raises:
      UserError: the encoder has no tokenizer.
    """
    if encoder.tokenizer is None:
        raise UserError(NO_TOKENIZER)
    definition = encoder.tokenizer.definition
    model = json.loads(definition)["model"]
    settings: dict[str, Any] = {"model_max_length": encoder.length}
    if isinstance(encoder, clip.ClipText):
        words = {number: word for word, number in model["vocab"].items()}
        marks = {
            "bos_token": vocabularies.CLIP_BEGIN,
            "eos_token": vocabularies.CLIP_END,
            "unk_token": vocabularies.CLIP_END,
            "pad_token": words[_pad_id(encoder)],
        }
        settings |= {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, **marks}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        files = {
            "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
            "special_tokens_map.json": json.dumps(marks, indent=2),
        }
    else:
        marks = {"eos_token": vocabularies.T5_END, "pad_token": "<pad>", "unk_token": "<unk>"}
        settings |= {"tokenizer_class": "T5Tokenizer", "extra_ids": vocabularies.T5_EXTRA_IDS, **marks}
        files = {"special_tokens_map.json": json.dumps(marks, indent=2)}
    folder.mkdir(parents=True, exist_ok=True)
    files |= {"tokenizer.json": definition, "tokenizer_config.json": json.dumps(settings, indent=2)}
    for name, text in files.items():
        (folder / name).write_text(text)


def read_fields(pipeline: epath.Path) -> dict[str, Any]:
    """The fields of `config.text_encoder` that mean the text encoder of a pipeline's folder.

    Raises:
      UserError: one of another architecture than ours.
    """
    described = read_json(pipeline / "text_encoder" / "config.json")
    named = (described.get("architectures") or ["none"])[0]
    if named in clip.CLASSES:
        return {"name": "clip", **_clip_fields(described, pipeline), "weights": str(pipeline)}
    if named not in t5.CLASSES:
        raise UserError(f"the text encoder of {pipeline} is a {named}; here are CLIP's and T5's")
    for name, size in t5.SIZES.items():
        shape = (size.width, size.head, size.mlp, size.layers, size.heads)
        if shape == tuple(
            described.get(key) for key in ("d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        ):
            return {"name": "t5", "size": name, "weights": str(pipeline)}
    raise UserError(f"the T5 of {pipeline} has no size of {', '.join(t5.SIZES)}")


def _clip_fields(described: Mapping[str, Any], pipeline: epath.Path) -> dict[str, Any]:
    keys = ("hidden_size", "num_attention_heads", "intermediate_size", "hidden_act")
    found = tuple(
        described.get(key, default) for key, default in zip(keys, (512, 8, 2048, "quick_gelu"), strict=True)
    )
    depth = described.get("num_hidden_layers", 12)
    for name, size in clip.SIZES.items():
        if found == (size.width, size.heads, size.mlp, size.activation) and depth in (
            size.layers,
            size.layers - 1,
        ):
            layer = "last" if depth == size.layers else "penultimate"
            return {"size": name, "layer": layer, "pad_id": _read_pad_id(pipeline, size)}
    raise UserError(f"the CLIP of {pipeline} has no size of {', '.join(clip.SIZES)}")


def _read_pad_id(pipeline: epath.Path, size: clip.Size) -> int:
    """What the tokenizer of a pipeline pads with; -1 where that is what the tower was trained with.

    `special_tokens_map.json` is believed before `tokenizer_config.json`: in Stable Diffusion 2 they differ, and the
    first is right.
    """
    folder = pipeline / "tokenizer"
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            continue
        token = read_json(folder / name).get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            vocabulary = json.loads(vocabularies.find(pipeline / "text_encoder"))["model"]["vocab"]
            found = vocabulary.get(token, size.pad_id)
            return -1 if found == size.pad_id else int(found)
    return -1


def _pad_id(encoder: clip.ClipText) -> int:
    return clip.SIZES[encoder.size].pad_id if encoder.pad_id < 0 else encoder.pad_id
