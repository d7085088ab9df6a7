"""Errors that a user can cause, each reported in one line: what is wrong, where, what would be right."""

import difflib
import re
from collections.abc import Iterable

# What a terminal obeys or hides: control characters, line separators, marks and overrides of the writing direction,
# halves of surrogate pairs.
_UNPRINTABLE = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)
# The most characters of an error line.
_LONGEST = 4000


def printable(text: str, keep: str = "") -> str:
    r"""A text that comes from data, a file or another program, as it may reach a terminal or a log.

    Characters that a terminal obeys or that cannot be encoded become escapes such as ``\x1b``.

    Args:
      text: of any kind.
      keep: characters that stay, such as the newlines of a table.
    """
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


class UserError(Exception):
    """A mistake in a command, config, file or call. `str(error)` is the one line that the user sees.

    The command line prints it as `scaling-dit: error: ...` and exits with `exit_code`, without a traceback.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        line = printable(" ".join(message.split()))
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} [...] {line[-_LONGEST // 2 :]}"
        super().__init__(line)


class StorageError(UserError):
    """A disk, folder or bucket could not be written or read; the command itself is right.

    What was complete before stays complete, and the same command resumes once there is space or access again.
    """

    # EX_IOERR of sysexits.h.
    exit_code = 74


def nearest(word: str, known: Iterable[str]) -> str:
    """The hint at the end of an error line: the nearest known name if one is close, else all known names.

    >>> nearest("uvti", ["uvit", "pixart"])
    "did you mean 'uvit'?"
    """
    names = sorted(str(name) for name in known)
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(names)
