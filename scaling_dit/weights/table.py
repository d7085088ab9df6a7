"""A small engine that maps parameters to and from state dicts by a table of names.

A row says which upstream entries make one of our parameters and how. `{i}` in its names stands for a layer index: our
"in_blocks_{i}/attn/qkv/kernel" means one parameter per layer, or layer i of the stacked parameter
"in_blocks/attn/qkv/kernel" where the backbone scans its layers. Only numpy runs here; arrays stay on the host.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange
from flax import traverse_util

from scaling_dit.errors import UserError

Arrays = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Transform:
    """`load` makes our array of the upstream arrays; `save` is its inverse and gives as many as the row has names."""

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


def patch_conv(patch: int) -> Transform:
    """Weight [out, C, p, p] of a stride-p convolution <-> kernel [p*p*C, out] of a linear map on (p, p, C) patches."""
    return Transform(
        load=lambda w: rearrange(w, "e c p q -> (p q c) e"),
        save=lambda p: (rearrange(p, "(p q c) e -> e c p q", p=patch, q=patch),),
    )


def leading_axis() -> Transform:
    """An upstream leading axis of one, [1, ...] <-> ours without it."""
    return Transform(load=lambda w: w[0] if w.shape[:1] == (1,) else w, save=lambda p: (p[None],))


@dataclasses.dataclass(frozen=True)
class Row:
    """Upstream name or names <-> our parameter.

    Attributes:
      upstream: names in the state dict, in the order the transform takes them.
      ours: path of our parameter, parts joined by "/".
      layers: how many layers `{i}` runs over; None for a row without it.
      free: axes of our array whose size is taken from the state dict, such as the length of a table of positions.
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

    Several names, or one Linear of several `parts`, make one kernel [in, parts, out], [parts, in, out] where ours is a
    `Dense` with `apart`, and one bias [parts, out]. `bias`: whether there is one; None: where `upstream` is one name.
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


def norm(upstream: str, ours: str, layers: int | None = None, *, bias: bool = True) -> list[Row]:
    """The rows of a torch norm: `upstream`.weight and .bias <-> `ours`/scale and /bias."""
    rows = [Row(f"{upstream}.weight", f"{ours}/scale", layers=layers)]
    return rows + ([Row(f"{upstream}.bias", f"{ours}/bias", layers=layers)] if bias else [])


@dataclasses.dataclass(frozen=True)
class Copy:
    """An upstream entry that must equal another one; written again when saving. `layers` as in a Row."""

    upstream: str
    of: str
    layers: int | None = None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(the copy's name, the original's) for every layer."""
        if self.layers is None:
            return [(self.upstream, self.of)]
        return [
            (self.upstream.replace("{i}", str(i)), self.of.replace("{i}", str(i))) for i in range(self.layers)
        ]


@dataclasses.dataclass(frozen=True)
class Unread:
    """An upstream entry that its code declares and never reads: may be missing, is dropped."""

    upstream: str
    shape: tuple[int, ...]


Table = Sequence[Row | Copy | Unread]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row for one layer: `layer` is its index in a stacked parameter, None where the parameter is its own."""

    names: tuple[str, ...]
    path: str
    layer: int | None
    row: Row


def expand(rows: Table, paths: Iterable[str]) -> list[Entry]:
    """One entry per Row and layer; a row's parameter is stacked where `paths`, our parameters, hold it so."""
    known = set(paths)
    entries = []
    for row in rows:
        if not isinstance(row, Row):
            continue
        if row.layers is None:
            entries.append(Entry(row.names, row.ours, None, row))
            continue
        stacked = row.ours.replace("_{i}", "")
        for i in range(row.layers):
            names = tuple(name.replace("{i}", str(i)) for name in row.names)
            one = Entry(names, row.ours.replace("{i}", str(i)), None, row)
            entries.append(Entry(names, stacked, i, row) if stacked in known else one)
    return entries


def load(
    rows: Table, abstract: Mapping[str, Any], state_dict: Mapping[str, Any], what: str
) -> dict[str, Any]:
    """A state dict as our tree of parameters, numpy arrays of the dtypes of `abstract`.

    Args:
      rows: the table; it must name every parameter of `abstract`.
      abstract: our tree of parameters as shapes and dtypes.
      state_dict: upstream name -> array; float arrays of any width, torch's tensors and parameters too.
      what: names the backbone in an error.

    Raises:
      UserError: an entry that is no array of numbers; unknown, missing or misshapen entries, and those of no floating
        type, all in one message.
    """
    expected = traverse_util.flatten_dict(abstract, sep="/")
    entries = expand(rows, expected)
    copies = dict(pair for row in rows if isinstance(row, Copy) for pair in row.pairs)
    unread = {row.upstream: row.shape for row in rows if isinstance(row, Unread)}
    known = {name for entry in entries for name in entry.names} | set(copies)
    problems = _compare_names(known, set(state_dict) - set(unread))
    problems += _compare_rest(copies, unread, state_dict)
    flat: dict[str, np.ndarray] = {}
    for entry in entries:
        if not all(name in state_dict for name in entry.names):
            continue
        # Each entry is read here and let go: a lazy state dict is never whole in memory.
        arrays = [_on_host(name, state_dict[name]) for name in entry.names]
        target = expected[entry.path]
        shape = target.shape if entry.layer is None else target.shape[1:]
        empty = np.broadcast_to(np.zeros((), target.dtype), shape)
        wanted = [part.shape for part in entry.row.transform.save(empty)]
        misfits = _compare_types(entry.names, arrays) + _compare_shapes(entry, arrays, wanted)
        problems += misfits
        if misfits:
            continue
        loaded = entry.row.transform.load(*arrays)
        if entry.layer is None:
            flat[entry.path] = loaded.astype(target.dtype)
        else:
            if entry.path not in flat:
                flat[entry.path] = np.empty((target.shape[0], *loaded.shape), target.dtype)
            flat[entry.path][entry.layer] = loaded
    if problems:
        raise UserError(f"the state dict does not fit {what}: " + "; ".join(problems))
    return traverse_util.unflatten_dict(flat, sep="/")


@dataclasses.dataclass(frozen=True)
class Renamed(Mapping[str, Any]):
    """Some entries of a mapping under other names; nothing is read before it is asked for."""

    entries: Mapping[str, Any]
    names: Mapping[str, str]  # new name -> that in `entries`

    def __getitem__(self, name: str) -> Any:
        return self.entries[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def save(
    rows: Table, abstract: Mapping[str, Any], params: Mapping[str, Any], what: str
) -> dict[str, np.ndarray]:
    """Our tree of parameters as a state dict of upstream names, contiguous numpy arrays.

    Raises:
      UserError: unknown, missing or misshapen parameters, all of them in one message.
    """
    expected = traverse_util.flatten_dict(abstract, sep="/")
    flat = traverse_util.flatten_dict(params, sep="/")
    problems = _compare_names(set(expected), set(flat))
    free = {entry.path: entry.row.free for entry in expand(rows, expected)}
    for path in sorted(set(expected) & set(flat)):
        found, wanted = np.shape(flat[path]), expected[path].shape
        if _fixed(found, free[path]) != _fixed(wanted, free[path]):
            problems.append(f"{path} is {found}, it must be {wanted}")
    if problems:
        raise UserError(f"the parameters do not fit {what}: " + "; ".join(problems))
    host = {path: np.asarray(value) for path, value in flat.items()}  # each stacked array is fetched once
    state_dict: dict[str, np.ndarray] = {}
    for entry in expand(rows, expected):
        array = host[entry.path] if entry.layer is None else host[entry.path][entry.layer]
        parts = entry.row.transform.save(array)
        state_dict |= {
            name: np.ascontiguousarray(part) for name, part in zip(entry.names, parts, strict=True)
        }
    for row in rows:
        if isinstance(row, Copy):
            state_dict |= {name: state_dict[original].copy() for name, original in row.pairs}
    return state_dict


def _on_host(name: str, value: Any) -> np.ndarray:
    """An entry as a numpy array; torch's tensors are known by `detach`, so that torch need not be there."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if value.is_floating_point():
            value = value.float()  # numpy has no bfloat16 of torch's
        value = value.numpy()
    array = np.asarray(value)
    if array.dtype == object or array.dtype.kind in "SUM":
        raise UserError(
            f"the entry {name} of the state dict is a {type(value).__name__}, not an array of numbers"
        )
    return array


def _compare_names(wanted: set[str], found: set[str]) -> list[str]:
    lists = (("missing", wanted - found), ("unknown", found - wanted))
    return [f"{label}: {', '.join(sorted(names))}" for label, names in lists if names]


def _compare_rest(
    copies: Mapping[str, str], unread: Mapping[str, tuple[int, ...]], state_dict: Mapping[str, Any]
) -> list[str]:
    """Problems of the entries that make no parameter of ours: shapes of unread ones, copies that differ."""
    problems, differ = [], []
    for name, shape in unread.items():
        found = np.shape(_on_host(name, state_dict[name])) if name in state_dict else shape
        if found != shape:
            problems.append(f"{name} is {found}, it must be {shape}")
    for name, original in copies.items():
        if name in state_dict and original in state_dict:
            copy = _on_host(name, state_dict[name])
            problems += _compare_types((name,), [copy])
            if not np.array_equal(copy, _on_host(original, state_dict[original])):
                differ.append(f"{name} differs from {original}")
    if differ:
        problems.append(f"one parameter here, so they must be equal: {', '.join(differ)}")
    return problems


def _compare_types(names: Sequence[str], arrays: Arrays) -> list[str]:
    """Quantised weights need their scales, which nothing here applies."""
    return [
        f"{name} is {array.dtype}, it must be floating"
        for name, array in zip(names, arrays, strict=True)
        if array.dtype.kind in "biuc"
    ]


def _compare_shapes(entry: Entry, arrays: Arrays, wanted: Sequence[tuple[int, ...]]) -> list[str]:
    """Problems of the upstream arrays of one entry; a free axis of ours is compared after the transform."""
    if entry.row.free:
        loaded = entry.row.transform.load(*arrays)
        target = entry.row.transform.load(*[np.broadcast_to(np.float32(0), shape) for shape in wanted])
        if _fixed(loaded.shape, entry.row.free) == _fixed(target.shape, entry.row.free):
            return []
    return [
        f"{name} is {array.shape}, it must be {shape}" + (" but for its length" if entry.row.free else "")
        for name, array, shape in zip(entry.names, arrays, wanted, strict=True)
        if array.shape != shape
    ]


def _fixed(shape: tuple[int, ...], free: tuple[int, ...]) -> tuple[int | None, ...]:
    return tuple(None if axis in free else size for axis, size in enumerate(shape))


def convolution(upstream: str, ours: str) -> list[Row]:
    """The rows of a torch Conv2d."""
    return [Row(f"{upstream}.weight", f"{ours}/kernel", conv()), Row(f"{upstream}.bias", f"{ours}/bias")]


# Weight [out, in, 1, 1] of a convolution <-> our kernel [in, out] of a linear map.
POINTWISE = Transform(load=lambda w: w[:, :, 0, 0].T, save=lambda p: (p.T[:, :, None, None],))
