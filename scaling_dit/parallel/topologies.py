"""Slices of TPUs that need not be there: descriptions for the compiler, and what their chips can do.

`parse("v5p:4x4x4")` names a slice and `Topology.devices()` gives devices to compile for, on any Linux machine that has
libtpu (`pip install 'scaling-dit[tpu]'`). Figures are per chip and per direction, from these pages, read in 2026:

- generations, HBM, peak, DCN: https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e
- one-way bandwidth of a link: https://jax-ml.github.io/scaling-book/tpus
- HBM that a program can use: the limit that the compiler of libtpu 0.0.51 names when a program does not fit
- clock: peak FLOP/s / FLOPs a cycle of the matrix units named on those pages; v6e's is not published: that of v5p
- price: US dollars of a chip-hour on demand, about the list price of 2025; not checked against a page, so give yours
- GPUs: https://www.nvidia.com/en-us/data-center/h200, /h100, /a100; dense FLOP/s
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

from scaling_dit.errors import UserError, nearest

LOCAL = "local"  # instead of a topology: the devices of this process
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of accelerators."""

    name: str
    kind: str  # begins jax's `device_kind`
    per_host: int
    hbm: float  # bytes
    usable_hbm: float  # bytes that programs can have
    peak: float  # FLOP/s of bfloat16 matrix products
    hbm_bandwidth: float  # bytes/s
    torus: int  # axes of the torus that joins the chips of a slice; 0 where all are joined with all
    link_bandwidth: float  # bytes/s that one link takes one way; two links for each axis of a torus
    dcn_bandwidth: float  # bytes/s between slices
    clock: float  # Hz of the matrix units
    price: float  # US dollars of an hour, about; 0 if there is no one price


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 4, 32 * GIB, 30.75 * GIB, 275e12, 1.2e12, 3, 4.5e10, 6.25e9, 1.05e9, 3.22),
        Chip("v5e", "TPU v5 lite", 4, 16 * GIB, 15.75 * GIB, 197e12, 8.19e11, 2, 5e10, 3.1e9, 1.5e9, 1.20),
        Chip("v5p", "TPU v5", 4, 96 * GIB, 95.73 * GIB, 459e12, 2.765e12, 3, 1e11, 6.25e9, 1.75e9, 4.20),
        Chip(
            "v6e", "TPU v6 lite", 4, 32 * GIB, 31.24 * GIB, 918e12, 1.638e12, 2, 1e11, 1.25e10, 1.75e9, 2.70
        ),
        Chip("a100", "NVIDIA A100", 8, 80e9, 80e9, 312e12, 2.04e12, 0, 3e11, 2.5e10, 1.41e9, 0.0),
        Chip("h100", "NVIDIA H100", 8, 80e9, 80e9, 989e12, 3.35e12, 0, 4.5e11, 5e10, 1.83e9, 0.0),
        Chip("h200", "NVIDIA H200", 8, 141e9, 141e9, 989e12, 4.8e12, 0, 4.5e11, 5e10, 1.83e9, 0.0),
    )
}
TPUS = tuple(name for name, chip in CHIPS.items() if chip.torus)
SPARSE_CORES = ("v5p", "v6e")  # whose SparseCores libtpu lets gather and sum
EXAMPLES = {"v4": "v4:4x4x4", "v5e": "v5e:16x16", "v5p": "v5p:4x4x4", "v6e": "v6e:16x16"}
# For libtpu on a machine without TPUs: it must not look for any, nor for their metadata server.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # any; the topology asked for decides
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or two compilations at once stop at a lock file
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is compiled here runs nowhere, and its time is told
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, or several equal ones joined by the data-centre network.

    Attributes:
      name: as `parse` takes it.
      chip: its generation; None for local devices of an unknown kind, such as CPUs.
      dims: chips along each axis of a slice's torus.
      slices: how many.
    """

    name: str
    chip: Chip | None
    dims: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.dims) * self.slices

    @property
    def hosts(self) -> int:
        """Machines of all slices."""
        return max(1, self.chips // (self.chip.per_host if self.chip else self.chips))

    @functools.cached_property
    def _devices(self) -> list[Any]:
        return local_devices() if self.name == LOCAL else _describe(self)

    def devices(self) -> list[Any]:
        """jax devices, one for each chip. Those of a description only take compilations, and no array.

        Raises:
          UserError: libtpu is missing or does not know this shape.
        """
        return list(self._devices)

    def wraps(self, axis: int) -> bool:
        """Whether the chips of a torus axis form a ring and not a line."""
        if self.chip is None or not self.chip.torus:
            return True
        if self.chip.torus == 2:
            return self.dims[axis] == 16
        return all(size % 4 == 0 for size in self.dims)

    def ici_bandwidth(self, axes: Iterable[int]) -> float:
        """Bytes/s that one chip can send when data move along these axes of the torus; all of them if none is given."""
        if self.chip is None:
            return 0.0
        if not self.chip.torus:
            return self.chip.link_bandwidth
        axes = list(axes) or range(self.chip.torus)
        return sum(self.chip.link_bandwidth * (2 if self.wraps(axis) else 1) for axis in axes)


def parse(text: str, slices: int = 1) -> Topology:
    """The topology "GENERATION:AxBxC", or "local".

    >>> parse("v5p:4x4x4").chips
    64

    Raises:
      UserError: an unknown generation, or a shape that is none.
    """
    if text == LOCAL:
        devices = local_devices()
        return Topology(LOCAL, find_chip(devices[0].device_kind), (len(devices),))
    name, _, shape = text.partition(":")
    if name not in TPUS:
        hint = nearest(name, [*TPUS, LOCAL])
        accelerator = re.fullmatch(r"(v\d[ep]?)-\d+", name)
        if accelerator and accelerator[1] in EXAMPLES:
            hint = f"give the shape of the slice, such as {EXAMPLES[accelerator[1]]}"
        raise UserError(f"--topology={text}: no generation {name!r}; {hint}")
    sizes = re.fullmatch(r"\d+(x\d+)*", shape)
    dims = tuple(map(int, shape.split("x"))) if sizes else ()
    if len(dims) != CHIPS[name].torus or 0 in dims:
        right = f"{CHIPS[name].torus} numbers of chips, such as {EXAMPLES[name]}"
        raise UserError(f"--topology={text}: the shape of {name} has {right}")
    return Topology(text, CHIPS[name], dims, slices)


def find_chip(kind: str) -> Chip | None:
    """The generation of a `device_kind` of jax; None if it is not known."""
    found = [chip for chip in CHIPS.values() if kind.startswith(chip.kind)]
    return max(found, key=lambda chip: len(chip.kind), default=None)


def prepare_environment(
    topologies: Sequence[str], environment: MutableMapping[str, str] = os.environ
) -> None:
    """Sets what libtpu needs where no TPU is. To be called before jax is imported.

    Raises:
      UserError: libtpu is not installed.
    """
    if all(name == LOCAL for name in topologies):
        return
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "plan compiles with libtpu, which is not installed: pip install 'scaling-dit[tpu]' (Linux); "
            f"or plan for the devices here with --topology={LOCAL}"
        )
    if LOCAL in topologies:
        raise UserError(
            f"--topology={LOCAL} cannot go together with a TPU topology; plan them one after the other"
        )
    environment.update(_ENVIRONMENT)


def local_devices() -> list[Any]:
    """The devices of all processes of this run."""
    import jax

    return list(jax.devices())


def _describe(topology: Topology) -> list[Any]:
    from jax.experimental import topologies

    # Without megacore a v4 chip shows its two cores as two devices, as no program of today uses them.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.name.startswith("v4") else {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        return list(topologies.get_topology_desc(topology.name, platform="tpu", **options).devices)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--topology={topology.name}: libtpu refuses it: {reason}") from error
