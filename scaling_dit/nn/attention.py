"""The one attention function. It chooses an implementation when a program is traced.

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
# Rows of a bfloat16 tile.
ROWS = 16
# The least number of keys for which "auto" uses splash on TPUs; with fewer the padding to its blocks costs more.
SPLASH_FROM = 512


class Choice(NamedTuple):
    """The implementation and shapes with which one call of `attention` was traced."""

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
    """Collects the choices of all calls traced in this context. A program traced earlier adds none."""
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
    """softmax(q k^T / sqrt(H)) v -> [B, T, N, H], the softmax in float32, the rest in the inputs' dtype.

    Args:
      q_BTNH: queries.
      k_BSNH: keys. They may have fewer heads than queries, a divisor, for grouped-query attention.
      v_BSNH: values, with the heads of the keys.
      key_mask: [B, S] bool; False hides a key from every query. A row that hides all keys hides none, as in the
        published code, which adds the same large negative number to every score.
      implementation: "xla", "short" (TPU, up to 512 tokens in bfloat16), "splash" (TPU), "cudnn" (GPU), or "auto": the
        first kernel that can run on the device (splash only from SPLASH_FROM keys), else xla. Only "auto" falls back.

    Raises:
      UserError: the implementation is unknown or cannot run here.
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
        # cuDNN takes a bias over all pairs of queries and keys.
        if mask_B11S is not None:
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
    """`attention` for a module with a field `implementation`; names the output for the remat policy.

    Initialisation needs shapes only, so it traces XLA's form, which runs on any device.
    """
    implementation = "xla" if module.is_initializing() else module.implementation
    o_BTNH = attention(q_BTNH, k_BSNH, v_BSNH, key_mask=key_mask, implementation=implementation)
    # Name the output with heads joined: separate heads of 64 would be kept in tiles of 128.
    o_BTD = checkpoint_name(rearrange(o_BTNH, "b t n h -> b t (n h)"), ATTENTION)
    return rearrange(o_BTD, "b t (n h) -> b t n h", n=o_BTNH.shape[2])


def padded_context(
    context_BSE: jax.Array, key_mask: jax.Array | None, dtype: Any
) -> tuple[jax.Array, jax.Array | None]:
    """Text and its mask [B, S], on TPUs padded with hidden tokens so that S fills whole tiles; elsewhere unchanged.

    Without padding a TPU copies the 77 tokens of many captions before it reads them as rows of one matrix, which took
    an eighth of the cycles of SDXL's transformer blocks. `dtype` is the type of the products.
    """
    missing = -context_BSE.shape[1] % ROWS
    if per_device.target().platform != "tpu" or jnp.dtype(dtype) != jnp.bfloat16 or not missing:
        return context_BSE, key_mask
    shown = jnp.ones(context_BSE.shape[:2], bool) if key_mask is None else _readable(key_mask)
    return jnp.pad(context_BSE, ((0, 0), (0, missing), (0, 0))), jnp.pad(shown, ((0, 0), (0, missing)))


def _readable(key_mask: jax.Array) -> jax.Array:
    """The mask, with a row that hides all keys changed to hide none."""
    return key_mask | ~key_mask.any(axis=1, keepdims=True)


def _attend_xla(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_B11S: jax.Array | None
) -> jax.Array:
    """Attention for XLA, with heads moved before lengths, so that each product is a plain batch of matrices.

    `jax.nn.dot_product_attention` contracts without moving them, which was slower on CPUs. Queries that share a key
    head are stacked along the length.
    """
    kv_heads = k_BSKH.shape[2]
    q = rearrange(q_BTNH, "b t (k g) h -> b k (g t) h", k=kv_heads)
    k, v = (rearrange(x, "b s k h -> b k s h") for x in (k_BSKH, v_BSKH))
    out = _core(q, k, v, mask_B11S)
    return rearrange(out, "b k (g t) h -> b t (k g) h", t=q_BTNH.shape[1])


@jax.custom_vjp
def _core(q_BKTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_B11S: jax.Array | None) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v -> [B, K, T, H], with the weights kept for the gradient in the type they are used in.

    Automatic differentiation would keep them in float32 as well, which is most of a layer's residuals.
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
    """The reason why cuDNN's fused attention cannot take these inputs on the default backend; None if it can."""
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


class _MultiHead(nn.Module):
    """What self- and cross-attention share: fields, splitting products into heads, and the product after attention.

    Attributes:
      out_init: initializer of the last kernel; by default `kernel_init`.
      length_axis: logical axis of tokens; None keeps images whole.
    """

    heads: int
    qkv_bias: bool = False
    implementation: str = "auto"
    kernel_init: Initializer = NORMAL_002
    out_init: Initializer | None = None
    bias_init: Initializer = nn.initializers.zeros
    length_axis: str | None = "length"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def _heads(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, N, H]."""
        x_BTNH = rearrange(x_BTD, "b t (n h) -> b t n h", n=self.heads)
        return constrain(x_BTNH, "batch", self.length_axis, "act_heads", None)

    @nn.nowrap
    def _project(
        self, q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, key_mask: jax.Array | None
    ) -> jax.Array:
        """Attention and the product `proj` after it: [B, T, D]."""
        o_BTNH = attend(self, q_BTNH, k_BSNH, v_BSNH, key_mask)
        proj = Dense(
            q_BTNH.shape[2] * q_BTNH.shape[3],
            ("heads", "embed"),
            kernel_init=self.out_init or self.kernel_init,
            bias_init=self.bias_init,
            name="proj",
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        return proj(rearrange(o_BTNH, "b t n h -> b t (n h)"))


class SelfAttention(_MultiHead):
    """Multi-head self-attention, one fused product for q, k and v: x [B, T, D], key_mask [B, T] -> [B, T, D]."""

    @nn.compact
    def __call__(self, x: jax.Array, key_mask: jax.Array | None = None) -> jax.Array:
        width = x.shape[-1]
        fused = Dense(
            (3, width),
            ("embed", None, "heads"),
            use_bias=self.qkv_bias,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name="qkv",
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )(x)
        q_BTNH, k_BTNH, v_BTNH = (self._heads(fused[:, :, i]) for i in range(3))
        return self._project(q_BTNH, k_BTNH, v_BTNH, key_mask)


class CrossAttention(_MultiHead):
    """Multi-head attention from x to a context: x [B, T, D], context [B, S, E], key_mask [B, S] -> [B, T, D].

    The kernels of k and v are one array [2, E, D].
    """

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array, key_mask: jax.Array | None = None) -> jax.Array:
        width = x.shape[-1]
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        inputs: dict[str, Any] = {"use_bias": self.qkv_bias, "kernel_init": self.kernel_init, **types}
        inputs["bias_init"] = self.bias_init
        q_BTD = Dense(width, ("embed", "heads"), name="q", **inputs)(x)
        k_BSD, v_BSD = Dense((2, width), (None, "text", "heads"), apart=True, name="kv", **inputs)(context)
        return self._project(self._heads(q_BTD), self._heads(k_BSD), self._heads(v_BSD), key_mask)
