"""Plans without kernels, each in a process of its own, which is ended as soon as the program is laid out in memory.

A process, because the compiler has no way to be told that its kernels are not wanted (`plan_compile.outline_program`).
"""

import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING

from scaling_dit.errors import UserError
from scaling_dit.parallel import topologies

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from scaling_dit.planning.plan import Plan

_REQUEST, _REPLY = "request", "reply"  # files
_FAILED = 70  # exit code of the process for what is no mistake of the user's; an error in Python ends with 1 as well


def require_described(name: str) -> None:
    """Raises UserError for the topology of the devices here, which is none that is described."""
    if name == topologies.LOCAL:
        raise UserError(
            f"--quick is for described slices, such as {topologies.EXAMPLES['v5p']}; it cannot go together with "
            f"--topology={topologies.LOCAL}"
        )


def make(
    config: "ConfigDict", topology: topologies.Topology, step: str = "train", price: float | None = None
) -> "Plan":
    """As `plan.make` with `kernels=False`.

    Raises:
      UserError: as `plan.make`; the topology is that of the devices here; or the process ended without a plan.
    """
    require_described(topology.name)
    path = [
        entry or os.getcwd() for entry in sys.path
    ]  # what can be imported here can be there, and nothing else
    with tempfile.TemporaryDirectory(prefix="scaling-dit-plan-") as name:
        folder = pathlib.Path(name)
        request = (os.getpid(), config, topology.name, topology.slices, step, price)
        (folder / _REQUEST).write_bytes(pickle.dumps(request))
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__, name],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path),
                "TMPDIR": name,
            },  # where the compiler writes
            stdout=subprocess.DEVNULL,
        )
        if not (folder / _REPLY).exists():
            raise UserError(_how_it_ended(done.returncode))
        reply = pickle.loads((folder / _REPLY).read_bytes())
    if isinstance(reply, Exception):
        raise reply
    return reply


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"the process that compiles ended with code {code}; what it says is above"
    return f"the process that compiles was ended by {signal.Signals(-code).name}; is there too little memory?"


def main(name: str) -> None:
    """The process: takes the request in a folder, and leaves the plan, or the mistake found, as the reply."""
    folder = pathlib.Path(name)
    parent, config, topology, slices, step, price = pickle.loads((folder / _REQUEST).read_bytes())
    threading.Thread(target=_end_with, args=(parent, folder), daemon=True).start()
    topologies.prepare_environment([topology])
    from scaling_dit.planning import plan  # not before: it imports jax

    reply: Plan | Exception
    try:
        reply = plan.make(config, topologies.parse(topology, slices), step, price, kernels=False)
    except (UserError, OSError) as error:
        reply = error
    partial = folder / f"{_REPLY}.partial"
    partial.write_bytes(pickle.dumps(reply))
    partial.rename(folder / _REPLY)


def _end_with(parent: int, folder: pathlib.Path) -> None:
    """Ends this process, and removes its folder, when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(_FAILED)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
        code = 0
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            sys.excepthook(type(error), error, error.__traceback__)
        code = _FAILED
    sys.stderr.flush()
    os._exit(code)  # the compiler's threads still run
