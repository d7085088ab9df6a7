"""How long a device waits for collectives: its program gone through in the compiler's order.

Computation takes the cycles that the compiler expects; a collective takes what it sends over the links that it spans
(`roofline.collective_seconds`). One that is not asynchronous stops the device. An asynchronous one runs from the place
of its start on; the device waits at the place of its end for what is left of it. One collective is on a network at a
time, in the order of their starts. What the body of a loop, or a branch, has started ends with it, and one that sends
waits for what was started before it.
"""

import dataclasses
from collections.abc import Iterator

from scaling_dit.parallel.topologies import Topology
from scaling_dit.planning.hlo import Instruction, Program
from scaling_dit.planning.hlo_cost import Collective, Layout, collective_of, cycles_of
from scaling_dit.planning.roofline import collective_seconds


@dataclasses.dataclass
class _Clock:
    """The state of one way through a computation.

    Attributes:
      now: seconds since its start.
      waited: of these without computation.
      free: network (whether between slices) -> when it has done what was started.
      ends: instruction -> when the collectives that it carries are done.
      held: `async-start` -> its collectives, where they begin with an update.
    """

    now: float = 0.0
    waited: float = 0.0
    free: dict[bool, float] = dataclasses.field(default_factory=dict)
    ends: dict[str, float] = dataclasses.field(default_factory=dict)
    held: dict[str, list[Collective]] = dataclasses.field(default_factory=dict)

    def wait(self, until: float) -> None:
        self.waited += max(until - self.now, 0.0)
        self.now = max(until, self.now)

    def send(self, seconds: float, slices: bool) -> float:
        """Starts what takes so long on a network as soon as that is free; when it is done."""
        self.free[slices] = max(self.now, self.free.get(slices, 0.0)) + seconds
        return self.free[slices]


def waiting(program: Program, layout: Layout, topology: Topology) -> float | None:
    """Seconds of one run of a program in which its device waits for collectives; None for a chip that is not known.

    Args:
      program: compiled and scheduled, for `layout.size` devices of the topology.
    """
    if topology.chip is None:
        return None
    return _Timeline(program, layout, topology, topology.chip.clock).run(program.entry).waited


@dataclasses.dataclass(frozen=True)
class _Timeline:
    program: Program
    layout: Layout
    topology: Topology
    clock: float  # Hz

    def run(self, computation: str) -> _Clock:
        """Goes through a computation; a loop in it counts as often as it runs."""
        at = _Clock()
        for instruction in self.program.computations.get(computation, ()):
            if instruction.opcode in ("while", "conditional", "call") and instruction.called:
                self._inner(at, instruction)
            else:
                self._step(at, instruction, computation)
        at.wait(max(at.free.values(), default=0.0))
        return at

    def _inner(self, at: _Clock, instruction: Instruction) -> None:
        times, called = 1, instruction.called
        if instruction.opcode == "while":
            trips = self.program.trip_count(instruction)
            times = 1 if trips is None else trips
        elif instruction.opcode == "conditional":
            called = [self.program.longest(called)]
        runs = [self.run(name) for name in called]
        if any(run.free for run in runs):
            at.wait(max(at.free.values(), default=0.0))
        at.now += times * sum(run.now for run in runs)
        at.waited += times * sum(run.waited for run in runs)

    def _step(self, at: _Clock, instruction: Instruction, computation: str) -> None:
        opcode, name = instruction.opcode, instruction.name
        cycles, found = 0, list[Collective]()
        for visit in self.program.inside(instruction, computation):
            cycles += visit.times * cycles_of(visit.instruction)
            row = collective_of(self.program, visit, self.layout)
            found += [row] * (visit.times if row else 0)  # type: ignore[list-item]
        carried = list(self._carried(at, instruction))
        if opcode == "async-start" and not instruction.operands:
            at.held[name] = found
            return
        if opcode == "async-update":
            found = [row for operand in instruction.operands for row in at.held.pop(operand, [])]
        begins = opcode.endswith(("-start", "-update")) or "async-collective-start" in name
        if found and begins:
            carried += [self._send(at, row) for row in found]
        elif found:
            at.wait(max(self._send(at, row) for row in found))
        at.now += cycles / self.clock
        if not carried:
            return
        if opcode.endswith("-done") or "async-collective-done" in name:
            at.wait(max(carried))
        elif begins or opcode == "get-tuple-element" or self._goes_on(instruction):
            at.ends[name] = max(carried)

    def _send(self, at: _Clock, row: Collective) -> float:
        return at.send(collective_seconds(self.topology, row), row.slices)

    def _carried(self, at: _Clock, instruction: Instruction) -> Iterator[float]:
        return (at.ends[name] for name in instruction.operands if name in at.ends)

    def _goes_on(self, instruction: Instruction) -> bool:
        """Whether it computes beside a collective that it hands on."""
        return any(name.startswith("async_collective_fusion") for name in instruction.called)
