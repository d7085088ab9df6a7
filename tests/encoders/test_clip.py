"""CLIP's text tower against transformers, from every kind of file it comes in."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from scaling_dit import encoders, trees
from scaling_dit.encoders import clip
from scaling_dit.encoders.clip import ClipText
from scaling_dit.encoders.subwords import SubwordTokenizer
from scaling_dit.errors import UserError
from tests.support import text_towers
from tests.support.uvit_golden import fill, run

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """`text_encoder` and `tokenizer` as Stable Diffusion 2 has them: two of three layers, no projection."""
    folder = tmp_path_factory.mktemp("pipeline")
    text_towers.clip_text(2).save_pretrained(folder / "text_encoder")
    text_towers.save_clip_words(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A whole CLIP, as transformers saves it."""
    folder = tmp_path_factory.mktemp("clip")
    text_towers.clip().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(pipeline_folder):
    return SubwordTokenizer.read({"weights": str(pipeline_folder)})


@pytest.fixture(scope="module")
def ids(tokenizer):
    """Hard captions, of which some are cut: int32 [B, 77]."""
    return ClipText(tokenizer, size="tiny").tokenize(text_towers.HARD[:12])


def outputs(encoder, ids):
    """(tokens, pooled) of an encoder with the weights it names."""
    tokens, mask, pooled = jax.jit(encoder.apply)(encoder.load(), *ids)
    np.testing.assert_array_equal(mask, ids[1])
    return np.asarray(tokens), np.asarray(pooled)


def reference(model, ids, **options):
    with torch.no_grad():
        return model(torch.tensor(ids[0], dtype=torch.long), **options)


@pytest.fixture(scope="module")
def expected(ids):
    """(tokens, pooled) of transformers' tower of two layers."""
    output = reference(text_towers.clip_text(2), ids)
    return output.last_hidden_state.numpy(), output.pooler_output.numpy()


def test_penultimate_layer_of_stable_diffusion_2(pipeline_folder, tokenizer, ids, expected):
    encoder = ClipText(tokenizer, weights=str(pipeline_folder), size="tiny")
    for ours, theirs in zip(outputs(encoder, ids), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    # Of the folder of the tower itself.
    same = dataclasses.replace(encoder, weights=str(pipeline_folder / "text_encoder")).load()
    jax.tree.map(np.testing.assert_array_equal, same, encoder.load())


def test_keys_with_the_prefix_of_older_files(pipeline_folder, tmp_path, ids, expected):
    weights = load_file(pipeline_folder / "text_encoder/model.safetensors")
    old = {f"text_model.{name}": array for name, array in weights.items()}
    old["text_model.embeddings.position_ids"] = np.arange(77)[None]
    save_file(old, tmp_path / "model.safetensors")
    tokens, _ = outputs(ClipText(weights=str(tmp_path / "model.safetensors"), size="tiny"), ids)
    np.testing.assert_allclose(tokens, expected[0], atol=TOLERANCE)


@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_layers_of_a_whole_clip(clip_folder, ids, layer):
    encoder = ClipText(weights=str(clip_folder), size="tiny", layer=layer, project=layer == "last")
    tokens, pooled = outputs(encoder, ids)
    model = text_towers.clip()
    theirs = reference(model.text_model, ids, output_hidden_states=True)
    with torch.no_grad():
        if layer == "last":
            np.testing.assert_allclose(tokens, theirs.last_hidden_state.numpy(), atol=TOLERANCE)
            projected = model.text_projection(theirs.pooler_output)
            np.testing.assert_allclose(pooled, projected.numpy(), atol=TOLERANCE)
        else:
            normed = model.text_model.final_layer_norm(theirs.hidden_states[-2])
            np.testing.assert_allclose(tokens, normed.numpy(), atol=TOLERANCE)


def to_open_clip(weights):
    """transformers' names and layouts of a whole CLIP as those of open_clip, text only."""
    renamed = {
        "token_embedding.weight": weights["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": weights["text_model.embeddings.position_embedding.weight"],
        "text_projection": weights["text_projection.weight"].T.copy(),
        "logit_scale": weights["logit_scale"],
        "visual.conv1.weight": weights["vision_model.embeddings.patch_embedding.weight"],
    }
    for end in ("weight", "bias"):
        renamed[f"ln_final.{end}"] = weights[f"text_model.final_layer_norm.{end}"]
        for i in range(3):
            ours, theirs = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
            for to, of in {
                "ln_1": "layer_norm1",
                "ln_2": "layer_norm2",
                "attn.out_proj": "self_attn.out_proj",
                "mlp.c_fc": "mlp.fc1",
                "mlp.c_proj": "mlp.fc2",
            }.items():
                renamed[f"{ours}.{to}.{end}"] = weights[f"{theirs}.{of}.{end}"]
            qkv = [weights[f"{theirs}.self_attn.{part}_proj.{end}"] for part in "qkv"]
            renamed[f"{ours}.attn.in_proj_{end}"] = np.concatenate(qkv)
    return renamed


@pytest.mark.parametrize("prefix", ["", "text."])
def test_names_of_open_clip(clip_folder, tmp_path, prefix):
    weights = to_open_clip(load_file(clip_folder / "model.safetensors"))
    path = tmp_path / "open_clip_model.safetensors"
    alone = ("visual.", "logit_")
    save_file({name if name.startswith(alone) else prefix + name: w for name, w in weights.items()}, path)
    options = {"size": "tiny", "layer": "last", "project": True}
    ours, theirs = (ClipText(weights=str(place), **options).load() for place in (path, clip_folder))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_quick_gelu_and_the_end_that_also_pads(monkeypatch, tmp_path, tokenizer):
    """As OpenAI's towers: the pooled state is that of the first of many ends."""
    size = clip.Size(32, 2, 4, 64, "quick_gelu", 16, pad_id=49_407)
    monkeypatch.setitem(clip.SIZES, "openai", size)
    model = text_towers.clip_text(2, hidden_act="quick_gelu")
    model.save_pretrained(tmp_path)
    encoder = ClipText(tokenizer, weights=str(tmp_path), size="openai", layer="last", length=20)
    ids = encoder.tokenize(["a red circle", ""])
    assert (ids[0] == 49_407).sum() == 16 + 19
    tokens, pooled = outputs(encoder, ids)
    theirs = reference(model, ids)
    np.testing.assert_allclose(tokens, theirs.last_hidden_state.numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(pooled, theirs.pooler_output.numpy(), atol=TOLERANCE)
    # To the last bit but one: the norm of one state and that of all are different programs.
    np.testing.assert_allclose(pooled, tokens[[0, 1], [4, 1]], rtol=0, atol=2.4e-7)


def test_padding_is_what_the_fields_say(tokenizer):
    captions = ["a red circle"]
    for fields, pad in (({}, 0), ({"pad_id": 49_407}, 49_407), ({"size": "clip-l"}, 49_407)):
        ids, mask = ClipText(tokenizer, **({"size": "tiny"} | fields)).tokenize(captions)
        np.testing.assert_array_equal(ids[0, 5:], pad)
        np.testing.assert_array_equal(mask[0], np.arange(77) < 5)


def test_a_long_caption_is_read_window_by_window(pipeline_folder, tokenizer):
    """Each window is what transformers' tower makes of its 75 words alone, as a caption."""
    one = ClipText(tokenizer, weights=str(pipeline_folder), size="tiny")
    three = dataclasses.replace(one, length=231)
    assert three.windows == 3 and three.dim == one.dim
    # One token a word: in 1 window, in 2, just 150, in 3 and cut.
    words = ["red", "blue", "green", "cat", "dog", "car"]
    captions = [" ".join(words[i % 6] for i in range(count)) for count in (5, 100, 150, 300)]
    captions.append("")
    ids, mask = three.tokenize(captions)
    assert ids.shape == mask.shape == (5, 231) and ids.dtype == np.int32
    np.testing.assert_array_equal(
        mask.reshape(5, 3, 77).sum(-1), [[7, 0, 0], [77, 27, 0], [77, 77, 0], [77] * 3, [2, 0, 0]]
    )
    tokens, _, pooled = jax.jit(three.apply)(three.load(), ids, mask)
    model = text_towers.clip_text(2)
    for number, caption in enumerate(captions):
        parts = [caption.split()[75 * j : 75 * (j + 1)] for j in range(3)]
        windows, real = one.tokenize([" ".join(part) for part in parts])
        np.testing.assert_array_equal(ids[number].reshape(3, 77), windows)
        theirs = reference(model, (windows, real))
        found = np.asarray(tokens[number]).reshape(3, 77, -1)
        np.testing.assert_allclose(found, theirs.last_hidden_state.numpy(), atol=TOLERANCE)
        np.testing.assert_allclose(pooled[number], theirs.pooler_output.numpy()[0], atol=TOLERANCE)


@pytest.mark.slow
def test_bfloat16_drifts_little(pipeline_folder, ids, expected):
    encoder = ClipText(weights=str(pipeline_folder), size="tiny", dtype="bfloat16", param_dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(encoder.load())} == {"bfloat16"}
    tokens, _ = outputs(encoder, ids)
    assert tokens.dtype == np.float32
    error = np.linalg.norm(tokens - expected[0]) / np.linalg.norm(expected[0])
    assert 1e-4 < error < 2e-2


@pytest.mark.parametrize(
    ("fields", "millions"),
    [
        ({"size": "openclip-h"}, 340.387840),
        ({"size": "openclip-h", "layer": "last", "project": True}, 354.032640),
        # The encoder of Stable Diffusion 1.
        ({"size": "clip-l", "layer": "last"}, 123.060480),
        # The second of SDXL.
        ({"size": "openclip-bigg", "layer": "last", "project": True}, 694.659840),
    ],
)
def test_sizes(fields, millions):
    shapes = trees.unbox(jax.eval_shape(ClipText(**fields).init, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == round(millions * 1e6)


def test_fresh_weights_fit_those_that_are_loaded(clip_folder):
    encoder = ClipText(weights=str(clip_folder), size="tiny", layer="last", project=True)
    fresh = trees.unbox(jax.eval_shape(encoder.init, jax.random.key(0)))
    loaded = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), encoder.load())
    assert fresh == loaded


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"size": "openclip-g"}, "text_encoder.size is 'openclip-g'; did you mean 'openclip-h'?"),
        ({"layer": "first"}, "text_encoder.layer is 'first'; known: last, penultimate"),
        ({"project": True}, "text_encoder.project needs text_encoder.layer='last'"),
        ({"length": 78}, "text_encoder.length is 78; it must be from 2 to 77, or a multiple of 77"),
        ({"length": 77 * 33}, "text_encoder.length is 2541; it must be from 2 to 77"),
        ({"pad_id": 49_408}, "text_encoder.pad_id is 49408; it must be an id below 49408"),
        ({"dtype": "float8"}, "text_encoder.dtype"),
    ],
)
def test_mistakes_in_fields(fields, line):
    with pytest.raises(UserError, match=re.escape(line)):
        encoders.create_text_encoder("clip", tokenizer=None, **fields)


def test_weights_that_do_not_fit(pipeline_folder, tmp_path):
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    config = json.loads((pipeline_folder / "text_encoder/config.json").read_text())
    weights = load_file(pipeline_folder / "text_encoder/model.safetensors")

    def load(changes, arrays, **fields):
        (folder / "config.json").write_text(json.dumps(config | changes))
        save_file(arrays, folder / "model.safetensors")
        ClipText(weights=str(folder), **({"size": "tiny"} | fields)).load()

    with pytest.raises(
        UserError, match=r"config.json says hidden_size 32, the fields of this encoder mean 1024"
    ):
        load({}, weights, size="openclip-h")
    with pytest.raises(UserError, match=r"says hidden_act quick_gelu, the fields of this encoder mean gelu"):
        load({"hidden_act": "quick_gelu"}, weights)
    with pytest.raises(UserError, match=r"says num_hidden_layers 12, the fields of this encoder mean .* or "):
        load({"num_hidden_layers": 12}, weights)
    with pytest.raises(UserError, match=r"holds a T5EncoderModel; it must hold a CLIPTextModel"):
        load({"architectures": ["T5EncoderModel"]}, weights)
    missing = {name: array for name, array in weights.items() if not name.startswith("final_layer_norm")}
    with pytest.raises(UserError, match=r"missing: final_layer_norm.bias, final_layer_norm.weight"):
        load({}, missing)
    with pytest.raises(UserError, match=r"num_hidden_layers 2, the fields of this encoder mean 3"):
        load({}, weights, layer="last")


def test_a_tokenizer_of_another_model(tokenizer):
    added = json.loads(tokenizer.definition)
    added["post_processor"]["sep"] = ["<|endoftext|>", 5]
    with pytest.raises(
        UserError, match=r"frames a text by the ids \(49406, 5\); CLIP's has \(49406, 49407\)"
    ):
        ClipText(SubwordTokenizer(json.dumps(added)), size="tiny")
    with pytest.raises(UserError, match=r"has no tokenizer: set config.text_encoder.weights"):
        ClipText(size="tiny").tokenize(["a"])


def test_the_pooled_end_follows_either_rule_of_transformers():
    """Old configs say that the end is id 2, and mean the largest; new ones name it."""
    ids = np.array([[49_406, 320, 49_407, 0, 0], [49_406, 49_407, 49_407, 49_407, 49_407]])
    results = []
    for end in (2, 49_407):
        model = text_towers.clip_text(2, eos_token_id=end)
        assert isinstance(model, transformers.CLIPTextModel)
        results.append(reference(model, (ids,)).pooler_output.numpy())
    np.testing.assert_array_equal(*results)
    tower = ClipText(size="tiny").module
    params = fill(trees.unbox(jax.eval_shape(tower.init, jax.random.key(0), ids)))
    tokens, pooled = jax.device_get(run(tower.apply, params, ids))
    np.testing.assert_array_equal(pooled, tokens[[0, 1], [2, 1]])


@pytest.mark.parametrize("size", text_towers.OPEN_CLIP)
def test_the_published_sizes_are_open_clip_s(size):
    config = text_towers.open_clip_config(size)
    text, ours = config["text_cfg"], clip.SIZES[size]
    assert (ours.width, ours.layers, ours.heads) == (text["width"], text["layers"], text["heads"])
    assert (ours.mlp, ours.projection) == (4 * text["width"], config["embed_dim"])
    assert ours.activation == ("quick_gelu" if config.get("quick_gelu") else "gelu")
    assert (clip.VOCABULARY, ClipText().length) == (text["vocab_size"], text["context_length"])
