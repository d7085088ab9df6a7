"""T5's encoder against transformers."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from scaling_dit import encoders, trees
from scaling_dit.encoders import t5
from scaling_dit.encoders.subwords import SubwordTokenizer
from scaling_dit.encoders.t5 import T5Text
from scaling_dit.errors import UserError
from tests.support import text_towers
from tests.support.uvit_golden import FAST_KEY, run

TINY = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 32_128}
LENGTH = 40


def config(**options):
    return transformers.T5Config(feed_forward_proj="gated-gelu", **(TINY | options))


@pytest.fixture(scope="module")
def model():
    return text_towers.build(transformers.T5EncoderModel, config())


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """As the folder of PixArt has it, in shards with an index; `model` is what it holds."""
    root = tmp_path_factory.mktemp("t5")
    model.save_pretrained(root / "text_encoder", max_shard_size="3MB")
    assert (root / "text_encoder/model.safetensors.index.json").exists()
    return root


@pytest.fixture(scope="module")
def ids():
    """Two captions of other lengths than a whole row, and one of the whole."""
    rng = np.random.default_rng(0)
    mask = np.arange(LENGTH) < np.array([[7], [23], [LENGTH]])
    return np.where(mask, rng.integers(3, 32_100, mask.shape), t5.PAD).astype(np.int32), mask


@pytest.fixture(scope="module")
def expected(model, ids):
    with torch.no_grad():
        tokens = model(torch.tensor(ids[0], dtype=torch.long), attention_mask=torch.tensor(ids[1]).long())
    return tokens.last_hidden_state.numpy()


def outputs(encoder, ids):
    tokens, mask, pooled = jax.jit(encoder.apply)(encoder.load(), *ids)
    np.testing.assert_array_equal(mask, ids[1])
    return np.asarray(tokens), np.asarray(pooled)


def test_tokens_of_a_sharded_folder(folder, ids, expected):
    encoder = T5Text(weights=str(folder), size="tiny", length=LENGTH)
    tokens, pooled = outputs(encoder, ids)
    np.testing.assert_allclose(tokens, expected, atol=1e-4)
    # Of the folder of the tower itself.
    same = T5Text(weights=str(folder / "text_encoder"), size="tiny", length=LENGTH).load()
    jax.tree.map(np.testing.assert_array_equal, same, encoder.load())
    mean = [row[real].mean(0) for row, real in zip(expected, ids[1], strict=True)]
    np.testing.assert_allclose(pooled, mean, atol=1e-4)


@pytest.mark.parametrize("table", ["shared", "encoder.embed_tokens", "both"])
def test_the_table_of_words_under_either_name_and_a_decoder_beside(tmp_path, table, folder):
    whole = text_towers.build(transformers.T5ForConditionalGeneration, config(tie_word_embeddings=False))
    weights = {name: value.numpy().copy() for name, value in whole.state_dict().items()}
    words = weights["shared.weight"]
    weights |= {"encoder.embed_tokens.weight": words, "decoder.embed_tokens.weight": words}
    if table != "both":
        other = {"shared": "encoder.embed_tokens", "encoder.embed_tokens": "shared"}[table]
        del weights[f"{other}.weight"]
    assert any(name.startswith("decoder.block") for name in weights)
    assert "lm_head.weight" in weights
    save_file(weights, tmp_path / "t5.safetensors")
    loaded = T5Text(weights=str(tmp_path / "t5.safetensors"), size="tiny").load()
    np.testing.assert_array_equal(loaded["words"], words)
    encoder = whole.encoder.block[1].layer[1].DenseReluDense.wi_1.weight
    np.testing.assert_array_equal(loaded["blocks"]["fc1"]["kernel"][1][:, 1], encoder.detach().numpy().T)


def test_buckets_are_those_of_transformers():
    attention = transformers.models.t5.modeling_t5.T5Attention
    # Beyond the largest distance with a bucket of its own.
    length = 300
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    theirs = attention._relative_position_bucket(
        distance, bidirectional=True, num_buckets=t5.BUCKETS, max_distance=t5.MAX_DISTANCE
    )
    np.testing.assert_array_equal(t5.buckets(length), theirs.numpy())


def test_padding_reaches_no_real_token(folder, ids):
    encoder = T5Text(weights=str(folder), size="tiny", length=LENGTH)
    apply, params = jax.jit(encoder.apply), encoder.load()
    tokens, _, pooled = jax.device_get(apply(params, *ids))
    other = np.where(ids[1], ids[0], 77)
    again, _, pooled_again = jax.device_get(apply(params, other, ids[1]))
    np.testing.assert_array_equal(tokens[ids[1]], again[ids[1]])
    np.testing.assert_array_equal(pooled, pooled_again)


def test_bfloat16_drifts_little_and_stays_finite(folder, ids, expected):
    encoder = T5Text(
        weights=str(folder), size="tiny", length=LENGTH, dtype="bfloat16", param_dtype="bfloat16"
    )
    apply, params = jax.jit(encoder.apply), encoder.load()
    tokens = np.asarray(apply(params, *ids)[0])
    error = np.linalg.norm(tokens - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 2e-2
    large = dict(params, words=params["words"] * np.float32(1e4).astype(params["words"].dtype))
    # Beyond float16's largest number within a block.
    assert np.isfinite(np.asarray(apply(large, *ids)[0])).all()


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("small", 35_332_800),
        ("base", 109_628_544),
        ("large", 341_231_104),
        ("xl", 1_223_527_424),
        ("xxl", 4_762_310_656),
    ],
)
def test_sizes(size, count):
    shapes = trees.unbox(jax.eval_shape(T5Text(size=size).init, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    with torch.device("meta"):
        shape = t5.SIZES[size]
        theirs = transformers.T5EncoderModel(
            config(
                d_model=shape.width, d_kv=64, d_ff=shape.mlp, num_layers=shape.layers, num_heads=shape.heads
            )
        )
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count


def test_fresh_weights_give_tokens_of_one_scale():
    encoder = T5Text(size="tiny", length=12)
    params = trees.unbox(run(encoder.init, FAST_KEY))
    ids = np.arange(24).reshape(2, 12) + 100
    tokens = np.asarray(run(encoder.apply, params, ids, np.ones(ids.shape, bool))[0])
    # The last norm's.
    assert float(np.std(tokens)) == pytest.approx(1.0, abs=0.05)
    assert len({round(float(x), 4) for x in tokens[:, 0, 0]}) == 2


def test_mistakes(folder, tmp_path):
    with pytest.raises(UserError, match=r"text_encoder.size is 'xxxl'; did you mean 'xxl'\?"):
        encoders.create_text_encoder("t5", tokenizer=None, size="xxxl")
    with pytest.raises(UserError, match=r"text_encoder.length is 0; it must be at least 1"):
        T5Text(length=0)
    with pytest.raises(UserError, match=r"config.json says d_model 32, the fields of this encoder mean 512"):
        T5Text(weights=str(folder), size="small").load()
    old = tmp_path / "text_encoder"
    old.mkdir()
    config = json.loads((folder / "text_encoder/config.json").read_text())
    (old / "config.json").write_text(json.dumps(config | {"feed_forward_proj": "relu"}))
    index = json.loads((folder / "text_encoder/model.safetensors.index.json").read_text())
    weights = {}
    for file in set(index["weight_map"].values()):
        weights |= load_file(folder / "text_encoder" / file)
    save_file(weights, old / "model.safetensors")
    with pytest.raises(
        UserError, match=r"says feed_forward_proj relu, the fields of this encoder mean gated-gelu"
    ):
        T5Text(weights=str(old), size="tiny").load()
    (old / "config.json").unlink()
    del weights["encoder.block.1.layer.0.SelfAttention.k.weight"]
    save_file(weights, old / "model.safetensors")
    with pytest.raises(UserError, match=r"missing: encoder.block.1.layer.0.SelfAttention.k.weight"):
        T5Text(weights=str(old), size="tiny").load()
    with pytest.raises(UserError, match=r"frames a text by the ids \(49406, 49407\); T5's has"):
        T5Text(SubwordTokenizer.read({"tokenizer_files": str(text_towers.clip_vocabulary())}))


def test_gradients_of_what_all_layers_share_are_those_of_torch(folder, ids):
    """The bias by distance reaches the loss through each layer of the scan."""
    encoder = T5Text(weights=str(folder), size="tiny", length=LENGTH)
    signs = np.cos(np.arange(3 * LENGTH * 32)).reshape(3, LENGTH, 32).astype(np.float32)
    grads = jax.jit(jax.grad(lambda params: (encoder.apply(params, *ids)[0] * signs).sum()))(encoder.load())
    model = text_towers.build(transformers.T5EncoderModel, config())
    tokens = model(torch.tensor(ids[0], dtype=torch.long), attention_mask=torch.tensor(ids[1]).long())
    (tokens.last_hidden_state * torch.tensor(signs)).sum().backward()
    theirs = dict(model.named_parameters())
    pairs = {
        "distances": theirs["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
        "words": theirs["shared.weight"],
    }
    for name, parameter in pairs.items():
        np.testing.assert_allclose(
            grads[name], parameter.grad.numpy(), atol=2e-4 * float(parameter.grad.abs().max())
        )
