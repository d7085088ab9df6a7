"""The parent of one process of several: what it passes on, and the line it makes of the runtime's dump."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from scaling_dit.parallel import supervise

# As jax 0.10.2 prints them.
HEAD = (
    "E1121 10:03:39.792584   19870 coordination_service_agent.cc:289] Polled an error from coordination service.\n"
    "F1121 10:03:39.792725   19870 client.h:80] Terminating process because the JAX distributed service detected fatal"
    " errors. Disable Python buffering, i.e. `python -u`. absl::Status: "
)
UNHEALTHY = (
    "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n{}The tasks have crashed. Check the"
    " task logs.\n\nRPC: /xla.coordination.CoordinationService/PollForError\n*** Check failure stack trace: ***\n"
    "    @     0x7fea37c40634  absl::lts_20260107::log_internal::LogMessage::SendToLog()\n"
)
LEADER = (
    "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted.\n"
    ":UNKNOWN:Error received from peer\n*** Check failure stack trace: ***\n"
)
SERVICE = (
    "E1121 09:53:43.222855   15363 coordination_service.cc:1549] [1509] Use error polling to propagate the following"
    " error to all tasks: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\n"
    "The tasks have crashed. Check the task logs for an earlier error. [type.googleapis.com]\n"
)


def forward(text: str, chunks: int = 7) -> tuple[str, str]:
    """(what is passed on, the dump) of a text that arrives in small pieces."""
    reading, writing = os.pipe()
    out = io.BytesIO()
    pid = os.fork()
    if not pid:
        os.close(reading)
        data = text.encode()
        for start in range(0, len(data), chunks):
            os.write(writing, data[start : start + chunks])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as source:
        dump = supervise.forward(source, out)
    os.waitpid(pid, 0)
    return out.getvalue().decode(), dump


@pytest.mark.parametrize("chunks", [1, 7, 100_000])
def test_everything_but_the_dump_is_passed_on(chunks):
    output = "one\n\rstep 1\rstep 2\nE1121 10:00:00.000000 1 other.cc:1] kept\nFinally\n"
    passed, dump = forward(output + SERVICE + HEAD + UNHEALTHY.format("1\n"), chunks)
    assert passed == output
    assert dump.startswith("F1121") and "SendToLog" in dump
    assert forward(output + "no end of line", chunks) == (output + "no end of line", "")


def test_what_follows_the_runtimes_message_is_passed_on():
    passed, dump = forward(SERVICE + "Traceback (most recent call last):\nValueError: 1\n")
    assert (passed, dump) == ("Traceback (most recent call last):\nValueError: 1\n", "")


@pytest.mark.parametrize(
    ("dump", "start"),
    [
        (UNHEALTHY.format("1\n"), "process 1 is lost: it stopped answering"),
        (UNHEALTHY.format("3\n11\n"), "processes 3, 11 are lost: they stopped answering"),
        (UNHEALTHY.format("/job:jax_worker/replica:0/task:2\n"), "process 2 is lost"),
        (LEADER, "process 0 is lost: it cannot be reached"),
        ("DEADLINE_EXCEEDED: late\n", "the processes lost touch (DEADLINE_EXCEEDED: late)"),
    ],
)
def test_the_line_names_the_process(dump, start):
    line = supervise.lost_line(HEAD + dump)
    assert line.startswith(start) and "\n" not in line
    assert "resumes from the last checkpoint" in line


def supervised(program: str, **options) -> subprocess.Popen:
    """A supervisor with a child that runs `program`."""
    parent = "import sys; from scaling_dit.parallel import supervise; sys.exit(supervise.run(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", parent, sys.executable, "-u", "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_exit_codes_and_output():
    process = supervised(
        """
        import os, sys
        from scaling_dit.parallel import supervise
        assert supervise.supervised()
        print("out"); print("error", file=sys.stderr); sys.exit(7)
        """
    )
    assert process.communicate(timeout=60) == ("out\n", "error\n")
    assert process.returncode == 7
    assert not supervise.supervised()


def test_a_dump_becomes_a_line_and_the_code_of_a_lost_process():
    process = supervised(
        f"import os, sys; sys.stderr.write({HEAD + UNHEALTHY.format('1' + chr(10))!r}); os.abort()"
    )
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == supervise.LOST
    assert errors.count("\n") == 1 and errors.startswith("scaling-dit: process 1 is lost: ")


def test_a_signal_is_reported():
    process = supervised("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert (
        process.communicate(timeout=60)[1]
        == "scaling-dit: this process was ended by SIGKILL (out of memory?)\n"
    )
    assert process.returncode == 128 + 9


def test_sigterm_reaches_the_child():
    process = supervised(
        """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        print("ready")
        time.sleep(60)
        """
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_ctrl_c_reaches_the_child_once():
    """A terminal sends SIGINT to the whole group of the command that it runs."""
    process = supervised(
        """
        import signal, sys, time
        caught = []
        signal.signal(signal.SIGINT, lambda *_: caught.append(1))
        print("ready")
        time.sleep(1)
        print(len(caught))
        """,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60) == ("1\n", "")
    assert process.returncode == 0


def test_the_child_does_not_outlive_its_parent():
    process = supervised("import os, time; print(os.getpid()); time.sleep(60)")
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    for _ in range(200):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        # Ended, if nobody has collected it yet.
        with open(f"/proc/{child}/stat") as stat:
            if stat.read().rpartition(")")[2].split()[0] == "Z":
                break
        time.sleep(0.05)
    else:
        raise AssertionError("the child still runs")
