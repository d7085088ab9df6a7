"""ImageReward's network in torch, of transformers' parts for BLIP, with the names of ImageReward.pt."""

import itertools
import pathlib
from typing import Any

import numpy as np
import torch
from transformers import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from tests.support.parity import randomise_

_IMAGE = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "post_layernorm": "norm",
    "encoder.layers": "blocks",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
    "layer_norm": "norm",
}


def build(size: Any) -> torch.nn.ModuleDict:
    """A random network of a size of `blip.SIZES`."""
    image = BlipVisionConfig(
        hidden_size=size.image_width,
        intermediate_size=4 * size.image_width,
        num_hidden_layers=size.image_layers,
        num_attention_heads=size.image_heads,
        image_size=size.image,
        patch_size=size.patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=size.words,
        hidden_size=size.width,
        encoder_hidden_size=size.image_width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.positions,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
    )
    sides = (size.width, 1024, 128, 64, 16, 1)
    layers: list[torch.nn.Module] = [torch.nn.Linear(*pair) for pair in itertools.pairwise(sides)]
    for at in (1, 3, 5):
        layers.insert(at, torch.nn.Dropout(0.2))
    model = torch.nn.ModuleDict(
        {
            "image": BlipVisionModel(image),
            "text": BlipTextModel(text, add_pooling_layer=False),
            "mlp": torch.nn.Sequential(*layers),
        }
    )
    return randomise_(model, 0).eval()


def rewards(
    model: torch.nn.ModuleDict, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
) -> np.ndarray:
    """The standardised rewards [B]."""
    tokens = model["image"](images).last_hidden_state
    found = model["text"](
        ids,
        mask.long(),
        encoder_hidden_states=tokens,
        encoder_attention_mask=torch.ones(tokens.shape[:2]).long(),
    )
    raw = model["mlp"](found.last_hidden_state[:, 0])[:, 0]
    return ((raw - 0.16717362830052426) / 1.0333394966054072).numpy()


def published(model: torch.nn.ModuleDict) -> dict[str, np.ndarray]:
    """Its weights as ImageReward.pt names them, with what only BLIP's training used."""
    found = {}
    for name, value in model["image"].state_dict().items():
        for theirs, ours in _IMAGE.items():
            name = name.replace(theirs, ours)
        found[f"blip.visual_encoder.{name}"] = value
    found |= {f"blip.text_encoder.{name}": value for name, value in model["text"].state_dict().items()}
    found |= {f"mlp.layers.{name}": value for name, value in model["mlp"].state_dict().items()}
    found["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    for part, width in (("vision", 32), ("text", 24)):
        found |= {
            f"blip.{part}_proj.weight": torch.zeros(256, width),
            f"blip.{part}_proj.bias": torch.zeros(256),
        }
    return {name: value.contiguous().numpy() for name, value in found.items()}


def vocabulary(folder: pathlib.Path) -> pathlib.Path:
    """A vocab.txt with the special lines of bert-base-uncased and some words."""
    lines = [f"[unused{i}]" for i in range(30_522)]
    for number, word in {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}.items():
        lines[number] = word
    words = ["a", "red", "circle", ",", "left", "of", "it", "word", "##s"]
    lines[2000 : 2000 + len(words)] = words
    path = folder / "vocab.txt"
    path.write_text("\n".join(lines) + "\n")
    return path
