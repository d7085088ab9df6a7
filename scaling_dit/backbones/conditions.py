"""Image conditions inside a backbone: which it reads, and how their images become channels or tokens.

A condition is an image [B, h, w, Ci] of the height and width of the latents, and for each row of the batch whether it
is present. A backbone's field `conditions` has a row for each: (name, Ci, concat, positions).

    channel  the input layer reads it beside the latents: a kernel of its own, zero at first, is added to the product
             with the latents. That is the input layer for latents and condition joined along the channels.
    token    its patches are tokens of their own, before those of the image, in whatever attends from image to image.
             Where a row has no condition, attention does not see them.

`positions` is for tokens: "shared" gives each the position of the image token at its place, "shifted" one beyond the
image: the k-th shifted condition stands like the k-th further image beside it. A condition that no row has, because it
is not given, adds nothing, so the backbone computes what it would without it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from scaling_dit.data.conditions.contract import CONCAT, POSITIONS
from scaling_dit.errors import UserError, nearest
from scaling_dit.nn import layers
from scaling_dit.nn.layers import Dense, Initializer

# Modules and parameters that conditions add to a backbone, the former with an entry for each of them by name, and the
# beginning of the names of learned tables of positions.
EMBED, _TABLE = "condition_embed", "condition_pos_"
# Name -> (image [B, h, w, Ci], present [B] bool).
Conditions = Mapping[str, tuple[jax.Array, jax.Array]]


def position_table(name: str) -> str:
    """The name of the learned table of positions of a shifted condition, beside EMBED."""
    return f"{_TABLE}{name}"


class Row(NamedTuple):
    """A condition that a backbone reads."""

    name: str
    channels: int
    concat: str
    positions: str


def rows_of(backbone: Any) -> tuple[Row, ...]:
    """The conditions of a backbone; none if its class has no field `conditions`."""
    return tuple(Row(*row) for row in getattr(backbone, "conditions", ()))


def condition_of(path: str) -> str | None:
    """The condition that a parameter "condition_embed/NAME/kernel" belongs to; None for the backbone's own."""
    *modules, last = path.split("/")
    if last.startswith(_TABLE):
        return last.removeprefix(_TABLE)
    # The condition's own module follows, and has the parameter.
    return modules[modules.index(EMBED) + 1] if EMBED in modules[:-1] else None


def check_rows(backbone: Any) -> None:
    """Checks the field `conditions` of a backbone, before anything is built.

    Raises:
      UserError: a row that is none, a name twice, or tokens in a backbone without a sequence of image tokens.
    """
    form = "(name, channels, 'token' or 'channel', 'shared' or 'shifted')"
    name, allowed = type(backbone).__name__, getattr(backbone, "CONCAT", CONCAT)
    for row in backbone.conditions:
        fits = isinstance(row, tuple | list) and len(row) == 4 and isinstance(row[0], str)
        if not fits or not row[0].isidentifier() or row[2] not in CONCAT or row[3] not in POSITIONS:
            raise UserError(f"conditions holds {row!r}; each must be {form}")
        if not isinstance(row[1], int) or isinstance(row[1], bool) or row[1] < 1:
            raise UserError(
                f"condition {row[0]!r} has {row[1]!r} channels; it must be an integer of at least 1"
            )
        if row[2] not in allowed:
            raise UserError(
                f"{name} has no sequence of image tokens, so it reads conditions as channels only; set "
                f"config.conditions.{row[0]}.concat to 'channel', not {row[2]!r}"
            )
    names = [row[0] for row in backbone.conditions]
    if len(set(names)) < len(names):
        raise UserError(f"conditions names {', '.join(names)}; each name may stand once")


def check_given(backbone: Any, latents: tuple[int, ...], conditions: Conditions | None) -> None:
    """Checks the conditions of one call against the latents [B, H, W, C] and the fields of a backbone.

    Raises:
      UserError: one that the backbone does not read, or of another shape than it takes.
    """
    name, rows = type(backbone).__name__, {row.name: row for row in rows_of(backbone)}
    if conditions and not rows:
        raise UserError(f"{name} reads no conditions, got {sorted(conditions)}; leave conditions out")
    for condition, given in (conditions or {}).items():
        if condition not in rows:
            raise UserError(f"{name} does not read the condition {condition!r}; {nearest(condition, rows)}")
        found = tuple(getattr(part, "shape", None) for part in given)
        right = ((*latents[:3], rows[condition].channels), latents[:1])
        if found != right:
            raise UserError(
                f"{name}: condition {condition!r} must be (image {list(right[0])}, present {list(right[1])}), "
                f"got shapes {', '.join(str(list(shape) if shape else shape) for shape in found)}"
            )


def example(backbone: Any, batch: int, height: int, width: int) -> dict[str, Any]:
    """Abstract conditions of one call, every one that a backbone reads."""
    return {
        row.name: (
            jax.ShapeDtypeStruct((batch, height, width, row.channels), jnp.float32),
            jax.ShapeDtypeStruct((batch,), jnp.bool_),
        )
        for row in rows_of(backbone)
    }


def shown(condition: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The image [B, h, w, Ci] of a condition, zero in rows that do not have it."""
    image, present = condition
    return jnp.where(present[:, None, None, None], image, 0)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of one condition.

    Attributes:
      name: of the condition.
      x: [B, T, D], one token for each image token, without positions.
      present: bool [B].
      shift: 0 for the positions of the image; k for those of the k-th further image.
    """

    name: str
    x: jax.Array
    present: jax.Array
    shift: int


class Embedded(NamedTuple):
    """The conditions of one call: what is added to the image tokens [B, T, D], None for nothing, and tokens."""

    added: jax.Array | None
    tokens: tuple[Tokens, ...]

    def add_to(self, x: jax.Array) -> jax.Array:
        """Image tokens with the conditions that the input layer reads."""
        return x if self.added is None else x + self.added.astype(x.dtype)

    @property
    def length(self) -> int:
        """Number of tokens of all conditions."""
        return sum(tokens.x.shape[1] for tokens in self.tokens)

    def before(self, x: jax.Array, placed: Callable[[Tokens], jax.Array]) -> jax.Array:
        """The tokens of the conditions, each as `placed` gives it with its positions, then `x` [B, T, D]."""
        if not self.tokens:
            return x
        return jnp.concatenate([*(placed(tokens).astype(x.dtype) for tokens in self.tokens), x], axis=1)

    def mask(self, following: int) -> jax.Array | None:
        """Which keys are seen, bool [B, S]: tokens of present conditions, and the `following` tokens behind them.

        None without tokens of conditions: every key is seen.
        """
        if not self.tokens:
            return None
        parts = [jnp.broadcast_to(t.present[:, None], t.x.shape[:2]) for t in self.tokens]
        batch = self.tokens[0].x.shape[0]
        return jnp.concatenate([*parts, jnp.ones((batch, following), bool)], axis=1)


def _zeros(channels: int) -> Initializer:
    return nn.initializers.zeros


class ConditionEmbed(nn.Module):
    """Conditions to channels or tokens: a linear map of the patches of each, its parameters under its name.

    That of a channel condition has no bias and is zero at first; that of a token condition is initialised as the
    backbone's own patch embedding.

    Attributes:
      rows: of the backbone.
      width: D, of its tokens.
      patch: side of a patch.
      kernel_init, bias_init: of token conditions, made for so many channels.
    """

    rows: tuple[Row, ...]
    width: int
    patch: int
    kernel_init: Callable[[int], Initializer]
    bias_init: Callable[[int], Initializer] = _zeros
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, conditions: Conditions | None, latents: tuple[int, ...]) -> Embedded:
        """Latents [B, H, W, C] are given by their shape."""
        added: jax.Array | None = None
        found, shift = [], 0
        for row in self.rows:
            shift += row.concat == "token" and row.positions == "shifted"
            given = (conditions or {}).get(row.name)
            # Every parameter is made, whatever is given.
            if given is None and not self.is_initializing():
                continue
            if given is None:
                given = jnp.zeros((*latents[:3], row.channels)), jnp.zeros(latents[:1], bool)
            channel = row.concat == "channel"
            embed = Dense(
                self.width,
                (None, "embed"),
                use_bias=not channel,
                kernel_init=nn.initializers.zeros if channel else self.kernel_init(row.channels),
                bias_init=nn.initializers.zeros if channel else self.bias_init(row.channels),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=row.name,
            )
            x = embed(layers.patchify(shown(given), self.patch))
            if channel:
                added = x if added is None else added + x
            else:
                found.append(Tokens(row.name, x, given[1], shift if row.positions == "shifted" else 0))
        return Embedded(added, tuple(found))


def embed_conditions(
    backbone: Any,
    conditions: Conditions | None,
    latents: tuple[int, ...],
    kernel_init: Callable[[int], Initializer],
    bias_init: Callable[[int], Initializer] = _zeros,
) -> Embedded:
    """`ConditionEmbed` for a transformer, inside its compact method.

    Args:
      backbone: has the fields `conditions`, `patch`, `dtype` and `param_dtype`, and `widths`.
      conditions: of the call.
      latents: their shape.
      kernel_init, bias_init: as in `ConditionEmbed`.
    """
    rows = rows_of(backbone)
    if not rows:
        return Embedded(None, ())
    embed = ConditionEmbed(
        rows,
        backbone.widths[0],
        backbone.patch,
        kernel_init,
        bias_init,
        dtype=backbone.dtype,
        param_dtype=backbone.param_dtype,
        name=EMBED,
    )
    return embed(conditions, latents)


class ConditionConv(nn.Module):
    """Conditions to feature maps: a 3x3 convolution of each, zero at first and without bias, and their sum.

    The parameters lie under the names of the conditions.
    """

    rows: tuple[Row, ...]
    features: int
    axes: tuple[str | None, ...]
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, conditions: Conditions | None) -> jax.Array:
        """x [B, H, W, features] with the conditions that are given."""
        for row in self.rows:
            given = (conditions or {}).get(row.name)
            if given is None and not self.is_initializing():
                continue
            if given is None:
                given = jnp.zeros((*x.shape[:3], row.channels)), jnp.zeros(x.shape[:1], bool)
            conv = layers.conv3x3(
                row.name,
                row.channels,
                self.features,
                axes=self.axes,
                bias=False,
                kernel_init=nn.initializers.zeros,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
            )
            x += conv(shown(given))
        return x
