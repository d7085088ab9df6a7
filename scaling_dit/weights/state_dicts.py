"""State dicts of other code to our parameters and back, by a table of names (`table.py`).

Only numpy runs here; arrays stay on the host.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from scaling_dit.errors import UserError
from scaling_dit.weights import inert
from scaling_dit.weights.table import Arrays, Copy, Row, Slices, Table, Unread


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row for one layer. `layer` is the index in a stacked parameter, or None for a parameter that is not stacked."""

    names: tuple[str, ...]
    path: str
    layer: int | None
    row: Row


def expand(rows: Table, paths: Iterable[str]) -> list[Entry]:
    """One entry for each Row and layer. A parameter is stacked if `paths`, our parameters, hold its stacked path."""
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


def check(rows: Any, abstract: Mapping[str, Any], where: str) -> None:
    """Makes sure that a table has one row for each parameter of `abstract`, and none for any other.

    Args:
      rows: what a backbone's function gave.
      abstract: our tree of parameters as shapes and dtypes.
      where: names the table in errors.

    Raises:
      UserError: no list of rows; parameters without a row, unknown ones, or ones with several, all in one message.
    """
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise UserError(f"{where} must be a list of Row, Copy and Unread, it is a {type(rows).__name__}")
    for number, row in enumerate(rows):
        if not isinstance(row, Row | Copy | Unread | Slices):
            raise UserError(
                f"{where} must be a list of Row, Copy and Unread, but item {number} is a {type(row).__name__}"
            )
    expected = traverse_util.flatten_dict(abstract, sep="/")
    entries = expand(rows, expected)
    problems = _compare_names(
        set(expected), {entry.path for entry in entries}, ("without a row", "no parameter")
    )
    found = Counter((entry.path, entry.layer) for entry in entries)
    several = sorted(path for (path, _), count in found.items() if count > 1)
    problems += [f"in several rows: {', '.join(several)}"] if several else []
    names = Counter(name for entry in entries for name in entry.names)
    read_twice = sorted(name for name, count in names.items() if count > 1)
    problems += [f"read by several rows: {', '.join(read_twice)}"] if read_twice else []
    for path, leaf in expected.items():
        layers = {entry.layer for entry in entries if entry.path == path} - {None}
        if layers and layers != set(range(leaf.shape[0])):
            problems.append(f"{path} has {leaf.shape[0]} layers, its row has {len(layers)}")
    if problems:
        raise UserError(f"{where} does not fit its parameters: " + "; ".join(problems))


def load(
    rows: Table,
    abstract: Mapping[str, Any],
    state_dict: Mapping[str, Any],
    what: str,
    *,
    check_inverse: bool = False,
    training_only: Sequence[str] = (),
) -> dict[str, Any]:
    """A state dict as our tree of parameters: numpy arrays with the dtypes of `abstract`.

    Args:
      rows: the table; it must name every parameter of `abstract`.
      abstract: our tree of parameters as shapes and dtypes.
      state_dict: upstream name -> array; float arrays of any width, torch's tensors and parameters too.
      what: names the backbone in an error.
      check_inverse: also make sure that saving gives back what was loaded.
      training_only: prefixes of entries that only training used, see `inert.py`.

    Raises:
      UserError: a transform that does not fit its parameter or is no inverse; an entry that is no array of numbers;
        unknown, missing or misshapen entries, and those of no floating type, all in one message.
    """
    expected = traverse_util.flatten_dict(abstract, sep="/")
    state_dict = _cut(rows, state_dict, what)
    entries = expand(rows, expected)
    copies = dict(pair for row in rows if isinstance(row, Copy) for pair in row.pairs)
    unread = {row.upstream: row.shape for row in rows if isinstance(row, Unread)}
    known = {name for entry in entries for name in entry.names} | set(copies)
    ignored = inert.inert(set(state_dict) - known - set(unread), training_only)
    problems = _compare_names(known, set(state_dict) - set(unread) - set(ignored))
    problems += _compare_rest(copies, unread, state_dict)
    flat: dict[str, np.ndarray] = {}
    for entry in entries:
        if not all(name in state_dict for name in entry.names):
            continue
        # Each entry is read here and released, so a lazy state dict is never completely in memory.
        arrays = [_on_host(name, state_dict[name]) for name in entry.names]
        target = expected[entry.path]
        shape = target.shape if entry.layer is None else target.shape[1:]
        empty = np.broadcast_to(np.zeros((), target.dtype), shape)
        wanted = [part.shape for part in _saved(entry, empty)]
        misfits = _compare_types(entry.names, arrays) + _compare_shapes(entry, arrays, wanted)
        problems += misfits
        if misfits:
            continue
        loaded = _loaded(entry, arrays)
        if _fixed(loaded.shape, entry.row.free) != _fixed(shape, entry.row.free):
            raise UserError(
                f"the row of {entry.path} makes {loaded.shape} of {entry.names}, it must make {shape}"
            )
        if check_inverse and not entry.row.free and not _same(arrays, _saved(entry, loaded)):
            raise UserError(
                f"the row of {entry.path} is wrong: its save does not give back what its load read"
            )
        if entry.layer is None:
            flat[entry.path] = loaded.astype(target.dtype)
        else:
            if entry.path not in flat:
                flat[entry.path] = np.empty((target.shape[0], *loaded.shape), target.dtype)
            flat[entry.path][entry.layer] = loaded
    if problems:
        raise UserError(f"the state dict does not fit {what}: " + "; ".join(problems))
    ignored += sorted(set(unread) & set(state_dict))
    if ignored:
        inert.report(tuple(ignored), what)
    return traverse_util.unflatten_dict(flat, sep="/")


@dataclasses.dataclass(frozen=True)
class Renamed(Mapping[str, Any]):
    """Some entries of a mapping under new names, read only at access."""

    entries: Mapping[str, Any]
    # New name -> name in `entries`.
    names: Mapping[str, str]

    def __getitem__(self, name: str) -> Any:
        return self.entries[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def save(
    rows: Table, abstract: Mapping[str, Any], params: Mapping[str, Any], what: str
) -> dict[str, np.ndarray]:
    """Our tree of parameters as a state dict: contiguous numpy arrays by upstream name.

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
    # Fetch each stacked array once.
    host = {path: np.asarray(value) for path, value in flat.items()}
    state_dict: dict[str, np.ndarray] = {}
    for entry in expand(rows, expected):
        array = host[entry.path] if entry.layer is None else host[entry.path][entry.layer]
        parts = _saved(entry, array)
        state_dict |= {
            name: np.ascontiguousarray(part) for name, part in zip(entry.names, parts, strict=True)
        }
    for row in rows:
        if isinstance(row, Copy):
            state_dict |= {name: state_dict[original].copy() for name, original in row.pairs}
        elif isinstance(row, Slices):
            parts = [state_dict.pop(name) for name, _ in row.parts]
            state_dict[row.upstream] = np.concatenate(parts, axis=row.axis)
    return state_dict


def _cut(rows: Table, state_dict: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """The state dict with the parts of each entry of a `Slices` in its place."""
    found = state_dict
    for row in rows:
        if not isinstance(row, Slices) or row.upstream not in state_dict:
            continue
        whole = _on_host(row.upstream, state_dict[row.upstream])
        ends = np.cumsum([size for _, size in row.parts])
        if whole.ndim <= row.axis or whole.shape[row.axis] != ends[-1]:
            sizes = " + ".join(f"{size} ({name})" for name, size in row.parts)
            raise UserError(
                f"the state dict does not fit {what}: {row.upstream} is {whole.shape}, axis {row.axis} must be "
                f"{ends[-1]} = {sizes}"
            )
        parts = np.split(whole, ends[:-1], axis=row.axis)
        names = [name for name, _ in row.parts]
        kept = {name: name for name in found if name != row.upstream}
        found = _Joined(Renamed(found, kept), dict(zip(names, parts, strict=True)))
    return found


@dataclasses.dataclass(frozen=True)
class _Joined(Mapping[str, Any]):
    """Two mappings as one; the first is read only at access."""

    entries: Mapping[str, Any]
    more: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.more[name] if name in self.more else self.entries[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.entries
        yield from self.more

    def __len__(self) -> int:
        return len(self.entries) + len(self.more)


def _on_host(name: str, value: Any) -> np.ndarray:
    """An entry as a numpy array. Recognises torch tensors by `detach`, so torch need not be installed."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if value.is_floating_point():
            # numpy cannot hold torch's bfloat16.
            value = value.float()
        value = value.numpy()
    array = np.asarray(value)
    if array.dtype == object or array.dtype.kind in "SUM":
        raise UserError(
            f"the entry {name} of the state dict is a {type(value).__name__}, not an array of numbers"
        )
    return array


def _saved(entry: Entry, array: np.ndarray) -> Arrays:
    """The upstream arrays of one entry.

    Raises:
      UserError: the row's transform fails on this array, or gives another number of arrays than the row has names.
    """
    try:
        parts = tuple(entry.row.transform.save(array))
    except Exception as error:
        # numpy, einops or a user's own code may raise any error.
        raise UserError(_failed(entry, "save", array.shape, error)) from error
    if len(parts) != len(entry.names):
        raise UserError(
            f"the row of {entry.path} has {len(entry.names)} upstream names, its transform saves {len(parts)} arrays"
        )
    return parts


def _loaded(entry: Entry, arrays: Arrays) -> np.ndarray:
    """Our array of one entry; raises UserError where the row's transform fails."""
    try:
        return np.asarray(entry.row.transform.load(*arrays))
    except Exception as error:
        # numpy, einops or a user's own code may raise any error.
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise UserError(_failed(entry, "load", shapes, error)) from error


def _failed(entry: Entry, what: str, shapes: Any, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [""])[0]
    return f"the row of {entry.path} cannot {what} {shapes}: {type(error).__name__}: {reason}"


def _same(arrays: Arrays, others: Arrays) -> bool:
    pairs = zip(arrays, others, strict=True)
    return all(
        one.shape == other.shape and np.array_equal(one, other, equal_nan=True) for one, other in pairs
    )


def _compare_names(
    wanted: set[str], found: set[str], labels: tuple[str, str] = ("missing", "unknown")
) -> list[str]:
    lists = zip(labels, (wanted - found, found - wanted), strict=True)
    return [f"{label}: {', '.join(sorted(names))}" for label, names in lists if names]


def _compare_rest(
    copies: Mapping[str, str], unread: Mapping[str, tuple[int | None, ...]], state_dict: Mapping[str, Any]
) -> list[str]:
    """Problems of entries that make no parameter of ours: wrong shapes of unread ones, copies that differ."""
    problems, differ = [], []
    for name, shape in unread.items():
        if name not in state_dict:
            continue
        found = np.shape(_on_host(name, state_dict[name]))
        sizes = len(found) == len(shape) and all(
            right in (None, size) for size, right in zip(found, shape, strict=True)
        )
        if not sizes:
            right = str(shape).replace("None", "any")
            problems.append(f"{name} is {found}, it must be {right}")
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
    """Problems of arrays that are not floating: quantised weights need scales, which nothing here applies."""
    return [
        f"{name} is {array.dtype}, it must be floating"
        for name, array in zip(names, arrays, strict=True)
        if array.dtype.kind in "biuc"
    ]


def _compare_shapes(entry: Entry, arrays: Arrays, wanted: Sequence[tuple[int, ...]]) -> list[str]:
    """Problems of the shapes of one entry's upstream arrays. Free axes are compared after the transform."""
    if entry.row.free:
        loaded = _loaded(entry, arrays)
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
