"""The verb `plan`: plans a config for one or several topologies, and prints text or JSON."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from scaling_dit.parallel import topologies
from scaling_dit.planning import plan as plan_lib
from scaling_dit.planning import quick as plan_quick
from scaling_dit.planning import search as plan_search
from scaling_dit.planning.hlo_cost import Collective
from scaling_dit.planning.plan import Memory, Plan
from scaling_dit.planning.roofline import ASSUMPTIONS, Roofline

# Exit codes.
FITS, FITS_NOT = 0, 1
_GIB = topologies.GIB


def main(
    config: ConfigDict,
    topology_names: Sequence[str],
    *,
    slices: int = 1,
    step: str = "train",
    search: bool = False,
    search_limit: int = 12,
    quick: bool = False,
    price: float | None = None,
    as_json: bool = False,
) -> int:
    """Plans a resolved config for each topology and prints the plans. Returns 0 if any plan fits, else 1."""
    make: Callable[..., Plan] = plan_lib.make
    if quick:
        for name in topology_names:
            plan_quick.require_described(name)
        make = plan_quick.make
    found = [topologies.parse(name, slices) for name in topology_names]
    fits, documents = False, []
    for topology in found:
        if search:
            tried = plan_search.search(config, topology, step, price, search_limit, _print_progress, make)
            fits |= any(plan.memory.fits for plan in tried)
            documents += [plan.to_dict() for plan in tried]
            text = search_table(topology, tried)
        else:
            plan = make(config, topology, step, price)
            fits |= plan.memory.fits
            documents.append(plan.to_dict())
            text = report(plan)
        if not as_json:
            print(text, end="\n\n")
    if as_json:
        print(json.dumps(documents, indent=2))
    elif any(document["roofline"] for document in documents):
        stated = [line for line in ASSUMPTIONS if not (quick and line.startswith("estimate"))]
        print("Nothing here is measured. " + "; ".join(stated) + ".")
    return FITS if fits else FITS_NOT


def _print_progress(line: str) -> None:
    print(f"scaling-dit: {line}", file=sys.stderr, flush=True)


def report(plan: Plan) -> str:
    """A plan as lines of text. Numbers are per device unless the line says otherwise; a device is mostly a chip."""
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    settings = ", ".join(f"{name} {value}" for name, value in plan.settings.items())
    slices = f"{plan.slices} slices, " if plan.slices > 1 else ""
    devices = plan.chips * plan.devices_per_chip
    chips = f"{plan.chips} chips" + (f" of {plan.devices_per_chip} devices" if devices > plan.chips else "")
    lines = [
        f"{plan.topology}: {slices}{chips}, {plan.hosts} hosts; {plan.step} step; mesh {mesh}; {settings}",
        f"  HBM          {memory_line(plan.memory)}",
        f"  parameters   {plan.replicated}",
        *(f"  attention    {chosen}" for chosen in plan.attention),
    ]
    statistics = plan.statistics
    if statistics is not None:
        model = f"{plan.model_flops / devices / 1e12:.2f} TFLOP" if plan.model_flops else "not counted"
        kernels = (
            f" ({statistics.undeclared_kernels} runs of kernels that declare no FLOPs are not included)"
            if statistics.undeclared_kernels
            else ""
        )
        lines += [
            f"  model        {model}",
            f"  program      {statistics.flops / 1e12:.2f} TFLOP{kernels}, "
            f"{statistics.hbm_bytes / 1e9:.1f} GB of HBM traffic",
            *map(collective_line, statistics.collectives),
        ]
        if statistics.unknown_loops:
            lines.append(f"  {statistics.unknown_loops} loops of unknown length are counted as running once")
        if statistics.cycles:
            shares = (
                f"{part} {cycles / statistics.cycles:.0%}"
                for part, cycles in sorted(statistics.parts.items(), key=lambda item: -item[1])
                if cycles >= 0.005 * statistics.cycles
            )
            lines.append(f"  cycles       {statistics.cycles / 1e6:.1f} M expected: {', '.join(shares)}")
    if plan.roofline is not None:
        lines += roofline_lines(plan.roofline)
    lines += notes(plan)
    how = "" if plan.kernels else " without kernels: no cycles, no estimate"
    lines.append(
        f"  compiled     in {plan.compile_seconds:.0f} s here{how}; traced and lowered in {plan.lower_seconds:.1f} s; "
        f"{plan.constraints} sharding constraints"
    )
    return "\n".join(lines)


def notes(plan: Plan) -> list[str]:
    """Lines about figures that are missing, or that could not be checked."""
    lines = []
    if plan.missing:
        counted = "".join(f", {name} {value:.4g}" for name, value in sorted((plan.analysis or {}).items()))
        lines += [
            "  missing      FLOPs, traffic, collectives, cycles and times: the compiled program cannot be read "
            f"({plan.missing}); --quick reads it another way",
            f"  XLA's count  the body of each loop once{counted}",
        ]
    if plan.unverified:
        names = ", ".join(name.replace("_", " ") for name in plan.unverified)
        lines.append(f"  unverified   {names} of this chip; HBM, ICI and DCN times follow from them")
    return lines


def memory_line(memory: Memory) -> str:
    """Arguments, temporaries, peak and limit in GiB, and whether the program fits."""
    limit = "of an unknown limit" if memory.limit is None else f"of {memory.limit / _GIB:.2f} GiB"
    arguments = f"arguments {memory.arguments / _GIB:.2f}"
    if memory.temporaries is None:
        return f"{arguments}, needs at least {memory.peak / _GIB:.2f} {limit}: does not fit"
    rest = f"temporaries {memory.temporaries / _GIB:.2f}, peak {memory.peak / _GIB:.2f} {limit}"
    return f"{arguments}, {rest}: {'fits' if memory.fits else 'does not fit'}"


def collective_line(row: Collective) -> str:
    """One line for one kind of collective over one set of mesh axes."""
    network = " between slices" if row.slices else ""
    how = "asynchronous" if row.asynchronous else "synchronous"
    return (
        f"  {row.kind:18} over {'+'.join(row.axes) or 'none'}{network}: {row.count} x, {row.size / 1e9:.3f} GB whole, "
        f"{row.wire / 1e9:.3f} GB sent, {how}"
    )


def roofline_lines(found: Roofline) -> list[str]:
    """Lines for times, MFU and cost."""
    lines = [
        f"  at peak      compute {1e3 * found.compute:.1f} ms, HBM {1e3 * found.hbm:.1f} ms, "
        f"ICI {1e3 * found.ici:.1f} ms, DCN {1e3 * found.dcn:.1f} ms: bound by {found.bound}"
    ]
    rows = (
        ("limit", found.limit, found.mfu_limit, found.chip_hours_limit),
        ("estimate", found.estimate, found.mfu_estimate, found.chip_hours_estimate),
    )
    for name, time, mfu, hours in rows:
        if time is None:
            continue
        text = f"  {name:12} {1e3 * time:.1f} ms a step"
        if mfu is not None:
            text += f", MFU {mfu:.1%}"
        if hours is not None:
            text += f"; the run {hours:,.0f} chip-hours"
            text += f" x ${found.price:.2f} = ${hours * found.price:,.0f}" if found.price else ""
        lines.append(text)
    return lines


def search_table(topology: topologies.Topology, plans: Sequence[Plan]) -> str:
    """A table of the compiled plans, best first."""
    rows = [f"{topology.name}: {topology.chips} chips; {len(plans)} compiled, best first"]
    estimated = any(plan.roofline and plan.roofline.estimate for plan in plans)
    times = ("ms a step", "MFU") if estimated else ("ms limit", "MFU limit")
    heads = ("mesh", "microbatches", "remat", "peak GiB", "fits", *times)
    cells = [heads] + [_cells(plan) for plan in plans]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    rows += [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells
    ]
    return "\n".join(row.rstrip() for row in rows)


def _cells(plan: Plan) -> tuple[str, ...]:
    found = plan.roofline
    time, mfu = (
        (found.estimate or found.limit, found.mfu_estimate or found.mfu_limit) if found else (None, None)
    )
    once = "".join(f" {name}" for name in ("gather_once", "sparse_core") if plan.settings.get(name))
    values: tuple[Any, ...] = (
        " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) + once,
        plan.settings.get("microbatches", ""),
        plan.settings.get("remat", ""),
        f"{plan.memory.peak / _GIB:.2f}",
        "yes" if plan.memory.fits else "no",
        "" if time is None else f"{1e3 * time:.1f}",
        "" if mfu is None else f"{mfu:.1%}",
    )
    return tuple(map(str, values))
