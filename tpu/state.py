"""The state machine of a job: a pure function (job, state, observation) -> (state, actions).

It decides everything: when to ask for a resource and in which zone, when to delete it, when to start the job on it, and
when to stop. It knows no clock, no gcloud and no back-end. The rules that it keeps:

- A resource has the name of its job, and one in another zone is asked for only once this one is seen to be gone. So a
  job never has two, and an answer that was lost does no harm: asking again finds the first one.
- It ends only when its resource is seen to be gone, or does not run because a user suspended it.
- Time in which machines may have run counts against the budget, also time in which nobody looked.

`docs/tpu_states.md` has its table, written by `tools/tpu_states.py` from the function itself.
"""

import dataclasses
import enum
from typing import Any

from .job import Job
from .observations import (
    FINAL_CODES,
    INTERRUPTED_CODE,
    RESUME_CODE,
    STORAGE_CODE,
    Answer,
    Observation,
    Phase,
    Work,
)


class Stage(enum.Enum):
    """What the launcher is at; the value says it in words."""

    FIND = "looks for a resource of the job"
    CREATE = "waits until it may ask for a resource"
    WAIT = "waits for the resource"
    SETUP = "prepares the workers"
    RUN = "watches the job"
    DELETE = "deletes the resource"
    DONE = "the job is done"
    STOPPED = "the job was stopped"
    PAUSED = "a user suspended the resource"


# Phases in which machines have stopped, and do not start again by themselves.
_STOPPED = (Phase.PREEMPTED, Phase.PAUSED, Phase.FAILED)
ENDS = (Stage.DONE, Stage.STOPPED, Stage.PAUSED)
# What a job waits out that ended with the exit code of storage.
REFUSED = "its disk or bucket refused"


class After(enum.Enum):
    """What follows when the resource is gone; the value says it in words."""

    END = "the end"
    RETRY = "another try in the same zone"
    NEXT = "a try in the next zone"


class Do(enum.Enum):
    """An action; the value says it in words."""

    CREATE = "ask for the resource"
    SET_UP = "prepare all workers"
    START = "start the job on all workers"
    SAVE = "have the job save and stop"
    DELETE = "delete the resource"


@dataclasses.dataclass(frozen=True)
class Action:
    """One thing to do, in the zone of this index among the job's."""

    do: Do
    zone: int
    attempt: int = 0


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds, which a test may shorten.

    Attributes:
      poll: between two observations.
      save: what the job is given to save before a planned deletion.
      delete: what a deletion may take; together with `poll` and `save` it is kept back from the budget.
      start: how long machines may start or be repaired.
      sick: how long machines may be unhealthy.
      silent: how long workers may not answer.
      refused: how long disk or bucket may refuse the job at one step.
      refused_pause: before it is started again then.
      again: after which a deletion that has no effect is asked for again.
      back_off: the first pause before another request; it doubles up to `back_off_most`.
      setups: how often a failing set-up is tried.
      switch: whether machines end themselves when their time is over.
    """

    poll: float = 60.0
    save: float = 120.0
    delete: float = 300.0
    start: float = 2400.0
    sick: float = 1800.0
    silent: float = 900.0
    refused: float = 3600.0
    refused_pause: float = 300.0
    again: float = 180.0
    back_off: float = 60.0
    back_off_most: float = 1800.0
    setups: int = 3
    switch: bool = False

    @property
    def reserve(self) -> float:
        """What is kept back from a budget in order to end within it."""
        return 2 * self.poll + self.save + self.delete


@dataclasses.dataclass(frozen=True)
class State:
    """Everything that the machine remembers; times are seconds since the epoch.

    Attributes:
      stage: see `Stage`.
      zone: index among the job's zones.
      trouble: what it waits out; "" = nothing.
      since: when that began.
      until: when the next request may be made.
      tries: requests in a row that led to no running job.
      attempt: starts of the job.
      restarts: starts after the first, and requests after a preemption.
      failed_at: step of the last failure that was no preemption; -2 = none.
      refused_at: step at which disk or bucket refused the job; -2 = it got further since, or none did.
      refused: when that began.
      setups: failures of the set-up in a row.
      machines: those that were set up last.
      alive: whether the resource was seen since it was asked for.
      used: seconds that machines ran, at most.
      seen: the last observation.
      billed: whether machines may have run then.
      stopped: whether the machines were seen to have stopped for good.
      out: whether a resource may exist.
      allowed: seconds that the last resource may run; a switch on its machines ends it then.
      deadline: when that switch ends the machines; 0 = they were not seen running yet.
      asked: when the resource or its deletion was asked for.
      after: what follows the deletion.
      verdict: why the job ends, in words.
      failed: whether it ends without having finished.
      resources: how many resources were asked for.
    """

    stage: Stage = Stage.FIND
    zone: int = 0
    trouble: str = ""
    since: float = 0.0
    until: float = 0.0
    tries: int = 0
    attempt: int = 0
    restarts: int = 0
    failed_at: int = -2
    refused_at: int = -2
    refused: float = 0.0
    setups: int = 0
    machines: str = ""
    alive: bool = False
    used: float = 0.0
    seen: float = 0.0
    billed: bool = False
    stopped: bool = False
    out: bool = False
    allowed: float = 0.0
    deadline: float = 0.0
    asked: float = 0.0
    after: After = After.END
    verdict: str = ""
    failed: bool = False
    resources: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        return {**vars(self), "stage": self.stage.name, "after": self.after.name}


def from_dict(values: dict[str, Any]) -> State:
    """The state that `State.to_dict` wrote. Raises KeyError or TypeError for another version's."""
    named = {"stage": Stage[values["stage"]], "after": After[values["after"]]}
    return State(**{**values, **named})


Step = tuple[State, tuple[Action, ...]]


def resumed(state: State) -> State:
    """The state with which another launcher continues: it looks for the resource, unless it was deleting it."""
    if state.stage in (*ENDS, Stage.DELETE):
        return state
    return dataclasses.replace(state, stage=Stage.FIND)


def left(job: Job, state: State, limits: Limits) -> float:
    """Seconds that the job may still run before its resource has to be deleted."""
    return 3600 * job.hours - state.used - limits.reserve


def step(job: Job, state: State, seen: Observation, limits: Limits) -> Step:
    """One turn: what is known -> the next state, and what to do."""
    if state.stage in ENDS:
        return state, ()
    if not _looks_elsewhere(state, seen):
        state = _charge(state, seen, limits)
    if state.stage is not Stage.DELETE or state.after is not After.END:
        if seen.stop:
            return _end(state, seen, "stopped by the user", failed=True)
        # A finished job may say so after its last minute.
        finished = seen.report.work is Work.ENDED and seen.report.code == 0
        if left(job, state, limits) <= 0 and not finished:
            used = f"{state.used / 3600:.2f} of {job.hours:.2f} hours used, and the rest is kept to end within it"
            return _end(state, seen, f"the budget is used up: {used}", failed=True)
    return _STAGES[state.stage](job, state, seen, limits)


def _looks_elsewhere(state: State, seen: Observation) -> bool:
    """Whether a search found the resource in another zone, so that `seen.resource` is not the one it runs on."""
    return state.stage is Stage.FIND and bool(seen.found) and state.zone not in (seen.found or ())


def _charge(state: State, seen: Observation, limits: Limits) -> State:
    """Adds the time since the last observation, if machines may have run in it."""
    phase, gap = seen.resource.phase, max(0.0, seen.now - state.seen) if state.seen else 0.0
    if phase is Phase.UNKNOWN and not state.billed:
        # What may have run meanwhile is added once it is known.
        return state
    billed = seen.resource.billed
    # A resource that still waits has never run; any other may have run while nobody looked. What was seen to have
    # stopped does not start again by itself.
    stopped = phase in _STOPPED and not billed
    unseen = (
        state.out and not state.stopped and phase is not Phase.WAITING and (stopped or gap > 3 * limits.poll)
    )
    if not (billed or state.billed or unseen):
        gap = 0.0
    elif not billed and limits.switch:
        # It cannot have outlived the switch on its machines by more than its deletion.
        rest = max(0.0, state.deadline - state.seen) if state.deadline else state.allowed
        gap = min(gap, rest + limits.delete)
    deadline = state.deadline
    if billed and not deadline:
        deadline = seen.now + state.allowed
    used = state.used + gap
    return dataclasses.replace(
        state, used=used, seen=seen.now, billed=billed, stopped=stopped, deadline=deadline
    )


def _end(state: State, seen: Observation, verdict: str, *, failed: bool) -> Step:
    """Ends the job: deletes the resource first, wherever there may be one."""
    state = dataclasses.replace(state, verdict=verdict, failed=failed)
    if state.stage is Stage.DELETE:
        return dataclasses.replace(state, after=After.END), ()
    if state.stage is Stage.CREATE:
        return _over(state), ()
    if state.stage is Stage.FIND:
        if seen.found is None:
            return state, ()
        if len(seen.found) > 1:
            return state, tuple(Action(Do.DELETE, zone) for zone in seen.found)
        if seen.found and state.zone != seen.found[0]:
            # The next observation is of that zone.
            return dataclasses.replace(state, zone=seen.found[0]), ()
        if seen.found:
            state = dataclasses.replace(state, alive=True)
        elif not state.out:
            return _over(state), ()
    return _delete(state, seen, After.END)


def _over(state: State) -> State:
    stage = Stage.STOPPED if state.failed else Stage.DONE
    return dataclasses.replace(state, stage=stage, billed=False, out=False)


def _left_alone(state: State, stage: Stage, verdict: str) -> State:
    """The end of a job whose resource is gone already, does not run, or is not its own."""
    return dataclasses.replace(state, stage=stage, verdict=verdict, failed=True, billed=False, out=False)


def _foreign(job: Job, state: State) -> State:
    return _left_alone(
        state,
        Stage.STOPPED,
        f"{job.zones[state.zone]} has a resource named {job.name} that is not this job's; nothing was done to it: "
        "give the job another --name",
    )


def _vanished(job: Job, state: State) -> State:
    return _left_alone(
        state,
        Stage.STOPPED,
        f"{job.name} in {job.zones[state.zone]} was deleted from outside; launch it again to resume",
    )


def _delete(state: State, seen: Observation, after: After) -> Step:
    """Begins to delete the resource; a job that runs is given time to save first."""
    changed = _to(state, Stage.DELETE, after=after, asked=seen.now)
    running = seen.report.work in (Work.RUNNING, Work.UNASKED, Work.SILENT)
    save = state.attempt and seen.resource.phase in (Phase.READY, Phase.SICK) and running
    first = (Action(Do.SAVE, state.zone, state.attempt),) if save else ()
    return changed, (*first, Action(Do.DELETE, state.zone, state.attempt))


def _again(job: Job, state: State, seen: Observation, verdict: str, after: After = After.RETRY) -> Step:
    """Deletes the resource in order to ask for another, as long as restarts are left."""
    if state.attempt:
        state = dataclasses.replace(state, restarts=state.restarts + 1)
        if state.restarts > job.budget.restarts:
            return _end(state, seen, _no_restarts(job, verdict), failed=True)
        state = dataclasses.replace(state, attempt=state.attempt + 1)
    return _delete(dataclasses.replace(state, verdict=verdict), seen, after)


def _no_restarts(job: Job, verdict: str) -> str:
    return f"{job.budget.restarts} restarts are used up; last: {verdict}"


def _to(state: State, stage: Stage, **changes: Any) -> State:
    """The state at the beginning of a stage."""
    return dataclasses.replace(state, **{"stage": stage, "trouble": "", "since": 0.0, **changes})


def _trouble(state: State, seen: Observation, what: str, seconds: float) -> tuple[State, bool]:
    """(the state that remembers when the trouble began, whether it has lasted this long)."""
    if state.trouble != what:
        return dataclasses.replace(state, trouble=what, since=seen.now), False
    return state, seen.now - state.since >= seconds


# The stages. Each takes what is not handled in `step` already.


def _find(job: Job, state: State, seen: Observation, limits: Limits) -> Step:
    if seen.found is None:
        return state, ()
    if not seen.found:
        if seen.resource.phase is Phase.FOREIGN:
            return _foreign(job, state), ()
        if seen.resource.phase is not Phase.ABSENT:
            return state, ()
        return _create(job, _to(state, Stage.CREATE, alive=False), seen, limits)
    keep = state.zone if state.zone in seen.found else seen.found[0]
    if len(seen.found) > 1 or keep != state.zone:
        extra = tuple(Action(Do.DELETE, zone) for zone in seen.found if zone != keep)
        return dataclasses.replace(state, zone=keep), extra
    if seen.resource.phase is Phase.DELETING:
        return state, ()
    return _wait(job, _to(state, Stage.WAIT, alive=True, out=True), seen, limits)


def _create(job: Job, state: State, seen: Observation, limits: Limits) -> Step:
    if seen.now < state.until:
        return state, ()
    changed = _to(
        state,
        Stage.WAIT,
        alive=False,
        out=True,
        asked=seen.now,
        allowed=left(job, state, limits) + limits.save,
        deadline=0.0,
        resources=state.resources + 1,
    )
    return changed, (Action(Do.CREATE, state.zone, state.attempt),)


def _pause(job: Job, state: State, seen: Observation, limits: Limits, after: After) -> State:
    """The state that waits before the next request, longer after every one in a row without success."""
    wait = min(limits.back_off * 2 ** min(state.tries, 20), limits.back_off_most)
    zone = (state.zone + 1) % len(job.zones) if after is After.NEXT else state.zone
    changes = {
        "until": seen.now + wait,
        "tries": state.tries + 1,
        "alive": False,
        "out": False,
        "machines": "",
    }
    return _to(state, Stage.CREATE, zone=zone, **changes)


def _wait(job: Job, state: State, seen: Observation, limits: Limits) -> Step:
    phase = seen.resource.phase
    if phase is Phase.ABSENT:
        return _not_there(job, state, seen, limits)
    if phase is Phase.UNKNOWN:
        return state, ()
    state = dataclasses.replace(state, alive=True)
    if phase is Phase.READY:
        if state.attempt and state.machines and state.machines != seen.resource.machines:
            # They were replaced while no launcher looked.
            return _restart(job, state, seen, "the machines were replaced", new=True)
        changed = _to(state, Stage.SETUP, machines=seen.resource.machines)
        return changed, (Action(Do.SET_UP, state.zone, state.attempt),)
    if phase is Phase.WAITING:
        state, late = _trouble(state, seen, phase.value, 3600 * job.patience)
        if late and len(job.zones) > 1:
            return _again(job, state, seen, f"{job.zones[state.zone]}: no capacity", After.NEXT)
        return state, ()
    return _not_ready(job, state, seen, limits)


def _not_there(job: Job, state: State, seen: Observation, limits: Limits) -> Step:
    """A resource that was asked for and is not there."""
    where = f"{job.zones[state.zone]}: {seen.reason}"
    if seen.answer is Answer.WRONG:
        return _end(dataclasses.replace(state, stage=Stage.CREATE), seen, where, failed=True)
    if seen.answer is Answer.REFUSED:
        return _pause(job, dataclasses.replace(state, verdict=where), seen, limits, After.NEXT), ()
    if state.alive:
        return _vanished(job, state), ()
    # The answer was lost, or the request does not show yet. Its name makes a second one harmless.
    if seen.now - state.asked < limits.poll:
        return state, ()
    return dataclasses.replace(state, asked=seen.now), (Action(Do.CREATE, state.zone, state.attempt),)


def _not_ready(job: Job, state: State, seen: Observation, limits: Limits) -> Step:
    """What a resource that is not READY, nor ABSENT, leads to in any stage."""
    phase, detail = seen.resource.phase, seen.resource.detail
    if phase is Phase.PAUSED:
        verdict = (
            f"a user suspended {job.name} in {job.zones[state.zone]}: it runs nothing, and may hold quota"
        )
        return _left_alone(state, Stage.PAUSED, verdict), ()
    if phase is Phase.FOREIGN:
        return _foreign(job, state), ()
    if phase is Phase.PREEMPTED:
        return _again(job, state, seen, f"preempted ({detail})")
    if phase is Phase.FAILED:
        return _again(job, state, seen, f"{job.zones[state.zone]}: {detail}", After.NEXT)
    if phase is Phase.DELETING:
        # Not by this launcher, so whoever deletes it does not want it.
        changes = {"after": After.END, "asked": seen.now, "verdict": "deleted from outside", "failed": True}
        return _to(state, Stage.DELETE, **changes), ()
    if phase is not Phase.UNKNOWN:
        seconds = limits.sick if phase is Phase.SICK else limits.start
        state, late = _trouble(state, seen, phase.value, seconds)
        if late:
            return _again(job, state, seen, f"{phase.value}, for {seconds / 60:.0f} minutes ({detail})")
    return state, ()


def _setup(job: Job, state: State, seen: Observation, limits: Limits) -> Step:
    if seen.resource.phase is Phase.ABSENT:
        return _vanished(job, state), ()
    if seen.resource.phase is not Phase.READY:
        return _not_ready(job, state, seen, limits)
    state = dataclasses.replace(state, trouble="")
    action = Action(Do.SET_UP, state.zone, state.attempt)
    if seen.resource.machines != state.machines:
        return _to(state, Stage.SETUP, machines=seen.resource.machines), (action,)
    if seen.answer is Answer.OK:
        attempt = max(state.attempt, 1)
        return _to(state, Stage.RUN, attempt=attempt, setups=0), (Action(Do.START, state.zone, attempt),)
    if seen.answer in (Answer.REFUSED, Answer.WRONG):
        state = dataclasses.replace(state, setups=state.setups + 1)
        if state.setups >= limits.setups:
            return _end(state, seen, f"the set-up failed {state.setups} times: {seen.reason}", failed=True)
    return state, (action,)


def _run(job: Job, state: State, seen: Observation, limits: Limits) -> Step:
    resource, report = seen.resource, seen.report
    if resource.phase is Phase.ABSENT:
        return _vanished(job, state), ()
    if resource.phase is not Phase.READY:
        return _not_ready(job, state, seen, limits)
    if resource.machines != state.machines:
        # The group made its machines again, or a host was replaced: nothing of the job is left on them.
        return _restart(job, state, seen, "the machines were replaced", new=True)
    if report.work in (Work.SILENT, Work.UNASKED):
        state, late = _trouble(state, seen, report.work.value, limits.silent)
        if late:
            return _again(job, state, seen, f"{report.work.value}, for {limits.silent / 60:.0f} minutes")
        return state, ()
    if report.work is Work.ENDED and report.code == STORAGE_CODE:
        return _refused(job, state, seen, limits)
    state = dataclasses.replace(state, trouble="")
    if report.work is Work.RUNNING:
        if report.step > state.refused_at:
            state = dataclasses.replace(state, refused_at=-2)
        return dataclasses.replace(state, tries=0), ()
    if report.work is Work.NONE:
        return _to(state, Stage.SETUP), (Action(Do.SET_UP, state.zone, state.attempt),)
    if report.work is Work.GONE:
        return _restart(job, state, seen, "a process of the job was gone")
    return _ended(job, state, seen)


def _ended(job: Job, state: State, seen: Observation) -> Step:
    code, at, what = seen.report.code, seen.report.step, _how(seen)
    if code == 0:
        return _end(state, seen, "the job finished", failed=False)
    if code == RESUME_CODE:
        return _restart(job, state, seen, f"{what}: it resumes")
    if code in FINAL_CODES:
        verdict = f"{what}; the same command would end in the same way (tpu logs shows why)"
        return _end(state, seen, verdict, failed=True)
    if code == INTERRUPTED_CODE:
        verdict = f"{what}: a user interrupted it on a worker, after it had saved; launch it again to resume"
        return _end(state, seen, verdict, failed=True)
    if state.failed_at == at:
        return _end(state, seen, f"{what}, for the second time (tpu logs shows why)", failed=True)
    return _restart(job, dataclasses.replace(state, failed_at=at), seen, what)


def _how(seen: Observation) -> str:
    code, at = seen.report.code, seen.report.step
    return f"exit code {code} {f'at step {at}' if at >= 0 else 'at an unknown step'}"


def _refused(job: Job, state: State, seen: Observation, limits: Limits) -> Step:
    """Disk or bucket refused: the job is started again after a pause, until that has not helped for too long."""
    if state.refused_at != seen.report.step:
        state = dataclasses.replace(state, refused_at=seen.report.step, refused=seen.now)
    if seen.now - state.refused >= limits.refused:
        minutes = f"{(seen.now - state.refused) / 60:.0f} minutes"
        return _end(state, seen, f"{_how(seen)}: {REFUSED} for {minutes} (tpu logs shows why)", failed=True)
    verdict = f"{_how(seen)}: {REFUSED}"
    state, over = _trouble(dataclasses.replace(state, verdict=verdict), seen, REFUSED, limits.refused_pause)
    if not over:
        return state, ()
    # Bounded by `limits.refused`, so it takes none of the restarts that preemptions and failures have.
    return _restart(job, dataclasses.replace(state, restarts=state.restarts - 1), seen, verdict)


def _restart(job: Job, state: State, seen: Observation, verdict: str, *, new: bool = False) -> Step:
    """Starts the job again on the machines at hand; on `new` ones after their set-up."""
    state = dataclasses.replace(state, restarts=state.restarts + 1, verdict=verdict)
    if state.restarts > job.budget.restarts:
        return _end(state, seen, _no_restarts(job, verdict), failed=True)
    attempt = state.attempt + 1
    if new:
        changed = _to(state, Stage.SETUP, attempt=attempt, machines=seen.resource.machines)
        return changed, (Action(Do.SET_UP, state.zone, attempt),)
    return _to(state, Stage.RUN, attempt=attempt), (Action(Do.START, state.zone, attempt),)


def _deleting(job: Job, state: State, seen: Observation, limits: Limits) -> Step:
    phase, waited = seen.resource.phase, seen.now - state.asked
    if phase in (Phase.ABSENT, Phase.FOREIGN):
        # A request whose answer was lost may still show.
        if not state.alive and waited < limits.again:
            return state, ()
        if state.after is After.END:
            return _over(state), ()
        return _pause(job, state, seen, limits, state.after), ()
    state = dataclasses.replace(state, alive=state.alive or phase is not Phase.UNKNOWN)
    if phase in (Phase.DELETING, Phase.UNKNOWN) and waited < limits.again:
        return state, ()
    return dataclasses.replace(state, asked=seen.now), (Action(Do.DELETE, state.zone, state.attempt),)


_STAGES = {
    Stage.FIND: _find,
    Stage.CREATE: _create,
    Stage.WAIT: _wait,
    Stage.SETUP: _setup,
    Stage.RUN: _run,
    Stage.DELETE: _deleting,
}
