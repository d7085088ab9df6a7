"""What a launcher can know about a job: the phase of its resource, and what its workers say.

The phases are the same for both back-ends. Each back-end maps the states of its control plane to them; the maps are in
`backends/`, and `docs/tpu_states.md` shows them.
"""

import dataclasses
import enum


class Phase(enum.Enum):
    """What a resource is doing; the value says it in words."""

    ABSENT = "there is none"
    FOREIGN = "one of that name belongs to something else"
    WAITING = "waits for capacity"
    STARTING = "its machines start, or are repaired"
    READY = "its machines run"
    SICK = "its machines run, unhealthy"
    PREEMPTED = "the service took its machines away"
    PAUSED = "a user suspended it"
    FAILED = "the service could not provide it"
    DELETING = "is being deleted"
    UNKNOWN = "could not be asked"


# Phases in which machines may run, and so cost money.
BILLED = frozenset({Phase.STARTING, Phase.READY, Phase.SICK, Phase.DELETING, Phase.UNKNOWN})


class Work(enum.Enum):
    """What the workers of a READY resource say about the job; the value says it in words."""

    UNASKED = "not asked"
    SILENT = "not all workers answer"
    NONE = "this attempt was not started on all workers"
    RUNNING = "runs"
    ENDED = "ended with an exit code"
    GONE = "its process is gone, without an exit code"


class Answer(enum.Enum):
    """How the last actions ended."""

    NONE = "nothing was done, or it is not known how it ended"
    OK = "done"
    REFUSED = "refused for now"
    WRONG = "refused, as it will be again"


@dataclasses.dataclass(frozen=True)
class Report:
    """What the workers say, all of them together.

    Attributes:
      work: see `Work`.
      code: exit code of an ENDED job: the one of all workers that decides, see `summarize`.
      step: the last step that a worker's log names; -1 if none is.
    """

    work: Work = Work.UNASKED
    code: int = 0
    step: int = -1


@dataclasses.dataclass(frozen=True)
class Resource:
    """A resource as its control plane describes it, in the words of both.

    Attributes:
      phase: see `Phase`.
      detail: the control plane's own words, for the user.
      machines: identifies the machines; other machines have another value. "" before there are any.
      nodes: names by which workers are reached: nodes of a queued resource, VMs of a group.
      created: seconds since the epoch; 0 if not known.
      partly: whether some machines run although the phase says otherwise, as when one of several was taken away.
    """

    phase: Phase
    detail: str = ""
    machines: str = ""
    nodes: tuple[str, ...] = ()
    created: float = 0.0
    partly: bool = False

    @property
    def billed(self) -> bool:
        """Whether machines may run, and so cost money."""
        return self.partly or self.phase in BILLED


@dataclasses.dataclass(frozen=True)
class Observation:
    """Everything that one turn of the machine looks at.

    Attributes:
      now: seconds since the epoch.
      resource: the one in the state's zone.
      found: zones, by their index among the job's, that hold a resource of this job; None if not asked for, or if some
        zone could not be asked.
      report: what the workers say.
      answer: how the last actions ended.
      reason: why they were refused.
      stop: whether a user asked to end the job.
    """

    now: float
    resource: Resource = Resource(Phase.UNKNOWN)
    found: tuple[int, ...] | None = None
    report: Report = Report()
    answer: Answer = Answer.NONE
    reason: str = ""
    stop: bool = False


@dataclasses.dataclass(frozen=True)
class Worker:
    """What one worker says. `code` is None while the job runs; `age` is the seconds since it ended."""

    name: str
    attempt: int
    work: Work
    code: int | None = None
    step: int = -1
    age: float = 0.0


# A mistake (2), a loss that is not finite (3), too many spikes (4): the same command would end in the same way.
FINAL_CODES = (2, 3, 4)
# EX_TEMPFAIL: the same command resumes.
RESUME_CODE = 75
# EX_IOERR: a disk or bucket refused for as long as the job tried; the same command resumes once it no longer does.
STORAGE_CODE = 74
# Of SIGINT, which only a user sends: a launcher stops a job by SIGTERM.
INTERRUPTED_CODE = 130
# The codes of several workers, from the one that decides to the one that says least. A worker whose code is not here
# and is no signal's failed by itself; the others then lost it, or a signal ended them.
_DECIDING = (*FINAL_CODES, INTERRUPTED_CODE, STORAGE_CODE)
_SIGNALS = 128
# Seconds after which workers that still run are given up when another has ended. The job's own heartbeat is shorter.
STRAGGLERS = 600.0


def _weight(code: int) -> tuple[int, int]:
    """Sorts exit codes, the one that decides first."""
    if code in _DECIDING:
        return 0, _DECIDING.index(code)
    if code == 0:
        return 3, 0
    signalled = code >= _SIGNALS
    return (1, 0) if code != RESUME_CODE and not signalled else (2, int(signalled))


def summarize(workers: tuple[Worker, ...], expected: int, attempt: int) -> Report:
    """What all workers of an attempt say together.

    The job has ended when every worker has ended, or when one ended `STRAGGLERS` seconds ago and others still run. Of
    several exit codes one of `FINAL_CODES` decides, then a user's interruption, then storage that refused one of them,
    then any other failure, then 75, then a signal: whoever loses another worker ends with 75.
    """
    step = max((worker.step for worker in workers), default=-1)
    if len({worker.name for worker in workers}) < expected:
        return Report(Work.SILENT, step=step)
    if any(worker.attempt != attempt for worker in workers):
        return Report(Work.NONE, step=step)
    ended = [worker for worker in workers if worker.work is Work.ENDED]
    if len(ended) == len(workers):
        return Report(Work.ENDED, min((worker.code or 0 for worker in ended), key=_weight), step)
    running = [worker for worker in workers if worker.work is Work.RUNNING]
    if not running or any(worker.age > STRAGGLERS for worker in ended):
        return Report(Work.GONE, step=step)
    return Report(Work.RUNNING, step=step)
