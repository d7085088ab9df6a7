"""One writer for a folder: a lease that a process holds from its first write on, and that others find.

The lease is a file that names its holder. On a local or shared file system the holder also has a lock on it, which
ends with the process. Where locks do not reach, on other hosts and in buckets, the holder changes the file every few
seconds: a file that stays the same for a while was left by a process that is gone, and is taken over. No clocks are
compared. `records.py` reads and writes the file; in a bucket of gs:// it changes only if nobody else changed it
meanwhile.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

from etils import epath

from scaling_dit import signals
from scaling_dit.checkpoints.records import Record, Taken, record_of
from scaling_dit.errors import StorageError, UserError

# Seconds between signs of life, and without one until a lease is taken over.
BEAT, STALE = 10.0, 60.0


class Held(UserError):
    """The folder is another process's."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
      owner: a random name of the lease.
      host: its host name.
      boot: of its kernel, for host names may be alike.
      process: its process id on that host.
      began: when it took the lease, in seconds since 1970 by the clock of its host.
      beat: how many signs of life it has given.
    """

    owner: str
    host: str
    boot: str
    process: int
    began: float
    beat: int = 0

    @classmethod
    def me(cls) -> Self:
        """This process, with a new name."""
        return cls(uuid.uuid4().hex, socket.gethostname(), _boot(), os.getpid(), time.time())

    @classmethod
    def parse(cls, data: bytes) -> Self | None:
        """The holder that a file names; None for a file that names none, such as one that a full disk left empty."""
        try:
            fields: dict[str, Any] = json.loads(data)
            return cls(**fields)
        except (ValueError, TypeError):
            return None

    def to_bytes(self) -> bytes:
        """The contents of the lease's file."""
        return json.dumps(dataclasses.asdict(self)).encode()

    def is_here(self) -> bool:
        """Whether it ran under this kernel, which knows whether it is alive."""
        return self.boot == _boot() and self.host == socket.gethostname()

    def is_gone(self) -> bool:
        """Whether it certainly has ended."""
        if not self.is_here():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False

    def __str__(self) -> str:
        age = max(time.time() - self.began, 0.0)
        return f"process {self.process} on host {self.host}, for {_duration(age)}"


class Lease:
    """The lease of a folder, as a context that releases it.

    Args:
      path: of the lease's file, in the folder.
      what: the folder, for the messages.
      beat, stale: seconds, see the top of this file.
      sleep: waits for so many seconds.
    """

    def __init__(
        self,
        path: epath.Path,
        what: str,
        *,
        beat: float = BEAT,
        stale: float = STALE,
        record: Record | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._what, self._beat, self._stale, self._sleep = what, beat, stale, sleep
        self._record = record_of(path) if record is None else record
        self._me = Holder.me()
        self._version: Any = None
        self._lost: str = ""
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def held(self) -> bool:
        """Whether this process has taken it."""
        return self._thread is not None

    def acquire(self) -> None:
        """Takes the lease, or waits whether the one that is there is given signs of life; does nothing if it is held.

        Raises:
          Held: another process has it.
          StorageError: the folder cannot be written.
        """
        if self.held:
            return
        self._record.lock(self._refused)
        try:
            found = self._record.read()
            version = None if found is None else found[1]
            if found is not None and (holder := Holder.parse(found[0])) is not None:
                self._wait_for_sign(holder, found[0])
            self._version = self._record.write(self._me.to_bytes(), version)
            # Without preconditions, two may have written at once: the last one has it.
            if not self._record.is_exclusive:
                self._sleep(min(2.0, self._beat))
                self._make_sure_it_is_mine()
        except Taken:
            self._record.unlock()
            raise self._refused() from None
        except BaseException:
            self._record.unlock()
            raise
        self._thread = threading.Thread(target=self._give_signs, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Makes sure that the lease is still this process's; called before anything is written.

        Raises:
          Held: another process took it over.
          StorageError: the folder is gone.
        """
        if self._lost:
            raise Held(f"{self._what} was taken over by {self._lost}; this process stops without writing")
        if self.held and not self._record.is_there():
            raise StorageError(f"{self._what} is gone, or was replaced by another folder")

    def release(self) -> None:
        """Gives the lease up; it can be called at any time, again, and from any thread."""
        self._released.set()
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        if thread is not threading.current_thread():
            thread.join(timeout=self._beat)
        with contextlib.suppress(Exception):
            if not self._lost:
                self._record.remove(self._version)
        self._record.unlock()

    def _refused(self) -> Held:
        with contextlib.suppress(Exception):
            found = self._record.read()
            holder = None if found is None else Holder.parse(found[0])
            if holder is not None:
                return Held(f"{self._what} is written by {holder}; stop it first, or give another --workdir")
        return Held(f"{self._what} is written by another process; stop it first, or give another --workdir")

    def _wait_for_sign(self, holder: Holder, data: bytes) -> None:
        """Returns once the holder of a lease that was found counts as gone."""
        if holder.is_gone() or (holder.is_here() and self._record.is_locked):
            return
        print(
            f"scaling-dit: {self._what} was written by {holder}; waiting up to {self._stale:.0f} s for a sign of it",
            file=sys.stderr,
            flush=True,
        )
        waited = 0.0
        while waited < self._stale:
            self._sleep(self._beat / 2)
            waited += self._beat / 2
            now = self._record.read()
            if now is None:
                return
            # A file that is just being written names nobody.
            if now[0] != data and Holder.parse(now[0]) is not None:
                raise self._refused()
        print(
            f"scaling-dit: {self._what}: no sign of it, so its lease is taken over",
            file=sys.stderr,
            flush=True,
        )

    def _make_sure_it_is_mine(self) -> None:
        found = self._record.read()
        holder = None if found is None else Holder.parse(found[0])
        if holder is not None and holder.owner != self._me.owner:
            raise Taken

    def _give_signs(self) -> None:
        while not self._released.wait(self._beat):
            self._me = dataclasses.replace(self._me, beat=self._me.beat + 1)
            try:
                self._make_sure_it_is_mine()
                self._version = self._record.write(self._me.to_bytes(), self._version)
            except Taken:
                found = self._record.read()
                self._lost = str((Holder.parse(found[0]) if found else None) or "another process")
                return
            except Exception:
                # A store that fails for a while: whoever writes meets that as well, and says so.
                continue


@contextlib.contextmanager
def leased(path: epath.Path, what: str) -> Iterator[Lease]:
    """A lease that is released at the end of the context, also where a signal ends the process in it."""
    with Lease(path, what) as lease, signals.cleaning(lease.release):
        yield lease


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
