"""The UNet of DeepFloyd IF's first stage as arXiv 2404.02883 scales it: one attention to text and image together.

Architecture of diffusers' UNet2DConditionModel with SimpleCrossAttn blocks: an attention's keys and values are those of
the text followed by those of the image, no feed-forward follows, time scales and shifts, residual blocks change the
resolution, GELU is the activation. Table 1's rows need attention at full, half and quarter resolution (the published
IF has it at half, quarter and eighth of its own) and no projection of the text encoder's tokens. Initial values are
PyTorch's (unet_layers.py).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from scaling_dit.backbones import contract
from scaling_dit.backbones.conditions import EMBED, ConditionConv, rows_of
from scaling_dit.errors import UserError
from scaling_dit.nn import layers, unet_layers
from scaling_dit.nn.attention import attend
from scaling_dit.nn.layers import conv3x3
from scaling_dit.nn.unet_layers import Embedding, ResBlock, linear

ACTIVATION = "gelu"


class Shape(NamedTuple):
    """What `size` and the explicit fields come to."""

    # Channels of each level, the finest first.
    widths: tuple[int, ...]
    res_blocks: int
    attention_levels: tuple[int, ...]
    head_dim: int


class UNetIF(nn.Module):
    """IF's UNet; fields are config values, `size` names a row of SIZES that explicit fields override.

    Attention follows each residual block of the levels in `attention_levels` (0 is the finest), and is in the middle.

    Raises a UserError for unknown names, for numbers that do not divide, for shapes that do not fit the fields, for
    conditions that are not in its field, and for extras, of which it reads none.
    """

    in_channels: int = 4
    # None: as many as come in.
    out_channels: int | None = None
    text_dim: int = 1024
    # Rows of (name, channels, concat, positions), see conditions.py.
    conditions: tuple[Any, ...] = ()
    size: str | None = "if-xl-c512"
    channels: int | None = None
    channel_mult: tuple[int, ...] | None = None
    # Of a level on the way down; one more on the way up.
    res_blocks: int | None = None
    attention_levels: tuple[int, ...] | None = None
    head_dim: int | None = None
    attention: str = "auto"
    # none | full | dots | products | attention | offload, of residual blocks and attentions
    remat: bool | str = "none"
    # Of products and feature maps.
    dtype: str = "float32"
    param_dtype: str = "float32"

    EXTRAS: ClassVar[Mapping[str, tuple[int | str, ...]]] = {}
    CONCAT: ClassVar[tuple[str, ...]] = ("channel",)
    WEIGHTS: ClassVar[str] = "scaling_dit.backbones.unet_if_weights:rows"
    DIFFUSERS: ClassVar[str] = "scaling_dit.backbones.unet_if_weights:DIFFUSERS"

    def __post_init__(self) -> None:
        _ = self.shape
        contract.check_fields(self)
        super().__post_init__()

    @property
    def shape(self) -> Shape:
        """Widths, levels with attention and heads after `size` and explicit fields."""
        row = unet_layers.size_fields(
            self.size,
            SIZES,
            channels=self.channels,
            channel_mult=self.channel_mult,
            res_blocks=self.res_blocks,
            attention_levels=self.attention_levels,
            head_dim=self.head_dim,
        )
        attended, levels = row["attention_levels"], len(row["channel_mult"])
        if not isinstance(attended, tuple) or any(level not in range(levels) for level in attended):
            raise UserError(
                f"attention_levels={attended} must lie in 0 to {levels - 1}, the levels of channel_mult"
            )
        widths = unet_layers.level_widths(
            row["channels"],
            row["channel_mult"],
            head_dim=row["head_dim"],
            attended=[*attended, levels - 1],
        )
        return Shape(widths, row["res_blocks"], attended, row["head_dim"])

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
        """The contract's call (contract.py); returns float32 [B, H, W, out_channels]. `train` changes nothing here."""
        shape = self.shape
        contract.check_inputs(self, latents.shape, text.shape, conditions=conditions, extras=extras)
        unet_layers.check_halvings("UNetIF", latents.shape, len(shape.widths))
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        channels = shape.widths[0]
        embedding = Embedding(4 * channels, ACTIVATION, param_dtype=self.param_dtype, name="time_embed")
        time = embedding(layers.timestep_embedding(timesteps, channels))
        res_block = layers.rematerialised(ResBlock, self.remat)
        joint = layers.rematerialised(JointAttention, self.remat)

        def res(name: str, x: jax.Array, width: int, resample: str | None = None) -> jax.Array:
            block = res_block(width, ACTIVATION, scale_shift=True, resample=resample, name=name, **types)
            return block(x, time)

        def attend(name: str, x: jax.Array, level: int | None) -> jax.Array:
            if level is not None and level not in shape.attention_levels:
                return x
            return joint(shape.head_dim, self.attention, name=name, **types)(x, text, text_mask)

        def down(name: str, x: jax.Array) -> jax.Array:
            return res(name, x, x.shape[-1], "down")

        def up(name: str, x: jax.Array) -> jax.Array:
            return res(name, x, x.shape[-1], "up")

        axes = (None, None, None, "embed")
        x = conv3x3("conv_in", self.in_channels, channels, axes=axes, **types)(latents)
        if rows := rows_of(self):
            x = ConditionConv(rows, channels, axes, name=EMBED, **types)(x, conditions)
        x = unet_layers.u_shape(
            unet_layers.whole(x), shape.widths, shape.res_blocks, res=res, attend=attend, down=down, up=up
        )
        return unet_layers.head(x, self.out_channels or self.in_channels, ACTIVATION, self.param_dtype)


class JointAttention(nn.Module):
    """Attention of the pixels to text and pixels at once, with a residual.

    (x [B, H, W, C], text [B, L, D], text_mask [B, L]) -> [B, H, W, C]. The mask hides text only. All four maps have
    biases. diffusers' Attention with AttnAddedKVProcessor.
    """

    head_dim: int
    implementation: str = "auto"
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array, text_mask: jax.Array | None) -> jax.Array:
        batch, height, width, channels = x.shape
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        tokens = unet_layers.flatten(unet_layers.group_norm("norm", param_dtype=self.param_dtype)(x))
        qkv_BT3D = linear("qkv", channels, (3, channels), ("embed", None, "heads"), **types)(tokens)
        kv_BL2D = linear("text_kv", text.shape[-1], (2, channels), ("text", None, "heads"), **types)(text)

        def heads(part: jax.Array) -> jax.Array:
            part = rearrange(part, "b t (n h) -> b t n h", h=self.head_dim)
            return layers.constrain(part, "batch", None, "act_heads", None)

        q_BTNH = heads(qkv_BT3D[:, :, 0])
        k_BSNH, v_BSNH = (
            heads(jnp.concatenate([kv_BL2D[:, :, i], qkv_BT3D[:, :, i + 1]], axis=1)) for i in (0, 1)
        )
        key_mask = None
        if text_mask is not None:
            key_mask = jnp.pad(text_mask.astype(bool), ((0, 0), (0, height * width)), constant_values=True)
        o_BTNH = attend(self, q_BTNH, k_BSNH, v_BSNH, key_mask)
        o_BTD = rearrange(o_BTNH, "b t n h -> b t (n h)")
        o_BTD = linear("proj", channels, channels, ("heads", "embed"), **types)(o_BTD)
        return unet_layers.whole(x + o_BTD.reshape(batch, height, width, channels))


def _if_xl(channels: int) -> dict[str, Any]:
    return {
        "channels": channels,
        "channel_mult": (1, 2, 3, 4),
        "res_blocks": 3,
        "attention_levels": (0, 1, 2),
        "head_dim": 64,
    }


# arXiv 2404.02883, Table 1; parameters at 1024-wide text.
SIZES: dict[str, dict[str, Any]] = {
    # 2.04B
    "if-xl-c512": _if_xl(512),
    # 3.82B
    "if-xl": _if_xl(704),
}
