"""Large-DiT for text to image: adaLN-Zero blocks on rows of image tokens that end in an end-of-line token.

Architecture and initialisation of the published code, LLaMA2-Accessory `Large-DiT-T2I/models/model.py` (near to
Flag-DiT of Lumina-T2X, arXiv 2405.05945), with the 1024-wide text of arXiv 2412.12391. Two things differ:
- That code fills the sequence up to 288 tokens with a learned padding token that attention sees. Here nothing is
  padded, which for the equal sizes of a batch computes what Lumina-T2X's masked padding does.
- The linear map of the pooled caption starts at zero, as in Lumina-T2X; that code leaves it uninitialised.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from scaling_dit.backbones import contract
from scaling_dit.backbones.conditions import embed_conditions
from scaling_dit.backbones.lumina import Lumina
from scaling_dit.backbones.lumina_layers import (
    Modulation,
    SwiGLU,
    TextGatedAttention,
    rms_norm,
    xavier_uniform,
)
from scaling_dit.nn import layers
from scaling_dit.nn.layers import NORMAL_002
from scaling_dit.nn.rotary import ROW_SCALINGS, Rotary, rotary_rows


class LargeDiT(Lumina):
    """Large-DiT; fields and errors as in `Lumina`, `size` names a row of SIZES."""

    size: str | None = "h1024-d16-n16"

    HEAD_SIZE_MULTIPLE: ClassVar[int] = 2
    ROPE_SCALINGS: ClassVar[tuple[str, ...]] = ROW_SCALINGS
    WEIGHTS: ClassVar[str] = "scaling_dit.backbones.large_dit_weights:rows"

    @property
    def named_sizes(self) -> Mapping[str, Mapping[str, int]]:
        """What `size` may name."""
        return SIZES

    @nn.compact
    def __call__(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        text: jax.Array,
        text_mask: jax.Array | None = None,
        conditions: contract.Conditions | None = None,
        extras: contract.Extras | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """The contract's call (contract.py), float32; twice the channels with learn_sigma. `train` changes nothing."""
        contract.check_inputs(
            self, latents.shape, text.shape, patch=self.patch, conditions=conditions, extras=extras
        )
        batch, height, width, _ = latents.shape
        rows, columns = height // self.patch, width // self.patch
        hidden = self.widths[0]

        # Each row of image tokens, then the end-of-line token; positions count through both.
        embedded = embed_conditions(self, conditions, latents.shape, lambda channels: xavier_uniform)
        x = embedded.add_to(self.embed_patches(latents)).reshape(batch, rows, columns, hidden)
        end_of_line: Any = self.param(
            "eol_token",
            nn.with_logical_partitioning(NORMAL_002, ("embed",)),
            (hidden,),
            jnp.dtype(self.param_dtype),
        )
        ends = jnp.broadcast_to(end_of_line.astype(x.dtype), (batch, rows, 1, hidden))
        x = jnp.concatenate([x, ends], axis=2).reshape(batch, rows * (columns + 1), hidden)
        # Tokens of conditions have the positions of those of the image, or of the next image's.
        rotary = rotary_rows(
            rows,
            columns,
            self.head_size,
            shifts=[tokens.shift for tokens in embedded.tokens],
            scaling=self.rope_scaling,
            base=self.base_size,
        )
        key_mask = embedded.mask(x.shape[1])
        x = embedded.before(x, lambda tokens: tokens.x)

        c = self.embed_conditioning(timesteps, text, text_mask)
        x = self.run_blocks(Block, x, c, text, text_mask, rotary, key_mask)[:, embedded.length :]
        x = x.reshape(batch, rows, columns + 1, hidden)[:, :, :columns].reshape(batch, -1, hidden)
        return self.predict(x, c, height, width, shift=True)


class Block(nn.Module):
    """adaLN-Zero block: x += g1 Attention(RMS(x) (1 + s1) + b1), x += g2 SwiGLU(RMS(x) (1 + s2) + b2).

    (b1, s1, g1, b2, s2, g2) are linear in silu(c), zero at first.
    (x [B, T, D], None, c [B, A], text [B, S, E], text_mask [B, S] bool, rotary, key_mask [B, T] bool) -> (x, None).
    """

    heads: int
    kv_heads: int
    qk_norm: bool
    attention: str = "auto"
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        _: None,
        c: jax.Array,
        text: jax.Array,
        text_mask: jax.Array | None,
        rotary: Rotary,
        key_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shift1, scale1, gate1, shift2, scale2, gate2 = Modulation(6, x.shape[-1], name="modulation", **types)(
            c
        )

        def norm(name: str) -> nn.RMSNorm:
            return rms_norm(name, param_dtype=self.param_dtype)

        attend = TextGatedAttention(
            self.heads, self.kv_heads, self.qk_norm, implementation=self.attention, name="attention", **types
        )
        a = norm("attention_norm")(x) * (1 + scale1) + shift1
        a = attend(a, norm("text_norm")(text), text_mask, rotary, key_mask)
        x = layers.constrain(x + (gate1 * a).astype(x.dtype), "batch", "length", "act_embed")
        f = norm("ffn_norm")(x) * (1 + scale2) + shift2
        f = SwiGLU(name="feed_forward", **types)(f)
        return layers.constrain(x + (gate2 * f).astype(x.dtype), "batch", "length", "act_embed"), None


# Rows of arXiv 2412.12391's scale and of the published code. Any other h<hidden>-d<depth>-n<heads> can be named too.
SIZES: dict[str, dict[str, int]] = {
    # 0.3B
    "h1024-d16-n16": {"hidden": 1024, "depth": 16, "heads": 16},
    # 0.6B
    "h1024-d28-n16": {"hidden": 1024, "depth": 28, "heads": 16},
    # The published code's 600M.
    "h1536-d16-n32": {"hidden": 1536, "depth": 16, "heads": 32},
    # 1.9B
    "h2048-d28-n16": {"hidden": 2048, "depth": 28, "heads": 16},
    # The published code's 3B.
    "h3072-d32-n32": {"hidden": 3072, "depth": 32, "heads": 32},
    # The published code's 7B.
    "h4096-d32-n32": {"hidden": 4096, "depth": 32, "heads": 32},
}
