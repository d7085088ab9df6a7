"""Writes docs/tpu_states.md: what the launcher of a TPU job does in each state, asked of the state machine itself.

python -m tools.tpu_states
"""

import dataclasses
import pathlib

from scaling_dit.tpu import backends
from scaling_dit.tpu.job import Budget, Job
from scaling_dit.tpu.observations import Answer, Observation, Phase, Report, Resource, Work
from scaling_dit.tpu.state import ENDS, REFUSED, Action, Limits, Stage, State, step

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "tpu_states.md"
LIMITS = Limits()
NOW = 1_000_000.0
JOB = Job("first", "v5e:4x4", ("us-west4-a", "us-west4-b"), ("train",), Budget(hours=100.0, restarts=20))
# In the middle of a job's life.
MIDDLE = State(
    zone=0,
    attempt=1,
    machines="m",
    alive=True,
    out=True,
    seen=NOW - LIMITS.poll,
    billed=True,
    failed_at=7,
    resources=1,
)
HEAD = """# What the launcher of a TPU job does

<!-- Written by `python -m tools.tpu_states`; a test fails while it is out of date. -->

The launcher of `scaling-dit tpu launch` is a function of what it remembers and what it sees, in `tpu/state.py`.
These tables are written by calling it. Limits are those of the default `--poll`.

Always, in every stage:

- A user's `tpu delete` ends the job: it saves, and its resource is deleted.
- So does a budget that is used up, of hours or dollars; {reserve:.0f} minutes are kept back to end within it. Time in
  which machines may have run while nobody looked counts as used.
- `--restarts` counts starts after the first one; when they are used up, the job ends.
- The job's end is said only when its resource is seen to be gone, or suspended by a user.
"""


def rows(stage: Stage) -> list[tuple[str, str, str]]:
    """(what is seen, what is done, the next stage) for a stage."""
    found = []
    for words, state, seen in situations(stage):
        after, actions = step(JOB, dataclasses.replace(state, stage=stage), seen, LIMITS)
        done = "; ".join(_action(action) for action in actions) or "nothing"
        verdict = ""
        if after.stage in (Stage.DELETE, *ENDS) and stage is not after.stage:
            follows = f", then {after.after.value}" if after.stage is Stage.DELETE else ""
            verdict = f"{follows}: {after.verdict}" if after.verdict else follows
        if after.stage is Stage.CREATE and stage is not Stage.CREATE:
            verdict = f", in {JOB.zones[after.zone]}, {after.until - NOW:.0f} s later"
        same = after.stage is stage and not actions
        found.append((words, done, "no change" if same else f"{after.stage.value}{verdict}"))
    return found


def _action(action: Action) -> str:
    return action.do.value + (f" (attempt {action.attempt})" if action.do.name == "START" else "")


def situations(stage: Stage) -> list[tuple[str, State, Observation]]:
    """Everything that a stage tells apart."""
    found = []

    def add(words: str, seen: Observation, state: State = MIDDLE, **changes: object) -> None:
        found.append((words, dataclasses.replace(state, **changes), seen))

    def at(phase: Phase, machines: str = "m", **changes: object) -> Observation:
        return Observation(NOW, Resource(phase, "as described", machines, ("n",)), **changes)

    if stage is Stage.FIND:
        add("some zone could not be asked", at(Phase.UNKNOWN))
        add("there is none in any zone", at(Phase.ABSENT, found=()), billed=False)
        add("one of that name is not this job's", at(Phase.FOREIGN, found=()), billed=False)
        add("one in this zone", at(Phase.WAITING, found=(0,)), billed=False)
        add("one in another zone", at(Phase.ABSENT, found=(1,)), billed=False)
        add("several", at(Phase.READY, found=(0, 1)))
        return found
    if stage is Stage.CREATE:
        add("the pause is not over", at(Phase.ABSENT), billed=False, until=NOW + 60)
        add("the pause is over", at(Phase.ABSENT), billed=False)
        return found
    phases = [phase for phase in Phase if phase not in (Phase.ABSENT, Phase.READY)]
    if stage is Stage.WAIT:
        calm = {"alive": False, "billed": False, "asked": NOW - LIMITS.poll}
        add(
            "there is none; the request was refused for now (quota, capacity)",
            at(Phase.ABSENT, answer=Answer.REFUSED, reason="why"),
            **calm,
        )
        add(
            "there is none; the request was refused as it will be again (permission, a wrong value)",
            at(Phase.ABSENT, answer=Answer.WRONG, reason="why"),
            **calm,
        )
        add("there is none; the answer was lost", at(Phase.ABSENT), **calm)
        add("there is none any more", at(Phase.ABSENT))
        add(Phase.READY.value, at(Phase.READY))
    elif stage in (Stage.SETUP, Stage.RUN):
        add(Phase.ABSENT.value, at(Phase.ABSENT))
        add("its machines are others than before", at(Phase.READY, "others"))
    if stage is Stage.SETUP:
        for answer in (Answer.OK, Answer.REFUSED, Answer.NONE):
            words = {
                Answer.OK: "all workers are prepared",
                Answer.REFUSED: "the set-up failed",
                Answer.NONE: "it is not known how the set-up ended",
            }
            add(words[answer], at(Phase.READY, answer=answer, reason="why"))
        add(
            f"the set-up failed {LIMITS.setups} times",
            at(Phase.READY, answer=Answer.REFUSED, reason="why"),
            setups=LIMITS.setups - 1,
        )
    if stage is Stage.RUN:
        for work in (Work.RUNNING, Work.NONE, Work.GONE, Work.SILENT):
            add(work.value, at(Phase.READY, report=Report(work)))
        add(
            f"{Work.SILENT.value}, for {LIMITS.silent / 60:.0f} minutes",
            at(Phase.READY, report=Report(Work.SILENT)),
            trouble=Work.SILENT.value,
            since=NOW - LIMITS.silent,
        )
        for code, at_step, words in (
            (0, 9, "exit code 0"), (75, 9, "exit code 75"), (2, 9, "exit code 2, 3 or 4"),
            (130, 9, "exit code 130: Ctrl-C on a worker"),
            (1, 9, "another exit code"), (1, 7, "another exit code, at the step of the last failure"),
        ):  # fmt: skip
            add(words, at(Phase.READY, report=Report(Work.ENDED, code, at_step)))
        refused = at(Phase.READY, report=Report(Work.ENDED, 74, 9))
        add("exit code 74: its disk or bucket refused", refused)
        for words, since, trouble in (
            (f"exit code 74, {LIMITS.refused_pause / 60:.0f} minutes later", LIMITS.refused_pause, REFUSED),
            (f"exit code 74 at one step, for {LIMITS.refused / 60:.0f} minutes", LIMITS.refused, ""),
        ):
            changes = {"refused_at": 9, "refused": NOW - since, "trouble": trouble, "since": NOW - since}
            add(words, refused, **changes)
    if stage is Stage.DELETE:
        for after in backends_after():
            add(f"{Phase.ABSENT.value}; {after.value} follows", at(Phase.ABSENT), after=after, verdict="why")
        add(
            f"{Phase.ABSENT.value}, and none was seen since the request",
            at(Phase.ABSENT),
            alive=False,
            asked=NOW,
            billed=False,
        )
        add(Phase.DELETING.value, at(Phase.DELETING), asked=NOW)
        add(
            f"{Phase.DELETING.value}, for {LIMITS.again / 60:.0f} minutes",
            at(Phase.DELETING),
            asked=NOW - LIMITS.again,
        )
        add("anything else", at(Phase.READY), asked=NOW)
        return found
    for phase in phases:
        if phase is Phase.SICK and stage is Stage.WAIT:
            continue
        add(phase.value, at(phase), billed=phase is not Phase.WAITING)
        lasting = {Phase.STARTING: LIMITS.start, Phase.SICK: LIMITS.sick}
        if stage is Stage.WAIT:
            lasting[Phase.WAITING] = 3600 * JOB.patience
        if phase in lasting:
            long = f"{phase.value}, for {lasting[phase] / 60:.0f} minutes"
            add(
                long,
                at(phase),
                trouble=phase.value,
                since=NOW - lasting[phase],
                billed=phase is not Phase.WAITING,
            )
    return found


def backends_after() -> list:
    """What may follow a deletion."""
    from scaling_dit.tpu.state import After

    return list(After)


def page() -> str:
    """The text of the page."""
    parts = [HEAD.format(reserve=LIMITS.reserve / 60)]
    for stage in Stage:
        if stage in ENDS:
            continue
        parts += [f"\n## It {stage.value}\n", "| it sees | it does | and then it |", "|---|---|---|"]
        parts += [f"| {words} | {done} | {then} |" for words, done, then in rows(stage)]
    titles = {"queued": "Queued resources", "compute": "Managed instance groups"}
    for name, backend in backends.BACKENDS.items():
        parts += [
            f"\n## {titles[name]}: what their states mean\n",
            "| the control plane says | for the launcher |",
            "|---|---|",
        ]
        parts += [f"| {words} | {phase.value} |" for words, phase in backend.STATES]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page())
    print(PAGE)


if __name__ == "__main__":
    main()
