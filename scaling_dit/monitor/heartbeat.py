"""Heartbeats: what each process of a run does at the moment, as a small file that others can read.

`process-00000.json` in the folder has {"host", "pid", "process", "processes", "state", "step", "steps", "began",
"time", "progress_time", ...}. Times are seconds since 1970: "time" when the file was written, "progress_time" when a
step was finished last. An old "time" means that the process is gone; a new one with an old "progress_time" that it
hangs, compiles or evaluates. States: "starting", "training", "evaluating", "saving", and at the end "done",
"preempted" or "failed".

Files with a "process" from the "processes" of process 0 on are left from an earlier start with more processes.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from etils import epath

from scaling_dit import files, signals

STARTING, TRAINING, EVALUATING, SAVING = "starting", "training", "evaluating", "saving"
DONE, PREEMPTED, FAILED = "done", "preempted", "failed"
ENDED = (DONE, PREEMPTED, FAILED)
# Seconds between two files of a process, on a local disk and in a bucket.
LOCAL_EVERY, REMOTE_EVERY = 5.0, 30.0


def path_of(folder: epath.Path, process: int) -> epath.Path:
    """The file of a process."""
    return folder / f"process-{process:05d}.json"


class Heartbeat:
    """A context that writes the heartbeat of this process, from a thread of its own.

    Errors of writing do not end the run: they are printed once.

    Args:
      folder: of all heartbeats of the run.
      process: the index of this process.
      facts: values that stay, such as "processes" and "steps".
      every: seconds between two files; by default by the kind of path.
      now: seconds since 1970.
    """

    def __init__(
        self,
        folder: epath.Path,
        process: int,
        facts: Mapping[str, Any],
        *,
        every: float | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._path, self._now = path_of(folder, process), now
        self._every = every or (REMOTE_EVERY if files.is_remote(folder) else LOCAL_EVERY)
        began = now()
        self._facts: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": process,
            **facts,
            "state": STARTING,
            "step": None,
            "began": began,
            "progress_time": began,
        }
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._is_reported = False

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = getattr(error, "code", None) in (signals.AGAIN, signals.INTERRUPTED)
        self.update(state=DONE if kind is None else PREEMPTED if stopped else FAILED)
        self._closed.set()
        self._thread.join()
        self.write()

    def update(self, **facts: Any) -> None:
        """Changes facts; the next file has them."""
        with self._lock:
            self._facts.update(facts)

    def reach(self, step: int) -> None:
        """Notes a finished step."""
        self.update(step=step, progress_time=self._now())

    @contextmanager
    def during(self, state: str) -> Iterator[None]:
        """Says that the process is in another state inside the context."""
        with self._lock:
            before = self._facts["state"]
        self.update(state=state)
        try:
            yield
        finally:
            self.update(state=before)

    def write(self) -> None:
        """Writes the file now."""
        with self._lock:
            text = json.dumps(self._facts | {"time": self._now()})
        try:
            files.write_whole(self._path, text.encode())
        except Exception as error:
            if not self._is_reported:
                self._is_reported = True
                print(f"scaling-dit: no heartbeat: {error}", file=sys.stderr, flush=True)

    def _beat(self) -> None:
        while not self._closed.wait(self._every):
            self.write()


def read(folder: epath.Path) -> list[dict[str, Any]]:
    """The heartbeats of the newest start of a run, by process; empty without any. A damaged file counts as missing."""
    found = {}
    for path in sorted(folder.glob("process-*.json"), key=lambda path: path.name):
        try:
            row = json.loads(path.read_text())
            found[int(row["process"])] = row
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            continue
    processes = found[0].get("processes", len(found)) if 0 in found else len(found)
    return [row for process, row in sorted(found.items()) if process < processes]
