"""Several processes as one run: how they are joined, what they agree on, and how one that is lost ends the others.

On TPU slices jax knows the processes from their host; elsewhere each is told by flags:

    scaling-dit train ... --coordinator=10.0.0.2:8482 --processes=4 --process=0     # and 1, 2, 3 on the others

`rendezvous.py` names processes that do not come, `supervise.py` one that is lost later. Every function here is called
by all processes in the same order; in a run of one process they cost nothing.
"""

import contextlib
import dataclasses
import glob
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from scaling_dit.errors import UserError
from scaling_dit.parallel import rendezvous, supervise

_TPU_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")
_COUNTS_BYTES = 4096  # of one process's counts as JSON


@dataclasses.dataclass(frozen=True)
class Membership:
    """Which process of a run this is."""

    coordinator: str  # host:port of process 0
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
    """What the flags of a command say; None if they say nothing.

    Raises:
      UserError: some of the three but not all, or values that do not fit each other.
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
    """Whether this host has TPU chips that jax may use; nothing is started."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return (not platforms or "tpu" in platforms) and any(glob.glob(pattern) for pattern in _TPU_DEVICES)


def detected() -> Membership | None:
    """What jax finds out about a TPU slice from its host; None for a slice of one host.

    Raises:
      UserError: it found no coordinator.
    """
    from jax._src.clusters import ClusterEnv  # jax has no public name for it

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
    settings: Mapping[str, Any],
    arguments: Sequence[str],
) -> int:
    """`main()` in a process joined with the others of its run, under a parent that tells how it ends.

    Args:
      main: the work of the verb, in one process, to its exit code: mistakes are told already.
      membership: of the flags; on a TPU host None means what jax detects.
      settings: `config.processes`: seconds of `heartbeat` and `start_up`.
      arguments: of the command line, to start this process again as a child.
    """
    if membership is None and not on_tpu_host():
        return main()
    if not supervise.supervised():
        return supervise.run([sys.executable, "-m", "scaling_dit", *arguments])
    membership = detected() if membership is None else membership
    if membership is None:
        return main()
    join(membership, heartbeat=settings["heartbeat"], start_up=settings["start_up"])
    return together(main, settings["heartbeat"])


def join(membership: Membership, *, heartbeat: int, start_up: int) -> None:
    """Joins this process with the others; before any other call of jax.

    Args:
      heartbeat: seconds without a sign of life after which a process counts as lost, and the others end.
      start_up: seconds to wait for all processes.

    Raises:
      MissingProcess: processes that did not come.
      UserError: some that were started differently.
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
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of no use but on CPUs
    jax.distributed.initialize(
        membership.coordinator,
        membership.processes,
        membership.process,
        initialization_timeout=start_up,
        heartbeat_timeout_seconds=heartbeat,
        cluster_detection_method="deactivate",
    )


def together(main: Callable[[], int], heartbeat: float) -> int:
    """`main()`, such that no process waits for one that has failed.

    A process that fails ends at once, without jax's shutdown, which would wait for the others for minutes while its
    heartbeat goes on; so they notice within the heartbeat. An error of a collective, which is how a lost peer shows
    on some networks, waits for the runtime to say whose loss it was.
    """
    import jax

    code = 1  # that of a traceback
    try:
        code = main()
    except Exception as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            time.sleep(heartbeat + 15)  # the runtime ends this process in the meantime if a peer is lost
        traceback.print_exc()
    if code not in (0, supervise.LOST):  # every process comes to these two
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """Gives `reached()`: whether to save now and stop, since SIGTERM arrived at any of the processes.

    All processes call it once for each step, and it answers yes at the same call in all of them. In a run of one
    process it is a handler of this context's, and the old one comes back after.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:  # the runtime has a handler of its own and passes the news on
        calls = itertools.count()  # not the step, which a rewind takes back
        yield lambda: bool(multihost_utils.reached_preemption_sync_point(next(calls)))
        return
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield event.is_set
        return
    old = signal.signal(signal.SIGTERM, lambda number, frame: event.set())
    try:
        yield event.is_set
    finally:
        signal.signal(signal.SIGTERM, old)


def first_says(value: bool) -> bool:
    """What process 0 says, in all of them."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def total(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts by name, added up over all processes."""
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
