"""The device mesh: four named axes that every array of a run is laid out over."""

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

    At most one size may be -1; it takes what the others leave. The axes are `AxisType.Auto`, since under the
    `Explicit` default of `jax.make_mesh` the logical constraints of linen modules act as assertions and fail.

    Within a slice TPUs are ordered so that an axis runs along links of the torus. Between slices there is only the data
    centre's network, and only `data` crosses it: once a step, with gradients.

    Args:
      data: replicas of the parameters, each on its own part of the batch.
      fsdp: parts of the batch whose devices also share (shard) the parameters and optimiser state.
      context: parts of the token axis.
      tensor: parts of the heads and of the MLP.
      slices: groups of devices that fast links join. Other devices than TPUs are split evenly, to try things out.
      devices: the devices to use, a topology description's for instance; all devices of all processes if not given.
      splits_tokens: whether the backbone can split its tokens over `context`. If not, `context` splits the batch too:
        it becomes part of `data`, for a convolution split over height gives wrong values in XLA.

    Raises:
      UserError: if the sizes do not multiply to the number of devices, or the slices are not those of the devices.
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
    """The devices of each slice, checked against what they say of themselves."""
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
    told = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size != -1 and size < 1 for size in sizes):
        raise UserError(f"mesh {told}: every size must be at least 1, or -1 for one axis that fills up")
    if sizes.count(-1) > 1:
        raise UserError(f"mesh {told}: at most one axis can be -1; give the others a size")
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if devices % fixed:
            free = AXES[sizes.index(-1)]
            raise UserError(
                f"mesh {told}: {devices} devices cannot be split into parts of {fixed} to fill {free};"
                f" the fixed sizes must multiply to a divisor of {devices}"
            )
        return tuple(devices // fixed if size == -1 else size for size in sizes)
    if fixed != devices:
        raise UserError(
            f"mesh {told}: the sizes multiply to {fixed} but there are {devices} devices;"
            f" set one axis to -1 or make the product {devices}"
        )
    return sizes
