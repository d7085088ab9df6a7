"""Rotary positions (RoPE, arXiv 2104.09864): tables of angles, and the rotation of heads by them.

The rotation swaps neighbours on the last axis. In XLA this is a roll, which a TPU computes by copying two slices. A
TPU kernel here rolls the lanes in place instead.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from scaling_dit.nn import per_device
from scaling_dit.nn.per_device import LANES

# Cosines and sines [T, H/2] float32.
Rotary = tuple[jax.Array, jax.Array]
THETA = 10000.0
# What `scaling` may be; rows of tokens that are one sequence have one more.
SCALINGS = ("none", "linear", "ntk", "centred")
ROW_SCALINGS = (*SCALINGS, "grid")
# The most tokens of a grid step.
_LONGEST = 1024
# The most numbers of a grid step: two tables and two blocks in float32 must fit 16 MiB twice.
_BLOCK = 2**19
_MOST_LANES = 512
# The compiler's estimate for an elementwise fusion on v5p.
_BYTES_PER_CYCLE = 551


def rotary_1d(positions: int | np.ndarray, head_size: int, theta: float = THETA) -> Rotary:
    """Tables [T, head_size/2] for the positions [T] of a sequence; for a number those up to it, from 0 on.

    angle[t, i] = position_t * theta^(-2i/head_size).
    """
    places = np.arange(positions) if isinstance(positions, int) else positions
    return _tables(np.outer(places, _frequencies(head_size, theta)))


def rotary_rows(
    rows: int,
    columns: int,
    head_size: int,
    *,
    shifts: Sequence[int] = (),
    scaling: str = "none",
    base: int | None = None,
) -> Rotary:
    """As `rotary_1d` for `rows` rows of `columns` tokens and an end-of-line token, which are one sequence.

    Args:
      shifts: of further images of as many tokens, which come first and have no end-of-line tokens: each token of shift
        k has the position of the image token at its place, k images later.
      scaling: what a grid beyond `base` x `base` tokens does, whose sequence is r times as long: "none" counts on;
        "linear" divides positions by r; "ntk" counts on with theta' = theta r^(d / (d - 2)), d = head_size, which keeps
        the fastest frequency and divides the slowest by r; "centred" counts from where the middle of the sequence is at
        the middle of the base's; "grid" gives each token the position of its place in the base's grid, so that rows and
        columns are interpolated alike. At `base` x `base` tokens all give the same, bit for bit.
      base: needed unless scaling is "none".
    """
    width = columns + 1
    length = rows * width
    # With the first place of the next image.
    place = np.arange(length + 1)
    theta, positions = THETA, place.astype(np.float64)
    if scaling == "grid" and base is not None:
        row, column = np.divmod(place, width)
        ratio = stretch(rows, columns, base)
        positions = row / ratio * (columns / ratio + 1) + column / ratio
    elif scaling != "none" and base is not None:
        whole = base * (base + 1)
        ratio = max(1.0, length / whole)
        positions, theta = _scaled(place, scaling, ratio, (whole - length) / 2, head_size)
    image = positions[:length]
    without_ends = image.reshape(rows, width)[:, :columns].ravel()
    further = [without_ends + shift * (positions[-1] - positions[0]) for shift in shifts]
    return rotary_1d(np.concatenate([*further, image]), head_size, theta)


def rotary_2d(
    rows: int,
    columns: int,
    head_size: int,
    *,
    shifts: Sequence[int] = (0,),
    scaling: str = "none",
    base: int | None = None,
) -> Rotary:
    """Tables [rows * columns, head_size/2] for a grid of tokens, row-major, or several such grids one after another.

    Rows and columns alternate: pair 2i has the angle row * f_i, pair 2i + 1 the angle column * f_i, with
    f_i = theta^(-4i/head_size), theta = 10000.

    Args:
      shifts: a grid for each; that of shift k stands k grids to the right of that of shift 0.
      scaling: what a grid beyond `base` x `base` tokens does, whose sides are r times as long (`stretch`): "none"
        counts on; "linear" divides rows and columns by r; "ntk" counts on with theta' = theta r^(d / (d - 2)),
        d = head_size/2; "centred" counts from where the middle of the grid is at the middle of the base's. At `base` x
        `base` tokens all give the same, bit for bit.
      base: needed unless scaling is "none".
    """
    half = head_size // 2
    row, column = np.divmod(np.arange(rows * columns), columns)
    theta, wide = THETA, float(columns)
    if scaling != "none" and base is not None:
        ratio = stretch(rows, columns, base)
        row, theta = _scaled(row, scaling, ratio, (base - rows) / 2, half)
        column, _ = _scaled(column, scaling, ratio, (base - columns) / 2, half)
        wide = columns / ratio if scaling == "linear" else wide
    beside = np.concatenate([column + shift * wide for shift in shifts])
    frequencies = _frequencies(half, theta)
    row = np.tile(row, len(shifts))
    angles = np.stack([np.outer(row, frequencies), np.outer(beside, frequencies)], axis=-1)
    return _tables(angles.reshape(-1, half))


def stretch(rows: int, columns: int, base: int) -> float:
    """How many times as long as `base` the sides of a square of rows x columns tokens are; 1 for smaller ones."""
    return max(1.0, math.sqrt(rows * columns) / base)


def _scaled(
    places: np.ndarray, scaling: str, ratio: float, shift: float, size: int
) -> tuple[np.ndarray, float]:
    """(positions, theta) of whole-number places; `size` features have frequencies."""
    if scaling == "linear":
        return places / ratio, THETA
    if scaling == "centred":
        return places + shift, THETA
    # Two features have the fastest frequency alone, which no theta changes.
    return places, THETA * ratio ** (size / (size - 2)) if size > 2 else THETA


def _frequencies(size: int, theta: float = THETA) -> np.ndarray:
    return theta ** (-np.arange(0, size, 2) / size)


def _tables(angles: np.ndarray) -> Rotary:
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def rotate(x_BTNH: jax.Array, rotary: Rotary, dtype: Any = jnp.float32) -> jax.Array:
    """Rotates each pair (x[2i], x[2i+1]) of a head by its angle, in float32: [B, T, N, H] -> the same in `dtype`."""
    cos_TH, sin_TH = (jnp.repeat(table, 2, axis=-1) for table in rotary)
    even = np.arange(cos_TH.shape[-1]) % 2 == 0
    # x[2i] adds its partner with the opposite sign.
    sin_TH = jnp.where(even, -sin_TH, sin_TH)
    if not _has_kernel(x_BTNH, jnp.dtype(dtype)):
        x = x_BTNH.astype(jnp.float32)
        partner = jnp.where(even, jnp.roll(x, -1, axis=-1), jnp.roll(x, 1, axis=-1))
        return (x * cos_TH[:, None] + partner * sin_TH[:, None]).astype(dtype)
    return per_device.run_on_rows(functools.partial(_on_one_device, dtype=dtype), x_BTNH, cos_TH, sin_TH)


def _has_kernel(x_BTNH: jax.Array, dtype: Any) -> bool:
    length, size = x_BTNH.shape[1], x_BTNH.shape[3]
    width = per_device.heads(x_BTNH.shape[2]) * x_BTNH.shape[3]
    fits = width % LANES == 0 and size % 2 == 0 and length <= _LONGEST
    fits = fits and length * int(np.lcm(size, LANES)) <= _BLOCK
    known = {x_BTNH.dtype, dtype} <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}
    able = per_device.obstacle(x_BTNH, x_BTNH) is None and per_device.keeps_lengths()
    return able and fits and known


def _on_one_device(
    x_BTNH: jax.Array, cos_TH: jax.Array, sin_TH: jax.Array, *, dtype: Any, interpret: bool = False
) -> jax.Array:
    x_BTD = x_BTNH.reshape(*x_BTNH.shape[:2], -1)
    lanes = _block_lanes(x_BTD.shape[2], x_BTNH.shape[3])
    heads = lanes // x_BTNH.shape[3]
    cos_TL, sin_TL = jnp.tile(cos_TH, (1, heads)), jnp.tile(sin_TH, (1, heads))
    return _turn(jnp.dtype(dtype), interpret, x_BTD, cos_TL, sin_TL).reshape(x_BTNH.shape)


def _block_lanes(width: int, size: int) -> int:
    """Lanes of a grid step: whole heads on whole tiles, up to about _MOST_LANES."""
    least = int(np.lcm(size, LANES))
    return max((n for n in range(least, _MOST_LANES + 1, least) if width % n == 0), default=least)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _turn(dtype: Any, interpret: bool, x_BTD: jax.Array, cos_TL: jax.Array, sin_TL: jax.Array) -> jax.Array:
    (batch, length, width), lanes = x_BTD.shape, cos_TL.shape[1]
    block = pl.BlockSpec((1, length, lanes), lambda example, part: (example, 0, part))
    table = pl.BlockSpec((length, lanes), lambda example, part: (0, 0))
    moved = x_BTD.size * (x_BTD.dtype.itemsize + dtype.itemsize)
    return pl.pallas_call(
        _kernel,
        grid=(batch, width // lanes),
        in_specs=[block, table, table],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x_BTD.shape, dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=moved, transcendentals=0),
        metadata={"estimated_cycles": str(int(moved / _BYTES_PER_CYCLE))},
        name="rotary",
        interpret=interpret,
    )(x_BTD, cos_TL, sin_TL)


def _forward(dtype: Any, interpret: bool, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[Any, Any]:
    return _turn(dtype, interpret, x, cos, sin), (jnp.zeros((), x.dtype), cos, sin)


def _backward(dtype: Any, interpret: bool, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    example, cos, sin = kept
    return _turn(example.dtype, interpret, gradient, cos, -sin), None, None


_turn.defvjp(_forward, _backward)


def _kernel(x_ref: Any, cos_ref: Any, sin_ref: Any, out_ref: Any) -> None:
    x = x_ref[0].astype(jnp.float32)
    lanes = x.shape[1]
    even = lax.broadcasted_iota(jnp.int32, x.shape, 1) % 2 == 0
    partner = jnp.where(even, pltpu.roll(x, lanes - 1, 1), pltpu.roll(x, 1, 1))
    out_ref[0] = (x * cos_ref[...] + partner * sin_ref[...]).astype(out_ref.dtype)
