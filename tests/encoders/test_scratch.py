"""The word tokenizer and the small text transformer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling_dit import encoders
from scaling_dit.encoders import scratch
from scaling_dit.encoders.scratch import BOS, EOS, PAD, UNK, WordTokenizer
from scaling_dit.errors import UserError
from scaling_dit.nn import attention
from tests.support.uvit_golden import FAST_KEY

CAPTIONS = ["a red circle", "A red square, left of a blue circle.", "a Triangle"]


@pytest.fixture(scope="module")
def tokenizer():
    return WordTokenizer.build(CAPTIONS)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return encoders.create_text_encoder("scratch", tokenizer=tokenizer, dim=16, depth=2, heads=2, length=12)


@pytest.fixture(scope="module")
def params(encoder):
    return jax.device_get(nn.unbox(jax.jit(encoder.init)(FAST_KEY)))


@pytest.fixture(scope="module")
def apply(encoder):
    return jax.jit(encoder.apply)


def test_words_are_lower_case_and_by_frequency(tokenizer):
    assert tokenizer.words[:3] == ("a", "circle", "red")
    # Once each: by alphabet.
    assert tokenizer.words[3:] == tuple(sorted(tokenizer.words[3:]))
    assert set(tokenizer.words[3:]) == {",", ".", "blue", "left", "of", "square", "triangle"}
    assert WordTokenizer.build(reversed(CAPTIONS)) == tokenizer
    assert WordTokenizer.build(CAPTIONS, max_words=2).words == ("a", "circle")


def test_encode(tokenizer):
    ids, mask = tokenizer.encode(["a red circle", "", "a purple circle!", "A RED, RED"], 7)
    a, circle, red = 4, 5, 6
    comma = tokenizer.words.index(",") + 4
    np.testing.assert_array_equal(
        ids,
        [
            [BOS, a, red, circle, EOS, PAD, PAD],
            [BOS, EOS, PAD, PAD, PAD, PAD, PAD],
            [BOS, a, UNK, circle, UNK, EOS, PAD],
            [BOS, a, red, comma, red, EOS, PAD],
        ],
    )
    assert ids.dtype == np.int32
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask.sum(1), [5, 2, 6, 6])


def test_a_cut_caption_keeps_its_end(tokenizer):
    ids, mask = tokenizer.encode(["a red circle left of a blue circle"], 5)
    np.testing.assert_array_equal(ids, [[BOS, 4, 6, 5, EOS]])
    assert mask.all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=4), st.integers(2, 9))
def test_any_text_is_encoded_within_its_frame(texts, length):
    tokenizer = WordTokenizer.build(texts)
    ids, mask = tokenizer.encode(texts, length)
    assert ids.shape == mask.shape == (len(texts), length)
    assert ids.max(initial=0) < len(tokenizer)
    # Every word was seen.
    assert UNK not in ids
    for row, real in zip(ids, mask, strict=True):
        assert row[0] == BOS
        assert row[real][-1] == EOS
        assert (row[~real] == PAD).all()


def test_composed_and_decomposed_letters_are_the_same_word():
    assert scratch.split_words("Cafe\u0301") == ["caf\u00e9"]


def test_save_and_load(tokenizer, tmp_path):
    tokenizer = WordTokenizer.build([*CAPTIONS, "caf\u00e9 \u4e2d"])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert WordTokenizer.load(str(path)) == tokenizer
    with pytest.raises(UserError, match="no tokenizer at"):
        WordTokenizer.load(tmp_path / "other.json")
    for damaged in ('{"words": ', "{}", "[]"):
        path.write_text(damaged)
        with pytest.raises(UserError, match="is no tokenizer"):
            WordTokenizer.load(path)


def test_build_tokenizer_reads_every_paraphrase_of_some_records():
    class Records:
        reads, image_size = 0, 1

        def __init__(self, length):
            self.length = length

        def __len__(self):
            return self.length

        def __getitem__(self, index, /):
            self.reads += 1
            assert type(index) is int
            image = np.zeros((1, 1, 3), np.uint8)
            return {"image": image, "captions": [f"word{index % 7}", f"other{index % 7}"], "key": str(index)}

    small = Records(7)
    assert len(scratch.build_tokenizer(small).words) == 14
    large = Records(2**40)
    assert len(scratch.build_tokenizer(large, samples=100).words) == 14
    assert 90 < large.reads <= 100
    assert scratch.build_tokenizer(Records(2**40), samples=100) == scratch.build_tokenizer(large, samples=100)


def test_shapes_and_pooling(encoder, params, apply):
    ids, mask = encoder.tokenize(CAPTIONS)
    tokens, out_mask, pooled = apply(params, ids, mask)
    assert tokens.shape == (3, 12, 16)
    assert tokens.dtype == pooled.dtype == jnp.float32
    np.testing.assert_array_equal(out_mask, mask)
    expected = np.stack([np.asarray(row)[real].mean(0) for row, real in zip(tokens, mask, strict=True)])
    np.testing.assert_allclose(pooled, expected, atol=1e-6)


def test_padding_changes_nothing(encoder, params, apply):
    ids, mask = encoder.tokenize(CAPTIONS)
    tokens, _, pooled = apply(params, ids, mask)
    other = np.where(mask, ids, UNK)
    other_tokens, _, other_pooled = apply(params, other, mask)
    np.testing.assert_allclose(other_tokens[mask], tokens[mask], atol=1e-6)
    np.testing.assert_allclose(other_pooled, pooled, atol=1e-6)
    # And a longer frame gives the same embeddings as a shorter one.
    short = mask[:1, :5]
    assert short.all()
    np.testing.assert_allclose(apply(params, ids[:1, :5], short)[0][0], tokens[0, :5], atol=1e-5)


def test_attention_goes_through_the_one_function(encoder, params, monkeypatch):
    calls, real = [], attention.attention

    def spy(*args, key_mask, **kwargs):
        calls.append(key_mask)
        return real(*args, key_mask=key_mask, **kwargs)

    monkeypatch.setattr(attention, "attention", spy)
    _, mask = tokenized = encoder.tokenize(CAPTIONS)
    # The ids and the mask are no arguments of what is traced, so the mask that is handed on has values.
    jax.eval_shape(lambda params: encoder.apply(params, *tokenized), params)
    assert len(calls) == 2
    np.testing.assert_array_equal(calls[0], mask)


def test_branches_start_small(tokenizer):
    encoder = encoders.create_text_encoder(
        "scratch", tokenizer=tokenizer, dim=128, depth=4, heads=4, length=12
    )
    block = jax.device_get(jax.jit(lambda key: nn.unbox(encoder.init(key))["blocks_3"])(FAST_KEY))
    for name, layer, fan_in, variance in (
        ("attn", "qkv", 128, 1), ("attn", "proj", 128, 1 / 8), ("mlp", "fc1", 128, 1), ("mlp", "fc2", 512, 1 / 8)
    ):  # fmt: skip
        assert np.var(block[name][layer]["kernel"]) * fan_in == pytest.approx(variance, rel=0.05)


def test_words_order_and_context_matter(encoder, params, apply):
    def tokens_of(caption):
        return np.asarray(apply(params, *encoder.tokenize([caption]))[0][0])

    assert np.abs(tokens_of("a red circle") - tokens_of("a circle red")).max() > 0.1
    # Bidirectional: the first word sees the last.
    assert np.abs(tokens_of("a red circle")[1] - tokens_of("a red square")[1]).max() > 1e-3
    assert np.isfinite(tokens_of("")).all()
    nothing = apply(params, np.zeros((1, 12), np.int32), np.zeros((1, 12), bool))
    assert all(np.isfinite(np.asarray(part)).all() for part in nothing)


def test_positions_and_words_start_at_the_same_scale(params):
    positions = scratch.sincos_positions(32, 128)
    assert np.sqrt(np.mean(positions**2)) == pytest.approx(0.5**0.5, rel=1e-5)
    assert np.sqrt(np.mean(np.square(params["embedding"]))) == pytest.approx(0.5**0.5, rel=0.1)
    np.testing.assert_allclose(positions[3, [0, 64]], [np.sin(3), np.cos(3)], rtol=1e-6)


def test_every_parameter_is_trained_and_named(encoder, params, apply):
    boxed = jax.eval_shape(encoder.init, FAST_KEY)
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    boxes = jax.tree.leaves(boxed, is_leaf=is_box)
    assert all(is_box(leaf) and len(leaf.names) == leaf.value.ndim for leaf in boxes)
    names = {name for leaf in boxes for name in leaf.names}
    assert names == {"vocab", "embed", "heads", "mlp", "norm", None}
    ids, mask = encoder.tokenize(CAPTIONS)

    def loss(params):
        tokens, _, pooled = apply(params, ids, mask)
        return jnp.sum(tokens**3) + jnp.sum(pooled**3)

    gradients = jax.jit(jax.grad(loss))(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(gradient).max() > 1e-6, path


def test_half_precision_products_stay_close(tokenizer, encoder, params, apply):
    half = encoders.create_text_encoder(
        "scratch", tokenizer=tokenizer, dim=16, depth=2, heads=2, length=12, dtype="bfloat16"
    )
    ids, mask = encoder.tokenize(CAPTIONS)
    tokens = np.asarray(jax.jit(half.apply)(params, ids, mask)[0])
    assert tokens.dtype == jnp.float32
    difference = np.abs(tokens - np.asarray(apply(params, ids, mask)[0]))
    assert 0 < difference.max() < 0.1


def test_names_and_fields(tokenizer):
    fields = encoders.text_encoder_fields("scratch")
    assert fields == {"dim": 128, "depth": 2, "heads": 4, "length": 32, "dtype": "float32"}
    for name, given_fields, message in (
        ("scrach", {}, "unknown text encoder 'scrach'; did you mean 'scratch'"),
        ("scratch", {"head": 2}, "no field 'head'; did you mean 'heads'"),
        ("scratch", {"dim": 30}, "dim is 30, heads 4"),
        ("scratch", {"length": 1}, "length is 1"),
    ):
        with pytest.raises(UserError, match=message):
            encoders.create_text_encoder(name, tokenizer=tokenizer, **given_fields)
