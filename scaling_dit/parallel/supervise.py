"""Runs one process of several as a child and reports in one line how it ended.

When a peer is lost, jax's runtime ends this process from a C++ thread, with SIGABRT and a stack dump. Python code in
the process cannot catch that, so a parent process does: it passes on all output but replaces the stack dump with one
line that names the lost process. It uses the standard library only, so it holds no accelerator and little memory.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import IO

# Environment variable of a supervised process.
CHILD = "SCALING_DIT_SUPERVISED"
# Exit code (EX_TEMPFAIL) after a lost process or a preemption: the same command resumes the run.
LOST = 75
# PR_SET_PDEATHSIG of prctl.
_DEATH_SIGNAL = 1
_FATAL = re.compile(
    rb"^F\d{4} .*Terminating process because the JAX distributed service detected fatal errors"
)
_RUNTIME = re.compile(rb"^[EW]\d{4} .*(coordination_service|preemption_sync_manager)")
# The beginning of a log line, which may become one of the lines above once it is complete.
_LOG = re.compile(rb"^[IWEF](\d|$)")


def supervised() -> bool:
    """Whether `run` in the parent process started this process."""
    return os.environ.get(CHILD) == str(os.getppid())


def die_with(parent: int) -> Callable[[], None] | None:
    """A `preexec_fn` of subprocess: the child is killed as soon as its parent, of this pid, has died. Linux only."""
    if sys.platform != "linux":
        return None

    def prepare() -> None:
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
        # The parent has died already.
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)

    return prepare


def run(command: Sequence[str]) -> int:
    """Runs a command and returns its exit code. Forwards SIGTERM and SIGINT to it, and passes on its output.

    The exit code is LOST if another process of the run was lost, and 128 + N if signal N ended the command. If this
    process is killed, the command is killed as well.
    """
    parent = os.getpid()
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        env={**os.environ, CHILD: str(parent)},
        # In the same group Ctrl-C would reach it twice: from the terminal and from this process.
        process_group=0,
        preexec_fn=die_with(parent),
    ) as child:

        def pass_on(number: int, frame: FrameType | None) -> None:
            child.send_signal(number)

        old = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            assert child.stderr is not None
            dump = forward(child.stderr, sys.stderr.buffer)
            code = child.wait()
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
    if dump:
        print(f"scaling-dit: {lost_line(dump)}", file=sys.stderr)
        return LOST
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        print(f"scaling-dit: this process was ended by {name}{hint}", file=sys.stderr)
        return 128 - code
    return code


def forward(source: IO[bytes], out: IO[bytes]) -> str:
    """Copies output as it arrives, without the runtime's dump and the messages just before it; returns the dump."""
    rest, skipping = b"", False
    dump: list[bytes] = []
    while chunk := os.read(source.fileno(), 1 << 16):
        *lines, rest = re.split(rb"(?<=[\n\r])", rest + chunk)
        kept = []
        for line in lines:
            if dump or _FATAL.match(line):
                dump.append(line)
            elif _RUNTIME.match(line):
                skipping = True
            elif not (skipping and _continues(line)):
                skipping = False
                kept.append(line)
        # A progress bar does not end its lines.
        if rest and not dump and not skipping and not _LOG.match(rest):
            kept.append(rest)
            rest = b""
        out.write(b"".join(kept))
        out.flush()
    if rest and not dump and not skipping:
        out.write(rest)
        out.flush()
    return b"".join(dump).decode(errors="replace")


def _continues(line: bytes) -> bool:
    """Whether a line continues the runtime's message about a lost process."""
    return bool(
        re.match(
            rb"(\S*task:)?\d+\s*$|\s*$|The tasks have crashed|Additional GRPC error|RPC: |:UNKNOWN:", line
        )
    )


def lost_line(dump: str) -> str:
    """One line that names the process which a dump reports as lost."""
    advice = "the same command resumes from the last checkpoint, with the same number of processes or another"
    unhealthy = re.search(r"stopped sending heartbeats\):\n((?:.*\d\n)+)", dump)
    if unhealthy:
        numbers = re.findall(r"(\d+)\n", unhealthy[1])
        who = (
            f"process {numbers[0]} is lost: it"
            if len(numbers) == 1
            else f"processes {', '.join(numbers)} are lost: they"
        )
        return f"{who} stopped answering, so this one stops; {advice}"
    if "Failed to send RPC to coordination service" in dump:
        return f"process 0 is lost: it cannot be reached any more, so this one stops; {advice}"
    status = re.search(r"absl::Status: (.*)", dump)
    return f"the processes lost touch ({status[1] if status else 'no reason given'}), so this one stops; {advice}"
