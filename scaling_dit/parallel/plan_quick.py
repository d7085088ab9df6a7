"""Plans without kernels, each in a process of its own, which is ended as soon as the program is laid out in memory.

A process, because the compiler has no way to be told that its kernels are not wanted (`plan_compile.outline_program`).
"""

import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

from scaling_dit.errors import UserError
from scaling_dit.parallel import topologies

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from scaling_dit.parallel.plan import Plan

_REQUEST, _REPLY = "request", "reply"  # files


def make(
    config: "ConfigDict", topology: topologies.Topology, step: str = "train", price: float | None = None
) -> "Plan":
    """As `plan.make` with `kernels=False`.

    Raises:
      UserError: as `plan.make`; or the topology is that of the devices here.
      RuntimeError: the process ended without a reply.
    """
    if topology.name == topologies.LOCAL:
        raise UserError(
            f"--quick is for described slices, such as {topologies.EXAMPLES['v5p']}; it cannot go together with "
            f"--topology={topologies.LOCAL}"
        )
    with tempfile.TemporaryDirectory(prefix="scaling-dit-plan-") as name:
        folder = pathlib.Path(name)
        (folder / _REQUEST).write_bytes(pickle.dumps((config, topology, step, price)))
        done = subprocess.run(
            [sys.executable, "-m", __name__, name],
            env={**os.environ, "TMPDIR": name},  # the compiler's files are removed with the others
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if not (folder / _REPLY).exists():
            raise RuntimeError(f"no plan, exit code {done.returncode}:\n{done.stderr}")
        reply = pickle.loads((folder / _REPLY).read_bytes())
    if isinstance(reply, UserError):
        raise reply
    return reply


def main(name: str) -> None:
    """The process: takes the request in a folder, and leaves the plan, or the user's mistake, as the reply."""
    folder = pathlib.Path(name)
    config, topology, step, price = pickle.loads((folder / _REQUEST).read_bytes())
    topologies.prepare_environment([topology.name])
    from scaling_dit.parallel import plan  # not before: it imports jax

    reply: Plan | UserError
    try:
        reply = plan.make(config, topology, step, price, kernels=False)
    except UserError as error:
        reply = error
    partial = folder / f"{_REPLY}.partial"
    partial.write_bytes(pickle.dumps(reply))
    partial.rename(folder / _REPLY)
    os._exit(0)  # the compiler's threads still run


if __name__ == "__main__":
    main(sys.argv[1])
