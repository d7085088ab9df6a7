"""Signals: one exit code for each, at any moment, in processes that import nothing slow."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from scaling_dit import signals
from scaling_dit.parallel import processes
from tests.support.paths import ROOT

CODES = {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGHUP: 75}


def start(code: str, **options) -> subprocess.Popen:
    """A process that has installed the handlers, and says when it is where a test wants it."""
    head = "import os, signal, sys, time\nfrom scaling_dit import signals\nsignals.install()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip
    assert process.stdout.readline() == "here\n"
    return process


def end(process: subprocess.Popen) -> tuple[int, list[str]]:
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors.splitlines()


NOTHING_TO_SAVE = "print('here', flush=True)\ntime.sleep(60)"
SAVING = """
    with signals.deferred() as reached:
        reached()
        print('here', flush=True)
        while not reached():
            time.sleep(0.01)
        time.sleep(float(os.environ['SAVE']))
        print(signals.name())
    sys.stdout.flush()
    os._exit(signals.exit_code())
"""


@pytest.mark.parametrize("number", CODES)
def test_with_nothing_to_save_a_signal_ends_the_process_at_once(number):
    process = start(NOTHING_TO_SAVE)
    process.send_signal(number)
    code, lines = end(process)
    assert code == CODES[number]
    assert lines == [f"scaling-dit: {number.name}: stopped; the same command starts again or resumes"]


@pytest.mark.parametrize("number", CODES)
def test_a_command_has_its_code_before_its_imports(number):
    """From the first line of the package on; `time` is what `-X importtime` waits for."""
    code = """
        import builtins
        real = builtins.__import__
        def slow(name, *args):
            if name == "scaling_dit.cli.main":
                print("here", flush=True)
                time.sleep(60)
            return real(name, *args)
        builtins.__import__ = slow
        from scaling_dit import __main__
        __main__.run()
    """
    process = start(code)
    process.send_signal(number)
    assert end(process)[0] == CODES[number]


@pytest.mark.parametrize("number", CODES)
def test_where_there_is_something_to_save_it_is_noted(number, monkeypatch):
    monkeypatch.setenv("SAVE", "0.1")
    process = start(SAVING)
    process.send_signal(number)
    code, lines = end(process)
    assert code == CODES[number]
    assert lines == [f"scaling-dit: {number.name}: saving after this step; a second signal stops at once"]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(number, marks=pytest.mark.slow) for number in CODES if number != signal.SIGTERM),
    ],
)
def test_five_in_a_row_keep_the_code_and_the_save(number, monkeypatch):
    monkeypatch.setenv("SAVE", "1")
    process = start(SAVING)
    for _ in range(5):
        process.send_signal(number)
        time.sleep(0.02)
    code, lines = end(process)
    assert code == CODES[number] and len(lines) == 1


@pytest.mark.parametrize("second", CODES)
def test_a_second_one_stops_at_once_with_the_code_of_the_first(second, monkeypatch):
    monkeypatch.setenv("SAVE", "60")
    process = start(SAVING)
    process.send_signal(signal.SIGTERM)
    time.sleep(signals.SAME + 0.2)
    began = time.monotonic()
    process.send_signal(second)
    code, lines = end(process)
    assert code == 75 and time.monotonic() - began < 5
    assert "stopped at once" in lines[-1] and len(lines) == 2


def test_an_ignored_signal_stays_ignored():
    process = start(NOTHING_TO_SAVE, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 75


def test_what_is_half_done_is_cleaned(tmp_path):
    code = f"""
        import pathlib
        from etils import epath
        from scaling_dit import files
        with files.staged(epath.Path({str(tmp_path / "whole")!r})) as local:
            local.write_text("half")
            print("here", flush=True)
            time.sleep(60)
    """
    process = start(code)
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 75
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_cleaner_that_hangs_does_not_keep_the_process():
    code = """
        with signals.cleaning(lambda: time.sleep(60)):
            print("here", flush=True)
            time.sleep(60)
    """
    process = start(code)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 75 and time.monotonic() - began < 20


@pytest.mark.parametrize("number", CODES)
def test_in_a_program_of_the_users_own_handlers_are_lent(number):
    """Without `install`: noted while a run trains, and as before afterwards."""
    seen = []
    before = {each: signal.signal(each, lambda number, frame: seen.append(number)) for each in CODES}
    try:
        with processes.preemption() as reached:
            assert not reached()
            os.kill(os.getpid(), number)
            assert reached() and signals.exit_code() == CODES[number] and signals.name() == number.name
            time.sleep(signals.SAME + 0.1)
            assert not seen
            os.kill(os.getpid(), number)
            assert seen == [number]
        os.kill(os.getpid(), number)
        assert seen == [number] * 2
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_a_parent_passes_signals_on_and_a_second_one_kills_the_child(tmp_path):
    code = """
        from scaling_dit.parallel import supervise
        child = "import signal, time; [signal.signal(n, lambda *_: None) for n in (1, 2, 15)]"
        sys.exit(supervise.run([sys.executable, "-c", child + "; print('here', flush=True); time.sleep(60)"]))
    """
    process = start(code)
    process.send_signal(signal.SIGHUP)
    time.sleep(signals.SAME + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    assert end(process) == (75, [])
