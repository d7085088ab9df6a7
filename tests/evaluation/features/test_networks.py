"""The networks of features against transformers, torch-fidelity and published code, on random weights."""

import numpy as np
import pytest
import torch
import transformers
from etils import epath
from safetensors.numpy import load_file, save_file

from scaling_dit.encoders import clip_vision
from scaling_dit.errors import UserError
from scaling_dit.evaluation.features import blip, dinov2, inception, networks, pixels
from scaling_dit.evaluation.features.sharded import Sharded
from scaling_dit.weights import pickles, places
from tests.support import blip_reference, fidelity
from tests.support.parity import randomise_
from tests.support.text_towers import clip

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 40, 40, 3), np.uint8)


def torch_pixels(images):
    return torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def dino():
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=98, patch_size=14
    )
    return randomise_(transformers.Dinov2Model(config), 0).eval()


def published_dinov2(state):
    """The weights of transformers' file with the names of the published code, q, k and v in one."""
    found = {}
    ends = {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    ends |= {"attention.output.dense": "attn.proj"}
    for i in range(2):
        at, to = f"encoder.layer.{i}", f"blocks.{i}"
        for theirs, name in ends.items():
            found |= {f"{to}.{name}.{end}": state[f"{at}.{theirs}.{end}"] for end in ("weight", "bias")}
        for end in ("weight", "bias"):
            parts = [state[f"{at}.attention.attention.{part}.{end}"] for part in ("query", "key", "value")]
            found[f"{to}.attn.qkv.{end}"] = np.concatenate(parts)
        found |= {f"{to}.ls{k}.gamma": state[f"{at}.layer_scale{k}.lambda1"] for k in (1, 2)}
    for end in ("weight", "bias"):
        found[f"norm.{end}"] = state[f"layernorm.{end}"]
        found[f"patch_embed.proj.{end}"] = state[f"embeddings.patch_embeddings.projection.{end}"]
    found |= {"cls_token": state["embeddings.cls_token"], "mask_token": state["embeddings.mask_token"]}
    return found | {"pos_embed": state["embeddings.position_embeddings"]}


@torch.no_grad()
def test_dinov2_is_transformers_(dino, tmp_path):
    size = dinov2.SIZES["tiny"]
    path = tmp_path / "dinov2.safetensors"
    dino.save_pretrained(tmp_path / "folder")
    save_file(published_dinov2(load_file(tmp_path / "folder" / "model.safetensors")), path)
    ours, theirs = dinov2.load(str(path), size), dinov2.load(str(tmp_path / "folder"), size)
    np.testing.assert_array_equal(ours["blocks"]["qkv"]["kernel"], theirs["blocks"]["qkv"]["kernel"])
    np.testing.assert_array_equal(ours["positions"], theirs["positions"])
    given = pixels.standardise(pixels.squash(IMAGES, size.image), dinov2.MEAN, dinov2.STD)
    # The table as the published code resamples it, which transformers does a little differently.
    patches = dino.embeddings.position_embeddings[:, 1:].reshape(1, 7, 7, 32).permute(0, 3, 1, 2)
    scale = (size.grid + 0.1) / 7
    resampled = torch.nn.functional.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    assert resampled.shape[2:] == (4, 4)
    np.testing.assert_allclose(ours["positions"][1:], resampled[0].flatten(1).T, atol=1e-5)
    dino.embeddings.interpolate_pos_encoding = lambda *_: torch.tensor(ours["positions"])[None]
    expected = dino(torch_pixels(given)).pooler_output
    found = Sharded(lambda p, x: dinov2.Dinov2(size).apply({"params": p}, x), ours, 2)(given)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_dinov2_of_another_size_is_refused(dino, tmp_path):
    dino.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="config.json says hidden_size 32, the fields of this encoder mean 1024"
    ):
        dinov2.load(str(tmp_path), dinov2.SIZES["dinov2-l"])
    with pytest.raises(UserError, match="a position table of 5 patches is no square"):
        dinov2.resample(np.zeros((6, 4), np.float32), 4)


@torch.no_grad()
def test_clip_s_features_are_transformers_(tmp_path):
    model = clip()
    model.save_pretrained(tmp_path)
    network = networks.Network("clip-tiny", 16, networks.CLIP_L_336.weights, "", networks._clip("tiny"))
    given = pixels.standardise(pixels.centre_square(IMAGES, 28), clip_vision.MEAN, clip_vision.STD)
    theirs = model.visual_projection(model.vision_model(torch_pixels(given)).pooler_output)
    theirs = theirs / theirs.norm(dim=-1, keepdim=True)
    np.testing.assert_allclose(network.open(str(tmp_path), 2)(IMAGES), theirs, atol=1e-4)


@torch.no_grad()
def test_rewards_are_those_of_a_torch_blip(tmp_path):
    size = blip.SIZES["tiny"]
    model = blip_reference.build(size)
    save_file(blip_reference.published(model), tmp_path / "ImageReward.safetensors")
    params = blip.load(str(tmp_path / "ImageReward.safetensors"), size)
    given = pixels.standardise(pixels.shorter_side(IMAGES, size.image), clip_vision.MEAN, clip_vision.STD)
    words = blip.Words(str(blip_reference.vocabulary(tmp_path)))
    ids, mask = words(["a Red  CIRCLE, left of it", "", "word " * 60])
    np.testing.assert_array_equal(ids[1, :3], [101, 102, 0])
    assert mask.sum(1).tolist() == [9, 2, 35] and ids[2, -1] == 102
    expected = blip_reference.rewards(model, torch_pixels(given), torch.tensor(ids), torch.tensor(mask))
    found = Sharded(lambda p, *x: blip.reward(size, p, *x), params, 2)(given, ids, mask)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.ptp(found) > 1e-2


def test_weights_of_image_reward_that_do_not_fit(tmp_path):
    size = blip.SIZES["tiny"]
    state = blip_reference.published(blip_reference.build(size))
    path = tmp_path / "ImageReward.safetensors"
    save_file({name: value for name, value in state.items() if "LayerNorm" not in name}, path)
    with pytest.raises(UserError, match=r"does not fit ImageReward .*LayerNorm"):
        blip.load(str(path), size)
    save_file({name: value for name, value in state.items() if name != "mlp.layers.6.bias"}, path)
    with pytest.raises(UserError, match=r"lacks entries of its linear layers: mlp.layers.6.bias"):
        blip.load(str(path), size)
    words = tmp_path / "vocab.txt"
    words.write_text("[PAD]\n[CLS]\n")
    with pytest.raises(UserError, match=r"is not bert-base-uncased's vocab.txt: \[CLS\] is not line 102"):
        blip.Words(str(words))


@pytest.mark.slow
def test_the_sizes_of_published_networks():
    """Millions of parameters: ImageReward.pt has 1.79 GB in float32, DINOv2 ViT-L/14 is a network of 304M."""
    import jax

    def count(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    assert 440e6 < count(blip.abstract(blip.SIZES["large"])) < 450e6
    # Keras counts 21,802,784 without the scales of its 17,216 channels.
    assert count(inception.abstract()) == 21_802_784 + 17_216
    large = dinov2.SIZES["dinov2-l"]
    images = jax.ShapeDtypeStruct((1, large.image, large.image, 3), np.float32)
    assert 303e6 < count(jax.eval_shape(dinov2.Dinov2(large).init, jax.random.key(0), images)) < 305e6


def test_rows_are_filled_up_to_one_shape():
    shapes = []

    def traced(params, x):
        shapes.append(x.shape)
        return x.sum(-1) * params

    run = Sharded(traced, np.float32(2), 4)
    given = np.arange(22, dtype=np.float32).reshape(11, 2)
    np.testing.assert_array_equal(run(given), 2 * given.sum(1))
    np.testing.assert_array_equal(run(given[:1]), 2 * given[:1].sum(1))
    assert len(set(shapes)) == 1


@pytest.mark.slow
@torch.no_grad()
def test_inception_is_torch_fidelity_s(tmp_path, monkeypatch):
    fidelity.on_one_device(monkeypatch)
    model = fidelity.inception(tmp_path)
    path = tmp_path / "inception.safetensors"
    pickles.convert(epath.Path(tmp_path / "inception.pth"), epath.Path(path))
    network = networks.INCEPTION["tensorflow1"].open(str(path), 2)
    for size in (40, 330):
        images = RNG.integers(0, 256, (2, size, size, 3), np.uint8)
        (theirs,) = model(torch_pixels(images))
        ours = network(images)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        assert np.std(theirs.numpy()) > 0.05
    clean = networks.INCEPTION["clean"].open(str(path), 2)(images)
    assert np.abs(clean - ours).max() > 1e-3 and np.corrcoef(clean.ravel(), ours.ravel())[0, 1] > 0.8
    opened = places.open_weights(str(path), part="inception", classes=(), field="weights")
    assert "fc.weight" in opened.tensors
