"""CLIP's image tower and the space it shares with text, against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from scaling_dit import trees
from scaling_dit.encoders import clip_vision
from scaling_dit.encoders.clip_vision import SIZES, VisionTower
from scaling_dit.errors import UserError
from tests.support import text_towers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    text_towers.clip().save_pretrained(folder)
    text_towers.save_clip_words(folder)
    return folder


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), np.uint8)


def test_embeddings_are_those_of_transformers(folder, images):
    text = clip_vision.open_text(str(folder), "tiny")
    ids, mask = text.tokenize(["a red circle", "&amp; 日本語", ""])
    pixels = np.float32((images / 255.0 - clip_vision.MEAN) / clip_vision.STD)
    vision = clip_vision.load_vision(str(folder), SIZES["tiny"])
    seen = jax.jit(VisionTower(SIZES["tiny"]).apply)({"params": vision}, pixels)
    read = jax.jit(text.apply)(text.load(), ids, mask)[2]
    with torch.no_grad():
        theirs = text_towers.clip()(
            input_ids=torch.tensor(ids).long(), pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2)
        )
    # transformers gives both at length 1.
    np.testing.assert_allclose(clip_vision.unit(seen), theirs.image_embeds.numpy(), atol=1e-4)
    np.testing.assert_allclose(clip_vision.unit(read), theirs.text_embeds.numpy(), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(clip_vision.unit(seen), axis=1), 1, atol=1e-5)


def test_names_of_open_clip(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    renamed = {
        "visual.conv1.weight": weights["vision_model.embeddings.patch_embedding.weight"],
        "visual.class_embedding": weights["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": weights["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": weights["visual_projection.weight"].T.copy(),
        "token_embedding.weight": weights["text_model.embeddings.token_embedding.weight"],
        "logit_scale": weights["logit_scale"],
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for end in ("weight", "bias"):
        renamed[f"visual.ln_pre.{end}"] = weights[f"vision_model.pre_layrnorm.{end}"]
        renamed[f"visual.ln_post.{end}"] = weights[f"vision_model.post_layernorm.{end}"]
        for i in range(2):
            at, of = f"visual.transformer.resblocks.{i}", f"vision_model.encoder.layers.{i}"
            renamed |= {f"{at}.{to}.{end}": weights[f"{of}.{name}.{end}"] for to, name in names.items()}
            qkv = [weights[f"{of}.self_attn.{part}_proj.{end}"] for part in "qkv"]
            renamed[f"{at}.attn.in_proj_{end}"] = np.concatenate(qkv)
    path = tmp_path / "open_clip_model.safetensors"
    save_file(renamed, path)
    ours, theirs = (clip_vision.load_vision(str(place), SIZES["tiny"]) for place in (path, folder))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(
    ("size", "millions"), [("openclip-h", 632.076800), ("clip-l", 303.966208), ("clip-b", 87.849216)]
)
def test_sizes(size, millions):
    """Of the image towers that transformers and open_clip list: 632M, 304M and 88M, projection included."""
    shape = SIZES[size]
    images = jax.ShapeDtypeStruct((1, shape.image, shape.image, 3), jnp.float32)
    shapes = trees.unbox(jax.eval_shape(VisionTower(shape).init, jax.random.key(0), images))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == round(millions * 1e6)


@pytest.mark.parametrize("size", text_towers.OPEN_CLIP)
def test_the_published_sizes_are_open_clip_s(size):
    config = text_towers.open_clip_config(size)
    image, ours = config["vision_cfg"], SIZES[size]
    assert (ours.width, ours.layers, ours.patch) == (image["width"], image["layers"], image["patch_size"])
    assert (ours.image, ours.projection) == (image["image_size"], config["embed_dim"])
    assert ours.heads == image["width"] // image.get("head_width", 64)
    assert ours.mlp == int(image["width"] * image.get("mlp_ratio", 4.0))
    assert ours.activation == ("quick_gelu" if config.get("quick_gelu") else "gelu")


def test_mistakes(folder):
    with pytest.raises(UserError, match=r"there is no CLIP of the size 'clip-xl'; did you mean 'clip-l'\?"):
        clip_vision.open_text(str(folder), "clip-xl")
    with pytest.raises(
        UserError, match=r"config.json says hidden_size 32, the fields of this encoder mean 1024"
    ):
        clip_vision.load_vision(str(folder), SIZES["clip-l"])
