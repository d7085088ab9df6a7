"""Several processes as one run: joins them, lets them agree on values, and ends all of them if one is lost.

On a TPU slice jax finds the processes through their host. Elsewhere each process gets its place by flags:

    scaling-dit train ... --coordinator=10.0.0.2:8482 --processes=4 --process=0     # and 1, 2, 3 on the others

`rendezvous.py` names processes that never start, `supervise.py` a process that is lost later. All processes call the
functions of this file in the same order. In a run of one process they cost nothing.
"""

import contextlib
import dataclasses
import glob
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from scaling_dit import signals
from scaling_dit.errors import StorageError, UserError
from scaling_dit.parallel import rendezvous, supervise

_TPU_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")
# Size of one process's counts as JSON.
_COUNTS_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Membership:
    """Which process of a run this is.

    Attributes:
      coordinator: "host:port" of process 0.
      processes: the number of processes.
      process: the index of this one, from 0.
    """

    coordinator: str
    processes: int
    process: int

    def __post_init__(self) -> None:
        rendezvous.split_address(self.coordinator)
        if self.processes < 1 or not 0 <= self.process < self.processes:
            right = (
                f"0 to {self.processes - 1}" if self.processes > 0 else "given with --processes of at least 1"
            )
            raise UserError(f"--process={self.process} of --processes={self.processes}: it must be {right}")


def from_flags(coordinator: str | None, processes: int | None, process: int | None) -> Membership | None:
    """The membership that a command's flags give; None without flags.

    Raises:
      UserError: some of the three flags are missing, or their values do not fit each other.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise UserError(
            f"--{' and --'.join(missing)} missing: --coordinator, --processes, --process go together"
        )
    assert coordinator is not None and processes is not None and process is not None
    return Membership(coordinator, processes, process)


def on_tpu_host() -> bool:
    """Whether this host has TPU chips that jax may use. Does not start jax."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return (not platforms or "tpu" in platforms) and bool(tpu_devices())


def tpu_devices() -> list[str]:
    """Paths of the devices through which this host reaches its TPU chips."""
    return sorted(path for pattern in _TPU_DEVICES for path in glob.glob(pattern))


def detected() -> Membership | None:
    """The membership that jax detects on the host of a TPU slice; None for a slice of one host.

    Raises:
      UserError: jax cannot find the hosts of the slice.
    """
    # jax has no public name for this class.
    from jax._src.clusters import ClusterEnv

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, [], None, 60)
    except Exception as error:
        raise UserError(
            f"jax does not know the hosts of this TPU slice: {error}; give --coordinator"
        ) from error
    coordinator, processes, process = found[:3]
    if coordinator is None or processes is None or process is None or processes < 2:
        return None
    return Membership(str(coordinator), int(processes), int(process))


def run_supervised(
    main: Callable[[], int],
    membership: Membership | None,
    settings: Callable[[], Mapping[str, Any]],
    arguments: Sequence[str],
) -> int:
    """Runs `main()` in a child process that joins the other processes of the run; returns the exit code.

    The parent process reports in one line how the child ended.

    Args:
      main: does the verb's work in one process, reports mistakes itself, and returns an exit code.
      membership: given by flags. None on a TPU host means that jax detects it.
      settings: gives `config.processes`, with `heartbeat` and `start_up` in seconds; called in a child alone, so that
        the parent imports nothing that a config needs.
      arguments: the command line's arguments, to start this process again as a child.
    """
    if membership is None and not on_tpu_host():
        return main()
    if not supervise.supervised():
        return supervise.run([sys.executable, "-m", "scaling_dit", *arguments])
    membership = detected() if membership is None else membership
    if membership is None:
        return main()
    given = settings()
    join(membership, heartbeat=given["heartbeat"], start_up=given["start_up"])
    return together(main, given["heartbeat"])


def join(membership: Membership, *, heartbeat: int, start_up: int) -> None:
    """Joins this process with the others. Call it before anything else of jax.

    Args:
      membership: which process this is.
      heartbeat: seconds without a heartbeat after which a process counts as lost and the others stop.
      start_up: seconds to wait for all processes.

    Raises:
      MissingProcess: some processes did not connect in time.
      UserError: some processes were started differently.
    """
    import jax

    from scaling_dit._version import __version__

    rendezvous.meet(
        membership.coordinator,
        membership.processes,
        membership.process,
        start_up,
        {"jax": jax.__version__, "scaling-dit": __version__},
    )
    # Only CPUs read this option.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        membership.coordinator,
        membership.processes,
        membership.process,
        initialization_timeout=start_up,
        heartbeat_timeout_seconds=heartbeat,
        cluster_detection_method="deactivate",
    )


def together(main: Callable[[], int], heartbeat: float) -> int:
    """Runs `main()` so that no process waits long for one that has failed; returns the exit code.

    A process that fails exits at once. jax's own shutdown would wait minutes for the other processes and keep its
    heartbeat alive meanwhile; without it the others notice within `heartbeat` seconds. On some networks a lost peer
    shows as an error of a collective. After such an error this process waits for jax's runtime to name the lost peer.
    """
    import jax

    # The exit code of Python after a traceback.
    code = 1
    try:
        code = main()
    except Exception as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            # If a peer is lost, the runtime ends this process during the wait.
            time.sleep(heartbeat + 15)
        traceback.print_exc()
    # All processes finish or stop for a lost peer together; any other exit code is of this process alone.
    if code not in (0, supervise.LOST):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """Gives `reached()`, which is true once any process has received a signal: save a checkpoint now and stop.

    All processes call `reached()` once a step, and it becomes true at the same call in all of them. Which signals, and
    what a second one does, is said in `signals.py`.
    """
    import jax
    from jax.experimental import multihost_utils

    # With several processes jax's runtime has its own handler and informs all of them.
    if jax.process_count() > 1:
        # A count of calls and not the step, because a rewind sets the step back.
        calls, passed_on = itertools.count(), list[int]()

        def reached_by_all() -> bool:
            # That handler knows SIGTERM only.
            if here() and not passed_on:
                passed_on.append(signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            return bool(multihost_utils.reached_preemption_sync_point(next(calls)))

        with signals.deferred(leave=(signal.SIGTERM,)) as here:
            yield reached_by_all
        return
    with signals.deferred() as reached:
        yield reached


def first_does(work: Callable[[], None]) -> None:
    """Has process 0 do something; where it fails with a UserError, all processes raise it.

    Raises:
      UserError, StorageError: of process 0.
    """
    import jax

    fault: UserError | None = None
    if jax.process_index() == 0:
        try:
            work()
        except UserError as error:
            fault = error
    if (agreed := agree(fault)) is not None:
        raise agreed


def agree(
    fault: UserError | None, kinds: Sequence[type[UserError]] = (StorageError, UserError)
) -> UserError | None:
    """The mistake that all processes report, if any has found one; all call this at the same place.

    Args:
      fault: what this process has found.
      kinds: of mistakes; the earlier one counts first, then the lower number of a process. One of another kind counts
        as a UserError.
    """
    kind = type(fault) if type(fault) in kinds else UserError
    found = gather_bytes(f"{kinds.index(kind)} {fault}".encode() if fault else b"")
    ranks = {number: int(text.partition(b" ")[0]) for number, text in enumerate(found) if text}
    if not ranks:
        return None
    first = min(ranks, key=lambda number: (ranks[number], number))
    if len(found) == 1:
        return fault
    return kinds[ranks[first]](found[first].decode().partition(" ")[2])


def first_says(value: bool) -> bool:
    """The value of process 0, in all processes."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def total(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts by name, summed over all processes."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return dict(counts)
    text = json.dumps(dict(counts)).encode()
    if len(text) > _COUNTS_BYTES:
        raise ValueError(f"counts of {len(text)} bytes; at most {_COUNTS_BYTES} fit")
    row = np.frombuffer(text.ljust(_COUNTS_BYTES), np.uint8)
    added: dict[str, int] = {}
    for other in np.asarray(multihost_utils.process_allgather(row)).reshape(-1, _COUNTS_BYTES):
        for name, count in json.loads(other.tobytes()).items():
            added[name] = added.get(name, 0) + count
    return dict(sorted(added.items()))


def gather_numbers(row: Sequence[float]) -> list[list[float]]:
    """The rows of all processes, in their order; every process gives as many numbers. In float32 if several do."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [list(row)]
    rows = np.asarray(multihost_utils.process_allgather(np.asarray(row, np.float32)))
    return rows.reshape(jax.process_count(), -1).tolist()


def barrier() -> None:
    """Returns once all processes have called it."""
    gather_bytes(b"")


def gather_bytes(data: bytes) -> list[bytes]:
    """What every process gives, in the order of the processes; of any lengths."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [data]
    lengths = np.asarray(multihost_utils.process_allgather(np.asarray(len(data), np.int32))).reshape(-1)
    row = np.frombuffer(data.ljust(max(1, int(lengths.max())), b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row)).reshape(len(lengths), -1)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]
