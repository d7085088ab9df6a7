"""Reads the text of a compiled XLA program: computations, instructions, and how often each of them runs.

`compiled.as_text()` is the only view of a compiled program that every backend and topology gives. The compiler's own
`cost_analysis` is not enough: it counts the body of a loop once, and TPU programs state no trip counts.
"""

import dataclasses
import functools
import math
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

_BITS = {"pred": 8, "token": 0, "opaque": 0} | {
    f"{kind}{bits}": bits for kind in "su" for bits in (2, 4, 8, 16, 32, 64)
} | {"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,<=]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_OPCODE = re.compile(r"([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|async_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# The only attribute that is printed on several lines.
_KERNEL_NOTES = re.compile(r"kernel_metadata=\{\n[^{}]*\}")
# Their computations are applied to single numbers and are no work of their own.
_ELEMENTWISE = {"reduce", "reduce-window", "scatter", "sort", "select-and-scatter", "map", "all-reduce",
                "reduce-scatter", "all-reduce-start"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result: its type, dimensions, and whether it lies in HBM, not in on-chip memory."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True

    @property
    def size(self) -> int:
        """Bytes without padding."""
        bits = _BITS.get(self.dtype) or (
            4 if self.dtype.startswith("f4") else 8 if self.dtype != "token" else 0
        )
        return math.prod(self.dims) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name: name of the instruction.
      opcode: its operation.
      arrays: arrays of the result, in order.
      operands: names of the operands.
      attributes: the rest of the line.
      value: the value of an integer constant, or the number of a parameter.
      root: whether it gives the computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    value: int | None = None
    root: bool = False

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return sum(array.size for array in self.arrays)

    @functools.cached_property
    def scope(self) -> str:
        """Its place in the source, as jax names it ("jit(step)/jvp(UViT)/.../dot_general"); "" if unknown."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> list[str]:
        """The computations that it calls."""
        found = _CALLED.findall(self.attributes)
        for group in _BRANCHES.findall(self.attributes):
            found += re.findall(r"%?([\w.\-]+)", group)
        return found


_START = Instruction("", "call", (), (), "")


@dataclasses.dataclass(frozen=True)
class Visit:
    """An instruction in the run of a program.

    Attributes:
      instruction: the instruction.
      computation: name of its computation.
      times: how often it runs: the product of the trip counts of the loops around it.
      fused: whether it lies inside a fusion, which is one kernel.
      asynchronous: whether it lies inside a computation that runs beside others.
      repeated: whether it lies inside a fusion that continues, or waits for, a collective begun by another fusion.
    """

    instruction: Instruction
    computation: str
    times: int
    fused: bool
    asynchronous: bool
    repeated: bool


class Program:
    """A parsed program.

    Attributes:
      computations: name -> its instructions in order.
      entry: name of the main computation.
      unknown_loops: while loops whose trip count could not be read; they count once.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in _KERNEL_NOTES.sub(lambda found: found[0].replace("\n", ""), text).splitlines():
            if line[:1] not in (" ", "}", ""):
                header = _HEADER.match(line)
                if header:
                    current = self.computations.setdefault(header[2], [])
                    self.entry = header[2] if header[1] else self.entry
                continue
            found = _INSTRUCTION.match(line)
            parsed = found and _parse(found[2], found[3], bool(found[1]))
            if parsed:
                current.append(parsed)
        self._named = {
            name: {instruction.name: instruction for instruction in body}
            for name, body in self.computations.items()
        }
        self.unknown_loops = 0

    def operands(self, visit: Visit) -> list[Instruction]:
        """The instructions that give an instruction's operands."""
        named = self._named[visit.computation]
        return [named[name] for name in visit.instruction.operands if name in named]

    def walk(self) -> Iterator[Visit]:
        """Every instruction that runs, with its number of runs; of a conditional only the longest branch."""
        self.unknown_loops = 0
        yield from self._walk(Visit(_START, self.entry, 1, False, False, False))

    def inside(self, instruction: Instruction, computation: str) -> Iterator[Visit]:
        """One instruction, then all instructions that it runs, with their number of runs each time it runs."""
        return self._instruction(Visit(instruction, computation, 1, False, False, False))

    def _walk(self, at: Visit) -> Iterator[Visit]:
        """The instructions of `at.computation`, each with the other fields of `at`."""
        for instruction in self.computations.get(at.computation, ()):
            yield from self._instruction(dataclasses.replace(at, instruction=instruction))

    def _instruction(self, at: Visit) -> Iterator[Visit]:
        yield at
        instruction = at.instruction
        opcode, called = instruction.opcode, instruction.called
        if not called or opcode in _ELEMENTWISE or opcode.endswith(("-done", "-update")):
            return
        times = at.times
        if opcode == "while":
            trips = self.trip_count(instruction)
            self.unknown_loops += trips is None
            times *= 1 if trips is None else trips
        elif opcode == "conditional":
            called = [self.longest(called)]
        started = "async-collective-start" in instruction.name or opcode == "async-start"
        for name in called:
            goes_on = "async-collective-done" in instruction.name or name.startswith(
                "async_collective_fusion"
            )
            yield from self._walk(
                Visit(
                    instruction,
                    name,
                    times,
                    fused=at.fused or opcode == "fusion",
                    asynchronous=at.asynchronous or started,
                    repeated=at.repeated or goes_on,
                )
            )

    def longest(self, branches: list[str]) -> str:
        """The branch of a conditional that counts: the one with the most instructions."""
        return max(branches, key=self._length)

    def _length(self, computation: str) -> int:
        return sum(
            1 + sum(map(self._length, instruction.called))
            for instruction in self.computations.get(computation, ())
        )

    def trip_count(self, loop: Instruction) -> int | None:
        """The number of runs of a while loop's body; None if it cannot be read.

        Reads the compiler's own note, else the bound of `i < bound` in the condition: `jax.lax.scan` counts up from 0.
        """
        noted = _TRIP_COUNT.search(loop.attributes)
        if noted:
            return int(noted[1])
        pending = re.findall(r"\bcondition=%?([\w.\-]+)", loop.attributes)
        bounds, less = list[int](), False
        while pending:
            for instruction in self.computations.get(pending.pop(), ()):
                less |= instruction.opcode == "compare" and "direction=LT" in instruction.attributes
                if instruction.opcode == "constant" and instruction.value is not None:
                    bounds.append(instruction.value)
                pending += instruction.called
        return bounds[0] if less and len(bounds) == 1 else None


def _parse(name: str, rest: str, root: bool) -> Instruction | None:
    """`(f32[2]{0}, u8[]) opcode(%a, %b), attribute=..` as an instruction."""
    head, tail = _split_type(rest)
    opcode = _OPCODE.match(tail)
    if not opcode:
        return None
    inside, attributes = _split_operands(tail)
    value = re.fullmatch(r"-?\d+", inside) if opcode[1] in ("constant", "parameter") else None
    arrays = tuple(
        Array(dtype, _dims(dims), "S(" not in layout or "S(0)" in layout)
        for dtype, dims, layout in _SHAPE.findall(head)
    )
    integer = opcode[1] == "parameter" or (bool(arrays) and arrays[0].dtype[0] in "su")
    return Instruction(
        name,
        opcode[1],
        arrays,
        tuple(re.findall(r"%([\w.\-]+)", inside)),
        attributes,
        int(value[0]) if value is not None and integer else None,
        root,
    )


def _split_type(rest: str) -> tuple[str, str]:
    """The type of a result and the rest of the line. A type may be a tuple, and holds layouts in braces."""
    depth = 0
    for place, char in enumerate(rest):
        depth += (char in "({[") - (char in ")}]")
        if char == " " and not depth:
            return rest[:place], rest[place + 1 :]
    return rest, ""


def _split_operands(tail: str) -> tuple[str, str]:
    """`opcode(inside), attributes` -> (inside, attributes)."""
    start, depth = tail.index("("), 0
    for place in range(start, len(tail)):
        depth += (tail[place] == "(") - (tail[place] == ")")
        if not depth:
            return tail[start + 1 : place], tail[place + 1 :]
    return tail[start + 1 :], ""


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(size.strip("<=")) for size in text.split(",") if size.strip("<="))


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """Stands for the text of a program that nothing here can read; `reason` says why in one line."""

    reason: str


def compiled_text(
    lowered: Any, options: dict[str, Any] | None = None, dump: bool = True, read_back: bool = True
) -> tuple[Any, str | Unreadable]:
    """Compiles a lowered program -> (the compiled program, its text).

    jax cannot read back a program in which a TPU's SparseCores look up embeddings or gather parameters, nor one of a
    tpu7x (jax 0.10.2 with libtpu 0.0.51). The text then is the compiler's own dump, if it writes one.

    Args:
      lowered: the lowered program.
      options: of the compiler.
      dump: whether the compiler is asked for its dump.
      read_back: False where jax is known to fail, which it does with pages of messages.
    """
    with tempfile.TemporaryDirectory() as folder:
        dumped = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if dump else {}
        compiled = lowered.compile(compiler_options=(options or {}) | dumped or None)
        reason = "jax cannot read programs of this chip back, and the compiler wrote no text of its own"
        if read_back:
            try:
                return compiled, compiled.as_text()
            except jax.errors.JaxRuntimeError as error:
                reason = str(error).strip().partition("\n")[0]
        texts = sorted(pathlib.Path(folder).glob("*after_codegen.txt"), key=lambda file: file.stat().st_size)
        return compiled, texts[-1].read_text() if texts else Unreadable(reason)
