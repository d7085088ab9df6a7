"""U-ViT for text to image: a transformer on one sequence of time, text and image tokens, with long skips.

Architecture and initialisation of the published code, baofff/U-ViT `libs/uvit_t2i.py` (arXiv 2209.12152), with the
sizes and the 1024-wide text of arXiv 2412.12391. Depth d makes d//2 in-blocks, one middle block and d//2 out-blocks;
out-block i merges the output of in-block d//2-1-i by concatenation and a linear map.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from scaling_dit import trees
from scaling_dit.backbones import contract
from scaling_dit.backbones.conditions import Embedded, Tokens, embed_conditions, position_table, rows_of
from scaling_dit.errors import UserError, nearest
from scaling_dit.nn import layers
from scaling_dit.nn.attention import SelfAttention
from scaling_dit.nn.layers import Dense, Mlp, layer_norm

# Of every LayerNorm.
EPSILON = 1e-5
POSITIONS = ("learned", "sincos_init")


class UViT(nn.Module):
    """U-ViT; fields are config values, `size` names a row of SIZES that `hidden`, `depth`, `heads` override.

    The table of positions is made for the shapes given to `init`, and used as it is for as many tokens. For other
    heights and widths its image part is resized if it is a square. It cannot say that of itself: a table for wide
    images of as many tokens as a square would be read as one, and so would what a text of another length leaves.

    Raises a UserError for an unknown size, dtype, policy or implementation, for shapes that fit neither the fields nor
    the table of positions, for conditions that are not in its field, and for extras, of which it reads none.
    """

    in_channels: int = 4
    # None: as many as come in.
    out_channels: int | None = None
    text_dim: int = 1024
    # Rows of (name, channels, concat, positions), see conditions.py.
    conditions: tuple[Any, ...] = ()
    size: str | None = "h512-d12-n8"
    hidden: int | None = None
    depth: int | None = None
    heads: int | None = None
    patch: int = 2
    long_skips: bool = True
    time_mlp: bool = False
    final_conv: bool = True
    # Initial table: N(0, 0.02), or 2-D sin-cos of amplitude 1 for image tokens.
    positions: str = "learned"
    # Side of the grid of tokens that the table is made for, and resized from in each call; 0: as the images at init.
    table_side: int = 0
    attention: str = "auto"
    # none | full | dots | products | attention | offload
    remat: bool | str = "none"
    scan_layers: bool = False
    # Of products and the residual stream.
    dtype: str = "float32"
    param_dtype: str = "float32"

    EXTRAS: ClassVar[Mapping[str, tuple[int | str, ...]]] = {}
    SPLITS_TOKENS: ClassVar[bool] = True
    WEIGHTS: ClassVar[str] = "scaling_dit.backbones.uvit_weights:rows"

    def __post_init__(self) -> None:
        _ = self.widths
        contract.check_fields(self)
        if self.positions not in POSITIONS:
            raise UserError(f"unknown positions {self.positions!r}; {nearest(self.positions, POSITIONS)}")
        if not isinstance(self.table_side, int) or self.table_side < 0:
            raise UserError(f"table_side must be an integer of at least 0, got {self.table_side!r}")
        super().__post_init__()

    @property
    def RESIZED(self) -> Mapping[str, str]:  # noqa: N802
        """Tables of positions, see contract.py."""
        here = "scaling_dit.backbones.uvit"
        shifted = [row.name for row in rows_of(self) if row.concat == "token" and row.positions == "shifted"]
        tables = {position_table(name): f"{here}:resize_condition_table" for name in shifted}
        return {"pos_embed": f"{here}:resize_table", **tables}

    @property
    def widths(self) -> tuple[int, int, int]:
        """(hidden, depth, heads) after `size` and explicit fields."""
        return contract.transformer_size(
            self.size, SIZES, hidden=self.hidden, depth=self.depth, heads=self.heads
        )

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
        contract.check_inputs(
            self, latents.shape, text.shape, patch=self.patch, conditions=conditions, extras=extras
        )
        hidden, depth, _ = self.widths
        _, height, width, channels = latents.shape
        text_length = text.shape[1]
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        # Tokens: [time | text | conditions | image].
        def fan_in_init(channels: int) -> layers.Initializer:
            return layers.torch_uniform(self.patch**2 * channels)

        image_tokens = Dense(
            hidden,
            (None, "embed"),
            kernel_init=fan_in_init(channels),
            bias_init=fan_in_init(channels),
            name="patch_embed",
            **types,
        )(layers.patchify(latents, self.patch))
        embedded = embed_conditions(self, conditions, latents.shape, fan_in_init, fan_in_init)
        image_tokens = embedded.add_to(image_tokens)
        text_tokens = Dense(hidden, ("text", "embed"), name="context_embed", **types)(text)
        time = layers.timestep_embedding(timesteps, hidden)
        if self.time_mlp:
            time = Mlp(4 * hidden, activation="silu", param_dtype=self.param_dtype, name="time_embed")(time)
        time_token = time[:, None].astype(image_tokens.dtype)
        x = jnp.concatenate([time_token, text_tokens, image_tokens], axis=1)
        grid = height // self.patch, width // self.patch
        table = self._position_table(text_length, *grid).astype(x.dtype)
        x += table
        first = 1 + text_length
        if embedded.tokens:
            x = self._insert_conditions(x, embedded, table, first, grid)
        x = layers.constrain(x, "batch", "length", "act_embed")

        key_mask = None
        if text_mask is not None:
            following = x.shape[1] - first
            key_mask = jnp.pad(text_mask.astype(bool), ((0, 0), (1, following)), constant_values=True)
        if (shown := embedded.mask(image_tokens.shape[1])) is not None:
            shown = jnp.pad(shown, ((0, 0), (first, 0)), constant_values=True)
            key_mask = shown if key_mask is None else key_mask & shown

        # Blocks; what a long skip carries is stacked over layers when they are scanned, else a list. The last out of
        # the first half is the first into the second.
        run = functools.partial(layers.stack, Block, depth // 2, remat=self.remat, scan=self.scan_layers)
        fields = self._block_fields()
        x, skips = run("in_blocks", x, None, key_mask, emits_skip=self.long_skips, **fields)
        middle = layers.rematerialised(Block, self.remat)(name="mid_block", **fields)
        x, _ = middle(x, None, key_mask)
        merged = skips if self.long_skips and depth > 1 else None
        x, _ = run("out_blocks", x, merged, key_mask, last_first=True, **fields)

        # Head on the image tokens, in float32: it is small, and its rounding would be the prediction's.
        x = layer_norm("norm", epsilon=EPSILON, param_dtype=self.param_dtype)(x[:, first + embedded.length :])
        out_channels = self.out_channels or self.in_channels
        head = Dense(
            self.patch**2 * out_channels, ("embed", None), param_dtype=self.param_dtype, name="decoder_pred"
        )
        x = layers.unpatchify(head(x), self.patch, height, width)
        if self.final_conv:
            # XLA errs on a convolution split over height.
            x = layers.constrain(x, "batch", None, None, None)
            conv = layers.conv3x3("final_layer", out_channels, out_channels, param_dtype=self.param_dtype)
            x = conv(x)
        return x

    @nn.nowrap
    def _block_fields(self) -> dict[str, Any]:
        hidden, _, heads = self.widths
        return {
            "hidden": hidden,
            "heads": heads,
            "attention": self.attention,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }

    @nn.nowrap
    def _insert_conditions(
        self, x: jax.Array, embedded: Embedded, table: jax.Array, first: int, grid: tuple[int, int]
    ) -> jax.Array:
        """x [B, T, D] with the tokens of conditions before token `first`, each with its positions.

        Those are rows of the image's own `table`, or for a shifted condition a learned table of its own.
        """

        def placed(tokens: Tokens) -> jax.Array:
            if not tokens.shift:
                return tokens.x + table[first:].astype(tokens.x.dtype)
            return tokens.x + self._grid_table(position_table(tokens.name), grid, tokens.shift).astype(
                tokens.x.dtype
            )

        return jnp.concatenate([x[:, :first], embedded.before(x[:, first:], placed)], axis=1)

    @nn.nowrap
    def _grid_table(self, name: str, grid: tuple[int, int], shift: int) -> jax.Array:
        """A learned table of positions of a grid of tokens, [rows * columns, hidden], resized as the image's is.

        With `sincos_init` it begins as the positions of the `shift`-th further image.
        """
        hidden, length = self.widths[0], grid[0] * grid[1]
        made = (self.table_side, self.table_side) if self.table_side else grid
        found = made[0] * made[1]
        if self.has_variable("params", name):
            found = trees.unbox(self.get_variable("params", name)).shape[0]
        side = math.isqrt(found)
        if self.table_side and found != self.table_side**2:
            raise UserError(
                f"the position table {name} holds {found} tokens, but table_side={self.table_side} needs "
                f"{self.table_side**2}"
            )
        # As in `_position_table`.
        as_made = grid == made if self.table_side else found == length
        if not as_made and side**2 != found:
            raise UserError(
                f"the position table {name} holds {found} tokens, but these shapes need {length}, and it can be "
                f"resized only from a square: use the sides given at init"
            )

        def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            if self.positions == "learned":
                return layers.NORMAL_002(key, shape, dtype)
            return jnp.asarray(layers.sincos_2d(*made, hidden, shift=shift), dtype)

        boxed = nn.with_logical_partitioning(init, (None, "embed"))
        table: Any = self.param(name, boxed, (found, hidden), jnp.dtype(self.param_dtype))
        if as_made:
            return table
        return resize_grid(table.reshape(side, side, hidden), *grid).reshape(length, hidden)

    @nn.nowrap
    def _position_table(self, text_length: int, rows: int, columns: int) -> jax.Array:
        """The learned table for these shapes, [1 + text_length + rows * columns, hidden], time and text first.

        Sized by the shapes at `init`, or by `table_side`. For another grid than it was made for the image part is
        resized (`resize_grid`).
        """
        hidden = self.widths[0]
        length = 1 + text_length + rows * columns
        made = (self.table_side, self.table_side) if self.table_side else (rows, columns)
        found = 1 + text_length + made[0] * made[1]
        if self.has_variable("params", "pos_embed"):
            found = trees.unbox(self.get_variable("params", "pos_embed")).shape[0]
        # Tokens of an image at init.
        image = found - 1 - text_length
        side = math.isqrt(max(image, 0))
        if self.table_side and image != self.table_side**2:
            raise UserError(
                f"the position table holds {found} tokens, but table_side={self.table_side} and {text_length} tokens "
                f"of text need {1 + text_length + self.table_side**2}"
            )
        # A wide grid may have as many tokens as the square of table_side.
        as_made = (rows, columns) == made if self.table_side else found == length
        if not as_made and (image < 1 or side**2 != image):
            raise UserError(
                f"the position table holds {found} tokens, but these shapes need {length} "
                f"(1 time + {text_length} text + {rows}x{columns} image), and it can be resized only from a square of "
                f"image tokens, not from {image}: use the text length and the sides given at init"
            )

        def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            table = layers.NORMAL_002(key, shape, dtype)
            if self.positions == "learned":
                return table
            return table.at[-made[0] * made[1] :].set(jnp.asarray(layers.sincos_2d(*made, hidden), dtype))

        table: Any = self.param(
            "pos_embed",
            nn.with_logical_partitioning(init, (None, "embed")),
            (found, hidden),
            jnp.dtype(self.param_dtype),
        )
        if as_made:
            return table
        start = 1 + text_length
        grid = table[start:].reshape(side, side, hidden)
        return jnp.concatenate([table[:start], resize_grid(grid, rows, columns).reshape(-1, hidden)])


def resize_grid(grid: jax.Array, rows: int, columns: int) -> jax.Array:
    """Learned positions of a grid of tokens for another grid: [h, w, D] -> [rows, columns, D].

    Bicubic (Keys, a = -1/2) between the centres of the tokens, weights renormalised at the borders, no antialiasing. In
    float32, then in the dtype of `grid`.
    """
    shape = (rows, columns, grid.shape[-1])
    resized = jax.image.resize(grid.astype(jnp.float32), shape, "bicubic", antialias=False)
    return resized.astype(grid.dtype)


def resize_table(table: jax.Array, text: tuple[int, int], image: tuple[int, int]) -> jax.Array:
    """The table of a model [1 + L + side^2, D] for one that begins with its weights, of another text length or grid.

    Positions of time, of text up to the shorter length and of an equal grid stay bit for bit. Text beyond repeats the
    old positions from the first on: position i has the vector of i mod L, which the model knows as one of text, and in
    windows of one length that of the same place in the first window. A grid is resized (`resize_grid`).

    Args:
      table: the learned positions.
      text: tokens of text that the table has, and that it must have.
      image: tokens of an image, likewise; squares.

    Raises:
      UserError: the table holds another number of tokens, or the images are no squares.
    """
    sides = [math.isqrt(max(count, 0)) for count in image]
    if (
        len(table) != 1 + text[0] + image[0]
        or [side**2 for side in sides] != list(image)
        or 0 in (*text, *sides)
    ):
        raise UserError(
            f"the position table holds {len(table)} tokens, and is resized from 1 time, {text[0]} text and {image[0]} "
            f"image tokens to {text[1]} text and {image[1]} image tokens, of which the images must be squares"
        )
    words = table[1 : 1 + text[0]][jnp.arange(text[1]) % text[0]]
    grid = table[1 + text[0] :]
    if image[0] != image[1]:
        grid = resize_grid(grid.reshape(sides[0], sides[0], -1), sides[1], sides[1]).reshape(image[1], -1)
    return jnp.concatenate([table[:1], words, grid])


def resize_condition_table(table: jax.Array, text: tuple[int, int], image: tuple[int, int]) -> jax.Array:
    """As `resize_table` for the table of a shifted condition [side^2, D], which has positions of a grid alone.

    Raises:
      UserError: the table holds another number of tokens, or the grids are no squares.
    """
    del text
    sides = [math.isqrt(max(count, 0)) for count in image]
    if len(table) != image[0] or [side**2 for side in sides] != list(image) or 0 in sides:
        raise UserError(
            f"a condition's position table holds {len(table)} tokens, and is resized from {image[0]} to {image[1]} "
            "tokens, which must be squares"
        )
    if image[0] == image[1]:
        return table
    return resize_grid(table.reshape(sides[0], sides[0], -1), sides[1], sides[1]).reshape(image[1], -1)


class Block(nn.Module):
    """Pre-norm transformer block; merges `skip` first if there is one. (x, skip, key_mask) -> (x, x if emits_skip)."""

    hidden: int
    heads: int
    emits_skip: bool = False
    attention: str = "auto"
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: jax.Array, skip: jax.Array | None, key_mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if skip is not None:
            # An axis name may stand once in a kernel: "mlp" splits the 2h-wide sum over the tensor axis.
            merge = Dense(self.hidden, ("mlp", "embed"), name="skip_linear", **types)
            x = merge(jnp.concatenate([x, skip], axis=-1))
        norm1 = layer_norm("norm1", epsilon=EPSILON, param_dtype=self.param_dtype)
        attend = SelfAttention(self.heads, implementation=self.attention, name="attn", **types)
        x = layers.constrain(x + attend(norm1(x), key_mask), "batch", "length", "act_embed")
        norm2 = layer_norm("norm2", epsilon=EPSILON, param_dtype=self.param_dtype)
        x += Mlp(4 * self.hidden, name="mlp", **types)(norm2(x))
        x = layers.constrain(x, "batch", "length", "act_embed")
        return x, x if self.emits_skip else None


# Rows of the two papers' scale and of the published code; any other h<hidden>-d<depth>-n<heads> can be named as well.
SIZES: dict[str, dict[str, int]] = {
    # U-ViT-S.
    "h512-d12-n8": {"hidden": 512, "depth": 12, "heads": 8},
    # U-ViT-S deep.
    "h512-d16-n8": {"hidden": 512, "depth": 16, "heads": 8},
    # U-ViT-L, 0.29B.
    "h1024-d20-n16": {"hidden": 1024, "depth": 20, "heads": 16},
    "h1024-d28-n16": {"hidden": 1024, "depth": 28, "heads": 16},
    # U-ViT-H, 0.50B.
    "h1152-d28-n16": {"hidden": 1152, "depth": 28, "heads": 16},
    "h1024-d42-n16": {"hidden": 1024, "depth": 42, "heads": 16},
    "h1024-d56-n16": {"hidden": 1024, "depth": 56, "heads": 16},
    "h1536-d28-n16": {"hidden": 1536, "depth": 28, "heads": 16},
    "h1536-d42-n16": {"hidden": 1536, "depth": 42, "heads": 16},
    "h2048-d28-n16": {"hidden": 2048, "depth": 28, "heads": 16},
    # The 2.3B of arXiv 2412.12391.
    "h2048-d42-n16": {"hidden": 2048, "depth": 42, "heads": 16},
    "h2560-d42-n16": {"hidden": 2560, "depth": 42, "heads": 16},
    "h3072-d56-n16": {"hidden": 3072, "depth": 56, "heads": 16},
}
