"""A queue of a study's members, which several preemptible slices work off.

Each member is one object of a store (`leases.Store`): its command, what it depends on, its state, the lease of the
slice that runs it, and its counters. Every change is one compare-and-swap of that object, so slices need no server and
no launcher, and any of them may vanish at any time. A member is

    waiting     for a slice, or for members that it depends on
    running     with a lease; a lease that ends without a word counts as a preemption
    done        its command ended with code 0; it never runs again
    failed      its command failed more than `retries` times, or with a code after which repeating it is of no use

Preemptions are counted, but do not use up retries; after `MOST_PREEMPTIONS` a member has failed, because it may be what
ends its slices, for example by filling their memory.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from scaling_dit import files
from scaling_dit.errors import UserError, nearest

from . import leases
from .leases import Lease, Store

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
FINAL = (DONE, FAILED)
MEMBERS = "members/"
# Exit codes of `scaling-dit` after which the same command leads to the same end: a mistake of the user, a loss that is
# not finite, and too many loss spikes; and after which it is not wanted: a user interrupted it.
HOPELESS = (2, 3, 4, 130)
# EX_TEMPFAIL: saved and stopped, or another process was lost. The same command resumes.
PREEMPTED_CODE = 75
MOST_PREEMPTIONS = 100
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclasses.dataclass(frozen=True)
class Member:
    """One member of a study.

    Attributes:
      name: unique in the queue.
      command: what to run, word by word; it must resume what an earlier run of it began.
      depends_on: members that must be done before.
      retries: failures after which it is run again.
      order: place in the queue; the lowest is run first.
      state: see the top of this file.
      lease: of the slice that runs it.
      attempts: times it was started.
      failures, preemptions: how attempts ended that did not finish it.
      code: the last exit code; None if there is none.
      finished_by: the slice that finished it.
      changed: seconds since 1970 of the last change of state.
    """

    name: str
    command: tuple[str, ...]
    depends_on: tuple[str, ...] = ()
    retries: int = 2
    order: int = 0
    state: str = WAITING
    lease: Lease | None = None
    attempts: int = 0
    failures: int = 0
    preemptions: int = 0
    code: int | None = None
    finished_by: str = ""
    changed: float = 0.0

    def encode(self) -> bytes:
        """The contents of its object."""
        return leases.encode(vars(self))


def decode(data: bytes) -> Member:
    """The member in an object.

    Raises:
      UserError: damaged, or of another version.
    """
    try:
        values = files.parse_json(data)
        values |= {name: tuple(values[name]) for name in ("command", "depends_on")}
        return Member(**values | {"lease": Lease.of(values["lease"])})
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(
            f"a member of the queue cannot be read ({error}); was it written by another version?"
        ) from error


def check(members: Sequence[Member], there: Iterable[str] = ()) -> None:
    """Makes sure that members can be added to a queue that has others.

    Raises:
      UserError: a name that is wrong, there already, or depended on but nowhere; no command; or a circle.
    """
    old, new = set(there), {member.name: member for member in members}
    if len(new) < len(members):
        raise UserError("two members of the queue have the same name")
    for member in members:
        if not _NAME.fullmatch(member.name):
            raise UserError(
                f"member {member.name!r}: a name has letters, digits, '.', '_' and '-', up to 100"
            )
        if member.name in old:
            raise UserError(f"member {member.name!r} is in the queue already; give it another name")
        if not member.command:
            raise UserError(f"member {member.name!r} has no command")
        if member.retries < 0:
            raise UserError(f"member {member.name!r}: retries must be at least 0")
        for name in member.depends_on:
            if name not in old and name not in new:
                hint = nearest(name, [*old, *new])
                raise UserError(
                    f"member {member.name!r} depends on {name!r}, which is not in the queue; {hint}"
                )
    settled: set[str] = set(old)
    while ready := {
        name for name, m in new.items() if name not in settled and settled.issuperset(m.depends_on)
    }:
        settled |= ready
    if circle := sorted(set(new) - settled):
        raise UserError(f"members {', '.join(circle)} depend on each other in a circle")


class Held(NamedTuple):
    """A member as it was read, with the generation of its object."""

    member: Member
    generation: int


def add(store: Store, members: Sequence[Member]) -> None:
    """Adds members to a queue, behind those that are there; the same call may be repeated after an interruption.

    Raises:
      UserError: as `check`, or a member of that name but with another command is there.
    """
    there = {held.member.name: held.member for held in read_all(store)}
    order = 1 + max((member.order for member in there.values()), default=-1)
    fresh: list[Member] = []
    for member in members:
        old = there.get(member.name)
        asked = (member.command, member.depends_on, member.retries)
        if old is None:
            fresh.append(dataclasses.replace(member, order=order + len(fresh)))
        elif (old.command, old.depends_on, old.retries) != asked:
            raise UserError(
                f"member {member.name!r} is in the queue with another command; give it another name"
            )
    check(fresh, there)
    for member in fresh:
        if not leases.swap(store, MEMBERS + member.name, member.encode(), leases.ABSENT):
            raise UserError(f"member {member.name!r} was added by somebody else meanwhile; look at the queue")


def read_all(store: Store) -> list[Held]:
    """All members, in their order."""
    found = (store.read(name) for name in store.names(MEMBERS))
    held = [Held(decode(one[0]), one[1]) for one in found if one is not None]
    return sorted(held, key=lambda one: (one.member.order, one.member.name))


# Changes of one member. Each is pure; `change` writes it.


def claimed(member: Member, owner: str, now: float) -> Member:
    """The member, taken by a slice. If it was running, its holder vanished, which is a preemption.

    It has failed instead, without a lease, if that was one too many.
    """
    preemptions = member.preemptions + (member.state == RUNNING)
    if preemptions > MOST_PREEMPTIONS:
        return dataclasses.replace(member, state=FAILED, lease=None, preemptions=preemptions, changed=now)
    return dataclasses.replace(
        member,
        state=RUNNING,
        lease=leases.take(owner, now),
        attempts=member.attempts + 1,
        preemptions=preemptions,
        changed=now,
    )


def renewed(member: Member, now: float) -> Member:
    """The member, whose lease lasts longer."""
    assert member.lease is not None
    return dataclasses.replace(member, lease=member.lease._replace(until=now + leases.SECONDS))


def ended(member: Member, code: int, now: float, stopped: bool = False) -> Member:
    """The member after an attempt.

    Args:
      member: running.
      code: of the command; negative if a signal ended it.
      now: seconds since 1970.
      stopped: whether the slice itself ended the command, because it had to stop.
    """
    assert member.lease is not None
    owner, left = member.lease.owner, dataclasses.replace(member, lease=None, code=code, changed=now)
    if code == 0:
        return dataclasses.replace(left, state=DONE, finished_by=owner)
    if stopped or code == PREEMPTED_CODE:
        return dataclasses.replace(left, state=WAITING, preemptions=member.preemptions + 1)
    failures = member.failures + 1
    over = failures > member.retries or code in HOPELESS
    return dataclasses.replace(left, state=FAILED if over else WAITING, failures=failures)


def runnable(held: Sequence[Held], now: float) -> list[Held]:
    """Members that a slice may take now, in their order."""
    done = {one.member.name for one in held if one.member.state == DONE}
    return [
        one
        for one in held
        if one.member.state not in FINAL
        and done.issuperset(one.member.depends_on)
        and (one.member.state == WAITING or leases.free(one.member.lease, now))
    ]


def blocked(members: Iterable[Member]) -> dict[str, str]:
    """Members that can never run -> the failed member that they wait for."""
    by_name = {member.name: member for member in members}
    found: dict[str, str] = {}
    for _ in by_name:
        for member in by_name.values():
            for name in member.depends_on:
                if member.state != DONE and (by_name[name].state == FAILED or name in found):
                    found.setdefault(member.name, found.get(name, name))
    return found


def finished(members: Sequence[Member]) -> bool:
    """Whether nothing is left that could run."""
    stuck = blocked(members)
    return all(member.state in FINAL or member.name in stuck for member in members)


def change(store: Store, held: Held, member: Member) -> Held | None:
    """Writes a change of a member that was read; None if another slice changed it in between."""
    name = MEMBERS + member.name
    if not leases.swap(store, name, member.encode(), held.generation):
        return None
    found = store.read(name)
    # Another slice may have followed at once, if the lease was over.
    return Held(member, found[1]) if found is not None and found[0] == member.encode() else None


def table(members: Sequence[Member], now: float) -> str:
    """The state of a queue as lines of text."""
    stuck = blocked(members)
    rows: list[tuple[str, ...]] = [("member", "state", "slice", "attempts", "failures", "preemptions", "")]
    for member in members:
        note = f"waits for {stuck[member.name]}, which failed" if member.name in stuck else ""
        if member.lease is not None:
            left = member.lease.until - now
            note = f"lease for {left:.0f} s" if left > 0 else f"lease over for {-left:.0f} s"
        elif member.state == FAILED:
            note = f"exit code {member.code}"
        state = "blocked" if member.name in stuck else member.state
        holder = member.lease.owner if member.lease else member.finished_by
        counts = (member.attempts, member.failures, member.preemptions)
        rows.append((member.name, state, holder, *map(str, counts), note))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    counted = {
        state: sum(member.state == state for member in members) for state in (DONE, RUNNING, WAITING, FAILED)
    }
    return "\n".join([*lines, ", ".join(f"{count} {state}" for state, count in counted.items())])


def from_mapping(values: Mapping[str, Any], place: str) -> Member:
    """A member from JSON: {"name", "command" (a list of words), "depends_on", "retries"}.

    Raises:
      UserError: a key that is missing, unknown or of another type; `place` says where.
    """
    known = {"name": str, "command": list, "depends_on": list, "retries": int}
    if not isinstance(values, Mapping):
        raise UserError(f"{place}: a member is an object with name and command")
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{place}: no key {key!r}; {nearest(key, known)}")
        if not isinstance(value, known[key]) or isinstance(value, bool):
            raise UserError(f"{place}: {key} must be of type {known[key].__name__}")
        if isinstance(value, list) and not all(isinstance(word, str) for word in value):
            raise UserError(f"{place}: {key} must be a list of words")
    missing = [key for key in ("name", "command") if key not in values]
    if missing:
        raise UserError(f"{place}: {' and '.join(missing)} missing")
    return Member(
        name=values["name"],
        command=tuple(values["command"]),
        depends_on=tuple(values.get("depends_on", ())),
        retries=values.get("retries", 2),
    )
