"""Trains several members of a study at the same time on one host, each in a process with its share of the CPU cores.

A program of a small model gains little from a second core. Each process is the command `scaling-dit study --member`,
which a user may give too; what it prints comes out with the member's name before each line.
"""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO

import jax

from scaling_dit import signals
from scaling_dit.errors import UserError
from scaling_dit.monitor import host
from scaling_dit.parallel import supervise
from scaling_dit.scaling.folder import StudyFolder
from scaling_dit.scaling.ladder import Member
from scaling_dit.training import loop

# Environment variable of a process that trains a member: its parent, and its cores.
_CHILD = "SCALING_DIT_AT_ONCE"
# Seconds between two looks at the processes.
_POLL = 0.1


def check(at_once: int) -> None:
    """Raises UserError unless this host can train so many members at the same time."""
    if jax.default_backend() != "cpu" or jax.process_count() > 1:
        raise UserError(
            f"--at_once={at_once} shares the CPU cores of one host, and this start has {jax.device_count()} "
            f"{jax.default_backend()} devices in {jax.process_count()} processes; leave it out"
        )
    if at_once > (cores := len(host.cores())):
        raise UserError(f"--at_once={at_once} is more than the {cores} CPU cores that this process may use")


def settle() -> bool:
    """Keeps this process to the cores that `run` in its parent chose, and lets it die with it; else does nothing.

    Called before jax starts: a fork of a process with jax's threads must not do it on the way. Returns whether `run`
    has started this process.
    """
    parent, _, cores = os.environ.pop(_CHILD, "").partition(" ")
    if not parent:
        return False
    if (die := supervise.die_with(int(parent))) is not None:
        die()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, map(int, cores.split(",")))
    return True


def shares(cores: Sequence[int], at_once: int) -> list[list[int]]:
    """The cores of each process: neighbours, and as many as each other's within one."""
    ends = [len(cores) * number // at_once for number in range(at_once + 1)]
    return [list(cores[a:b]) for a, b in itertools.pairwise(ends)]


class _Child:
    """The process that trains one member, and the thread that passes on what it prints."""

    def __init__(self, member: Member, command: Sequence[str], cores: Sequence[int]) -> None:
        self.member, self.cores, self._began = member, cores, time.monotonic()
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, _CHILD: f"{os.getpid()} {','.join(map(str, cores))}"},
            # In the same group Ctrl-C would reach it twice: from the terminal and from this process.
            process_group=0,
        )
        assert self.process.stdout is not None
        self._thread = threading.Thread(target=_pass_on, args=(self.process.stdout, member.name), daemon=True)
        self._thread.start()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def ended(self) -> int | None:
        """Its exit code, 128 + N after signal N, once all that it printed has been passed on; None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        self._thread.join()
        return code if code >= 0 else 128 - code


def _pass_on(stream: IO[str], name: str) -> None:
    for line in stream:
        print(f"{name}: {line.rstrip()}", file=sys.stderr, flush=True)


def run(
    members: Sequence[Member],
    folder: StudyFolder,
    at_once: int,
    ended: Callable[[Member, float], None],
    *,
    own_code: bool = False,
) -> None:
    """Trains and evaluates members, each after the one that it begins from.

    If one fails, the others save and stop.

    Args:
      ended: called with each member that has ended, and the seconds that it took.

    Raises:
      Stopped: with the exit code of the process that failed, or after a signal.
    """
    waiting, running = list(members), list[_Child]()
    free = shares(host.cores(), at_once)
    # Exit code and message of what went wrong first.
    failure: tuple[int, str] | None = None
    stopping: list[int] = []

    def stop(number: int) -> None:
        stopping.append(number)
        for child in running:
            child.process.send_signal(number)

    with signals.relayed(stop):
        while running or (waiting and not stopping):
            while free and not stopping and (member := _next(waiting, running)):
                waiting.remove(member)
                running.append(_Child(member, _command(member, folder, own_code), free.pop(0)))
                # A signal that came while it started; twice at once counts as once.
                for number in stopping:
                    running[-1].process.send_signal(number)
            for child in list(running):
                if (code := child.ended()) is None:
                    continue
                running.remove(child)
                free.append(list(child.cores))
                if code == 0:
                    ended(child.member, child.seconds)
                elif failure is None and not stopping:
                    failure = (
                        code,
                        f"member {child.member.name} ended with exit code {code}, see its lines above",
                    )
                    stop(signal.SIGTERM)
            time.sleep(_POLL)
    if failure is None and stopping:
        code = signals.INTERRUPTED if stopping[0] == signal.SIGINT else signals.AGAIN
        failure = code, f"{signal.Signals(stopping[0]).name}: the same command resumes the study"
    if failure is not None:
        raise loop.Stopped(*failure)


def _next(waiting: Sequence[Member], running: Sequence[_Child]) -> Member | None:
    """The first member whose base is not still to be trained."""
    open_ = {one.name for one in waiting} | {child.member.name for child in running}
    return next((member for member in waiting if member.base not in open_), None)


def _command(member: Member, folder: StudyFolder, own_code: bool) -> list[str]:
    command = [sys.executable, "-m", "scaling_dit", "study", f"--workdir={folder}", f"--member={member.name}"]
    return [*command, "--own_code"] if own_code else command
