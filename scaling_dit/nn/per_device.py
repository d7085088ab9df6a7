"""Runs an attention kernel on each device of a mesh, on its own examples and heads. XLA cannot split kernels itself.

Shape suffixes as in attention.py.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

# Lanes of a TPU's vectors, which are the last axis of a tile.
LANES = 128

# (queries, keys, values, mask of keys) -> [B, T, N, H]
Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


class Target(NamedTuple):
    """The device that a program is compiled for: its platform ("cpu", "gpu" or "tpu") and jax's name of its kind."""

    platform: str
    device_kind: str


def target() -> Target:
    """The device of the context's mesh, which may be a topology description's; without a mesh the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return Target(mesh.abstract_device.platform, mesh.abstract_device.device_kind)
    return Target(jax.default_backend(), getattr(jax.devices()[0], "device_kind", ""))


def obstacle(q_BTNH: jax.Array, k_BSKH: jax.Array) -> str | None:
    """The reason why a TPU kernel cannot take these inputs: no TPU, or an uneven split on the mesh. None if it can."""
    if (platform := target().platform) != "tpu":
        return f"the backend is {platform}, it needs tpu"
    batch, _, heads = _mesh_axes()
    for what, size, axes in (
        ("examples", q_BTNH.shape[0], batch),
        ("heads", q_BTNH.shape[2], heads),
        ("key heads", k_BSKH.shape[2], heads),
    ):
        if size % _parts(axes):
            return f"{size} {what} cannot be split over {' x '.join(axes)} = {_parts(axes)}"
    return None


def heads(count: int) -> int:
    """The number of heads on each device, out of `count` in all."""
    return count // _parts(_mesh_axes()[2])


def keeps_lengths() -> bool:
    """Whether no axis of the context's mesh splits lengths."""
    return _parts(_mesh_axes()[1]) == 1


def run_on_rows(kernel: Callable[..., jax.Array], x_BTNH: jax.Array, *tables: jax.Array) -> jax.Array:
    """Runs a kernel (x, *tables) -> [B, T, N, H] on each device's examples and heads. All devices get whole tables."""
    if _alone():
        return kernel(x_BTNH, *tables)
    batch, _, heads = _mesh_axes()
    rows = PartitionSpec(batch, None, heads)
    return jax.shard_map(
        kernel, in_specs=(rows, *[PartitionSpec()] * len(tables)), out_specs=rows, check_vma=False
    )(x_BTNH, *tables)


def _alone() -> bool:
    """Whether there is no mesh, or the code already runs for each device separately."""
    return all(kind == AxisType.Manual for kind in jax.sharding.get_abstract_mesh().axis_types)


def run(
    kernel: Kernel, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, key_mask: jax.Array | None
) -> jax.Array:
    """Runs a kernel on each device's examples, heads and part of the queries -> [B, T, N, H].

    Keys and values are gathered over the axis that splits lengths.
    """
    if _alone():
        return kernel(q_BTNH, k_BSKH, v_BSKH, key_mask)
    batch, length, heads = _mesh_axes()
    queries = q_BTNH.shape[1]
    padded = -(-queries // _parts(length)) * _parts(length)
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, padded - queries), (0, 0), (0, 0)))
    of_queries = PartitionSpec(batch, length, heads)
    of_keys = PartitionSpec(batch, None, heads)
    out_BTNH = jax.shard_map(
        kernel,
        in_specs=(of_queries, of_keys, of_keys, PartitionSpec(batch)),
        out_specs=of_queries,
        # Kernels do not declare over which mesh axes their results vary.
        check_vma=False,
    )(q_BTNH, k_BSKH, v_BSKH, key_mask)
    return out_BTNH[:, :queries]


def _mesh_axes() -> tuple[tuple[str, ...], ...]:
    """The mesh axes of examples, lengths and heads under the rules of the context."""
    spec = nn.logical_to_mesh_axes(("batch", "length", "act_heads")) or (None,) * 3
    return tuple((axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec)


def _parts(axes: tuple[str, ...]) -> int:
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in axes)
