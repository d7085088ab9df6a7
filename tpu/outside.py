"""What the verbs share: how they reach the world, and what they do around a launcher."""

import contextlib
import dataclasses
import re
import sys
import time
from collections.abc import Iterator

from scaling_dit.cli.exit_codes import INTERRUPTED
from scaling_dit.errors import UserError

from . import checks, commands, deadman, launcher
from .job import Job
from .launcher import Launcher
from .state import ENDS, Limits, Stage
from .store import Store

# Replaced by tests: they have another gcloud, other times and another planner.
RUN = commands.run
SLEEP = time.sleep
LIMITS = Limits()
PLAN = checks.plan


def deadman_switch(job: Job, zone: str) -> str:
    """The script that ends a job's machines when nobody watches them any more, see `deadman`.

    A workdir on a path relative to wherever a worker runs has heartbeats that the switch cannot find; such a job, and
    one with a command of its own and no workdir, has only its hours.
    """
    # Not at the top: --help does not wait for what paths need.
    from scaling_dit.checkpoints.workdir import Workdir

    readable = job.workdir.startswith(("gs://", "/"))
    return deadman.script(
        {
            "backend": job.backend,
            "resource": job.name,
            "zone": zone,
            "project": job.project,
            "heartbeats": str(Workdir(job.workdir).heartbeats) if readable else "",
            "minutes": job.quiet_minutes,
            "hours": job.hours,
        }
    )


# (job, zone) -> the script that its machines run when they start, see `Launcher`.
STARTUP: launcher.Startup = deadman_switch


@contextlib.contextmanager
def alone(kept: Store) -> Iterator[None]:
    """For the block, this is the only launcher of a job on this machine. Raises UserError if there is another."""
    with kept.locked() as only:
        if not only:
            raise UserError(f"{kept.folder.name} is watched by another launcher on this machine")
        yield


def watch(job: Job, kept: Store, until: Stage | None, poll: float) -> int:
    """Watches a job; Ctrl-C says what still runs."""
    one = Launcher(job, kept, RUN, say, dataclasses.replace(LIMITS, poll=poll), startup=STARTUP)
    try:
        one.watch(SLEEP, until)
    except KeyboardInterrupt:
        say(f"interrupted. {one.what_runs()}")
        return INTERRUPTED
    except BaseException:
        say(one.what_runs())
        raise
    if one.state.stage in ENDS:
        return launcher.exit_code(one.state)
    say(one.what_runs())
    return 0


def say(line: str) -> None:
    """Shows a line that is no result."""
    print(f"scaling-dit: {line}", file=sys.stderr, flush=True)


def label(name: str) -> str:
    """A user's name as a label may have it."""
    return re.sub(r"[^a-z0-9_-]", "-", name.lower())[:63]
