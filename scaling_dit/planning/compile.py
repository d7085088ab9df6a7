"""A lowered program through the compiler, to its end or as far as most of a plan needs: its text, its memory.

The TPU's compiler first orders the kernels of a program and gives each array its place in memory; then it makes the
kernels, in most of its time. Of what a plan tells, that second part adds the cycles, and some kilobytes at most that
kernels ask for.
"""

import dataclasses
import math
import pathlib
import re
import tempfile
import threading
import time
from typing import Any

import jax

from scaling_dit.errors import UserError
from scaling_dit.parallel.topologies import GIB, LOCAL, TPUS, Topology
from scaling_dit.planning import hlo

# Files that the compiler writes when all arrays have their places, the last one after the others.
_ORDERED = "after_optimizations.txt"
_PLACES = "after_optimizations-buffer-assignment.txt"
_LAST = "after_optimizations_after_buffer_assignment.txt"
# allocation 3: size 512, page 0, parameter 2, shape |f32[128]| at ShapeIndex {}, maybe-live-out:
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (color \d+, )?page \d+, (.*):$", re.MULTILINE)
_POLL = 0.1  # seconds between two looks for the compiler's files


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM of one chip, in bytes.

    Attributes:
      arguments: state, frozen weights and batch, as they lie between steps. Sums of shards, padding included.
      temporaries: what a step needs on top; None for a program that was not compiled to its end.
      peak: most at any time; for a program that does not fit, what it needs at least.
      limit: what a program can have; None if not known.
      fits: whether the compiler accepts the program and the peak is within the limit.
    """

    arguments: int
    temporaries: int | None
    peak: int
    limit: int | None
    fits: bool


def compile_program(lowered: Any, arguments: int, topology: Topology) -> tuple[hlo.Program | None, Memory]:
    """(the compiled program, or None if it does not fit, its memory on one chip).

    `arguments` are the bytes of what it takes; where they alone do not fit, nothing is compiled.

    Raises:
      UserError: the compiler fails, for another reason than memory.
    """
    limit = int(topology.chip.usable_hbm) if topology.chip else None
    if limit is not None and arguments > limit:
        return None, Memory(arguments, None, arguments, limit, fits=False)
    try:
        compiled, text = hlo.compiled_text(lowered, dump=topology.name != LOCAL)
    except jax.errors.JaxRuntimeError as error:
        needed, limit = out_of_memory(str(error), limit)
        return None, Memory(arguments, None, needed, limit, fits=False)
    analysis = compiled.memory_analysis()
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    # Compilers for other chips than TPUs leave arguments out of their peak. Results that do not take the place of the
    # donated state lie beside all the rest.
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    on_tpu = topology.chip is not None and topology.chip.name in TPUS
    peak = analysis.peak_memory_in_bytes if on_tpu else arguments + temporaries + fresh
    return hlo.Program(text), Memory(arguments, temporaries, peak, limit, fits=limit is None or peak <= limit)


def outline_program(lowered: Any, arguments: int, topology: Topology) -> tuple[hlo.Program | None, Memory]:
    """As `compile_program`, without kernels: the program has no cycles, and the peak counts gaps between arrays too.

    All else is the same; a kernel that the compiler would refuse stays unseen. The compiler cannot be stopped: it goes
    on, in a thread, with files in the folder for temporary ones. So this is for a process that then ends, and whose
    such folder is removed.

    Args:
      topology: a description of TPUs, not the devices here.

    Raises:
      UserError: the compiler fails, for another reason than memory, or its files are not there or cut short.
    """
    assert topology.name != LOCAL and topology.chip is not None
    limit = int(topology.chip.usable_hbm)
    if arguments > limit:
        return None, Memory(arguments, None, arguments, limit, fits=False)
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
        return None, Memory(arguments, None, needed, of, fits=False)
    # Programs of SparseCores are written as well, without the file that tells the main one.
    last = next(folder.glob(f"*{_LAST}"), None)
    if last is None:
        raise UserError(
            "the compiler does not write how it lays a program out: plan without --quick, or mend XLA_FLAGS if set"
        )
    stem = last.name.removesuffix(_LAST)
    text, places = ((folder / f"{stem}{name}").read_text() for name in (_ORDERED, _PLACES))
    held, temporaries, fresh = allocated(places)
    if not (text.endswith("}\n\n") and places.endswith("\n") and held):
        raise UserError(f"the layout that the compiler writes is cut short: is {folder.parent} full?")
    peak = held + temporaries + fresh
    # Cycles stand there of hand-written kernels alone: their sum would pass for the step's.
    program = hlo.Program(re.sub(r'"estimated_cycles":"\d+"', "", text))
    return program, Memory(held, temporaries, peak, limit, fits=peak <= limit)


def allocated(places: str) -> tuple[int, int, int]:
    """The compiler's list of places -> bytes in HBM of (arguments, temporaries, results not in an argument's place)."""
    arguments = temporaries = fresh = 0
    for size, color, what in _ALLOCATION.findall(places):
        if color:  # another memory: VMEM, that of SparseCores or of the host
            continue
        if what.startswith("parameter "):
            arguments += int(size)
        elif what == "preallocated-temp":
            temporaries += int(size)
        elif what.endswith("maybe-live-out"):
            fresh += int(size)
    return arguments, temporaries, fresh


def out_of_memory(message: str, limit: int | None) -> tuple[int, int | None]:
    """(bytes needed, bytes there) from the compiler's error.

    Raises:
      UserError: an error of another kind, in one line.
    """
    known = "RESOURCE_EXHAUSTED" in message or "Ran out of memory" in message
    if not known or "space vmem" in message:  # a kernel's own memory is no matter of what fits the chip
        raise UserError(f"the compiler fails: {message.strip().partition(chr(10))[0]}")
    found = re.search(r"[Uu]sed ([\d.]+)([GM]) of ([\d.]+)([GM])", message) or re.search(
        r"\(([\d.]+)([GM])\) exceeds available \w+ \(([\d.]+)([GM])\)", message
    )
    if found is None:
        raise UserError(f"the program does not fit: {message.strip().partition(chr(10))[0]}")
    unit = {"G": GIB, "M": 2**20}
    return int(float(found[1]) * unit[found[2]]), int(float(found[3]) * unit[found[4]])


def shard_bytes(leaf: Any) -> int:
    """Bytes of one device's part of an abstract array with a sharding, without the padding of a memory layout."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
