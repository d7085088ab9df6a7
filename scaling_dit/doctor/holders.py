"""Processes that hold the TPU's devices: what a dead or forgotten run leaves, and why the next one cannot start.

Needs no jax, so it runs before jax asks for the devices. Processes of other users show only to root.
"""

import dataclasses
import os
import pathlib
import signal
import time
from collections.abc import Callable, Sequence

from scaling_dit.parallel import processes

_PROC = pathlib.Path("/proc")
# Seconds that a process has to end after SIGTERM, and after SIGKILL.
TERM_SECONDS, KILL_SECONDS = 10.0, 5.0


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that has devices open.

    Attributes:
      pid: its number.
      began: when it began, in clock ticks since boot, so that another process of this number is not taken for it.
      command: its command line.
      devices: the devices that it has open.
    """

    pid: int
    began: int
    command: str
    devices: tuple[str, ...]

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command}) holds {', '.join(self.devices)}"


def find(devices: Sequence[str] | None = None, proc: pathlib.Path = _PROC) -> list[Holder]:
    """The processes, other than this one, that have devices open.

    Args:
      devices: paths; by default the TPU's devices of this host.
      proc: the file system that shows processes.
    """
    real = {os.path.realpath(device) for device in (processes.tpu_devices() if devices is None else devices)}
    if not real:
        return []
    found = []
    for folder in sorted(proc.iterdir(), key=lambda path: path.name):
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        opened = sorted(real & set(_open_files(folder)))
        began = _began(folder)
        if opened and began is not None:
            found.append(Holder(int(folder.name), began, _command(folder), tuple(opened)))
    return found


def hidden(proc: pathlib.Path = _PROC) -> int:
    """The number of processes whose open files this user may not see."""
    return sum(
        folder.name.isdecimal() and folder.exists() and not os.access(folder / "fd", os.R_OK | os.X_OK)
        for folder in proc.iterdir()
    )


def end(
    holders: Sequence[Holder], proc: pathlib.Path = _PROC, sleep: Callable[[float], object] = time.sleep
) -> list[Holder]:
    """Ends processes with SIGTERM, then SIGKILL; returns those that are still there."""
    left = list(holders)
    for number, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        for holder in left:
            if _lives(holder, proc):
                try:
                    os.kill(holder.pid, number)
                except (ProcessLookupError, PermissionError):
                    continue
        waited = 0.0
        while (left := [holder for holder in left if _lives(holder, proc)]) and waited < seconds:
            sleep(0.1)
            waited += 0.1
    return left


def _lives(holder: Holder, proc: pathlib.Path) -> bool:
    folder = proc / str(holder.pid)
    # A zombie holds nothing any more.
    return _began(folder) == holder.began and bool(set(_open_files(folder)) & set(holder.devices))


def _open_files(folder: pathlib.Path) -> list[str]:
    try:
        descriptors = list((folder / "fd").iterdir())
    except OSError:
        return []
    paths = []
    for descriptor in descriptors:
        try:
            paths.append(os.readlink(descriptor))
        except OSError:
            continue
    return paths


def _began(folder: pathlib.Path) -> int | None:
    try:
        # The name of the program, in parentheses, may have spaces.
        return int((folder / "stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _command(folder: pathlib.Path) -> str:
    try:
        words = (folder / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except OSError:
        return "?"
    text = " ".join(word.decode(errors="replace") for word in words)
    return "".join(char if char.isprintable() else "?" for char in text)[:120] or "?"
