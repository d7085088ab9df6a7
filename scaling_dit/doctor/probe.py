"""The facts that one process finds out about its host, together with the other processes of the run.

All processes call these functions in the same order. A fault of one host becomes a fact, so that the others neither
wait for it nor end without a verdict.
"""

import dataclasses
import hashlib
import importlib.metadata
import math
import platform
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit._version import __version__
from scaling_dit.checkpoints.workdir import Workdir
from scaling_dit.parallel import processes, rules, topologies
from scaling_dit.training.program import place_seed
from scaling_dit.training.start import Run

STEPS = 3
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ml_dtypes")
# Columns of the array whose rows are summed.
_COLUMNS = 1024


def installed() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version(), "scaling-dit": __version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def all_reduce(mesh: Mesh, rows: jax.Array) -> jax.Array:
    """The sum of the rows of an array whose rows lie on the devices of a mesh, whole on each device."""
    return jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, PartitionSpec()))(rows)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What is asked of a host; tests give others."""

    host: Callable[[], str] = socket.gethostname
    now: Callable[[], float] = time.time
    versions: Callable[[], Mapping[str, str]] = installed
    all_reduce: Callable[[Mesh, jax.Array], jax.Array] = all_reduce


def facts(config: ConfigDict, workdir: str | None, machine: Machine) -> dict[str, Any]:
    """The facts of this process, for `judge`.

    Args:
      config: resolved; its train step runs.
      workdir: where runs of this host write; None to leave it out.
      machine: what is asked of the host.
    """
    local = jax.local_devices()
    chip = topologies.find_chip(local[0].device_kind)
    text = config_lib.to_json(config)
    return {
        "process": jax.process_index(),
        "host": machine.host(),
        "local_devices": len(local),
        "devices": len(jax.devices()),
        "devices_per_chip": chip.devices if chip else 1,
        "kind": local[0].device_kind,
        "versions": dict(machine.versions()),
        "config": hashlib.sha256(text.encode()).hexdigest()[:12],
        "storage": storage(workdir, machine) if workdir else None,
        "clock": clock(machine),
        "sum_error": sum_error(machine),
        "steps": train_steps(config),
    }


def storage(workdir: str, machine: Machine) -> dict[str, Any]:
    """Writes a file, reads those of all processes, and deletes its own.

    Returns:
      "error" in words, "" without; "seconds" that it took; "clock": seconds that this host is ahead of the store's
      clock, None if the store does not say.
    """
    began, error, ahead = time.perf_counter(), "", None
    folder, mine = epath.Path(workdir), secrets.token_hex(16)
    path = folder / f".doctor-{mine}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = machine.now()
        path.write_text(mine)
        ahead = _ahead(path, before, machine.now())
    except Exception as fault:
        error = f"cannot write to {workdir}: {_words(fault)}"
    written = [data.decode() for data in processes.gather_bytes((mine if not error else "").encode())]
    for process, theirs in enumerate(written):
        try:
            if theirs and not error and (folder / f".doctor-{theirs}").read_text() != theirs:
                error = f"reads other contents from {workdir} than process {process} wrote"
        except Exception as fault:
            whose = "its own file" if theirs == mine else f"the file of process {process}"
            error = f"cannot read {whose} in {workdir}: {_words(fault)}; do all hosts see the same folder?"
    # Nobody deletes before all have read.
    processes.gather_bytes(b"")
    try:
        if written[jax.process_index()]:
            path.unlink()
    except Exception as fault:
        error = error or f"cannot delete {path}: {_words(fault)}"
    return {"error": error, "seconds": time.perf_counter() - began, "clock": ahead}


def _ahead(path: epath.Path, before: float, after: float) -> float | None:
    """Seconds by which this host's clock is ahead of the store's; 0 if the file's time lies between both."""
    try:
        written = float(path.stat().mtime)
    except (AttributeError, NotImplementedError, TypeError):
        return None
    # Some file systems keep whole seconds.
    return max(0.0, before - 1 - written) - max(0.0, written - after - 1)


def _words(fault: Exception) -> str:
    return getattr(fault, "strerror", None) or str(fault).strip().partition("\n")[0] or type(fault).__name__


def clock(machine: Machine) -> float:
    """Seconds by which this host's clock is ahead of that of process 0: of some tries the one with the least spread."""
    tries = []
    for _ in range(3):
        # All leave this together, but for the time that the network takes.
        processes.gather_bytes(b"")
        times = [float(data) for data in processes.gather_bytes(repr(machine.now()).encode())]
        tries.append([moment - times[0] for moment in times])
    return min(tries, key=lambda offsets: max(offsets) - min(offsets))[jax.process_index()]


def sum_error(machine: Machine) -> str:
    """What is wrong with the sums and products of devices, in words; "" if nothing is."""
    devices = jax.devices()
    # Sums of these integers are exact in float32 in any order.
    largest = min(8191, 2**24 // len(devices))
    rows = (np.arange(len(devices))[:, None] * 7919 + np.arange(_COLUMNS) * 104729) % largest
    rows = rows.astype(np.float32)
    mesh = Mesh(np.array(devices), ("all",))
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    placed = jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])
    found = machine.all_reduce(mesh, placed)
    with jax.default_device(jax.local_devices()[0]):
        alone = np.asarray(jnp.asarray(rows).sum(0))
    for shard in found.addressable_shards:
        wrong = np.flatnonzero(np.asarray(shard.data) != alone)
        if len(wrong):
            at = int(wrong[0])
            value, device = np.asarray(shard.data)[at], shard.device.id
            return (
                f"the sum over all devices is {value:g} on device {device} where one device gives {alone[at]:g} "
                f"({len(wrong)} of {_COLUMNS} numbers differ)"
            )
    return product_error()


def product_error() -> str:
    """Names the local devices whose product of two matrices differs from most others'; "" if none does."""
    size = 256
    matrix = np.random.default_rng(0).integers(-8, 8, (size, size)).astype(np.float32)
    wanted = (matrix.astype(np.int64) @ matrix.astype(np.int64)).astype(np.float32)
    bad = []
    for device in jax.local_devices():
        placed = jax.device_put(matrix, device)
        if not np.array_equal(np.asarray(jnp.matmul(placed, placed, precision="highest")), wanted):
            bad.append(str(device.id))
    return f"devices {', '.join(bad)} compute a wrong product of two matrices" if bad else ""


def train_steps(config: ConfigDict) -> dict[str, Any]:
    """Runs some steps of a config from scratch, in a folder of its own.

    Returns:
      "losses", "seconds" of a step without the first, "compile_seconds" of the first, and "attention" as a start prints
      it; or "error" in words. With buckets each size compiles when it first comes, so "seconds" may hold that.
    """
    with tempfile.TemporaryDirectory(prefix="scaling-dit-doctor-") as folder:
        run, error = None, ""
        try:
            run = Run.open(config, Workdir(folder))
        except Exception as fault:
            error = _words(fault)
        # Without one of them the others would wait in the first step.
        faults = [data.decode() for data in processes.gather_bytes(error.encode())]
        if run is None or any(faults):
            return (
                {"error": error}
                if error
                else {"error": f"not run, because of another host: {next(filter(None, faults))}"}
            )
        try:
            return _run_steps(run)
        except Exception as fault:
            if jax.process_count() > 1:
                # Others wait in a collective by now.
                raise
            return {"error": _words(fault)}


def _run_steps(run: Run) -> dict[str, Any]:
    decided = run.program.decisions
    state, mesh = run.fresh_state(), run.program.mesh
    seed = place_seed(run.config.seed, mesh)
    loader = run.loader()
    losses, ends = [], [time.perf_counter()]
    for _ in range(STEPS):
        batch = rules.to_global(next(loader), mesh, run.config.batch) | {"seed": seed}
        with rules.activate(mesh):
            state, metrics = run.program.step(state, run.frozen, batch)
        losses.append(float(metrics["loss"]))
        ends.append(time.perf_counter())
    loader.close()
    found = {
        "losses": losses,
        "compile_seconds": ends[1] - ends[0],
        "seconds": (ends[-1] - ends[1]) / (STEPS - 1),
        "attention": decided["attention"],
    }
    wrong = [loss for loss in losses if not math.isfinite(loss)]
    return found | ({"error": f"the loss is not finite: {losses}"} if wrong else {})
