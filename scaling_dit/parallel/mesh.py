"""The device mesh: the four named axes over which every array of a run is sharded."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from scaling_dit.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    slices: int = 1,
    devices: Sequence[jax.Device] | None = None,
    *,
    splits_tokens: bool = True,
) -> Mesh:
    """A mesh with the axes ("data", "fsdp", "context", "tensor") over all devices.

    At most one size may be -1; that axis takes all remaining devices. The axes are `AxisType.Auto`, because under
    `jax.make_mesh`'s default of `Explicit` the logical constraints of linen modules act as assertions and fail.

    Within a slice TPUs are ordered so that an axis runs along links of the torus. Slices are joined by the data
    centre's network, and only `data` crosses it: once a step, with gradients.

    Args:
      data: replicas of the parameters, each on its own part of the batch.
      fsdp: parts of the batch whose devices also shard the parameters and the optimizer state.
      context: parts of the token axis.
      tensor: parts of the heads and of the MLP.
      slices: groups of devices joined by fast links. Devices other than TPUs are split evenly, to try things out.
      devices: the devices to use, such as those of a topology description. By default all devices of all processes.
      splits_tokens: whether the backbone can split its tokens over `context`. If not, `context` becomes part of `data`
        and splits the batch, because XLA computes wrong values for a convolution split over height.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `slices` is not their number of slices.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = _fill((data, fsdp, context, tensor), len(devices))
    groups = _slices(devices, slices, sizes)
    within = (sizes[0] // slices, *sizes[1:])
    parts = [mesh_utils.create_device_mesh(within, group, allow_split_physical_axes=True) for group in groups]
    grid = np.concatenate(parts, axis=0)
    if not splits_tokens:
        grid = grid.swapaxes(1, 2).reshape(sizes[0] * sizes[2], sizes[1], 1, sizes[3])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: list[jax.Device], slices: int, sizes: tuple[int, ...]) -> list[list[jax.Device]]:
    """The devices of each slice, checked against the slice indices that the devices report."""
    if slices < 1 or sizes[0] % slices:
        raise UserError(
            f"mesh slices={slices} cannot share data={sizes[0]}: only data crosses slices, so it must be a multiple"
        )
    found = sorted({getattr(device, "slice_index", None) or 0 for device in devices})
    if len(found) > 1 or devices[0].platform == "tpu":
        if len(found) != slices:
            raise UserError(
                f"mesh slices={slices}, but the devices lie in {len(found)}; set mesh.slices={len(found)}"
            )
        return [[d for d in devices if (getattr(d, "slice_index", None) or 0) == index] for index in found]
    size = len(devices) // slices
    return [devices[i * size : (i + 1) * size] for i in range(slices)]


def _fill(sizes: tuple[int, ...], devices: int) -> tuple[int, ...]:
    """Sizes with -1 replaced, checked against the number of devices."""
    mesh_text = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size != -1 and size < 1 for size in sizes):
        raise UserError(
            f"mesh {mesh_text}: every size must be at least 1, or -1 for one axis that takes the rest"
        )
    if sizes.count(-1) > 1:
        raise UserError(f"mesh {mesh_text}: at most one axis can be -1; give the others a size")
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if devices % fixed:
            free = AXES[sizes.index(-1)]
            raise UserError(
                f"mesh {mesh_text}: {devices} devices cannot be split into parts of {fixed} to fill {free};"
                f" the fixed sizes must multiply to a divisor of {devices}"
            )
        return tuple(devices // fixed if size == -1 else size for size in sizes)
    if fixed != devices:
        raise UserError(
            f"mesh {mesh_text}: the sizes multiply to {fixed} but there are {devices} devices;"
            f" set one axis to -1 or make the product {devices}"
        )
    return sizes
