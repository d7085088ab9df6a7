"""Everything of ours in some zones, whoever launched it and wherever: `list`, and `sweep`, which deletes leftovers."""

import time
from collections.abc import Sequence

from scaling_dit.errors import UserError
from scaling_dit.parallel import topologies

from . import backends
from .backends import Row
from .backends.contract import is_absent, parsed
from .commands import Command, Runner
from .job import EXPIRES, LIST_PRICE, OWNER, STUDY
from .observations import Phase

_LEFTOVER = (Phase.FAILED, Phase.PREEMPTED, Phase.PAUSED)
_RUNS = (Phase.STARTING, Phase.READY, Phase.SICK)


def commands(project: str, zones: Sequence[str]) -> list[tuple[str, str, Command]]:
    """(back-end, zone, command) for every listing."""
    return [
        (name, zone, backend.listing(project, zone))
        for zone in zones
        for name, backend in backends.BACKENDS.items()
    ]


def rows(project: str, zones: Sequence[str], runner: Runner) -> tuple[list[Row], list[str]]:
    """(all our resources, what could not be asked)."""
    found, failed = [], []
    for name, zone, command in commands(project, zones):
        result = runner(command, 120.0)
        listed = parsed(result)
        if result.code or not isinstance(listed, list):
            if not is_absent(result):
                failed.append(f"{name} in {zone}: {result.reason}")
            continue
        found += backends.BACKENDS[name].rows(zone, listed)
    return found, failed


def leftover(row: Row, now: float) -> str:
    """Why a resource should go, in words; "" if it should not."""
    expires = row.labels.get(EXPIRES, "")
    if expires.isdigit() and now > int(expires):
        return "its time is over"
    return f"{row.state}: it runs nothing and holds quota" if row.phase in _LEFTOVER else ""


def cost(row: Row, price: float | None, now: float) -> str:
    """What a resource has cost at most, in words, counted from its request."""
    if row.phase not in _RUNS:
        return "none now"
    if not row.shape or not row.created:
        return "unknown"
    try:
        shape = topologies.parse(row.shape, row.slices)
    except UserError:
        return "unknown"
    rate = price if price is not None else shape.chip.price if shape.chip else 0.0
    return f"<= ${shape.chips * rate * (now - row.created) / 3600:,.2f}" if rate else "unknown"


def table(found: Sequence[Row], price: float | None, now: float | None = None) -> str:
    """One line for each resource, and what the costs rest on."""
    now = time.time() if now is None else now
    heads = ("name", "zone", "slice", "state", "age", "cost", "study", "owner", "note")
    lines = [heads]
    for row in found:
        age = f"{(now - row.created) / 3600:.1f} h" if row.created else "?"
        shape = f"{row.slices} x {row.shape}" if row.slices > 1 else row.shape
        labels = (row.labels.get(STUDY, ""), row.labels.get(OWNER, ""))
        lines.append(
            (row.name, row.zone, shape, row.state, age, cost(row, price, now), *labels, leftover(row, now))
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    text = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    basis = f"${price:.2f} a chip-hour" if price is not None else LIST_PRICE
    return f"{text}\n\nCosts are upper bounds: all the time since the request, at {basis}."
