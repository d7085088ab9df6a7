"""The device mesh: four named axes that every array of a run is laid out over."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from scaling_dit.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes ("data", "fsdp", "context", "tensor") over all devices.

    At most one size may be -1; it takes what the others leave. The axes are `AxisType.Auto`, since under the
    `Explicit` default of `jax.make_mesh` the logical constraints of linen modules act as assertions and fail.

    Args:
      data: replicas of the parameters, each on its own part of the batch.
      fsdp: parts of the batch whose devices also share (shard) the parameters and optimiser state.
      context: parts of the token axis.
      tensor: parts of the heads and of the MLP.
      devices: the devices to use; all devices of all processes if not given.

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    shape = _fill((data, fsdp, context, tensor), len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


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
