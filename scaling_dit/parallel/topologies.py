"""Unattached TPU topologies: descriptions of slices for the compiler, and the specifications of their chips.

`parse("v5p:4x4x4")` describes a slice and `Topology.devices()` gives devices to compile for, on any Linux machine with
libtpu (`pip install 'scaling-dit[tpu]'`). Numbers are per chip and per direction, from these pages, read in 2026:

- generations, HBM, peak, DCN: https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x
- one-way bandwidth of a link: https://jax-ml.github.io/scaling-book/tpus
- HBM that a program can use: the limit that the compiler of libtpu 0.0.51 reports when a program does not fit
- clock: peak FLOP/s divided by the FLOPs a cycle of the matrix units on those pages. The clock of v6e is not
  published; the table has the clock of v5p instead. That of tpu7x is not known, so there are no times from cycles
- fields that `Chip.unverified` names: no page was at hand to check them; plans say so
- price: US dollars for a chip-hour on demand, about the list price of 2025. It was not checked, so give your own
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

# Name in place of a topology: the devices of this process.
LOCAL = "local"
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of accelerators.

    Attributes:
      name: such as "v5p".
      kind: the beginning of jax's `device_kind`.
      per_host: chips of one host.
      hbm: bytes of memory.
      usable_hbm: bytes that programs can use, over all devices of the chip.
      peak: FLOP/s of bfloat16 matrix products.
      hbm_bandwidth: bytes/s of the memory.
      torus: axes of the torus that joins the chips of a slice; 0 if every chip is joined with every other.
      link_bandwidth: bytes/s of one link in one direction. A chip has two links for each axis of a torus.
      dcn_bandwidth: bytes/s between slices.
      clock: Hz of the matrix units; 0 if not known.
      price: approximate US dollars an hour; 0 if there is no single price.
      devices: jax devices of one chip. A tpu7x has two, each with half of everything.
      unverified: fields whose figures could not be checked.
    """

    name: str
    kind: str
    per_host: int
    hbm: float
    usable_hbm: float
    peak: float
    hbm_bandwidth: float
    torus: int
    link_bandwidth: float
    dcn_bandwidth: float
    clock: float
    price: float
    devices: int = 1
    unverified: tuple[str, ...] = ()

    @property
    def device_hbm(self) -> int:
        """Bytes of memory that programs can use on one jax device."""
        return int(self.usable_hbm / self.devices)


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 4, 32 * GIB, 30.75 * GIB, 275e12, 1.2e12, 3, 4.5e10, 6.25e9, 1.05e9, 3.22),
        Chip("v5e", "TPU v5 lite", 4, 16 * GIB, 15.75 * GIB, 197e12, 8.19e11, 2, 5e10, 3.1e9, 1.5e9, 1.20),
        Chip("v5p", "TPU v5", 4, 96 * GIB, 95.73 * GIB, 459e12, 2.765e12, 3, 1e11, 6.25e9, 1.75e9, 4.20),
        Chip(
            "v6e", "TPU v6 lite", 4, 32 * GIB, 31.24 * GIB, 918e12, 1.638e12, 2, 1e11, 1.25e10, 1.75e9, 2.70
        ),
        Chip(
            "tpu7x",
            "TPU7x",
            4,
            192 * GIB,
            2 * 94.74 * GIB,
            2.307e15,
            7.38e12,
            3,
            1e11,
            1.25e10,
            0.0,
            0.0,
            devices=2,
            unverified=("hbm_bandwidth", "link_bandwidth", "dcn_bandwidth"),
        ),
        Chip("a100", "NVIDIA A100", 8, 80e9, 80e9, 312e12, 2.04e12, 0, 3e11, 2.5e10, 1.41e9, 0.0),
        Chip("h100", "NVIDIA H100", 8, 80e9, 80e9, 989e12, 3.35e12, 0, 4.5e11, 5e10, 1.83e9, 0.0),
        Chip("h200", "NVIDIA H200", 8, 141e9, 141e9, 989e12, 4.8e12, 0, 4.5e11, 5e10, 1.83e9, 0.0),
    )
}
TPUS = tuple(name for name, chip in CHIPS.items() if chip.torus)
# Generations whose SparseCores libtpu can use for gathers and sums.
SPARSE_CORES = ("v5p", "v6e")
EXAMPLES = {
    "v4": "v4:4x4x4", "v5e": "v5e:16x16", "v5p": "v5p:4x4x4", "v6e": "v6e:16x16", "tpu7x": "tpu7x:4x4x4"
}  # fmt: skip
# Other names that people give a generation; libtpu knows none of them.
_ALIASES = {"v7x": "tpu7x", "tpu7": "tpu7x", "v7": "tpu7x", "ironwood": "tpu7x", "v5litepod": "v5e"}
# Keeps libtpu on a machine without TPUs from searching for chips and for their metadata server.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Any value will do; the topology description decides.
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    # Otherwise two compilations at once stop at a lock file.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # These programs never run, and their compile time is reported, so a cached one is of no use.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, or several equal slices joined by the data-centre network.

    Attributes:
      name: the text that `parse` takes.
      chip: the generation; None for local devices of an unknown kind, such as CPUs.
      dims: chips along each axis of a slice's torus.
      slices: the number of slices.
    """

    name: str
    chip: Chip | None
    dims: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """The number of chips in all slices."""
        return math.prod(self.dims) * self.slices

    @property
    def hosts(self) -> int:
        """The number of hosts in all slices."""
        return max(1, self.chips // (self.chip.per_host if self.chip else self.chips))

    @property
    def devices_per_chip(self) -> int:
        """jax devices of one chip; 1 for an unknown kind."""
        return self.chip.devices if self.chip else 1

    @functools.cached_property
    def _devices(self) -> list[Any]:
        return local_devices() if self.name == LOCAL else _describe(self)

    def devices(self) -> list[Any]:
        """jax devices, `devices_per_chip` for each chip. Those of a description can be compiled for but hold no arrays.

        Raises:
          UserError: libtpu is missing or does not know this shape.
        """
        return list(self._devices)

    def wraps(self, axis: int) -> bool:
        """Whether the chips along a torus axis form a ring, not a line."""
        if self.chip is None or not self.chip.torus:
            return True
        if self.chip.torus == 2:
            return self.dims[axis] == 16
        return all(size % 4 == 0 for size in self.dims)

    def ici_bandwidth(self, axes: Iterable[int]) -> float:
        """Bytes/s that one chip can send along these axes of the torus, or along all axes if none is given.

        The devices of a chip share its links.
        """
        if self.chip is None:
            return 0.0
        if not self.chip.torus:
            return self.chip.link_bandwidth
        axes = list(axes) or range(self.chip.torus)
        return sum(self.chip.link_bandwidth * (2 if self.wraps(axis) else 1) for axis in axes)


# Of the largest pod of any generation, a TPU7x.
MOST_CHIPS = 9216


def parse(text: str, slices: int = 1) -> Topology:
    """The topology "GENERATION:AxBxC", or "local".

    >>> parse("v5p:4x4x4").chips
    64

    Raises:
      UserError: an unknown generation or an impossible shape.
    """
    if text == LOCAL:
        devices = local_devices()
        chip = find_chip(devices[0].device_kind)
        return Topology(LOCAL, chip, (max(1, len(devices) // (chip.devices if chip else 1)),))
    name, _, shape = text.partition(":")
    if name not in TPUS:
        hint = nearest(name, [*TPUS, LOCAL])
        kind = re.sub(r"-\d+$", "", name)
        generation = _ALIASES.get(kind, kind)
        if generation in EXAMPLES:
            hint = f"give the shape of the slice, such as {EXAMPLES[generation]}"
        raise UserError(f"--topology={text}: no generation {name!r}; {hint}")
    sizes = re.fullmatch(r"\d+(x\d+)*", shape)
    dims = tuple(map(int, shape.split("x"))) if sizes else ()
    if len(dims) != CHIPS[name].torus or 0 in dims:
        right = f"{CHIPS[name].torus} numbers of chips, such as {EXAMPLES[name]}"
        raise UserError(f"--topology={text}: the shape of {name} has {right}")
    if math.prod(dims) > MOST_CHIPS:
        raise UserError(f"--topology={text}: no slice has more than {MOST_CHIPS:,} chips")
    return Topology(text, CHIPS[name], dims, slices)


def find_chip(kind: str) -> Chip | None:
    """The generation of a jax `device_kind`; None if it is not known."""
    found = [chip for chip in CHIPS.values() if kind.startswith(chip.kind)]
    return max(found, key=lambda chip: len(chip.kind), default=None)


def prepare_environment(
    topologies: Sequence[str], environment: MutableMapping[str, str] = os.environ
) -> None:
    """Sets the environment that libtpu needs on a machine without a TPU. Call it before jax is imported.

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

    # Without megacore the two cores of a v4 chip appear as two devices, which programs no longer use.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.name.startswith("v4") else {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        return list(topologies.get_topology_desc(topology.name, platform="tpu", **options).devices)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--topology={topology.name}: libtpu refuses it: {reason}") from error
