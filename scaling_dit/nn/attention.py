"""Attention goes through one function; which implementation runs is decided when the program is traced.

Shape suffixes: B batch, T queries, S keys, N heads, K key/value heads, H head size, D model width.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from scaling_dit.errors import UserError, nearest
from scaling_dit.nn import per_device, short_attention, splash
from scaling_dit.nn.layers import ATTENTION, NORMAL_002, WEIGHTS, Dense, Initializer, constrain

IMPLEMENTATIONS = ("auto", "xla", "short", "splash", "cudnn")
_TPU_KERNELS = {"short": short_attention.attend, "splash": splash.attend}
ROWS = 16  # of a tile of bfloat16
SPLASH_FROM = 512  # keys from which "auto" takes splash on TPUs; below, the padding to its blocks costs more


class Choice(NamedTuple):
    """What one call of `attention` was traced with."""

    implementation: str
    queries: int
    keys: int
    heads: int
    head_size: int

    def __str__(self) -> str:
        return f"{self.queries}x{self.keys} tokens, {self.heads} heads of {self.head_size}: {self.implementation}"


_choices: contextvars.ContextVar[set[Choice] | None] = contextvars.ContextVar("choices", default=None)


@contextlib.contextmanager
def recorded_choices() -> Iterator[set[Choice]]:
    """Collects what every call traced inside chose; a program that was traced before adds nothing."""
    found: set[Choice] = set()
    token = _choices.set(found)
    try:
        yield found
    finally:
        _choices.reset(token)


def attention(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v -> [B, T, N, H], softmax in float32, the rest in the inputs' dtype.

    Args:
      q_BTNH: queries.
      k_BSNH, v_BSNH: keys and values; fewer heads than queries (a divisor) make grouped-query attention.
      key_mask: [B, S] bool, False hides a key from every query. Where it hides all of them, none is hidden: what the
        published code makes of a large negative number on every score.
      implementation: "xla", "short" (TPU, up to 512 tokens in bfloat16), "splash" (TPU), "cudnn" (GPU), or "auto": the
        first kernel of the device that can run (splash from SPLASH_FROM keys), else xla. An explicit one never falls
        back.

    Raises:
      UserError: an unknown implementation, or an explicit one that cannot run here.
    """
    check_implementation(implementation)
    obstacles = {
        "short": short_attention.obstacle(q_BTNH, k_BSNH),
        "splash": per_device.obstacle(q_BTNH, k_BSNH),
        "cudnn": cudnn_obstacle(q_BTNH, k_BSNH, key_mask),
    }
    if implementation == "auto":
        able = [name for name, obstacle in obstacles.items() if not obstacle]
        few = k_BSNH.shape[1] < SPLASH_FROM
        implementation = next((name for name in able if not (name == "splash" and few)), "xla")
    elif obstacle := obstacles.get(implementation):
        raise UserError(f"attention={implementation!r} cannot run: {obstacle}; use attention='xla' or 'auto'")
    if (found := _choices.get()) is not None:
        found.add(Choice(implementation, q_BTNH.shape[1], k_BSNH.shape[1], *q_BTNH.shape[2:]))

    if key_mask is not None:
        key_mask = _readable(key_mask)
    if implementation in _TPU_KERNELS:
        return _TPU_KERNELS[implementation](q_BTNH, k_BSNH, v_BSNH, key_mask)
    mask_B11S = None if key_mask is None else key_mask[:, None, None, :]
    if implementation == "cudnn":
        if mask_B11S is not None:  # cuDNN takes a bias over all pairs of queries and keys
            mask_B11S = jnp.broadcast_to(mask_B11S, (q_BTNH.shape[0], 1, q_BTNH.shape[1], k_BSNH.shape[1]))
        return jax.nn.dot_product_attention(q_BTNH, k_BSNH, v_BSNH, mask=mask_B11S, implementation="cudnn")
    return _attend_xla(q_BTNH, k_BSNH, v_BSNH, mask_B11S)


def attend(
    module: nn.Module,
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    key_mask: jax.Array | None = None,
) -> jax.Array:
    """`attention` as a module with the field `implementation` calls it, its output named for remat.

    While a module is initialised only shapes matter, on whatever device that is: XLA's form is traced then.
    """
    implementation = "xla" if module.is_initializing() else module.implementation
    o_BTNH = attention(q_BTNH, k_BSNH, v_BSNH, key_mask=key_mask, implementation=implementation)
    # Named with its heads side by side: cut apart, heads of 64 would be kept in tiles of 128.
    o_BTD = checkpoint_name(rearrange(o_BTNH, "b t n h -> b t (n h)"), ATTENTION)
    return rearrange(o_BTD, "b t (n h) -> b t n h", n=o_BTNH.shape[2])


def padded_context(
    context_BSE: jax.Array, key_mask: jax.Array | None, dtype: Any
) -> tuple[jax.Array, jax.Array | None]:
    """Text and its mask [B, S] with hidden tokens at the end, so that S is whole tiles of a TPU; as they are elsewhere.

    What reads 77 tokens of many captions as rows of one matrix is then no copy: an eighth of the cycles of SDXL's
    transformer blocks. `dtype` is that of the products.
    """
    missing = -context_BSE.shape[1] % ROWS
    if per_device.target().platform != "tpu" or jnp.dtype(dtype) != jnp.bfloat16 or not missing:
        return context_BSE, key_mask
    shown = jnp.ones(context_BSE.shape[:2], bool) if key_mask is None else _readable(key_mask)
    return jnp.pad(context_BSE, ((0, 0), (0, missing), (0, 0))), jnp.pad(shown, ((0, 0), (0, missing)))


def _readable(key_mask: jax.Array) -> jax.Array:
    """The mask, where it hides all keys of an example hiding none."""
    return key_mask | ~key_mask.any(axis=1, keepdims=True)


def _attend_xla(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_B11S: jax.Array | None
) -> jax.Array:
    """Written out for XLA, with heads moved before lengths, so that each product is a plain batch of matrices.

    `jax.nn.dot_product_attention` contracts in place instead, which was slower on CPUs. Queries that share a key head
    are stacked along the length.
    """
    kv_heads = k_BSKH.shape[2]
    q = rearrange(q_BTNH, "b t (k g) h -> b k (g t) h", k=kv_heads)
    k, v = (rearrange(x, "b s k h -> b k s h") for x in (k_BSKH, v_BSKH))
    out = _core(q, k, v, mask_B11S)
    return rearrange(out, "b k (g t) h -> b t (k g) h", t=q_BTNH.shape[1])


@jax.custom_vjp
def _core(q_BKTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_B11S: jax.Array | None) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v -> [B, K, T, H], whose gradient keeps the weights in the type they are used in.

    Differentiated step by step it keeps them in float32 as well, which is most of what a layer keeps.
    """
    return _core_forward(q_BKTH, k_BKSH, v_BKSH, mask_B11S)[0]


def _core_forward(
    q_BKTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_B11S: jax.Array | None
) -> tuple[jax.Array, Any]:
    scale = q_BKTH.shape[-1] ** -0.5
    logits_BKTS = jnp.einsum("bkth,bksh->bkts", q_BKTH, k_BKSH, preferred_element_type=jnp.float32) * scale
    if mask_B11S is not None:
        logits_BKTS = jnp.where(mask_B11S, logits_BKTS, jnp.finfo(jnp.float32).min / 2)
    weights_BKTS = checkpoint_name(jax.nn.softmax(logits_BKTS, axis=-1).astype(v_BKSH.dtype), WEIGHTS)
    out_BKTH = jnp.einsum("bkts,bksh->bkth", weights_BKTS, v_BKSH)
    return out_BKTH, (q_BKTH, k_BKSH, v_BKSH, weights_BKTS)


def _core_backward(kept: Any, d_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, weights = kept
    d_weights = jnp.einsum("bkth,bksh->bkts", d_out, v, preferred_element_type=jnp.float32)
    wide = weights.astype(jnp.float32)
    d_logits = wide * (d_weights - (wide * d_weights).sum(axis=-1, keepdims=True)) * q.shape[-1] ** -0.5
    d_logits = d_logits.astype(q.dtype)
    d_q = jnp.einsum("bkts,bksh->bkth", d_logits, k)
    d_k = jnp.einsum("bkts,bkth->bksh", d_logits, q)
    d_v = jnp.einsum("bkts,bkth->bksh", weights, d_out)
    return d_q, d_k, d_v, None


_core.defvjp(_core_forward, _core_backward)


def check_implementation(implementation: str) -> None:
    """Raises a UserError unless `implementation` is one of IMPLEMENTATIONS."""
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"unknown attention {implementation!r}; {nearest(implementation, IMPLEMENTATIONS)}")


def cudnn_obstacle(q_BTNH: jax.Array, k_BSNH: jax.Array, key_mask: jax.Array | None) -> str | None:
    """Why cuDNN's fused attention cannot take these inputs on the default backend; None if it can."""
    platform, _ = per_device.target()
    if platform != "gpu":
        return f"the backend is {platform}, it needs gpu"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype is {q_BTNH.dtype}, it needs bfloat16 or float16"
    head_size = q_BTNH.shape[-1]
    capability = float(getattr(jax.devices()[0], "compute_capability", 0))
    largest = 256 if capability >= 9.0 else 128
    if head_size % 8 or head_size > largest:
        return f"head size is {head_size}, it needs a multiple of 8 up to {largest} on this device"
    if key_mask is not None and (q_BTNH.shape[1] % 2 or k_BSNH.shape[1] % 2):
        return f"lengths {q_BTNH.shape[1]} and {k_BSNH.shape[1]} are odd, with a mask they must be even"
    return None


class SelfAttention(nn.Module):
    """Multi-head self-attention, one fused product for q, k and v: x [B, T, D], key_mask [B, T] -> [B, T, D]."""

    heads: int
    qkv_bias: bool = False
    implementation: str = "auto"
    kernel_init: Initializer = NORMAL_002
    out_init: Initializer | None = None  # of the last kernel; None: kernel_init
    bias_init: Initializer = nn.initializers.zeros
    length_axis: str | None = "length"  # logical axis of tokens; None keeps images whole
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, key_mask: jax.Array | None = None) -> jax.Array:
        width = x.shape[-1]
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        fused = Dense(
            (3, width),
            ("embed", None, "heads"),
            use_bias=self.qkv_bias,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name="qkv",
            **types,
        )(x)
        q_BTNH, k_BTNH, v_BTNH = (
            constrain(
                rearrange(fused[:, :, i], "b t (n h) -> b t n h", n=self.heads),
                "batch", self.length_axis, "act_heads", None,
            )
            for i in range(3)
        )  # fmt: skip
        o_BTNH = attend(self, q_BTNH, k_BTNH, v_BTNH, key_mask)
        out_init = self.out_init or self.kernel_init
        inits: dict[str, Any] = {"kernel_init": out_init, "bias_init": self.bias_init}
        proj = Dense(width, ("heads", "embed"), name="proj", **inits, **types)
        return proj(rearrange(o_BTNH, "b t n h -> b t (n h)"))


class CrossAttention(nn.Module):
    """Multi-head attention from x to a context: x [B, T, D], context [B, S, E], key_mask [B, S] -> [B, T, D].

    The kernels of k and v lie in one array [2, E, D].
    """

    heads: int
    qkv_bias: bool = False
    implementation: str = "auto"
    kernel_init: Initializer = NORMAL_002
    out_init: Initializer | None = None  # of the last kernel; None: kernel_init
    bias_init: Initializer = nn.initializers.zeros
    length_axis: str | None = "length"  # logical axis of tokens; None keeps images whole
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array, key_mask: jax.Array | None = None) -> jax.Array:
        width = x.shape[-1]
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        inputs: dict[str, Any] = {"use_bias": self.qkv_bias, "kernel_init": self.kernel_init, **types}
        inputs["bias_init"] = self.bias_init
        q_BTD = Dense(width, ("embed", "heads"), name="q", **inputs)(x)
        k_BSD, v_BSD = Dense((2, width), (None, "text", "heads"), apart=True, name="kv", **inputs)(context)
        axes = ("batch", self.length_axis, "act_heads", None)
        q_BTNH, k_BSNH, v_BSNH = (
            constrain(rearrange(part, "b t (n h) -> b t n h", n=self.heads), *axes)
            for part in (q_BTD, k_BSD, v_BSD)
        )
        o_BTNH = attend(self, q_BTNH, k_BSNH, v_BSNH, key_mask)
        out_init = self.out_init or self.kernel_init
        inits: dict[str, Any] = {"kernel_init": out_init, "bias_init": self.bias_init}
        proj = Dense(width, ("heads", "embed"), name="proj", **inits, **types)
        return proj(rearrange(o_BTNH, "b t n h -> b t (n h)"))
