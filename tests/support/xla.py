"""How XLA compiles in tests: small programs that run a few times, so compiling is what takes time."""

import functools
import os
import types
from typing import Any

from tests.support.paths import ROOT, SUPPORT

# LLVM's optimizations and the fusion emitters take five sixths of compiling a tiny backbone with its gradients. A test
# compares programs that were all compiled this way, so comparisons of bits mean what they say.
QUICK = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
        # Threads that compile parts of a small program cost more than they save beside another worker.
        "--xla_cpu_parallel_codegen_split_count=1",
    )
)
# A simulated device that waits its turn on a busy machine is not a dead one: by default XLA ends the process after 40
# seconds.
_PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600"
_COUNT = "--xla_force_host_platform_device_count"


def flags(devices: int) -> str:
    """XLA_FLAGS of a process with this many simulated devices."""
    return f"{QUICK} {_PATIENT} {_COUNT}={devices}"


def one_of_several(devices: int) -> dict[str, str]:
    """The environment of one of several processes with this many devices: all read what the first one compiled."""
    paths = str(SUPPORT / "one_of_several"), str(ROOT), os.environ.get("PYTHONPATH", "")
    return {**os.environ, "XLA_FLAGS": flags(devices), "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def prepare(environment) -> None:
    """Sets XLA_FLAGS of the tests themselves: eight devices; what a user set stays and wins."""
    given = environment.get("XLA_FLAGS", "")
    count = "" if _COUNT in given else f"{_COUNT}=8"
    environment["XLA_FLAGS"] = " ".join(part for part in (QUICK, _PATIENT, count, given) if part)
    # Filtering a traceback costs at each call of a jitted function, with or without an error.
    environment.setdefault("JAX_TRACEBACK_FILTERING", "off")
    # XLA splits sums over this many threads, or one a device if there are more of these: so a command on one device
    # computes the bits that the tests compute on one of their eight, whatever the cores.
    environment.setdefault("NPROC", "8")


def share_contexts(programs: int = 100) -> None:
    """Makes so many programs in turn be lowered in one MLIR context; what it holds of them is freed with it.

    jax makes one for each, and loads every dialect into it: a third of the time of a program of one operation.
    """
    from jax._src.interpreters import mlir

    make, kept = mlir.make_ir_context, list[Any]()

    def shared() -> Any:
        if not kept or kept[1] == programs:
            kept[:] = make(), 0
        kept[1] += 1
        return kept[0]

    mlir.make_ir_context = shared


def remember_shapes_of_parameters(most: int = 10_000) -> None:
    """Traces an initialiser once for all parameters that it makes of one shape.

    Each time a model is applied, flax traces the initialiser of each parameter again, to hold its shape against the
    parameter's: a tenth of the time of tracing. The comparison itself stays.
    """
    import jax
    from flax.core import scope

    known: dict[Any, Any] = {}

    def eval_shape(function: Any, *args: Any) -> Any:
        kept: list[Any] = []
        try:
            key = (_identity(function, kept), args, jax.config.jax_enable_x64)
            found = known.get(key)
        # Of something that has no hash.
        except TypeError:
            return jax.eval_shape(function, *args)
        if found is None:
            if len(known) >= most:
                known.clear()
            # What stands in the key by its address lives as long as the key.
            found = known[key] = jax.eval_shape(function, *args), kept
        return found[0]

    scope.jax = types.SimpleNamespace(**{**vars(jax), "eval_shape": eval_shape})


def _identity(value: Any, kept: list[Any]) -> Any:
    """What a function computes by: its code, and the values it closes over; any other value itself."""
    if isinstance(value, functools.partial):
        return tuple(_identity(part, kept) for part in (value.func, value.args, value.keywords))
    if not isinstance(value, types.FunctionType):
        if isinstance(value, dict):
            return tuple((name, _identity(one, kept)) for name, one in value.items())
        if isinstance(value, list | tuple):
            return tuple(_identity(one, kept) for one in value)
        hash(value)
        return value
    kept.append(value.__code__)
    cells = tuple(_identity(cell.cell_contents, kept) for cell in value.__closure__ or ())
    defaults = _identity((value.__defaults__, value.__kwdefaults__), kept)
    return id(value.__code__), cells, defaults


def plain_environment() -> dict[str, str]:
    """The environment of a process that compiles as a user's does: for TPUs, or for figures of a program."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "NPROC"))
    }
