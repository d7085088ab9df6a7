"""The best possible time of a step and the cost of a run, from counted work and stated assumptions.

Nothing here is measured. There are two times. In the limit everything overlaps perfectly and each unit runs at its
peak. The estimate takes the compiler's own cycles and adds the time that a device waits for collectives. A real run is
slower than both.
"""

import dataclasses
import functools
from typing import Any

from scaling_dit.parallel.topologies import Topology
from scaling_dit.planning.hlo_cost import Collective, Statistics

ASSUMPTIONS = (
    "limit: the slowest of compute, HBM, ICI and DCN, each at its peak, all at the same time",
    "compute: FLOPs of the compiled program (rematerialisation included) / peak of bfloat16 products",
    "HBM: every kernel reads its inputs and writes its outputs once",
    "ICI: bytes a chip sends in a ring / links of the torus axes that the collective spans, both ways where they close",
    "DCN: the same over the network between slices",
    "estimate: cycles that the compiler expects / clock, plus waiting for collectives in the compiler's order",
    "MFU: 6 x multiply-accumulates of the backbone x images (attention in full, no rematerialisation) / peak / time",
    "the run: all steps at that speed; no evaluation, checkpoints, restarts or waiting for data",
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step by resource, and the resulting MFU and chip-hours of the run.

    Attributes:
      compute: seconds if compute alone were the limit.
      hbm: seconds if HBM alone were the limit.
      ici: seconds if the links of a slice alone were the limit.
      dcn: seconds if the network between slices alone were the limit.
      exposed: seconds that the device waits for collectives.
      bound: name of the slowest of the four resources.
      limit: seconds of the slowest resource.
      estimate: seconds by the compiler's cycles plus `exposed`; None without cycles.
      mfu_limit: MFU at the limit; None without model FLOPs.
      mfu_estimate: MFU at the estimate; None without model FLOPs or estimate.
      chip_hours_limit: chip-hours of all steps at the limit; None for sampling.
      chip_hours_estimate: chip-hours of all steps at the estimate; None for sampling or without estimate.
      price: US dollars of a chip-hour.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float
    exposed: float
    bound: str
    limit: float
    estimate: float | None
    mfu_limit: float | None
    mfu_estimate: float | None
    chip_hours_limit: float | None
    chip_hours_estimate: float | None
    price: float

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return dataclasses.asdict(self)


def collective_seconds(topology: Topology, row: Collective) -> float:
    """Seconds that collectives take on the wire, each network at its peak. The topology's chip must be known.

    The devices of a chip share its links: each has an equal part of their bandwidth.
    """
    assert topology.chip is not None
    bandwidth = topology.chip.dcn_bandwidth if row.slices else topology.ici_bandwidth(row.torus_axes)
    return row.wire * topology.chip.devices / bandwidth


def roofline(
    topology: Topology,
    statistics: Statistics,
    model_flops: int | None,
    steps: int | None,
    price: float | None = None,
    exposed: float | None = None,
) -> Roofline | None:
    """The roofline of a program on one chip of a topology; None for an unknown chip.

    Args:
      topology: where the program runs.
      statistics: statistics of the compiled program, for one device.
      model_flops: FLOPs of the step over all chips by `costs.count`; None for sampling.
      steps: steps of the run; None for sampling.
      price: US dollars of a chip-hour; the list price by default.
      exposed: seconds that a device waits for collectives, see `hlo_timeline.waiting`; by default the time of all
        synchronous collectives.
    """
    chip = topology.chip
    if chip is None:
        return None
    seconds = functools.partial(collective_seconds, topology)
    # A program is that of one device, and each device of a chip has an equal part of it.
    times = {
        "compute": statistics.flops * chip.devices / chip.peak,
        "HBM": statistics.hbm_bytes * chip.devices / chip.hbm_bandwidth,
        "ICI": sum(seconds(row) for row in statistics.collectives if not row.slices),
        "DCN": sum(seconds(row) for row in statistics.collectives if row.slices),
    }
    if exposed is None:
        exposed = sum(seconds(row) for row in statistics.collectives if not row.asynchronous)
    bound = max(times, key=lambda name: times[name])
    limit = times[bound]
    estimate = statistics.cycles / chip.clock + exposed if statistics.cycles and chip.clock else None

    def mfu(time: float | None) -> float | None:
        return None if not time or model_flops is None else model_flops / topology.chips / chip.peak / time

    def chip_hours(time: float | None) -> float | None:
        return None if time is None or steps is None else topology.chips * steps * time / 3600

    return Roofline(
        compute=times["compute"],
        hbm=times["HBM"],
        ici=times["ICI"],
        dcn=times["DCN"],
        exposed=exposed,
        bound=bound,
        limit=limit,
        estimate=estimate,
        mfu_limit=mfu(limit),
        mfu_estimate=mfu(estimate),
        chip_hours_limit=chip_hours(limit),
        chip_hours_estimate=chip_hours(estimate),
        price=chip.price if price is None else price,
    )
