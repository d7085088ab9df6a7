"""Layers of the Lumina line of backbones: RMSNorm, SwiGLU, text-gated attention, conditioning, modulation, head.

Architecture and initialisation of the published code (LLaMA2-Accessory `Large-DiT-T2I/models/model.py`, Lumina-T2X
`lumina_next_t2i/models/model.py`, arXiv 2405.05945 and 2406.18583). Shape suffixes as in attention.py; A is the
width of the conditioning vector, E that of the text.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from scaling_dit.nn import layers
from scaling_dit.nn.attention import attend
from scaling_dit.nn.layers import NORMAL_002, Dense, layer_norm
from scaling_dit.nn.rotary import Rotary, rotate

# Of every norm but the last.
EPSILON = 1e-5
# Width of the sinusoidal time embedding.
TIME_FEATURES = 256


def xavier_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform in +-sqrt(6 / (fan_in + fan_out)) for a kernel [in, out] or, part by part, [in, parts, out]."""
    bound = math.sqrt(6 / (shape[0] + shape[-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def rms_norm(name: str, *, param_dtype: Any = jnp.float32) -> nn.RMSNorm:
    """x / sqrt(mean(x^2) + 1e-5) * scale over the last axis, computed and returned in float32 whatever comes in."""
    return nn.RMSNorm(
        epsilon=EPSILON,
        dtype=jnp.float32,
        param_dtype=jnp.dtype(param_dtype),
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        name=name,
    )


class SwiGLU(nn.Module):
    """W2(silu(W1 x) * W3 x) without biases, of width 256 * ceil(floor(8D/3) / 256): [B, T, D] -> [B, T, D].

    W1 and W3 lie in one kernel.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = x.shape[-1]
        width = 256 * math.ceil(8 * features // 3 / 256)
        dense = functools.partial(
            Dense,
            use_bias=False,
            kernel_init=xavier_uniform,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        gate, value = dense((2, width), (None, "embed", "mlp"), apart=True, name="w13")(x)
        x = layers.constrain(layers.ACTIVATIONS["silu"](gate) * value, "batch", "length", "act_mlp")
        return dense(features, ("mlp", "embed"), name="w2")(x)


class TextGatedAttention(nn.Module):
    """Attention of image tokens to each other and, by the same queries, to the text; one output projection for both.

    o = softmax(q k^T / sqrt(H)) v + tanh(gate) softmax(q k_text^T / sqrt(H)) v_text, a gate per head that starts at 0.
    q and k carry rotary positions, k_text none. `qk_norm`: LayerNorm over all heads jointly, before they are split.
    Fewer key and value heads than heads make grouped-query attention, for image and text.

    A row whose text is all masked reads no text.
    """

    heads: int
    kv_heads: int
    qk_norm: bool
    implementation: str = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        text: jax.Array,
        text_mask: jax.Array | None,
        rotary: Rotary,
        key_mask: jax.Array | None = None,
    ) -> jax.Array:
        """x [B, T, D], text [B, S, E], text_mask [B, S] bool, key_mask [B, T] bool -> [B, T, D]."""
        width = x.shape[-1]
        dense = functools.partial(
            Dense,
            use_bias=False,
            kernel_init=xavier_uniform,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        kv_shape = (2, width // self.heads * self.kv_heads)
        if self.kv_heads == self.heads:
            qkv = dense((3, width), ("embed", None, "heads"), name="qkv")(x)
            q, k, v = (qkv[:, :, i] for i in range(3))
        else:
            q = dense(width, ("embed", "heads"), name="q")(x)
            kv = dense(kv_shape, ("embed", None, "heads"), name="kv")(x)
            k, v = kv[:, :, 0], kv[:, :, 1]
        text_k, text_v = dense(kv_shape, (None, "text", "heads"), apart=True, name="text_kv")(text)
        if self.qk_norm:
            norm = functools.partial(layer_norm, epsilon=EPSILON, param_dtype=self.param_dtype)
            q, k, text_k = norm("q_norm")(q), norm("k_norm")(k), norm("text_k_norm")(text_k)

        q_BTNH, k_BTKH, v_BTKH, text_k_BSKH, text_v_BSKH = (
            rearrange(part, "b t (n h) -> b t n h", h=width // self.heads)
            for part in (q, k, v, text_k, text_v)
        )
        q_BTNH, k_BTKH, v_BTKH, text_k_BSKH, text_v_BSKH = (
            layers.constrain(part.astype(self.dtype), "batch", "length", "act_heads", None)
            for part in (
                rotate(q_BTNH, rotary, self.dtype),
                rotate(k_BTKH, rotary, self.dtype),
                *(v_BTKH, text_k_BSKH, text_v_BSKH),
            )
        )
        o_BTNH = attend(self, q_BTNH, k_BTKH, v_BTKH, key_mask)
        gate_N: Any = self.param(
            "gate",
            nn.with_logical_partitioning(nn.initializers.zeros, ("heads",)),
            (self.heads,),
            jnp.dtype(self.param_dtype),
        )
        share_BTNH = jnp.tanh(gate_N.astype(jnp.float32))[:, None]
        if text_mask is not None:
            text_mask = jnp.asarray(text_mask, bool)
            readable_B1 = text_mask.any(axis=-1, keepdims=True)
            # A softmax over nothing is no number; its share is 0.
            text_mask = text_mask | ~readable_B1
            share_BTNH = share_BTNH * readable_B1[:, :, None, None]
        from_text_BTNH = attend(self, q_BTNH, text_k_BSKH, text_v_BSKH, text_mask)
        o_BTNH += share_BTNH.astype(o_BTNH.dtype) * from_text_BTNH
        return dense(width, ("heads", "embed"), name="out")(rearrange(o_BTNH, "b t n h -> b t (n h)"))


class Conditioning(nn.Module):
    """Time and the mean of the caption's tokens as one vector: timesteps [B], text [B, S, E] -> [B, A] float32.

    Of a row whose text is all masked the mean is 0.
    """

    width: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, timesteps: jax.Array, text: jax.Array, text_mask: jax.Array | None = None
    ) -> jax.Array:
        """text_mask [B, S] bool."""
        dense = functools.partial(Dense, self.width, param_dtype=self.param_dtype)
        time = layers.timestep_embedding(timesteps, TIME_FEATURES)
        time = jax.nn.silu(dense((None, "mlp"), kernel_init=NORMAL_002, name="time_fc1")(time))
        time = dense(("mlp", "embed"), kernel_init=NORMAL_002, name="time_fc2")(time)
        shown = jnp.ones(text.shape[:2], bool) if text_mask is None else jnp.asarray(text_mask, bool)
        weights = shown / jnp.maximum(shown.sum(axis=-1, keepdims=True), 1)
        pooled = (text.astype(jnp.float32) * weights[..., None]).sum(axis=1)
        pooled = layer_norm("text_norm", epsilon=EPSILON, param_dtype=self.param_dtype)(pooled)
        zeros = nn.initializers.zeros
        return time + dense(("text", "embed"), kernel_init=zeros, name="text_embed")(pooled)


class Modulation(nn.Module):
    """Linear(silu(c)), zero at first: c [B, A] -> `parts` arrays [B, 1, width] float32."""

    parts: int
    width: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, c: jax.Array) -> list[jax.Array]:
        # "mlp" splits the output over the tensor axis, which holds these large kernels in parts.
        out = Dense(
            (self.parts, self.width),
            ("embed", None, "mlp"),
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="linear",
        )(jax.nn.silu(c))
        return [out[:, None, i].astype(jnp.float32) for i in range(self.parts)]


class Head(nn.Module):
    """LayerNorm without parameters, scaled (and shifted) by c, then a linear map that starts at zero; in float32.

    x [B, T, D], c [B, A] -> [B, T, features]. With `shift` the modulation has the parts (shift, scale), else (scale).
    """

    features: int
    shift: bool
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        parts = Modulation(1 + self.shift, x.shape[-1], param_dtype=self.param_dtype, name="modulation")(c)
        x = layer_norm("norm", epsilon=1e-6, affine=False)(x) * (1 + parts[-1])
        if self.shift:
            x += parts[0]
        zeros = nn.initializers.zeros
        return Dense(
            self.features, ("embed", None), kernel_init=zeros, param_dtype=self.param_dtype, name="linear"
        )(x)
