"""What every mistake on the command line must give: one line, exit code 2, nothing else, soon."""

import re
import time
from collections.abc import Iterable
from typing import Any

import pytest

from scaling_dit.cli import main as cli

# Seconds; a mistake that takes as long as work is none that a user waits for.
LONGEST = 60
_UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def line_of(capsys, *arguments: str) -> str:
    """The one line of a command that must fail, without the name of the program."""
    began = time.monotonic()
    code = cli.main(list(arguments))
    took = time.monotonic() - began
    captured = capsys.readouterr()
    assert code == 2, (arguments, code, captured.err[-500:])
    assert captured.err.startswith("scaling-dit: error: "), captured.err[-2000:]
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n"), captured.err
    assert captured.out == ""
    assert not _UNSAFE.search(captured.err), repr(captured.err)
    assert "Traceback" not in captured.err
    assert took < LONGEST
    return captured.err.removeprefix("scaling-dit: error: ").rstrip()


def swept(cases: Iterable[Any], share: int = 3) -> list[Any]:
    """Parameters of a generated test: one of `share` runs with the fast tests, all of them with the slow ones.

    Neighbours are of one verb or field, so each of these has some among the fast ones.
    """
    marked = []
    for number, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        marked.append(pytest.param(*values, marks=[pytest.mark.slow] if number % share else []))
    return marked
