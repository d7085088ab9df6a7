"""The UNets of Stable Diffusion 2 and SDXL and their variants: convolutions with transformers at some levels.

Architecture of diffusers' UNet2DConditionModel with linear projections, in the forms and sizes of arXiv 2404.02883,
Table 1: 1024-wide text and no embedding but that of time; the official SDXL has `text_time` besides. Initial values are
PyTorch's (unet_layers.py).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from scaling_dit.backbones import contract
from scaling_dit.backbones.conditions import EMBED, ConditionConv, rows_of
from scaling_dit.errors import UserError
from scaling_dit.nn import layers, unet_layers
from scaling_dit.nn.attention import padded_context
from scaling_dit.nn.layers import conv3x3
from scaling_dit.nn.unet_layers import Embedding, ResBlock, Transformer2D, Upsample

# Sinusoidal features of each of the six numbers in the extra `sizes`.
SIZE_FEATURES = 256


class Shape(NamedTuple):
    """What `size` and the explicit fields come to."""

    # Channels of each level, the finest first.
    widths: tuple[int, ...]
    res_blocks: int
    # Transformer blocks of each level, 0 = no attention.
    depths: tuple[int, ...]
    mid_depth: int
    head_dim: int
    text_time: bool


class UNet(nn.Module):
    """SD2's and SDXL's UNet; fields are config values, `size` names a row of SIZES that explicit fields override.

    `transformer_depth` is the paper's TD: transformer blocks after each residual block of a level, finest level first,
    0 = no attention. Levels beyond its end have none, and the middle has as many as its last entry.
    With `text_time` the call needs the extras `pooled` [B, pooled_dim], a pooled text embedding, and `sizes` [B, 6]:
    original height and width, top and left of the crop, target height and width, in pixels.

    Raises a UserError for unknown names, for numbers that do not divide, for shapes that do not fit the fields, for
    conditions that are not in its field, and for extras that are missing or not read.
    """

    in_channels: int = 4
    # None: as many as come in.
    out_channels: int | None = None
    text_dim: int = 1024
    # Rows of (name, channels, concat, positions), see conditions.py.
    conditions: tuple[Any, ...] = ()
    size: str | None = "sdxl-c128"
    channels: int | None = None
    channel_mult: tuple[int, ...] | None = None
    # Of a level on the way down; one more on the way up.
    res_blocks: int | None = None
    transformer_depth: tuple[int, ...] | None = None
    head_dim: int | None = None
    text_time: bool | None = None
    pooled_dim: int = 1280
    attention: str = "auto"
    # none | full | dots | products | attention | offload, of residual and transformer blocks
    remat: bool | str = "none"
    # Over the blocks of each transformer.
    scan_layers: bool = False
    # Of products and feature maps.
    dtype: str = "float32"
    param_dtype: str = "float32"

    CONCAT: ClassVar[tuple[str, ...]] = ("channel",)
    WEIGHTS: ClassVar[str] = "scaling_dit.backbones.unet_weights:rows"
    DIFFUSERS: ClassVar[str] = "scaling_dit.backbones.unet_weights:DIFFUSERS"

    def __post_init__(self) -> None:
        _ = self.shape
        contract.check_fields(self)
        super().__post_init__()

    @property
    def shape(self) -> Shape:
        """Widths, depths and heads after `size` and explicit fields."""
        row = unet_layers.size_fields(
            self.size,
            SIZES,
            channels=self.channels,
            channel_mult=self.channel_mult,
            res_blocks=self.res_blocks,
            transformer_depth=self.transformer_depth,
            head_dim=self.head_dim,
            text_time=self.text_time,
        )
        unet_layers.check_integers("transformer_depth", row["transformer_depth"], least=0)
        depths, levels = tuple(row["transformer_depth"]), len(row["channel_mult"])
        if len(depths) > levels or depths[-1] == 0:
            raise UserError(
                f"transformer_depth={depths} must have at most {levels} entries, one for each of channel_mult, "
                f"and end in at least 1, which the middle has too"
            )
        depths += (0,) * (levels - len(depths))
        widths = unet_layers.level_widths(
            row["channels"],
            row["channel_mult"],
            head_dim=row["head_dim"],
            attended=[level for level in range(levels) if depths[level] or level == levels - 1],
        )
        mid_depth = row["transformer_depth"][-1]
        return Shape(widths, row["res_blocks"], depths, mid_depth, row["head_dim"], row["text_time"])

    @property
    def EXTRAS(self) -> Mapping[str, tuple[int | str, ...]]:  # noqa: N802  # the contract's name
        """The extras that this instance reads, with their shapes per example."""
        return {"pooled": ("pooled_dim",), "sizes": (6,)} if self.shape.text_time else {}

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
        unet_layers.check_halvings("UNet", latents.shape, len(shape.widths))
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        key_mask = None if text_mask is None else text_mask.astype(bool)
        text, key_mask = padded_context(text, key_mask, self.dtype)
        time = self._time_embedding(timesteps, extras or {})
        res_block = layers.rematerialised(ResBlock, self.remat)

        def res(name: str, x: jax.Array, width: int) -> jax.Array:
            return res_block(width, name=name, **types)(x, time)

        def attend(name: str, x: jax.Array, level: int | None) -> jax.Array:
            depth = shape.mid_depth if level is None else shape.depths[level]
            if not depth:
                return x
            modes: dict[str, Any] = {
                "attention": self.attention,
                "remat": self.remat,
                "scan_layers": self.scan_layers,
            }
            return Transformer2D(depth, shape.head_dim, name=name, **modes, **types)(x, text, key_mask)

        def down(name: str, x: jax.Array) -> jax.Array:
            axes = unet_layers.CONV_AXES
            return conv3x3(name, x.shape[-1], x.shape[-1], axes=axes, stride=2, **types)(x)

        def up(name: str, x: jax.Array) -> jax.Array:
            return Upsample(name=name, **types)(x)

        channels = shape.widths[0]
        axes = (None, None, None, "embed")
        x = conv3x3("conv_in", self.in_channels, channels, axes=axes, **types)(latents)
        if rows := rows_of(self):
            x = ConditionConv(rows, channels, axes, name=EMBED, **types)(x, conditions)
        x = unet_layers.u_shape(
            unet_layers.whole(x), shape.widths, shape.res_blocks, res=res, attend=attend, down=down, up=up
        )
        return unet_layers.head(x, self.out_channels or self.in_channels, "silu", self.param_dtype)

    @nn.nowrap
    def _time_embedding(self, timesteps: jax.Array, extras: contract.Extras) -> jax.Array:
        """[B, 4 * channels] float32 of the time step, and of pooled text and sizes with `text_time`."""
        channels = self.shape.widths[0]
        features = layers.timestep_embedding(timesteps, channels)
        time = Embedding(4 * channels, param_dtype=self.param_dtype, name="time_embed")(features)
        shapes = contract.extra_shapes(self)
        for name, shape in shapes.items():
            found = extras[name].shape if name in extras else None
            if found != (len(timesteps), *shape):
                raise UserError(
                    f"UNet with text_time=True needs the extra {name!r} of shape {(len(timesteps), *shape)}, "
                    f"got {'none' if found is None else found}"
                )
        if shapes:
            sizes = layers.timestep_embedding(extras["sizes"].reshape(-1), SIZE_FEATURES)
            pooled = extras["pooled"].astype(jnp.float32)
            added = jnp.concatenate([pooled, sizes.reshape(len(timesteps), -1)], axis=-1)
            time += Embedding(4 * channels, param_dtype=self.param_dtype, name="extra_embed")(added)
        return time


def _sd2(channels: int) -> dict[str, Any]:
    return {
        "channels": channels,
        "channel_mult": (1, 2, 4, 4),
        "res_blocks": 2,
        "transformer_depth": (1, 1, 1),
        "head_dim": 64,
        "text_time": False,
    }


def _sdxl(channels: int, *depth: int, text_time: bool = False) -> dict[str, Any]:
    return {
        "channels": channels,
        "channel_mult": (1, 2, 4),
        "res_blocks": 2,
        "transformer_depth": depth,
        "head_dim": 64,
        "text_time": text_time,
    }


# arXiv 2404.02883, Table 1, by the names of its plots; parameters at 1024-wide text.
SIZES: dict[str, dict[str, Any]] = {
    # 0.87B
    "sd2": _sd2(320),
    "sd2-c512": _sd2(512),
    # 2.39B
    "sdxl": _sdxl(320, 0, 2, 10),
    # 0.42B
    "sdxl-c128": _sdxl(128, 0, 2, 10),
    "sdxl-c192": _sdxl(192, 0, 2, 10),
    "sdxl-c384": _sdxl(384, 0, 2, 10),
    "sdxl-td2": _sdxl(320, 0, 2, 2),
    "sdxl-td4": _sdxl(320, 0, 2, 4),
    "sdxl-td12": _sdxl(320, 0, 2, 12),
    "sdxl-td14": _sdxl(320, 0, 2, 14),
    # 1.32B, the paper's efficient one.
    "sdxl-td4_4": _sdxl(320, 0, 4, 4),
    "sdxl-td4_8": _sdxl(320, 0, 4, 8),
    "sdxl-td4_12": _sdxl(320, 0, 4, 12),
    # 4.07B
    "sdxl-c384-td4_12": _sdxl(384, 0, 4, 12),
    # The published one; its text is 2048 wide.
    "sdxl-official": _sdxl(320, 0, 2, 10, text_time=True),
}
