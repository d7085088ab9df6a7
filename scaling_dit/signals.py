"""SIGTERM, SIGINT and SIGHUP: a run saves and stops, any other moment ends at once, always with the same exit codes.

`install` is the first thing a command does, before any slow import. A thread waits for signals, so that they act while
the main thread compiles or imports, where Python would keep them waiting. It uses the standard library only.

The first signal ends the process at once, unless there is something to save (`deferred`): then it is only noted. A
second one, after a moment in which a shell or scheduler may send the same one twice, always ends the process at once;
whatever is written whole stays whole.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Seconds in which further signals count as the first one.
SAME = 0.5
# EX_TEMPFAIL: the same command resumes. And that of a command that Ctrl-C ended.
AGAIN, INTERRUPTED = 75, 130
# Seconds that what is left to clean may take.
_CLEANING = 3.0


class _State:
    """What this process knows of signals; there is one."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.installed = False
        self.first: int | None = None
        self.at = 0.0
        # How many contexts note a signal for their own use.
        self.saving = 0
        # Gets every signal instead.
        self.relay: Callable[[int], None] | None = None
        self.cleaners: list[Callable[[], None]] = []


_state = _State()


def install() -> None:
    """Makes this process end or save on signals, see the top of this file; called once, in the main thread.

    A signal that is ignored, as under nohup, stays ignored.
    """
    if _state.installed:
        return
    _state.installed = True
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            # The thread does the work; this keeps Python from ending the process.
            signal.signal(number, _nothing)


def first() -> int | None:
    """The first signal that was received, None so far."""
    return _state.first


def exit_code() -> int:
    """The exit code that the first signal asks for; AGAIN without one."""
    return INTERRUPTED if _state.first == signal.SIGINT else AGAIN


def name() -> str:
    """The name of the first signal, "SIGTERM" without one."""
    return signal.Signals(_state.first or signal.SIGTERM).name


@contextlib.contextmanager
def deferred(leave: Sequence[int] = ()) -> Iterator[Callable[[], bool]]:
    """Gives `reached()`: whether a signal has been received. From its first call on a signal is only noted.

    Before that there is nothing to save. Without `install`, in a program of a user's own, the context notes signals
    from its beginning to its end; a second one then does what it did before.

    Args:
      leave: signals that somebody else handles.
    """
    if not _state.installed:
        with _noted(leave) as reached:
            yield reached
        return
    armed = False

    def reached_in_command() -> bool:
        nonlocal armed
        if not armed:
            armed = True
            with _state.lock:
                _state.saving += 1
        return _state.first is not None

    try:
        yield reached_in_command
    finally:
        if armed:
            with _state.lock:
                _state.saving -= 1


@contextlib.contextmanager
def relayed(relay: Callable[[int], None]) -> Iterator[None]:
    """Hands every signal to `relay` while the context lasts, and nothing else happens."""
    if _state.installed:
        _state.relay = relay
        try:
            yield
        finally:
            _state.relay = None
        return
    with _handled(lambda number, frame: relay(number)):
        yield


@contextlib.contextmanager
def cleaning(clean: Callable[[], None]) -> Iterator[None]:
    """Has `clean()` called, from another thread, if a signal ends the process while the context lasts."""
    _state.cleaners.append(clean)
    try:
        yield
    finally:
        _state.cleaners.remove(clean)


def _nothing(number: int, frame: FrameType | None) -> None:
    pass


def _watch(reading: int) -> None:
    while received := os.read(reading, 64):
        for number in received:
            if number in SIGNALS:
                _receive(number)


def _receive(number: int) -> None:
    relay = _state.relay
    if relay is not None:
        relay(number)
        return
    with _state.lock:
        now = time.monotonic()
        if _state.first is None:
            _state.first, _state.at = number, now
            if not _state.saving:
                _end(f"{name()}: stopped; the same command starts again or resumes")
            _say(f"{name()}: saving after this step; a second signal stops at once")
        elif now - _state.at > SAME:
            _end(f"{name()}: stopped at once; the same command resumes from the last checkpoint")


def _end(line: str) -> None:
    """Ends this process."""
    _say(line)
    for clean in reversed(_state.cleaners):
        # A store that does not answer must not keep it.
        thread = threading.Thread(target=_quietly, args=(clean,), daemon=True)
        thread.start()
        thread.join(_CLEANING)
    os._exit(exit_code())


def _quietly(clean: Callable[[], None]) -> None:
    with contextlib.suppress(Exception):
        clean()


def _say(line: str) -> None:
    # Past Python's buffers, whose locks the main thread may hold.
    with contextlib.suppress(OSError):
        os.write(2, f"scaling-dit: {line}\n".encode())


@contextlib.contextmanager
def _noted(leave: Sequence[int]) -> Iterator[Callable[[], bool]]:
    # Only the main thread can set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    seen = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if not seen:
            seen = True
            _state.first, _state.at = number, time.monotonic()
        elif time.monotonic() - _state.at > SAME:
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)

    with _handled(note, leave):
        _state.first = None
        yield lambda: seen


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], leave: Sequence[int] = ()) -> Iterator[None]:
    """Sets the handler of all SIGNALS but those to leave and ignored ones, and the old ones at the end."""
    old = {}
    for number in SIGNALS:
        if number not in leave and signal.getsignal(number) not in (signal.SIG_IGN, None):
            old[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)
