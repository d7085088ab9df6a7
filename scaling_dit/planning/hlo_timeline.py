"""Computes how long a device waits for collectives, by simulating its program in the compiler's order.

Computation takes the cycles that the compiler expects. A collective takes the time to send its bytes over its links
(`roofline.collective_seconds`). A synchronous collective stops the device. An asynchronous one runs from its start
instruction on, and the device waits at its done instruction for the remaining time. Each network runs one collective at
a time, in the order of their starts. Collectives that the body of a loop or a branch starts end with it, and a body
that sends waits for collectives that were started before it.
"""

import dataclasses
from collections.abc import Iterator

from scaling_dit.parallel.topologies import Topology
from scaling_dit.planning.hlo import Instruction, Program
from scaling_dit.planning.hlo_cost import Collective, Layout, collective_of, cycles_of
from scaling_dit.planning.roofline import collective_seconds


@dataclasses.dataclass
class _Clock:
    """The state of the simulation within one computation.

    Attributes:
      now: seconds since the computation's start.
      waited: the part of these seconds without computation.
      free: network (whether between slices) -> time at which it has finished all collectives started so far.
      ends: instruction -> time at which the collectives that it carries are finished.
      held: `async-start` -> its collectives, if they begin with an update.
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
        """Starts a transfer of `seconds` on a network as soon as the network is free; returns the time of its end."""
        self.free[slices] = max(self.now, self.free.get(slices, 0.0)) + seconds
        return self.free[slices]


def waiting(program: Program, layout: Layout, topology: Topology) -> float | None:
    """Seconds that a device waits for collectives in one run of a program; None for an unknown chip or clock.

    Args:
      program: compiled and scheduled for `layout.size` devices of the topology.
      layout: the program's partitions.
      topology: where the program runs.
    """
    if topology.chip is None or not topology.chip.clock:
        return None
    return _Timeline(program, layout, topology, topology.chip.clock).run(program.entry).waited


@dataclasses.dataclass(frozen=True)
class _Timeline:
    program: Program
    layout: Layout
    topology: Topology
    # In Hz.
    clock: float

    def run(self, computation: str) -> _Clock:
        """Simulates a computation. A loop in it counts as often as it runs."""
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
        elif begins or opcode == "get-tuple-element" or self._carries_on(instruction):
            at.ends[name] = max(carried)

    def _send(self, at: _Clock, row: Collective) -> float:
        return at.send(collective_seconds(self.topology, row), row.slices)

    def _carried(self, at: _Clock, instruction: Instruction) -> Iterator[float]:
        return (at.ends[name] for name in instruction.operands if name in at.ends)

    def _carries_on(self, instruction: Instruction) -> bool:
        """Whether the instruction computes beside a running collective and passes it on."""
        return any(name.startswith("async_collective_fusion") for name in instruction.called)
