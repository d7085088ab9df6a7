"""What a back-end does: it gives the commands of its control plane, and reads their answers."""

import calendar
import collections
import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from scaling_dit import files

from ..commands import Command, Result, Runner
from ..job import Job
from ..observations import Answer, Phase, Resource


@dataclasses.dataclass(frozen=True)
class Request:
    """One request for a resource.

    Attributes:
      zone: where.
      number: counts the requests of a job, from 1.
      seconds: how long the machines may run.
      expires: seconds since the epoch at which they have certainly ended, for `sweep`.
      startup: file with the script that the machines run when they start; "" = none.
    """

    zone: str
    number: int
    seconds: float
    expires: int
    startup: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """A resource of ours, as a listing shows it.

    Attributes:
      backend: name of the back-end.
      name, zone: of the resource.
      labels: see `Job.labels`.
      state: in the control plane's words.
      phase: as far as the listing says.
      created: seconds since the epoch; 0 = not known.
      shape: such as "v5e:4x8"; "" = the listing does not say.
      slices: how many.
    """

    backend: str
    name: str
    zone: str
    labels: Mapping[str, str]
    state: str
    phase: Phase
    created: float
    shape: str
    slices: int = 1


class Backend(Protocol):
    """One control plane. Methods that return commands run nothing."""

    # (state in its own words, phase), for the docs.
    STATES: tuple[tuple[str, Phase], ...]

    def check(self, job: Job) -> None:
        """Raises UserError for a job that this control plane cannot run."""

    def create(self, job: Job, request: Request) -> list[Command]:
        """The commands that ask for the job's resource, in order."""
        ...

    def delete(self, job: Job, zone: str, number: int) -> list[Command]:
        """The commands that delete the job's resource, in order."""
        ...

    def describe(self, job: Job, zone: str) -> Command:
        """The command that shows the job's resource."""
        ...

    def observe(self, job: Job, zone: str, runner: Runner) -> Resource:
        """The job's resource in a zone, by its name; never raises for what gcloud answers."""
        ...

    def on_workers(self, job: Job, zone: str, nodes: Sequence[str], text: str) -> list[Command]:
        """The commands that run shell text on all workers, at the same time."""
        ...

    def on_worker(
        self, job: Job, zone: str, nodes: Sequence[str], worker: int, text: str, flags: Sequence[str] = ()
    ) -> Command:
        """The command that runs shell text on one worker, counted over all slices; `flags` are those of ssh."""
        ...

    def copy(self, job: Job, zone: str, nodes: Sequence[str], local: str, remote: str) -> list[Command]:
        """The commands that copy a file to a path below the home folder of all workers."""
        ...

    def maintain(self, job: Job, zone: str, nodes: Sequence[str], worker: int) -> Command:
        """The command that simulates a maintenance event at a worker."""
        ...

    def listing(self, project: str, zone: str) -> Command:
        """The command that lists the resources of a zone."""
        ...

    def rows(self, zone: str, found: Any) -> list[Row]:
        """Those of a listing that are ours."""
        ...

    def delete_row(self, row: Row, project: str) -> list[Command]:
        """The commands that delete a listed resource."""
        ...


def gcloud(*words: str, track: str = "", project: str = "", zone: str = "") -> Command:
    """A gcloud command. `track` is "" (generally available) or "alpha"."""
    where = [f"--project={project}"] if project else []
    where += [f"--zone={zone}"] if zone else []
    return ("gcloud", *([track] if track else []), *words, *where)


def mapping(values: Mapping[str, str]) -> str:
    """A dict as gcloud's flags take it; a value with a comma needs another delimiter."""
    delimiter = next(mark for mark in ",|~;\x1f" if not any(mark in value for value in values.values()))
    text = delimiter.join(f"{key}={value}" for key, value in values.items())
    return text if delimiter == "," else f"^{delimiter}^{text}"


def duration(seconds: float) -> str:
    """Seconds as gcloud takes a duration."""
    return f"{max(1, int(seconds))}s"


def seconds_of(stamp: str) -> float:
    """Seconds since the epoch of a timestamp such as 2026-11-29T10:00:00.123Z or with an offset; 0 if it is none."""
    found = re.match(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.\d+)?(Z|[+-]\d\d:\d\d)", stamp)
    if not found:
        return 0.0
    seconds = calendar.timegm(time.strptime(found[1], "%Y-%m-%dT%H:%M:%S"))
    if found[2] != "Z":
        hours, minutes = map(int, found[2][1:].split(":"))
        seconds -= (3600 * hours + 60 * minutes) * (-1 if found[2][0] == "-" else 1)
    return float(seconds)


def parsed(result: Result) -> Any:
    """The JSON that a command printed; None if it is none."""
    try:
        return files.parse_json(result.out)
    except ValueError:
        return None


def counted(words: Sequence[str]) -> str:
    """Equal words once, with their number: "READY x 3, PREEMPTED"."""
    counts = collections.Counter(words)
    return ", ".join(f"{word} x {count}" if count > 1 else word for word, count in counts.items())


_ABSENT = re.compile(r"NOT_FOUND|was not found|could not be found|HTTPError 404")
_EXISTS = re.compile(r"ALREADY_EXISTS|already exists|HTTPError 409")
_REFUSED = re.compile(
    r"RESOURCE_EXHAUSTED|[Qq]uota|QUOTA|[Cc]apacity|STOCKOUT|UNAVAILABLE|resources available"
)
_WRONG = re.compile(
    r"PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|NOT_FOUND|FAILED_PRECONDITION|unrecognized arguments"
    r"|[Ii]nvalid|must be specified|auth(?:entication)? tokens|active account|was not found|SERVICE_DISABLED"
)


def clears(command: Command) -> bool:
    """Whether a command of a request only removes what an earlier one left; that may not be there, or be in use."""
    return command[1:4] == ("compute", "instance-templates", "delete")


def is_absent(result: Result) -> bool:
    """Whether a command failed because the thing it names does not exist."""
    return result.code != 0 and bool(_ABSENT.search(result.err))


def answer(result: Result) -> tuple[Answer, str]:
    """How a request ended, and why it was refused. One that was made before counts as done."""
    if result.code == 0 or (result.code > 0 and _EXISTS.search(result.err)):
        return Answer.OK, ""
    if result.code > 0 and _REFUSED.search(result.err):
        return Answer.REFUSED, result.reason
    if result.code > 0 and _WRONG.search(result.err):
        return Answer.WRONG, result.reason
    return Answer.NONE, result.reason
