"""One process of several is run by a parent that tells in one line how it ended.

jax's runtime ends a process whose peer is lost from a thread of its own, in C++, by SIGABRT and a stack dump; Python
code in that process gets no chance to speak. The parent does: it passes everything on, but for that dump, of which it
says which process was lost. Standard library only, so the parent holds no accelerator and little memory.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType
from typing import IO

CHILD = "SCALING_DIT_SUPERVISED"  # in the environment of a supervised process
LOST = 75  # exit code: EX_TEMPFAIL, the same command goes on; also that of a preempted run
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_FATAL = re.compile(
    rb"^F\d{4} .*Terminating process because the JAX distributed service detected fatal errors"
)
_RUNTIME = re.compile(rb"^[EW]\d{4} .*(coordination_service|preemption_sync_manager)")
_LOG = re.compile(rb"^[IWEF](\d|$)")  # what may become one of these lines once it is whole


def supervised() -> bool:
    """Whether this process has a parent that `run` made."""
    return os.environ.get(CHILD) == str(os.getppid())


def run(command: Sequence[str]) -> int:
    """Runs a command, passes SIGTERM and SIGINT to it and its output on; returns its exit code.

    That is LOST if another process of the run was lost, and 128 + N for a signal N. If this process is killed, the
    command is too.
    """
    parent = os.getpid()

    def die_with_parent() -> None:
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it has died already
            os._exit(128 + signal.SIGKILL)

    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        env={**os.environ, CHILD: str(parent)},
        process_group=0,  # or Ctrl-C reaches it twice, once from the terminal and once from here
        preexec_fn=die_with_parent if sys.platform == "linux" else None,
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
    """Copies bytes as they come, without the runtime's dump and what it says just before; returns the dump."""
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
        if rest and not dump and not skipping and not _LOG.match(rest):  # a progress bar ends no line
            kept.append(rest)
            rest = b""
        out.write(b"".join(kept))
        out.flush()
    if rest and not dump and not skipping:
        out.write(rest)
        out.flush()
    return b"".join(dump).decode(errors="replace")


def _continues(line: bytes) -> bool:
    """Whether a line goes on with the runtime's message about a lost process before it."""
    return bool(
        re.match(
            rb"(\S*task:)?\d+\s*$|\s*$|The tasks have crashed|Additional GRPC error|RPC: |:UNKNOWN:", line
        )
    )


def lost_line(dump: str) -> str:
    """One line of which process a dump says was lost."""
    advice = "the same command goes on from the last checkpoint, with as many processes or others"
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
