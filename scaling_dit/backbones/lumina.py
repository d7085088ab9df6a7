"""What the backbones of the Lumina line share: fields, checks, and the steps of the call.

They run image tokens through blocks that are conditioned on time and the mean of the caption, and that read the
caption's tokens by gated attention (lumina_layers.py). They differ in their blocks, in the sequence that the image
tokens make with its rotary positions, and in the modulation of the head.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import linen as nn

from scaling_dit.backbones import contract
from scaling_dit.backbones.lumina_layers import Conditioning, Head, xavier_uniform
from scaling_dit.errors import UserError, nearest
from scaling_dit.nn import layers
from scaling_dit.nn.layers import Dense
from scaling_dit.nn.rotary import SCALINGS, Rotary

# At most; hidden where that is less.
CONDITIONING_WIDTH = 1024


class Lumina(nn.Module):
    """Base of these backbones; fields are config values, `size` names a row of SIZES that explicit fields override.

    Raises a UserError for an unknown size, dtype, policy or implementation, for head counts that do not fit, for
    shapes that do not fit the fields, for conditions that are not in its field, and for extras, of which it reads none.
    """

    in_channels: int = 4
    # None: as many as come in.
    out_channels: int | None = None
    text_dim: int = 1024
    # Rows of (name, channels, concat, positions), see conditions.py.
    conditions: tuple[Any, ...] = ()
    size: str | None = None
    hidden: int | None = None
    depth: int | None = None
    heads: int | None = None
    # Of keys and values, a divisor of heads; None: heads.
    kv_heads: int | None = None
    patch: int = 2
    qk_norm: bool = True
    # Side of the grid of tokens that the rotary positions were trained at, and what they do beyond it
    # (nn/rotary.py). The published code counts on.
    base_size: int = 16
    rope_scaling: str = "none"
    # Twice the channels: the prediction, then what gives its variance.
    learn_sigma: bool = False
    attention: str = "auto"
    # none | full | dots | products | attention | offload
    remat: bool | str = "none"
    scan_layers: bool = False
    # Of products and the residual stream.
    dtype: str = "float32"
    param_dtype: str = "float32"

    EXTRAS: ClassVar[Mapping[str, tuple[int | str, ...]]] = {}
    SPLITS_TOKENS: ClassVar[bool] = True
    # What the rotary positions of the family need; set by the subclasses.
    HEAD_SIZE_MULTIPLE: ClassVar[int] = 1
    ROPE_SCALINGS: ClassVar[tuple[str, ...]] = SCALINGS

    def __post_init__(self) -> None:
        hidden, _, heads = self.widths
        contract.check_fields(self)
        if not isinstance(self.base_size, int) or self.base_size < 1:
            raise UserError(f"base_size must be an integer of at least 1, got {self.base_size!r}")
        if self.rope_scaling not in self.ROPE_SCALINGS:
            raise UserError(
                f"unknown rope_scaling {self.rope_scaling!r}; {nearest(self.rope_scaling, self.ROPE_SCALINGS)}"
            )
        if self.kv_heads is not None and (self.kv_heads < 1 or heads % self.kv_heads):
            raise UserError(f"kv_heads={self.kv_heads} must be a divisor of heads={heads}")
        if hidden // heads % self.HEAD_SIZE_MULTIPLE:
            raise UserError(
                f"hidden={hidden} and heads={heads} give heads of size {hidden // heads}; the rotary positions of "
                f"{type(self).__name__} need a multiple of {self.HEAD_SIZE_MULTIPLE}"
            )
        super().__post_init__()

    @property
    def named_sizes(self) -> Mapping[str, Mapping[str, int]]:
        """What `size` may name: the SIZES at the foot of the family's file."""
        raise NotImplementedError

    @property
    def widths(self) -> tuple[int, int, int]:
        """(hidden, depth, heads) after `size` and explicit fields."""
        return contract.transformer_size(
            self.size, self.named_sizes, hidden=self.hidden, depth=self.depth, heads=self.heads
        )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        hidden, _, heads = self.widths
        return hidden // heads

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a head of keys and values."""
        return self.kv_heads not in (None, self.widths[2])

    @nn.nowrap
    def embed_patches(self, latents: jax.Array) -> jax.Array:
        """[B, H, W, C] -> image tokens [B, H/p * W/p, D], row-major."""
        embed = Dense(
            self.widths[0],
            (None, "embed"),
            kernel_init=xavier_uniform,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="patch_embed",
        )
        return embed(layers.patchify(latents, self.patch))

    @nn.nowrap
    def embed_conditioning(
        self, timesteps: jax.Array, text: jax.Array, text_mask: jax.Array | None
    ) -> jax.Array:
        """The vector [B, A] float32 that modulates every block and the head, A = min(hidden, 1024)."""
        width = min(self.widths[0], CONDITIONING_WIDTH)
        return Conditioning(width, param_dtype=self.param_dtype, name="conditioning")(
            timesteps, text, text_mask
        )

    @nn.nowrap
    def run_blocks(
        self,
        block: type[nn.Module],
        x: jax.Array,
        c: jax.Array,
        text: jax.Array,
        text_mask: jax.Array | None,
        rotary: Rotary,
        key_mask: jax.Array | None,
    ) -> jax.Array:
        """The stack of blocks [B, T, D] -> [B, T, D].

        Each maps (x, None, c, text, text_mask, rotary, key_mask [B, T] of x itself) to (x, None).
        """
        _, depth, heads = self.widths
        fields: dict[str, Any] = {
            "heads": heads,
            "kv_heads": self.kv_heads or heads,
            "qk_norm": self.qk_norm,
            "attention": self.attention,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        x = layers.constrain(x, "batch", "length", "act_embed")
        x, _ = layers.stack(
            block,
            depth,
            "layers",
            x,
            None,
            c,
            text,
            text_mask,
            rotary,
            key_mask,
            remat=self.remat,
            scan=self.scan_layers,
            **fields,
        )
        return x

    @nn.nowrap
    def predict(self, x: jax.Array, c: jax.Array, height: int, width: int, *, shift: bool) -> jax.Array:
        """Image tokens [B, H/p * W/p, D] -> prediction [B, H, W, out_channels], or twice the channels; float32."""
        channels = (self.out_channels or self.in_channels) * (1 + self.learn_sigma)
        head = Head(self.patch**2 * channels, shift=shift, param_dtype=self.param_dtype, name="head")
        return layers.unpatchify(head(x, c), self.patch, height, width)
