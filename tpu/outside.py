"""What the verbs share: how they reach the world, and what they do around a launcher."""

import contextlib
import dataclasses
import re
import sys
import time
from collections.abc import Iterator

from scaling_dit.cli.exit_codes import INTERRUPTED
from scaling_dit.errors import UserError

from . import checks, commands, launcher
from .job import Job
from .launcher import Launcher
from .state import ENDS, Limits, Stage
from .store import Store

# Replaced by tests: they have another gcloud, other times and another planner.
RUN = commands.run
SLEEP = time.sleep
LIMITS = Limits()
PLAN = checks.plan
# (job, zone) -> the script that its machines run when they start, see `Launcher`.
STARTUP: launcher.Startup = launcher.no_startup


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
