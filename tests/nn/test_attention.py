"""The one attention function: its values, its masks, and which implementation it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_dit import trees
from scaling_dit.errors import UserError
from scaling_dit.nn import attention as attention_lib
from scaling_dit.nn import per_device
from scaling_dit.nn.attention import CrossAttention, SelfAttention, attention
from tests.support.uvit_golden import FAST_KEY, fill, run


def qkv(batch=2, queries=6, keys=5, heads=4, kv_heads=4, size=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = ((batch, queries, heads, size), (batch, keys, kv_heads, size), (batch, keys, kv_heads, size))
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def reference(q, k, v, key_mask=None):
    """Written out in float64, one head of keys per group of queries."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    repeats = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, repeats, axis=2) for x in (k, v))
    logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    if key_mask is not None:
        logits = np.where(np.asarray(key_mask)[:, None, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(
    "implementation, kv_heads, size", [("auto", 4, 64), ("xla", 4, 72), ("xla", 2, 128), ("auto", 1, 4)]
)
def test_values(implementation, kv_heads, size):
    args = qkv(kv_heads=kv_heads, size=size)
    mask = np.array([[True, False, True, True, False], [True] * 5])
    for key_mask in (None, mask):
        found = run(lambda *a, m=key_mask: attention(*a, key_mask=m, implementation=implementation), *args)
        np.testing.assert_allclose(found, reference(*args, key_mask), atol=1e-5)


def test_hidden_keys_change_nothing_and_get_no_gradient():
    q, k, v = qkv()
    mask = np.array([[True, True, False, True, False]] * 2)
    grads = run(jax.grad(lambda k, v: (attention(q, k, v, key_mask=mask) ** 2).sum(), (0, 1)), k, v)
    for grad in grads:
        assert not np.asarray(grad)[:, [2, 4]].any()
        assert np.asarray(grad)[:, [0, 1, 3]].all()


def test_softmax_is_float32_for_bfloat16_inputs():
    q, k, v = qkv(dtype=jnp.bfloat16)
    before = str(jax.make_jaxpr(attention)(q, k, v)).split(" = exp ")
    assert len(before) == 2
    # The type of what exp gives.
    assert ":f32[" in before[0].rsplit("\n", 1)[-1]
    assert jax.eval_shape(attention, q, k, v).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "word, hint", [("xla2", "'xla'"), ("ring", "known: auto, cudnn, short, splash, xla")]
)
def test_unknown_implementation(word, hint):
    with pytest.raises(UserError, match=f"unknown attention '{word}'.*{hint}"):
        attention(*qkv(), implementation=word)


def test_explicit_cudnn_never_falls_back():
    with pytest.raises(UserError, match="the backend is cpu, it needs gpu"):
        attention(*qkv(dtype=jnp.bfloat16), implementation="cudnn")


class FakeGpu:
    compute_capability = "8.0"


@pytest.fixture
def chosen(monkeypatch):
    """Pretends to be a GPU and records which implementation gets which mask."""
    calls = []

    def record(q, k, v, *, mask, implementation):
        calls.append((implementation, None if mask is None else mask.shape))
        return q

    def record_xla(q, k, v, mask):
        return record(q, k, v, mask=mask, implementation="xla")

    monkeypatch.setattr(attention_lib.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention_lib.jax, "devices", lambda: [FakeGpu()])
    monkeypatch.setattr(attention_lib.jax.nn, "dot_product_attention", record)
    monkeypatch.setattr(attention_lib, "_attend_xla", record_xla)
    return calls


@pytest.mark.parametrize(
    "shape, implementation",
    [
        ({"dtype": jnp.bfloat16}, "cudnn"),
        ({"dtype": jnp.float16}, "cudnn"),
        ({"dtype": jnp.float32}, "xla"),
        ({"dtype": jnp.bfloat16, "size": 12}, "xla"),
        # Above 128 only from compute capability 9.0.
        ({"dtype": jnp.bfloat16, "size": 160}, "xla"),
    ],
)
def test_auto_on_a_gpu(chosen, shape, implementation):
    attention(*qkv(**shape))
    assert chosen == [(implementation, None)]


def test_masks_on_a_gpu(chosen):
    half = {"dtype": jnp.bfloat16}
    attention(*qkv(keys=5, **half), key_mask=np.ones((2, 5), bool))
    attention(*qkv(keys=4, **half), key_mask=np.ones((2, 4), bool))
    assert chosen == [("xla", (2, 1, 1, 5)), ("cudnn", (2, 1, 6, 4))]
    with pytest.raises(UserError, match="odd"):
        attention(*qkv(keys=5, **half), key_mask=np.ones((2, 5), bool), implementation="cudnn")


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_self_attention_module(qkv_bias):
    x = np.random.default_rng(1).normal(size=(2, 7, 24)).astype("f4")
    module = SelfAttention(heads=3, qkv_bias=qkv_bias)
    params = fill(trees.unbox(jax.eval_shape(module.init, FAST_KEY, x)))["params"]
    assert ("bias" in params["qkv"]) == qkv_bias
    fused = np.einsum("btd,dkh->kbth", x, params["qkv"]["kernel"])
    fused = fused + (params["qkv"]["bias"][:, None, None] if qkv_bias else 0)
    q, k, v = (part.reshape(2, 7, 3, 8) for part in fused)
    wanted = reference(q, k, v).reshape(2, 7, 24) @ params["proj"]["kernel"] + params["proj"]["bias"]
    found = run(module.apply, {"params": params}, x)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_cross_attention_is_each_head_alone():
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=(2, 5, 8)), rng.normal(size=(2, 3, 6))
    mask = np.array([[True, True, False], [True, True, True]])
    module = CrossAttention(2, qkv_bias=True)
    shapes = trees.unbox(jax.eval_shape(module.init, FAST_KEY, x, context, mask))["params"]
    params = jax.tree.map(lambda kernel: 5 * kernel, fill(shapes))
    # It is written out without biases.
    for part in ("q", "kv", "proj"):
        params[part]["bias"] = np.zeros_like(params[part]["bias"])
    q = x @ params["q"]["kernel"]
    k, v = (context @ params["kv"]["kernel"][i] for i in range(2))
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = np.where(mask[:, None], q[..., head] @ k[..., head].swapaxes(1, 2) / 2, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        heads.append(weights / weights.sum(axis=-1, keepdims=True) @ v[..., head])
    expected = np.concatenate(heads, axis=-1) @ params["proj"]["kernel"]
    found = run(module.apply, {"params": params}, x, context, mask)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_padding_the_context_for_a_tpu_changes_no_value(masked, monkeypatch):
    q, k, v = (np.asarray(x) for x in qkv(batch=3, queries=5, keys=7, heads=2, kv_heads=2))
    mask = np.array([[True] * 4 + [False] * 3, [False] * 7, [True] * 7]) if masked else None

    def attend(q, k, v, mask):
        return run(lambda *qkv: attention(*qkv, key_mask=mask, implementation="xla"), q, k, v)

    wanted = attend(q, k, v, mask)
    same, none = attention_lib.padded_context(k.reshape(3, 7, 16), mask, jnp.bfloat16)
    # Not for a TPU.
    assert same.shape == (3, 7, 16) and none is mask

    monkeypatch.setattr(per_device, "target", lambda: per_device.Target("tpu", "TPU v5"))
    assert attention_lib.padded_context(k.reshape(3, 7, 16), mask, jnp.float32)[0].shape == (3, 7, 16)
    longer, shown = attention_lib.padded_context(k.reshape(3, 7, 16), mask, jnp.bfloat16)
    assert longer.shape == (3, 16, 16) and shown.shape == (3, 16)
    k, v = (np.pad(x, ((0, 0), (0, 9), (0, 0), (0, 0)), constant_values=3.0) for x in (k, v))
    found = attend(q, k, v, shown)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
