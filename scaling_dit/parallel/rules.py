"""Which mesh axis each logical axis goes to, and the shardings that follow for parameters, state and batch.

Backbones name logical axes only. This table is the one place that turns names into a layout:

| logical axis | mesh axis | why |
|---|---|---|
| batch | data, fsdp | each device works on its own images; fsdp devices share parameters, not images |
| length | context | tokens of backbones with SPLITS_TOKENS; for others `make_mesh` makes `context` a part of data |
| act_heads, act_mlp | tensor | follow the parameters that make them, so that no gather is needed in between |
| act_embed | - | every block reads the whole width of a token |
| embed | fsdp | the width is in nearly every large parameter, so sharding it shards nearly all memory |
| text | fsdp | the same for the text side; second to embed, for projections have both |
| heads, mlp, vocab | tensor | columns of one matrix and rows of the next: one reduction for each block |
| layers | - | scanned over: a split here would move whole layers between devices |
| norm | - | vectors of a few kB: gathering costs more latency than their memory is worth |
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scaling_dit import trees
from scaling_dit.errors import UserError

BATCH_AXES = ("data", "fsdp")

# In order of precedence: each mesh axis is given to the first rule that can use it.
_RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", BATCH_AXES),
    ("length", "context"),
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("act_embed", None),
    ("embed", "fsdp"),
    ("text", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
    ("norm", None),
)


def logical_rules() -> tuple[tuple[str, str | tuple[str, ...] | None], ...]:
    """The table above as flax's (logical axis, mesh axis) pairs, in order of precedence."""
    return _RULES


_ROWS = ("heads", "mlp", "text")  # axes of rows that fsdp splits rather than the last one


@contextlib.contextmanager
def activate(mesh: Mesh) -> Iterator[None]:
    """Enter the mesh and the logical rules together; trace or call jitted functions inside.

    Both are needed: without the mesh, or with the deprecated `with mesh:`, flax drops every logical constraint
    without a word. Parameters are initialised outside, by `jax.jit(init, out_shardings=...)`: inside, flax
    constrains each new parameter by name alone and fails where an axis does not divide.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules()):
        yield


def param_shardings(mesh: Mesh, abstract_variables: Any) -> Any:
    """Shardings of parameters, from their logical axis names.

    An axis is split only where its size divides. A parameter that no name places (a module of a user's own, or
    a width that does not divide) is split over fsdp by its largest axis that divides, so that memory falls with
    the number of devices for any backbone.

    Args:
      mesh: a mesh of `make_mesh`.
      abstract_variables: arrays or shapes, boxed by `nn.with_logical_partitioning` or bare.

    Returns:
      The unboxed tree with a NamedSharding at each leaf.
    """

    def shard(leaf: Any) -> NamedSharding:
        if not trees.is_box(leaf):
            return NamedSharding(mesh, _largest_axis(mesh, np.shape(leaf)))
        return NamedSharding(mesh, _spec(mesh, tuple(leaf.names), np.shape(leaf.value)))

    return jax.tree.map(shard, abstract_variables, is_leaf=trees.is_box)


@dataclasses.dataclass(frozen=True)
class Replicated:
    """How many bytes of parameters every device holds whole, because no axis of them divides or is named."""

    total: int  # bytes of all parameters
    whole: int  # bytes of those that are whole on every device
    largest: tuple[tuple[str, int], ...]  # path and bytes of the largest of these, largest first

    def __str__(self) -> str:
        share = f"{self.whole / max(self.total, 1):.2%} of {self.total:,} bytes of parameters are whole on every device"
        return share + "".join(f", {path} {size:,}" for path, size in self.largest)


def replicated(mesh: Mesh, abstract_variables: Any, most: int = 3) -> Replicated:
    """What `param_shardings` leaves whole on every device, with its `most` largest parameters.

    Args:
      mesh: a mesh of `make_mesh`, or a `jax.sharding.AbstractMesh` with its axes.
      abstract_variables: as `param_shardings` takes them.
    """
    placed = trees.by_path(param_shardings(mesh, abstract_variables))
    sizes = {
        path: math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        for path, leaf in trees.by_path(trees.unbox(abstract_variables)).items()
    }
    whole = sorted(
        (path for path in sizes if placed[path].is_fully_replicated), key=lambda path: -sizes[path]
    )
    return Replicated(
        total=sum(sizes.values()),
        whole=sum(sizes[path] for path in whole),
        largest=tuple(("/".join(path), sizes[path]) for path in whole[:most]),
    )


def _spec(mesh: Mesh, names: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """The partition of one named parameter; each mesh axis is used at most once.

    Where the rows of a matrix can take fsdp it does not split its last axis: on TPUs that lies along the lanes, and XLA
    sums a gradient that is to be cut there whole, with twice the bytes sent. Not so for a table of words, whose rows
    are looked up: split by these, every device would look up the ids of the whole batch.
    """
    parts: list[str | None] = [None] * len(shape)
    known = {name for name, _ in _RULES}
    wants_fsdp = any(name is not None and name not in known for name in names)
    for rule, axis in _RULES:
        if rule not in names or not isinstance(axis, str):
            continue
        wants_fsdp |= axis == "fsdp"
        for i, (name, size) in enumerate(zip(names, shape, strict=True)):
            if name == rule and axis not in parts and _splits(mesh, axis, size):
                parts[i] = axis
    if wants_fsdp and "fsdp" not in parts:
        fixed = [name == "layers" or part is not None for name, part in zip(names, parts, strict=True)]
        fallback = _largest_axis(mesh, shape, fixed)
        parts = [new if new is not None else old for new, old in zip(fallback, parts, strict=True)]
    if parts[-1:] == ["fsdp"]:
        for i, (name, size) in enumerate(zip(names, shape, strict=True)):
            if name in _ROWS and parts[i] is None and _splits(mesh, "fsdp", size):
                parts[i], parts[-1] = "fsdp", None
                break
    return PartitionSpec(*parts)


def _splits(mesh: Mesh, axis: str, size: int) -> bool:
    """Whether an array axis divides over a mesh axis that has more than one device."""
    return mesh.shape[axis] > 1 and size > 0 and size % mesh.shape[axis] == 0


def _largest_axis(mesh: Mesh, shape: Sequence[int], fixed: Sequence[bool] | None = None) -> PartitionSpec:
    """Fsdp on the largest axis that divides and is not fixed; nothing where there is none."""
    fixed = fixed or [False] * len(shape)
    usable = [i for i, size in enumerate(shape) if _splits(mesh, "fsdp", size) and not fixed[i]]
    best = max(usable, key=lambda i: shape[i], default=None)
    return PartitionSpec(*("fsdp" if i == best else None for i in range(len(shape))))


def state_shardings(mesh: Mesh, abstract_state: Any, params_shardings: Any) -> Any:
    """Shardings of a whole training state: moments and EMAs lie where their parameter lies.

    A leaf belongs to the parameter whose path is the longest suffix of the leaf's own path, if the shapes are
    equal too (factored moments are not); everything else, such as step counters, is replicated.

    Args:
      mesh: a mesh of `make_mesh`.
      abstract_state: state of arrays or shapes whose field or key `params` holds the parameters.
      params_shardings: what `param_shardings` gave for those parameters.
    """
    shapes = {path: np.shape(leaf) for path, leaf in trees.by_path(abstract_state).items()}
    by_path = trees.by_path(params_shardings)

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = trees.names(path)
        for start in range(len(names)):
            owner = names[start:]
            if owner in by_path and shapes.get(("params", *owner)) == np.shape(leaf):
                return by_path[owner]
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every batch array: the leading axis over data and fsdp, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def round_batch(mesh: Mesh, batch: int) -> int:
    """The least number of rows, at least `batch`, that splits evenly over the mesh."""
    parts = _batch_parts(mesh)
    return -(-batch // parts) * parts


def _batch_parts(mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _check_batch(mesh: Mesh, batch: int) -> None:
    parts = _batch_parts(mesh)
    if batch < 1 or batch % parts:
        raise UserError(
            f"batch {batch} cannot be split over data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} = {parts}"
            f" parts; nearest that can: {max(parts, round(batch / parts) * parts)}"
        )


def local_positions(mesh: Mesh, batch: int) -> np.ndarray:
    """The positions of the global batch that this process's devices hold, int64, sorted, each once.

    Devices that differ only in context or tensor hold the same positions. A loader that reads exactly these
    gives every layout of processes the same global batch.

    Raises:
      UserError: if the batch does not divide over data x fsdp.
    """
    _check_batch(mesh, batch)
    held = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    # An index is None only for a device that holds nothing, which a NamedSharding never has.
    return np.unique(np.concatenate([np.arange(*index[0].indices(batch)) for index in held if index]))


def to_global(host_batch: Mapping[str, Any], mesh: Mesh, batch: int) -> dict[str, Any]:
    """Global arrays [batch, ...] from the rows of this process; nothing is gathered on any host.

    Args:
      host_batch: tree of numpy arrays [len(local_positions(mesh, batch)), ...], rows in that order.
      mesh: a mesh of `make_mesh`.
      batch: number of rows over all processes.

    Raises:
      UserError: if the batch does not divide over data x fsdp.
    """
    _check_batch(mesh, batch)
    sharding = batch_sharding(mesh)

    def place(rows: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, rows, (batch, *rows.shape[1:]))

    return jax.tree.map(place, dict(host_batch))


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Shapes and dtypes of `abstract` with the places of `shardings`: what a checkpoint is restored into."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
