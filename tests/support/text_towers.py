"""Small random models of transformers, and vocabularies, that several tests read."""
# ruff: noqa: RUF001 - signs that look alike are among them

import gzip
import importlib.util
import json
import pathlib
from typing import Any

import torch
import transformers

from tests.support import references
from tests.support.parity import randomise_

HEAD = {"num_attention_heads": 4, "layer_norm_eps": 1e-5}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 49_408, "hidden_act": "gelu", **HEAD}
TEXT_IDS = {"bos_token_id": 49_406, "eos_token_id": 49_407, "pad_token_id": 1}

# What captions from the web may hold.
HARD = (
    "a photo of a cat",
    "A RED Circle, left of a blue square!!!",
    "",
    " ",
    "  leading \t and \n trailing   ",
    "it's the dog's, they'll we've I'd I'm you're don't",
    "12345 3.14 1,000,000 50% №5 ½ ²",
    "...!?!? --- ;;; ((nested)) [x] {y} <z> \\ / | ~ ` ^ _under_score_",
    # Composed.
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m",
    # The same, decomposed.
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
    "İstanbul Straße ǅ ﬁne ＦＵＬＬ",
    "日本語のキャプション と 漢字",
    "中文字幕，没有空格。",
    "Привет, мир! Γειά σου Κόσμε שלום مرحبا",
    "हिन्दी ไทย 한국어",
    "🐈‍⬛ 👩‍👩‍👧 👍🏽 emoji🙂inside",
    "&amp; &lt;b&gt; &quot;quoted&quot; &#39;",
    "http://example.com/a_b?c=d&e=f#g user@host.org",
    "zero\u200bwidth soft\u00adhyphen nbsp\u00a0here \ufeffbom",
    "a" * 200,
    " ".join(["word"] * 120),
    "long, " * 60 + "end",
    "<|endoftext|> in the middle <|startoftext|>",
    "<extra_id_0> a sentinel </s> <pad>",
    "tab\tnew\nline\r\nreturn",
    "“curly” ‘quotes’ – — … •",
)


def clip_vocabulary() -> pathlib.Path:
    """CLIP's merges in the open_clip_torch wheel, which need not be importable."""
    references.look()
    (folder,) = importlib.util.find_spec("open_clip").submodule_search_locations
    return pathlib.Path(folder) / "bpe_simple_vocab_16e6.txt.gz"


def clip_words() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) of CLIP, as transformers takes them; written apart from the code under test."""
    lines = gzip.decompress(clip_vocabulary().read_bytes()).decode().split("\n")[1 : 49_152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}, merges


def save_clip_words(folder: pathlib.Path) -> None:
    """vocab.json and merges.txt, as the folder `tokenizer` of Stable Diffusion has them."""
    vocabulary, merges = clip_words()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def build(model: type[torch.nn.Module], config: transformers.PretrainedConfig) -> torch.nn.Module:
    """A random model, always the same, of which no parameter keeps a start of zero or one."""
    return randomise_(model(config), 0).eval()


def clip_text(
    layers: int, model: type[torch.nn.Module] = transformers.CLIPTextModel, **options: Any
) -> torch.nn.Module:
    """A random text tower of the size "tiny"."""
    config = {**TEXT, **TEXT_IDS, **options}
    return build(model, transformers.CLIPTextConfig(num_hidden_layers=layers, projection_dim=16, **config))


def clip(**vision: Any) -> torch.nn.Module:
    """A random CLIP whose towers have the size "tiny"."""
    text = {"num_hidden_layers": 3, **TEXT, **TEXT_IDS}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    image = {"hidden_act": "gelu", **sizes, **HEAD, **vision}
    config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=16)
    return build(transformers.CLIPModel, config)


# Our name of a size -> open_clip's, whose configurations lie beside its code.
OPEN_CLIP = {
    "openclip-h": "ViT-H-14",
    "openclip-bigg": "ViT-bigG-14",
    "clip-l": "ViT-L-14-quickgelu",
    "clip-l-336": "ViT-L-14-336-quickgelu",
    "clip-b": "ViT-B-32-quickgelu",
}


def open_clip_config(size):
    """open_clip's configuration of a size; the package itself is not imported."""
    folder = clip_vocabulary().parent
    return json.loads((folder / "model_configs" / f"{OPEN_CLIP[size]}.json").read_text())
