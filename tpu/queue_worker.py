"""The loop of one slice that works off a queue: takes a member, runs its command, keeps the lease, says how it ended.

On a slice of several hosts the first one leads: it takes members, and the others run what it runs, which they read
from an object of the same store. The hosts of a member's run end together (`parallel.supervise`), so the exit code of
the first is that of the run.

A slice that cannot renew its lease in time ends the command itself, before another slice may start it.
"""

import contextlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from etils import epath

from scaling_dit import files
from scaling_dit.errors import UserError
from scaling_dit.monitor.heartbeat import Heartbeat
from scaling_dit.parallel import supervise

from . import leases
from . import queue as queue_lib
from .leases import Store
from .queue import Held

# Seconds between two looks at the command, and between two looks at the queue of a slice without work.
POLL, IDLE = 2.0, 30.0
# Seconds that a command has to save and end before it is killed.
PATIENCE = 120.0
SLICES, HEARTBEATS = "slices/", "heartbeats"


class Runner(Protocol):
    """Runs one command at a time."""

    def start(self, command: Sequence[str], name: str) -> None:
        """Starts a command for the member of this name."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""

    def stop(self) -> int:
        """Ends it and returns its exit code."""


class Processes:
    """A `Runner` of local processes, each with a group of its own. Their output goes to `logs`/NAME.log."""

    def __init__(self, logs: pathlib.Path, patience: float = PATIENCE) -> None:
        self._logs, self._patience = logs, patience
        self._child: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str], name: str) -> None:
        """See `Runner`. A command that cannot be started ends with code 127."""
        self._logs.mkdir(parents=True, exist_ok=True)
        with open(self._logs / f"{name}.log", "ab") as log:
            try:
                self._child = subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=log,
                    process_group=0,
                    # If this process is killed nobody renews the lease.
                    preexec_fn=supervise.die_with(os.getpid()),
                )
            except OSError as error:
                log.write(f"cannot start: {error}\n".encode())
                self._child = None

    def poll(self) -> int | None:
        """See `Runner`."""
        return 127 if self._child is None else self._child.poll()

    def stop(self) -> int:
        """See `Runner`. SIGTERM first, so that a run saves; SIGKILL for the whole group after `patience` seconds."""
        child = self._child
        if child is None:
            return 127
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(self._patience)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        return child.wait()


class Worker:
    """One slice at work; `tick` does what is due and never waits for the command.

    Args:
      store: of the queue.
      owner: name of the slice.
      runner: of commands.
      leads: called with what the slice runs (None: nothing), for its other hosts.
    """

    def __init__(
        self,
        store: Store,
        owner: str,
        runner: Runner,
        leads: Callable[[Held | None], None] = lambda held: None,
    ) -> None:
        self.store, self.owner, self.runner, self._leads = store, owner, runner, leads
        # The member that this slice runs, as it wrote it last.
        self.held: Held | None = None
        # How a command ended that could not be written yet.
        self._result: tuple[int, bool] | None = None
        self._looked = float("-inf")

    def tick(self, now: float, stopping: bool = False) -> bool:
        """Does what is due; returns whether there may be more to do.

        Args:
          now: seconds since 1970.
          stopping: whether the slice shall end: its command is stopped, and its member given back.
        """
        if self.held is None:
            if stopping:
                return False
            if now - self._looked < IDLE:
                return True
            self._looked = now
            try:
                return self._claim(now)
            except OSError as error:
                _complain(error)
                return True
        lease = self.held.member.lease
        assert lease is not None
        if self._result is None and (code := self.runner.poll()) is not None:
            self._result = code, False
        if self._result is None and not leases.valid(lease, now):
            # Somebody else may run it soon. That it was lost, its next holder writes down.
            self._drop()
            return not stopping
        if self._result is None and stopping:
            self._result = self.runner.stop(), True
        if self._result is not None:
            self._report(now)
        elif leases.due(lease, now):
            self._renew(now)
        return self.held is not None or not stopping

    def _claim(self, now: float) -> bool:
        every = queue_lib.read_all(self.store)
        for held in queue_lib.runnable(every, now):
            taken = queue_lib.change(self.store, held, queue_lib.claimed(held.member, self.owner, now))
            if taken is not None and taken.member.state == queue_lib.RUNNING:
                self.held = taken
                self.runner.start(taken.member.command, taken.member.name)
                self._publish(taken)
                return True
        return not queue_lib.finished([held.member for held in every])

    def _renew(self, now: float) -> None:
        assert self.held is not None
        try:
            found = queue_lib.change(self.store, self.held, queue_lib.renewed(self.held.member, now))
            if found is None and not self._mine():
                self._drop()
        except OSError as error:
            # The lease may last until the store answers again.
            _complain(error)
            return
        self.held = found if found is not None else self.held

    def _report(self, now: float) -> None:
        assert self.held is not None and self._result is not None
        code, stopped = self._result
        try:
            change = queue_lib.ended(self.held.member, code, now, stopped)
            if queue_lib.change(self.store, self.held, change) is None and self._mine():
                return
        except OSError as error:
            _complain(error)
            return
        self._over()

    def _over(self) -> None:
        """The slice runs nothing, and looks for work at once."""
        self.held = self._result = None
        self._looked = float("-inf")
        self._publish(None)

    def _publish(self, held: Held | None) -> None:
        try:
            self._leads(held)
        except OSError as error:
            # Hosts that do not know of it leave the run, which then ends with a code that counts as a preemption.
            _complain(error)

    def _mine(self) -> bool:
        """Whether the member still has this slice's lease, of which it then takes the newest generation."""
        assert self.held is not None
        found = self.store.read(queue_lib.MEMBERS + self.held.member.name)
        if found is None:
            return False
        member = queue_lib.decode(found[0])
        if member.lease is None or self.held.member.lease is None:
            return False
        if member.lease.token != self.held.member.lease.token:
            return False
        self.held = Held(member, found[1])
        return True

    def _drop(self) -> None:
        """Ends the command of a member that was lost."""
        self.runner.stop()
        self._over()


def run(
    store: Store,
    owner: str,
    logs: pathlib.Path,
    *,
    host: int = 0,
    hosts: int = 1,
    beats: epath.Path | None = None,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], Any] = time.sleep,
) -> int:
    """Works off a queue until nothing is left that could run. Returns 0, or 75 after SIGTERM.

    Args:
      store: of the queue.
      owner: name of the slice, the same on all of its hosts.
      logs: folder for the output of the commands.
      host: index of this host in the slice.
      hosts: hosts of the slice.
      beats: folder of the slice's heartbeats, which a dead-man switch reads; None for none.
      clock: seconds since 1970.
      sleep: waits for seconds.
    """
    runner = Processes(logs)
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(stop_signal())
        # An error here is the user's: no such bucket, or no permission.
        queue_lib.read_all(store)
        if beats is not None:
            stack.enter_context(Heartbeat(beats, host, {"processes": hosts}))
        worker: Worker | Follower
        if host:
            worker = Follower(store, owner, runner)
        else:
            worker = Worker(
                store, owner, runner, _Lead(store, owner).publish if hosts > 1 else lambda held: None
            )
        while worker.tick(clock(), stopping.is_set()):
            sleep(POLL)
    return queue_lib.PREEMPTED_CODE if stopping.is_set() else 0


class _Lead:
    """Publishes what the other hosts of a slice run, in one object that only the first host writes."""

    def __init__(self, store: Store, owner: str) -> None:
        self._store, self._name = store, f"{SLICES}{owner}"

    def publish(self, held: Held | None) -> None:
        lease = held.member.lease if held else None
        value = {"name": held.member.name, "token": lease.token} if held and lease else {}
        for _ in range(10):
            found = self._store.read(self._name)
            if leases.swap(
                self._store, self._name, leases.encode(value), found[1] if found else leases.ABSENT
            ):
                return
        raise UserError(
            f"{self._name}: another host of the slice writes it; is --host the same on two of them?"
        )


class Follower:
    """Another host of a slice: runs what the first one runs, as long as its lease lasts."""

    def __init__(self, store: Store, owner: str, runner: Runner) -> None:
        self._store, self._name, self._runner = store, f"{SLICES}{owner}", runner
        # Token of the lease under which the command was started, and its end as known.
        self._token: str | None = None
        self._until = 0.0
        self._looked = float("-inf")

    def tick(self, now: float, stopping: bool = False) -> bool:
        """Does what is due; returns whether there may be more to do."""
        try:
            found = self._store.read(self._name)
            published = _published(found[0], self._name) if found else {}
            if self._token is not None and published.get("token") != self._token:
                self._stop()
            if now - self._looked >= IDLE:
                self._looked = now
                if self._token is not None:
                    self._look(published, now)
                elif queue_lib.finished([held.member for held in queue_lib.read_all(self._store)]):
                    return False
            if self._token is None and published and not stopping:
                self._look(published, now)
        except OSError as error:
            _complain(error)
        if self._token is not None and (stopping or now >= self._until - leases.STOPPING):
            self._stop()
        return not stopping

    def _look(self, published: dict[str, Any], now: float) -> None:
        """Reads the member that the first host holds; starts its command unless it runs already."""
        found = self._store.read(queue_lib.MEMBERS + published["name"])
        member = queue_lib.decode(found[0]) if found else None
        # What was published for an earlier slice of this name is over.
        if member is None or member.lease is None or member.lease.token != published["token"]:
            return
        if not leases.valid(member.lease, now):
            return
        self._until = member.lease.until
        if self._token is None:
            self._token = member.lease.token
            self._runner.start(member.command, member.name)

    def _stop(self) -> None:
        self._runner.stop()
        self._token = None


def _complain(error: OSError) -> None:
    print(f"scaling-dit: the queue's store does not answer: {error}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set inside the context."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    old = {
        number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def main(
    action: str, place: str, *, members: str = "", owner: str = "", logs: str = "logs", host: int = 0,
    hosts: int = 1, dry_run: bool = False, as_json: bool = False,
) -> int:  # fmt: skip
    """The verb `tpu queue`: "add" the members of a JSON file, "run" them, or show their "status".

    With `dry_run` the members that would be added, or be run next, are printed with their commands.

    Raises:
      UserError: a mistake in the flags, in the file, or in the queue.
    """
    store = leases.open_store(place)
    if action == "add":
        asked = read_members(pathlib.Path(members))
        if dry_run:
            there = {held.member.name for held in queue_lib.read_all(store)}
            fresh = [member for member in asked if member.name not in there]
            queue_lib.check(fresh, there)
            return _show_commands(fresh)
        queue_lib.add(store, asked)
        print(f"{len(asked)} members are in {place}")
        return 0
    if action == "run" and dry_run:
        return _show_commands(
            [held.member for held in queue_lib.runnable(queue_lib.read_all(store), time.time())]
        )
    if action == "run":
        beats = epath.Path(place) / HEARTBEATS / owner
        return run(store, owner, pathlib.Path(logs), host=host, hosts=hosts, beats=beats)
    found = [held.member for held in queue_lib.read_all(store)]
    if as_json:
        print(json.dumps([json.loads(member.encode()) for member in found], indent=1))
    else:
        print(queue_lib.table(found, time.time()) if found else f"{place} has no members")
    return 0 if not any(member.state == queue_lib.FAILED for member in found) else 1


def _show_commands(members: Sequence[queue_lib.Member]) -> int:
    for member in members:
        print(f"{member.name}: {shlex.join(member.command)}")
    return 0


def _published(data: bytes, name: str) -> dict[str, Any]:
    """What the first host of a slice published for the others; empty if it runs nothing.

    Raises:
      UserError: it is damaged.
    """
    try:
        published = files.parse_json(data)
    except ValueError:
        published = None
    if not isinstance(published, dict) or not all(
        isinstance(published.get(key, ""), str) for key in ("name", "token")
    ):
        raise UserError(
            f"{name} in the queue's store is damaged; delete it: the first host of the slice writes it again"
        )
    return published


def read_members(path: pathlib.Path) -> list[queue_lib.Member]:
    """The members in a JSON file: a list, see `queue.from_mapping`; "-" reads the standard input."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
        values = files.parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, list):
        raise UserError(f"{path}: it must hold a list of members")
    return [queue_lib.from_mapping(value, f"{path}, member {i + 1}") for i, value in enumerate(values)]
