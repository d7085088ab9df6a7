"""PixArt-alpha: a transformer on image tokens whose blocks share one modulation by time and read the text by attention.

Architecture and initialisation of the published code, `diffusion/model/nets/PixArt.py` (arXiv 2310.00426), with the
sizes and the 1024-wide text of arXiv 2404.02883. The time modulates all blocks by one linear map, to which each block
adds a table of its own (adaLN-single). The text of an unconditional prediction is the embedding of the empty caption,
as for every backbone here; the published code swaps in a random buffer instead.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from scaling_dit.backbones import contract
from scaling_dit.backbones.conditions import embed_conditions
from scaling_dit.errors import UserError
from scaling_dit.nn import layers
from scaling_dit.nn.attention import CrossAttention, SelfAttention, padded_context
from scaling_dit.nn.layers import NORMAL_002, Dense, Mlp, layer_norm

# Of every LayerNorm.
EPSILON = 1e-6
# Width of the sinusoidal time embedding.
TIME_FEATURES = 256


class PixArt(nn.Module):
    """PixArt-alpha; fields are config values, `size` names a row of SIZES that explicit fields override.

    Raises a UserError for an unknown size, dtype, policy or implementation, for a text width that cannot be read
    without a caption embedding, for inputs that do not fit the fields, for conditions that are not in its field, and
    for extras, of which it reads none.
    """

    in_channels: int = 4
    # None: as many as come in.
    out_channels: int | None = None
    text_dim: int = 1024
    # Rows of (name, channels, concat, positions), see conditions.py.
    conditions: tuple[Any, ...] = ()
    size: str | None = "h1152-d28"
    hidden: int | None = None
    depth: int | None = None
    heads: int | None = None
    patch: int = 2
    # An MLP from text_dim to hidden; None: as the size says, else True.
    caption_embedding: bool | None = None
    # Twice the channels: the prediction, then what gives its variance.
    learn_sigma: bool = False
    # Side of the grid of tokens at which positions are whole numbers.
    base_size: int = 16
    attention: str = "auto"
    # none | full | dots | products | attention | offload
    remat: bool | str = "none"
    scan_layers: bool = False
    # Of products and the residual stream.
    dtype: str = "float32"
    param_dtype: str = "float32"

    EXTRAS: ClassVar[Mapping[str, tuple[int | str, ...]]] = {}
    SPLITS_TOKENS: ClassVar[bool] = True
    WEIGHTS: ClassVar[str] = "scaling_dit.backbones.pixart_weights:rows"
    DIFFUSERS: ClassVar[str] = "scaling_dit.backbones.pixart_weights:DIFFUSERS"

    def __post_init__(self) -> None:
        hidden = self.widths[0]
        contract.check_fields(self)
        if self.base_size < 1:
            raise UserError(f"base_size must be at least 1, got {self.base_size}")
        if hidden % 4:
            raise UserError(f"hidden={hidden} must be a multiple of 4, which 2-D sin-cos positions need")
        if not self.embeds_caption and self.text_dim != hidden:
            raise UserError(
                f"without a caption embedding the text must be as wide as the tokens: text_dim={self.text_dim}, "
                f"hidden={hidden} (size={self.size!r}); set caption_embedding=True or text_dim={hidden}"
            )
        super().__post_init__()

    @property
    def widths(self) -> tuple[int, int, int]:
        """(hidden, depth, heads) after `size` and explicit fields."""
        return contract.transformer_size(
            self._size_name, SIZES, hidden=self.hidden, depth=self.depth, heads=self.heads
        )

    @property
    def embeds_caption(self) -> bool:
        """Whether an MLP takes the text to the width of the tokens."""
        if self.caption_embedding is not None:
            return self.caption_embedding
        return self.size is None or bool(
            contract.size_row(self._size_name or "", SIZES).get("caption_embedding", True)
        )

    @property
    def _size_name(self) -> str | None:
        """The size by its name in SIZES, which leave out the papers' 16 heads."""
        short = (self.size or "").removesuffix("-n16")
        return short if short in SIZES else self.size

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
        hidden, depth, heads = self.widths
        _, height, width, _ = latents.shape
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        # Image tokens at fixed positions.
        embed = Dense(hidden, (None, "embed"), kernel_init=xavier_uniform, name="patch_embed", **types)
        embedded = embed_conditions(self, conditions, latents.shape, lambda channels: xavier_uniform)
        x = embedded.add_to(embed(layers.patchify(latents, self.patch)))
        grid = height // self.patch, width // self.patch

        def positions(shift: int = 0) -> jax.Array:
            table = layers.sincos_2d(*grid, hidden, base=self.base_size, shift=shift)
            return jnp.asarray(table, x.dtype)

        x += positions()
        self_mask = embedded.mask(x.shape[1])
        x = embedded.before(x, lambda tokens: tokens.x + positions(tokens.shift))
        x = layers.constrain(x, "batch", "length", "act_embed")

        # Time: one vector for the head, and one modulation for all blocks.
        time, modulation = TimeModulation(hidden, param_dtype=self.param_dtype, name="time")(timesteps)
        if self.embeds_caption:
            text = CaptionEmbedding(hidden, name="caption_embed", **types)(text)
        key_mask = None if text_mask is None else text_mask.astype(bool)
        text, key_mask = padded_context(text, key_mask, self.dtype)

        x, _ = layers.stack(
            Block,
            depth,
            "blocks",
            x,
            None,
            modulation,
            text,
            key_mask,
            self_mask,
            remat=self.remat,
            scan=self.scan_layers,
            heads=heads,
            attention=self.attention,
            **types,
        )

        channels = (self.out_channels or self.in_channels) * (1 + self.learn_sigma)
        head = Head(self.patch**2 * channels, param_dtype=self.param_dtype, name="head")
        return layers.unpatchify(head(x[:, embedded.length :], time), self.patch, height, width)


class TimeModulation(nn.Module):
    """timesteps [B] -> (t [B, D], SiLU(t) W + b as six parts [B, 6, D]), both float32; t is an MLP of sinusoids."""

    width: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        types: dict[str, Any] = {"kernel_init": NORMAL_002, "param_dtype": self.param_dtype}
        t = layers.timestep_embedding(timesteps, TIME_FEATURES)
        t = jax.nn.silu(Dense(self.width, (None, "mlp"), name="fc1", **types)(t))
        t = Dense(self.width, ("mlp", "embed"), name="fc2", **types)(t)
        # "mlp" splits the output over the tensor axis, which holds this large kernel in parts.
        shared = Dense((6, self.width), ("embed", None, "mlp"), name="modulation", **types)
        return t, shared(jax.nn.silu(t))


class CaptionEmbedding(nn.Module):
    """Linear, GELU (tanh), Linear: text [B, L, E] -> [B, L, width]."""

    width: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = Dense(self.width, ("text", "mlp"), name="fc1", **types)(text)
        return Dense(self.width, ("mlp", "embed"), name="fc2", **types)(layers.ACTIVATIONS["gelu_tanh"](y))


class Block(nn.Module):
    """Self-attention and MLP, modulated and gated, with attention to the text in between that is neither, nor normed.

    (b1, s1, g1, b2, s2, g2) = table + modulation;
    x += g1 Self(LN(x) (1 + s1) + b1);  x += Cross(x, text);  x += g2 MLP(LN(x) (1 + s2) + b2).

    (x [B, T, D], None, modulation [B, 6, D], text [B, L, E], key_mask [B, L] bool, self_mask [B, T] bool) -> (x, None).
    """

    heads: int
    attention: str = "auto"
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        _: None,
        modulation: jax.Array,
        text: jax.Array,
        key_mask: jax.Array | None,
        self_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        hidden = x.shape[-1]
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attends: dict[str, Any] = {
            "qkv_bias": True,
            "implementation": self.attention,
            "kernel_init": xavier_uniform,
            **types,
        }
        table = modulation_table(self, 6, hidden)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(table + modulation, 6, axis=1)

        a = layer_norm("norm1", epsilon=EPSILON, affine=False)(x) * (1 + scale1) + shift1
        a = SelfAttention(self.heads, name="attn", **attends)(a, self_mask)
        x = layers.constrain(x + (gate1 * a).astype(x.dtype), "batch", "length", "act_embed")
        cross = CrossAttention(self.heads, out_init=nn.initializers.zeros, name="cross_attn", **attends)
        x = layers.constrain(x + cross(x, text, key_mask), "batch", "length", "act_embed")
        f = layer_norm("norm2", epsilon=EPSILON, affine=False)(x) * (1 + scale2) + shift2
        f = Mlp(4 * hidden, activation="gelu_tanh", kernel_init=xavier_uniform, name="mlp", **types)(f)
        return layers.constrain(x + (gate2 * f).astype(x.dtype), "batch", "length", "act_embed"), None


class Head(nn.Module):
    """LN(x) (1 + s) + b with (b, s) = table + t, then a linear map that starts at zero; float32, for its rounding would
    be the prediction's.

    x [B, T, D], t [B, D] -> [B, T, features].
    """

    features: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        shift, scale = jnp.split(modulation_table(self, 2, x.shape[-1]) + t[:, None], 2, axis=1)
        x = layer_norm("norm", epsilon=EPSILON, affine=False)(x) * (1 + scale) + shift
        zeros = nn.initializers.zeros
        linear = Dense(
            self.features, ("embed", None), kernel_init=zeros, param_dtype=self.param_dtype, name="linear"
        )
        return linear(x)


def modulation_table(module: Any, parts: int, width: int) -> jax.Array:
    """The module's parameter "table" [parts, width], N(0, 1/width) at first, as float32."""
    init = nn.with_logical_partitioning(nn.initializers.normal(width**-0.5), (None, "embed"))
    table: jax.Array = module.param("table", init, (parts, width), jnp.dtype(module.param_dtype))
    return table.astype(jnp.float32)


def xavier_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform in +-sqrt(6 / (in + out)) for a kernel [in, *features], of which all features count as one output.

    The published code has q, k and v as one map.
    """
    return nn.initializers.xavier_uniform(0, tuple(range(1, len(shape))))(key, shape, dtype)


# Rows of arXiv 2404.02883, Table 2, and larger ones for arXiv 2412.12391, all with 16 heads; "-n16" may be added to a
# name. Any other h<hidden>-d<depth>-n<heads> can be named as well.
SIZES: dict[str, dict[str, int]] = {
    # 0.48B
    "h1024-d28": {"hidden": 1024, "depth": 28, "heads": 16, "caption_embedding": False},
    # 0.95B
    "h1024-d56": {"hidden": 1024, "depth": 56, "heads": 16, "caption_embedding": False},
    # PixArt-alpha XL/2, 0.61B.
    "h1152-d28": {"hidden": 1152, "depth": 28, "heads": 16},
    # 1.08B
    "h1536-d28": {"hidden": 1536, "depth": 28, "heads": 16},
    # 1.9B
    "h2048-d28": {"hidden": 2048, "depth": 28, "heads": 16},
    # 2.4B
    "h2304-d28": {"hidden": 2304, "depth": 28, "heads": 16},
    # 4.3B
    "h3072-d28": {"hidden": 3072, "depth": 28, "heads": 16},
}
