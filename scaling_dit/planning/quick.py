"""Plans without kernels, each in its own process, which ends once the program is laid out in memory.

It needs a process because the compiler has no option to skip its kernels (`compile.outline_program`).
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

# File names.
_REQUEST, _REPLY = "request", "reply"
# Exit code of the process for an error that is not the user's mistake.
_FAILED = 70


def require_described(name: str) -> None:
    """Raises UserError for "local": only described topologies can be planned without kernels."""
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
      UserError: as `plan.make`; or the topology is "local"; or the process ended without a plan.
    """
    require_described(topology.name)
    # The process can import exactly the modules that this one can.
    path = [entry or os.getcwd() for entry in sys.path]
    with tempfile.TemporaryDirectory(prefix="scaling-dit-plan-") as name:
        folder = pathlib.Path(name)
        request = (os.getpid(), config, topology.name, topology.slices, step, price)
        (folder / _REQUEST).write_bytes(pickle.dumps(request))
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__, name],
            # The compiler writes its files to TMPDIR.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "TMPDIR": name},
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
        return f"the process that compiles ended with code {code}; its messages are above"
    return f"the process that compiles was ended by {signal.Signals(-code).name}; is there too little memory?"


def main(name: str) -> None:
    """Runs in the process: reads the request in a folder, and writes the plan or the error as the reply."""
    folder = pathlib.Path(name)
    parent, config, topology, slices, step, price = pickle.loads((folder / _REQUEST).read_bytes())
    threading.Thread(target=_end_with, args=(parent, folder), daemon=True).start()
    topologies.prepare_environment([topology])
    # Imported after the environment is prepared, because it imports jax.
    from scaling_dit.planning import plan

    reply: Plan | Exception
    try:
        reply = plan.make(config, topologies.parse(topology, slices), step, price, kernels=False)
    except (UserError, OSError) as error:
        reply = error
    partial = folder / f"{_REPLY}.partial"
    partial.write_bytes(pickle.dumps(reply))
    partial.rename(folder / _REPLY)


def _end_with(parent: int, folder: pathlib.Path) -> None:
    """Ends this process and removes its folder when its parent has ended."""
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
    # The compiler's threads still run.
    os._exit(code)
