"""Next-DiT for text to image: Large-DiT with 2-D rotary positions, sandwich norms and gates bounded by tanh.

Architecture and initialisation of the published code, Lumina-T2X `lumina_next_t2i/models/model.py` (Lumina-Next, arXiv
2406.18583). Image and text are read by the same queries, as there; diffusers' `LuminaNextDiT2DModel` gives the text
queries of its own. With `learn_sigma` both halves of the channels are returned, of which that code keeps the first.
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
from scaling_dit.nn.rotary import Rotary, rotary_2d


class NextDiT(Lumina):
    """Next-DiT; fields and errors as in `Lumina`, `size` names a row of SIZES."""

    size: str | None = "h2304-d24-n32"

    HEAD_SIZE_MULTIPLE: ClassVar[int] = 4
    WEIGHTS: ClassVar[str] = "scaling_dit.backbones.next_dit_weights:rows"
    DIFFUSERS: ClassVar[str] = "scaling_dit.backbones.next_dit_weights:DIFFUSERS"

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
        _, height, width, _ = latents.shape
        embedded = embed_conditions(self, conditions, latents.shape, lambda channels: xavier_uniform)
        x = embedded.add_to(self.embed_patches(latents))
        # The published code fills batches of mixed sizes with it; kept with its weights and counts, and unread.
        self.param(
            "pad_token",
            nn.with_logical_partitioning(NORMAL_002, ("embed",)),
            (self.widths[0],),
            jnp.dtype(self.param_dtype),
        )
        grid = height // self.patch, width // self.patch
        shifts = [*(tokens.shift for tokens in embedded.tokens), 0]
        rotary = rotary_2d(
            *grid, self.head_size, shifts=shifts, scaling=self.rope_scaling, base=self.base_size
        )
        key_mask = embedded.mask(x.shape[1])
        x = embedded.before(x, lambda tokens: tokens.x)
        c = self.embed_conditioning(timesteps, text, text_mask)
        x = self.run_blocks(Block, x, c, text, text_mask, rotary, key_mask)[:, embedded.length :]
        return self.predict(x, c, height, width, shift=False)


class Block(nn.Module):
    """x += tanh(g1) RMS(Attention(RMS(x) (1 + s1))), x += tanh(g2) RMS(SwiGLU(RMS(x) (1 + s2))).

    (s1, g1, s2, g2) are linear in silu(c), zero at first.
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
        scale1, gate1, scale2, gate2 = Modulation(4, x.shape[-1], name="modulation", **types)(c)

        def norm(name: str) -> nn.RMSNorm:
            return rms_norm(name, param_dtype=self.param_dtype)

        attend = TextGatedAttention(
            self.heads, self.kv_heads, self.qk_norm, implementation=self.attention, name="attention", **types
        )
        a = norm("attention_norm")(x) * (1 + scale1)
        a = norm("attention_out_norm")(attend(a, norm("text_norm")(text), text_mask, rotary, key_mask))
        x = layers.constrain(x + (jnp.tanh(gate1) * a).astype(x.dtype), "batch", "length", "act_embed")
        f = norm("ffn_norm")(x) * (1 + scale2)
        f = norm("ffn_out_norm")(SwiGLU(name="feed_forward", **types)(f))
        x = layers.constrain(x + (jnp.tanh(gate2) * f).astype(x.dtype), "batch", "length", "act_embed")
        return x, None


# The published code's row; any other h<hidden>-d<depth>-n<heads> can be named as well.
SIZES: dict[str, dict[str, int]] = {
    # The published code's 2B; kv_heads=8 in a variant.
    "h2304-d24-n32": {"hidden": 2304, "depth": 24, "heads": 32},
}
