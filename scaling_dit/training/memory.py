"""What a run holds at least, against the memory there is: a batch beyond it is refused before it ends the process."""

import contextlib
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import jax

from scaling_dit.errors import UserError

_GB = 1e9
# Batches that are in the making beside those that `config.loader.prefetch` keeps.
_MAKING = 2
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_fits(batch: int, prefetch: int, rows: int, program: Any, memory: int | None = None) -> None:
    """Makes sure that the batches that are read ahead, and the state of the run, fit into this host.

    It is a lower bound: the activations of a step are not known before it is compiled; `plan` says them.

    Args:
      batch: the global batch.
      prefetch: batches read ahead.
      rows: of the global batch that this process reads.
      program: a `program.StepProgram`.
      memory: bytes of this host; asked of the system by default.

    Raises:
      UserError: they do not fit; it says how large they are.
    """
    memory = host_memory() if memory is None else memory
    one = sum(_bytes(leaf.shape, leaf) for leaf in jax.tree.leaves(program.batch)) / batch
    ahead = (prefetch + _MAKING) * rows * one
    if ahead > memory:
        raise UserError(
            f"config.batch is {batch}: {prefetch + _MAKING} batches of {rows} rows, which this process reads ahead, "
            f"take {ahead / _GB:,.1f} GB of the {memory / _GB:,.1f} GB of this host; lower config.batch or "
            "config.loader.prefetch, or start more processes"
        )
    for device, limit in device_memory(memory).items():
        state = _on_device(jax.tree.leaves(program.state), device)
        shown = _on_device(jax.tree.leaves(program.batch), device)
        if state + shown > limit:
            raise UserError(
                f"config.batch is {batch}: on a device the state of the run takes {state / _GB:,.1f} GB and its part "
                f"of a batch {shown / _GB:,.1f} GB, of {limit / _GB:,.1f} GB; lower config.batch, choose a smaller "
                "config.backbone, or split it over more devices; scaling-dit plan says the rest of a step"
            )


def host_memory() -> int:
    """Bytes of memory that this process may use: of the host, or of the container around it."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUPS:
        # "max" without a limit.
        with contextlib.suppress(OSError, ValueError):
            found = min(found, int(pathlib.Path(path).read_text()))
    return found


def device_memory(memory: int) -> dict[Any, int]:
    """Bytes of each device of this process that has memory of its own; CPU devices have their part of the host's."""
    devices = jax.local_devices()
    limits = {device: (device.memory_stats() or {}).get("bytes_limit") for device in devices}
    return {device: limit or memory // len(devices) for device, limit in limits.items()}


def _on_device(leaves: Iterable[Any], device: Any) -> int:
    """Bytes of the parts of abstract arrays that lie on a device."""
    held = 0
    for leaf in leaves:
        if device in leaf.sharding.device_set:
            held += _bytes(leaf.sharding.shard_shape(leaf.shape), leaf)
    return held


def _bytes(shape: tuple[int, ...], leaf: Any) -> int:
    return math.prod(shape) * leaf.dtype.itemsize
