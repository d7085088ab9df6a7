"""Compiles a lowered program, completely or as far as most of a plan needs, and gives its text and memory.

The TPU compiler first orders the kernels of a program and assigns memory to each array. Then it generates the kernels,
which takes most of its time. To a plan this second phase adds the cycles, and at most some kilobytes of memory that
kernels need.
"""

import dataclasses
import math
import pathlib
import re
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax

from scaling_dit.errors import UserError
from scaling_dit.parallel.topologies import GIB, LOCAL, TPUS, Topology
from scaling_dit.planning import hlo

# Files that the compiler writes after it has assigned memory to all arrays; _LAST comes last.
_ORDERED = "after_optimizations.txt"
_PLACES = "after_optimizations-buffer-assignment.txt"
_LAST = "after_optimizations_after_buffer_assignment.txt"
# allocation 3: size 512, page 0, parameter 2, shape |f32[128]| at ShapeIndex {}, maybe-live-out:
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (color \d+, )?page \d+, (.*):$", re.MULTILINE)
# Seconds between two checks for the compiler's files.
_POLL = 0.1


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM of one device, in bytes. A device is a chip, except for chips with several.

    Attributes:
      arguments: state, frozen weights and batch between steps. The sum of this chip's shards, padding included.
      temporaries: additional memory during a step; None for a program that was not compiled completely.
      peak: the most at any time; for a program that does not fit, the least that it needs.
      limit: memory that a program can use; None if not known.
      fits: whether the compiler accepts the program and the peak is within the limit.
    """

    arguments: int
    temporaries: int | None
    peak: int
    limit: int | None
    fits: bool


@dataclasses.dataclass(frozen=True)
class Compiled:
    """All that is known of a program after compiling it.

    Attributes:
      program: its text, parsed; None if it does not fit, or if the text cannot be read.
      memory: on one device.
      missing: why the text of a program that fits cannot be read; "" if it can.
      analysis: XLA's own "flops" and "bytes accessed" for a program without text. They count the body of a loop once.
    """

    program: hlo.Program | None
    memory: Memory
    missing: str = ""
    analysis: Mapping[str, float] | None = None


def compile_program(lowered: Any, arguments: int, topology: Topology) -> Compiled:
    """Compiles a program completely.

    `arguments` is the size of the program's arguments in bytes. If they alone do not fit, nothing is compiled.

    Raises:
      UserError: the compiler fails for a reason other than memory.
    """
    limit = topology.chip.device_hbm if topology.chip else None
    if limit is not None and arguments > limit:
        return Compiled(None, Memory(arguments, None, arguments, limit, fits=False))
    try:
        read_back = topology.chip is None or topology.chip.devices == 1
        compiled, text = hlo.compiled_text(lowered, dump=topology.name != LOCAL, read_back=read_back)
    except jax.errors.JaxRuntimeError as error:
        needed, limit = out_of_memory(str(error), limit)
        return Compiled(None, Memory(arguments, None, needed, limit, fits=False))
    analysis = compiled.memory_analysis()
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    # Compilers for chips other than TPUs do not include arguments in their peak. Results that do not reuse the memory
    # of the donated state need memory of their own.
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    on_tpu = topology.chip is not None and topology.chip.name in TPUS
    peak = analysis.peak_memory_in_bytes if on_tpu else arguments + temporaries + fresh
    memory = Memory(arguments, temporaries, peak, limit, fits=limit is None or peak <= limit)
    if isinstance(text, hlo.Unreadable):
        cost = compiled.cost_analysis() or {}
        found = {name: float(cost[name]) for name in ("flops", "bytes accessed") if name in cost}
        return Compiled(None, memory, text.reason, found)
    return Compiled(hlo.Program(text), memory)


def outline_program(lowered: Any, arguments: int, topology: Topology) -> Compiled:
    """As `compile_program`, but without kernels: the program has no cycles, and the peak includes gaps between arrays.

    All else is the same, except that the compiler does not report kernels that it would refuse. The compiler cannot be
    stopped: it continues in a thread and writes to the folder for temporary files. So only a process that ends
    afterwards may call this, and its caller must remove that folder.

    Args:
      lowered: the lowered program.
      arguments: bytes of its arguments.
      topology: a description of TPUs, not local devices.

    Raises:
      UserError: the compiler fails for a reason other than memory, or its files are missing or incomplete.
    """
    assert topology.name != LOCAL and topology.chip is not None
    limit = topology.chip.device_hbm
    if arguments > limit:
        return Compiled(None, Memory(arguments, None, arguments, limit, fits=False))
    folder, failed = pathlib.Path(tempfile.mkdtemp()), list[Exception]()

    def run() -> None:
        try:
            lowered.compile(compiler_options={"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True})
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive() and not list(folder.glob(f"*{_LAST}")):
        time.sleep(_POLL)
    if failed and not isinstance(failed[0], jax.errors.JaxRuntimeError):
        raise failed[0]
    if failed:
        needed, of = out_of_memory(str(failed[0]), limit)
        return Compiled(None, Memory(arguments, None, needed, of, fits=False))
    # The compiler also writes programs of SparseCores, but this file only for the main program.
    last = next(folder.glob(f"*{_LAST}"), None)
    if last is None:
        raise UserError(
            "the compiler does not write its memory layout: plan without --quick, or fix XLA_FLAGS if set"
        )
    stem = last.name.removesuffix(_LAST)
    text, places = ((folder / f"{stem}{name}").read_text() for name in (_ORDERED, _PLACES))
    held, temporaries, fresh = allocated(places)
    if not (text.endswith("}\n\n") and places.endswith("\n") and held):
        raise UserError(f"the memory layout that the compiler writes is incomplete: is {folder.parent} full?")
    peak = held + temporaries + fresh
    # At this point only hand-written kernels have cycles. Their sum would be mistaken for the step's cycles.
    program = hlo.Program(re.sub(r'"estimated_cycles":"\d+"', "", text))
    return Compiled(program, Memory(held, temporaries, peak, limit, fits=peak <= limit))


def allocated(places: str) -> tuple[int, int, int]:
    """Bytes in HBM of (arguments, temporaries, other results), from the compiler's list of places.

    Results in the memory of an argument do not count.
    """
    arguments = temporaries = fresh = 0
    for size, color, what in _ALLOCATION.findall(places):
        # Another memory: VMEM, SparseCore memory or the host's.
        if color:
            continue
        if what.startswith("parameter "):
            arguments += int(size)
        elif what == "preallocated-temp":
            temporaries += int(size)
        elif what.endswith("maybe-live-out"):
            fresh += int(size)
    return arguments, temporaries, fresh


def out_of_memory(message: str, limit: int | None) -> tuple[int, int | None]:
    """(bytes needed, bytes available) from the compiler's error.

    Raises:
      UserError: the error has another cause, in one line.
    """
    known = "RESOURCE_EXHAUSTED" in message or "Ran out of memory" in message
    # A kernel that exceeds its own memory (VMEM) would fail on any chip.
    if not known or "space vmem" in message:
        raise UserError(f"the compiler fails: {message.strip().partition(chr(10))[0]}")
    found = re.search(r"[Uu]sed ([\d.]+)([GM]) of ([\d.]+)([GM])", message) or re.search(
        r"\(([\d.]+)([GM])\) exceeds available \w+ \(([\d.]+)([GM])\)", message
    )
    if found is None:
        raise UserError(f"the program does not fit: {message.strip().partition(chr(10))[0]}")
    unit = {"G": GIB, "M": 2**20}
    return int(float(found[1]) * unit[found[2]]), int(float(found[3]) * unit[found[4]])


def shard_bytes(leaf: Any) -> int:
    """Bytes of one device's shard of an abstract array, without padding."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
