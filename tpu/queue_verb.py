"""The verb `tpu queue`."""

import dataclasses
import socket

from scaling_dit.cli.options import flag
from scaling_dit.cli.verb import json_flag
from scaling_dit.errors import UserError, nearest
from scaling_dit.fields import COUNT, FROM_0

from .starting import TpuVerb, dry_flag

ACTIONS = ("add", "run", "status")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Queue(TpuVerb):
    """Lets several preemptible slices work off the members of a study."""

    EXAMPLE = "scaling-dit tpu queue run --queue=gs://bucket/queues/ladder --slice=v5e-a"
    ARGUMENTS = "add|run|status"

    queue: str = flag("folder of the queue, local or gs://", required=True, path=True)
    members: str | None = flag(
        "add: JSON file with a list of name, command, depends_on, retries; - for stdin", path=True
    )
    slice: str | None = flag("run: name of this slice, the same on all of its hosts; this host's by default")
    host: int = flag("run: index of this host in the slice", 0, FROM_0)
    hosts: int = flag("run: hosts of the slice", 1, COUNT)
    logs: str = flag("run: folder for the output of the commands", "logs", path=True)
    dry_run: bool = dry_flag()
    json: bool = json_flag()

    def run(self) -> int:
        """Returns 0; of `status` 1 if a member failed; of `run` 75 after SIGTERM."""
        if len(self.arguments) != 1 or self.arguments[0] not in ACTIONS:
            given = " ".join(self.arguments)
            hint = nearest(given, ACTIONS) if given else f"known: {', '.join(ACTIONS)}"
            raise UserError(f"queue takes one of {', '.join(ACTIONS)}, not {given!r}; {hint}")
        (action,) = self.arguments
        if action == "add" and not self.members:
            raise UserError("queue add needs --members, a JSON file with a list of members")
        if self.host >= self.hosts:
            raise UserError(f"--host={self.host} of --hosts={self.hosts}: it must be 0 to {self.hosts - 1}")
        if self.hosts > 1 and not self.slice:
            raise UserError("--slice missing: the hosts of a slice find each other by its name")

        # With Orbax's paths, which --help does not wait for.
        from . import queue_worker

        return queue_worker.main(
            action,
            self.queue,
            members=self.members or "",
            owner=self.slice or socket.gethostname(),
            logs=self.logs,
            host=self.host,
            hosts=self.hosts,
            dry_run=self.dry_run,
            as_json=self.json,
        )
