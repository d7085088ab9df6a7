"""The transformer blocks of text and image encoders: scanned pre-norm blocks, and attention with a bias.

Norms, softmax and the residual stream are float32; products run in `dtype`. Lengths such as 77 and 257 do not divide
over a mesh, so tokens are not sharded. Shape suffixes: B batch, T queries, S keys, N heads, H head size, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from scaling_dit.nn.layers import ACTIVATIONS, Dense, constrain, layer_norm, stack
from scaling_dit.weights import table

NORM_EPSILON = 1e-5
# A logit whose weight is 0. With -inf a row without keys would become NaN.
HIDDEN = float(np.finfo(np.float32).min / 2)

TOKEN_AXES = ("batch", None, "act_embed")
HEAD_AXES = ("batch", None, "act_heads", None)
MLP_AXES = ("batch", None, "act_mlp")


def attend(
    q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, bias: jax.Array | None, scale: float
) -> jax.Array:
    """softmax(scale q k^T + bias) v -> [B, T, N, H]; logits and softmax in float32, the rest in the inputs' dtype.

    Backbones use `nn/attention.py`, whose fused kernels support no bias. Captions are too short to need these kernels.

    Args:
      q_BTNH: queries.
      k_BSNH: keys.
      v_BSNH: values.
      bias: float32, broadcast to [B, N, T, S]; `HIDDEN` hides a key. None lets every query see every key.
      scale: factor on the products; 1 for T5.
    """
    q, k, v = (rearrange(x, "b t n h -> b n t h") for x in (q_BTNH, k_BSNH, v_BSNH))
    logits = jnp.einsum("bnth,bnsh->bnts", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits += bias
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return rearrange(jnp.einsum("bnts,bnsh->bnth", weights, v), "b n t h -> b t n h")


class Block(nn.Module):
    """Attention and an MLP of hidden width `mlp`, each a residual branch after a LayerNorm: x, bias -> (x, None).

    With `scaled` each branch has a learned factor for every channel (LayerScale, arXiv 2103.17239).
    """

    heads: int
    mlp: int
    activation: str
    dtype: Any
    param_dtype: Any
    epsilon: float = NORM_EPSILON
    scaled: bool = False

    @nn.compact
    def __call__(self, x_BTD: jax.Array, _: None, bias: jax.Array | None) -> tuple[jax.Array, None]:
        width = x_BTD.shape[-1]
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        normed = layer_norm("norm1", epsilon=self.epsilon, param_dtype=self.param_dtype)(x_BTD)
        fused = Dense((3, width), ("embed", None, "heads"), name="qkv", **types)(normed)
        q, k, v = (
            constrain(rearrange(fused[:, :, i], "b t (n h) -> b t n h", n=self.heads), *HEAD_AXES)
            for i in range(3)
        )
        out = rearrange(attend(q, k, v, bias, (width // self.heads) ** -0.5), "b t n h -> b t (n h)")
        x_BTD += self._scaled("scale1", Dense(width, ("heads", "embed"), name="proj", **types)(out))
        normed = layer_norm("norm2", epsilon=self.epsilon, param_dtype=self.param_dtype)(x_BTD)
        inner = constrain(Dense(self.mlp, ("embed", "mlp"), name="fc1", **types)(normed), *MLP_AXES)
        out = Dense(width, ("mlp", "embed"), name="fc2", **types)(ACTIVATIONS[self.activation](inner))
        return constrain(x_BTD + self._scaled("scale2", out), *TOKEN_AXES), None

    def _scaled(self, name: str, branch_BTD: jax.Array) -> jax.Array:
        if not self.scaled:
            return branch_BTD
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        factors: Any = self.param(name, init, (branch_BTD.shape[-1],), self.param_dtype)
        return branch_BTD * factors


def blocks(x: jax.Array, count: int, bias: jax.Array | None, **fields: Any) -> jax.Array:
    """Applies `count` blocks inside a compact method, of which one is compiled: x [B, T, D] -> the same shape."""
    return stack(Block, count, "blocks", x, None, bias, remat="none", scan=True, **fields)[0]


def hugging_face_rows(layers: int) -> list[table.Row]:
    """The table of CLIP's blocks with transformers' names, below `encoder`."""
    at, to = "encoder.layers.{i}", "blocks_{i}"
    qkv = tuple(f"{at}.self_attn.{part}_proj" for part in "qkv")
    return [
        *table.norm(f"{at}.layer_norm1", f"{to}/norm1", layers),
        *table.linear(qkv, f"{to}/qkv", layers, bias=True),
        *table.linear(f"{at}.self_attn.out_proj", f"{to}/proj", layers),
        *table.norm(f"{at}.layer_norm2", f"{to}/norm2", layers),
        *table.linear(f"{at}.mlp.fc1", f"{to}/fc1", layers),
        *table.linear(f"{at}.mlp.fc2", f"{to}/fc2", layers),
    ]


def open_clip_rows(layers: int) -> list[table.Row]:
    """The table of the same blocks with open_clip's names, below `transformer`; q, k and v are fused as in torch."""
    at, to = "transformer.resblocks.{i}", "blocks_{i}"
    return [
        *table.norm(f"{at}.ln_1", f"{to}/norm1", layers),
        table.Row(f"{at}.attn.in_proj_weight", f"{to}/qkv/kernel", table.fused(3), layers),
        table.Row(f"{at}.attn.in_proj_bias", f"{to}/qkv/bias", table.split(3), layers),
        *table.linear(f"{at}.attn.out_proj", f"{to}/proj", layers),
        *table.norm(f"{at}.ln_2", f"{to}/norm2", layers),
        *table.linear(f"{at}.mlp.c_fc", f"{to}/fc1", layers),
        *table.linear(f"{at}.mlp.c_proj", f"{to}/fc2", layers),
    ]
