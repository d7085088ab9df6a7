"""Tables of weights: rows that map entries of a state dict to our parameters.

A row names the upstream entries that make one of our parameters, and the transform between them. `{i}` in a name is a
layer index: "in_blocks_{i}/attn/qkv/kernel" is one parameter for each layer, or layer i of the stacked parameter
"in_blocks/attn/qkv/kernel" if the backbone scans its layers. `state_dicts.py` reads and writes weights by a table.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from einops import rearrange

Arrays = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Transform:
    """`load` makes our array from the upstream arrays. Its inverse `save` gives one array for each upstream name."""

    load: Callable[..., np.ndarray]
    save: Callable[[np.ndarray], Arrays]


SAME = Transform(load=lambda w: w, save=lambda p: (p,))


def transpose() -> Transform:
    """torch Linear weight [out, in] <-> our kernel [in, out]."""
    return Transform(load=lambda w: w.T, save=lambda p: (p.T,))


def fused(parts: int, *, apart: bool = False) -> Transform:
    """One Linear weight [parts*out, in] (such as q, k, v) <-> our kernel [in, parts, out], `apart` [parts, in, out]."""
    ours = "n d e" if apart else "d n e"
    return Transform(
        load=lambda w: rearrange(w, f"(n e) d -> {ours}", n=parts),
        save=lambda p: (rearrange(p, f"{ours} -> (n e) d"),),
    )


def joined(parts: int, *, apart: bool = False) -> Transform:
    """Weights [out, in] of several Linears (q, k, v) <-> our kernel [in, parts, out], `apart` [parts, in, out]."""
    axis = 0 if apart else 1
    return Transform(
        load=lambda *w: np.stack([part.T for part in w], axis=axis),
        save=lambda p: tuple(p.take(i, axis).T for i in range(parts)),
    )


def split(parts: int) -> Transform:
    """A bias [parts*out] <-> ours [parts, out]."""
    return Transform(load=lambda b: b.reshape(parts, -1), save=lambda p: (p.reshape(-1),))


def stacked(parts: int) -> Transform:
    """Biases [out] of several layers (such as q, k, v) <-> ours [parts, out]."""
    return Transform(load=lambda *b: np.stack(b), save=lambda p: tuple(p[i] for i in range(parts)))


def patch_linear(patch: int) -> Transform:
    """Linear weight [out, C*p*p] on (C, p, p) patches <-> kernel [p*p*C, out] of a linear map on (p, p, C) patches."""
    return Transform(
        load=lambda w: rearrange(w, "e (c p q) -> (p q c) e", p=patch, q=patch),
        save=lambda p: (rearrange(p, "(p q c) e -> e (c p q)", p=patch, q=patch),),
    )


def conv() -> Transform:
    """torch convolution weight OIHW <-> our kernel HWIO."""
    return Transform(load=lambda w: w.transpose(2, 3, 1, 0), save=lambda p: (p.transpose(3, 2, 0, 1),))


def pointwise() -> Transform:
    """Weight [out, in, 1, 1] of a convolution <-> our kernel [in, out] of a linear map."""
    return Transform(load=lambda w: w[:, :, 0, 0].T, save=lambda p: (p.T[:, :, None, None],))


def patch_conv(patch: int) -> Transform:
    """Weight [out, C, p, p] of a stride-p convolution <-> kernel [p*p*C, out] of a linear map on (p, p, C) patches."""
    return Transform(
        load=lambda w: rearrange(w, "e c p q -> (p q c) e"),
        save=lambda p: (rearrange(p, "(p q c) e -> e c p q", p=patch, q=patch),),
    )


def leading_axis() -> Transform:
    """An upstream leading axis of one, [1, ...] <-> ours without it."""
    return Transform(load=lambda w: w[0] if w.shape[:1] == (1,) else w, save=lambda p: (p[None],))


def leading_axes(count: int) -> Transform:
    """`count` upstream leading axes of one, [1, 1, D] <-> ours [D]."""
    return Transform(
        load=lambda w: w.reshape(w.shape[count:]), save=lambda p: (p.reshape((1,) * count + p.shape),)
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """Upstream name or names <-> our parameter.

    Attributes:
      upstream: names in the state dict, in the order of the transform's arguments.
      ours: path of our parameter, parts joined by "/".
      transform: converts between the upstream arrays and ours.
      layers: the number of layers that `{i}` runs over; None for a row without `{i}`.
      free: axes of our array whose size comes from the state dict, such as the length of a position table.
    """

    upstream: str | tuple[str, ...]
    ours: str
    transform: Transform = SAME
    layers: int | None = None
    free: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The upstream names as a tuple."""
        return (self.upstream,) if isinstance(self.upstream, str) else self.upstream


def linear(
    upstream: str | tuple[str, ...],
    ours: str,
    layers: int | None = None,
    *,
    bias: bool | None = None,
    parts: int | None = None,
    apart: bool = False,
) -> list[Row]:
    """The rows of a torch Linear: `upstream`.weight and .bias <-> `ours`/kernel and /bias.

    Several names, or one Linear of several `parts`, make one kernel [in, parts, out] and one bias [parts, out]. If ours
    is a `Dense` with `apart`, the kernel is [parts, in, out]. `bias` says whether the Linear has one; by default only
    if `upstream` is a single name.
    """
    weights: str | tuple[str, ...]
    biases: str | tuple[str, ...]
    if isinstance(upstream, tuple):
        weights, biases = (tuple(f"{name}.{end}" for name in upstream) for end in ("weight", "bias"))
        transforms = joined(len(upstream), apart=apart), stacked(len(upstream))
    else:
        weights, biases = f"{upstream}.weight", f"{upstream}.bias"
        transforms = (transpose(), SAME) if parts is None else (fused(parts, apart=apart), split(parts))
    rows = [Row(weights, f"{ours}/kernel", transforms[0], layers)]
    has_bias = isinstance(upstream, str) if bias is None else bias
    return rows + ([Row(biases, f"{ours}/bias", transforms[1], layers)] if has_bias else [])


def query_key_value(
    q: str, k: str, v: str, ours: str, layers: int | None = None, *, grouped: bool = False
) -> list[Row]:
    """The rows of three Linears without bias <-> one kernel `ours`/qkv, or `ours`/q and /kv for grouped queries."""
    if grouped:
        return linear(q, f"{ours}/q", layers, bias=False) + linear((k, v), f"{ours}/kv", layers)
    return linear((q, k, v), f"{ours}/qkv", layers)


def norm(upstream: str, ours: str, layers: int | None = None, *, bias: bool = True) -> list[Row]:
    """The rows of a torch norm: `upstream`.weight and .bias <-> `ours`/scale and /bias."""
    rows = [Row(f"{upstream}.weight", f"{ours}/scale", layers=layers)]
    return rows + ([Row(f"{upstream}.bias", f"{ours}/bias", layers=layers)] if bias else [])


def convolution(upstream: str, ours: str) -> list[Row]:
    """The rows of a torch Conv2d."""
    return [Row(f"{upstream}.weight", f"{ours}/kernel", conv()), Row(f"{upstream}.bias", f"{ours}/bias")]


@dataclasses.dataclass(frozen=True)
class Copy:
    """An upstream entry that must equal another entry, and is written as its copy. `layers` as in a Row."""

    upstream: str
    of: str
    layers: int | None = None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(name of the copy, name of the original) for every layer."""
        if self.layers is None:
            return [(self.upstream, self.of)]
        return [
            (self.upstream.replace("{i}", str(i)), self.of.replace("{i}", str(i))) for i in range(self.layers)
        ]


@dataclasses.dataclass(frozen=True)
class Unread:
    """An upstream entry that nothing reads after training. It may be missing, and it is dropped.

    None in its shape stands for any size.
    """

    upstream: str
    shape: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Slices:
    """An upstream entry that is read in parts along an axis, each under a name of its own, which rows name.

    Attributes:
      upstream: the whole entry.
      axis: that it is cut along.
      parts: (name, size along the axis) of each part, in order.
    """

    upstream: str
    axis: int
    parts: tuple[tuple[str, int], ...]


Table = Sequence[Row | Copy | Unread | Slices]
