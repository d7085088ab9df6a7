"""Maps logical axes to mesh axes, and derives the shardings of parameters, training state and batch.

Backbones name logical axes only. This table is the one place that maps the names to a layout:

| logical axis | mesh axis | why |
|---|---|---|
| batch | data, fsdp | each device works on its own images; fsdp devices share parameters, not images |
| length | context | tokens of backbones with SPLITS_TOKENS; for others `make_mesh` makes `context` a part of data |
| act_heads, act_mlp | tensor | follow the parameters that make them, so that no gather is needed in between |
| act_embed | - | every block reads the whole width of a token |
| embed | fsdp | nearly every large parameter has the width, so sharding it shards nearly all memory |
| text | fsdp | the width of the text side; after embed, because projections have both |
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
    """The table above as flax's pairs of logical axis and mesh axis, in order of precedence."""
    return _RULES


# Row axes that fsdp splits in preference to the last axis of a matrix.
_ROWS = ("heads", "mlp", "text")


@contextlib.contextmanager
def activate(mesh: Mesh) -> Iterator[None]:
    """Activates the mesh and the logical rules together. Trace and call jitted functions inside this context.

    Both are needed: without the mesh, or with the deprecated `with mesh:`, flax silently drops every logical
    constraint. Initialise parameters outside, by `jax.jit(init, out_shardings=...)`: inside, flax constrains each new
    parameter by name alone and fails where an axis does not divide.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules()):
        yield


def param_shardings(mesh: Mesh, abstract_variables: Any) -> Any:
    """Shardings of parameters, from their logical axis names.

    An axis is split only where its size divides. If the names give a parameter no split (in a user's own module, or
    for a width that does not divide), fsdp splits its largest axis that divides. So memory falls with the number of
    devices for any backbone.

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
    """How many bytes of parameters every device holds whole, because none of their axes is named or divides.

    Attributes:
      total: bytes of all parameters.
      whole: bytes of the parameters that are whole on every device.
      largest: path and bytes of the largest whole parameters, largest first.
    """

    total: int
    whole: int
    largest: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        share = f"{self.whole / max(self.total, 1):.2%} of {self.total:,} bytes of parameters are whole on every device"
        return share + "".join(f", {path} {size:,}" for path, size in self.largest)


def replicated(mesh: Mesh, abstract_variables: Any, most: int = 3) -> Replicated:
    """The parameters that `param_shardings` leaves whole on every device; names the `most` largest.

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
    """The partition of one named parameter. Each mesh axis is used at most once.

    If fsdp can split the rows of a matrix, it does not split the last axis. On TPUs the last axis lies along the lanes;
    XLA would sum the whole gradient before cutting it there, and send twice the bytes. Word tables are an exception:
    with their rows split, every device would look up the ids of the whole batch.
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
    """A partition with fsdp on the largest axis that divides and is not fixed; an empty one if there is none."""
    fixed = fixed or [False] * len(shape)
    usable = [i for i, size in enumerate(shape) if _splits(mesh, "fsdp", size) and not fixed[i]]
    best = max(usable, key=lambda i: shape[i], default=None)
    return PartitionSpec(*("fsdp" if i == best else None for i in range(len(shape))))


def state_shardings(mesh: Mesh, abstract_state: Any, params_shardings: Any) -> Any:
    """Shardings of a whole training state: moments and EMAs are sharded like their parameter.

    A leaf belongs to the parameter whose path is the longest suffix of the leaf's own path, if the shapes are equal as
    well (factored moments have other shapes). All other leaves, such as step counters, are replicated.

    Args:
      mesh: a mesh of `make_mesh`.
      abstract_state: state of arrays or shapes whose field or key `params` holds the parameters.
      params_shardings: the result of `param_shardings` for these parameters.
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
    """The sharding of every batch array: the leading axis over data and fsdp, the other axes whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def whole(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


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
    """The positions of the global batch that this process's devices hold: int64, sorted, each once.

    Devices that differ only in context or tensor hold the same positions. If each loader reads exactly its positions,
    every layout of processes gets the same global batch.

    Raises:
      UserError: the batch does not divide over data x fsdp.
    """
    _check_batch(mesh, batch)
    held = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    # An index is None only for a device that holds nothing, which a NamedSharding never has.
    return np.unique(np.concatenate([np.arange(*index[0].indices(batch)) for index in held if index]))


def to_global(host_batch: Mapping[str, Any], mesh: Mesh, batch: int) -> dict[str, Any]:
    """Global arrays [batch, ...] from the rows of each process. No host gathers the rows of others.

    Args:
      host_batch: tree of numpy arrays [len(local_positions(mesh, batch)), ...], rows in that order.
      mesh: a mesh of `make_mesh`.
      batch: number of rows over all processes.

    Raises:
      UserError: the batch does not divide over data x fsdp.
    """
    _check_batch(mesh, batch)
    sharding = batch_sharding(mesh)

    def place(rows: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, rows, (batch, *rows.shape[1:]))

    return jax.tree.map(place, dict(host_batch))


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Shapes and dtypes of `abstract` with these shardings: the target that a checkpoint is restored into."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
