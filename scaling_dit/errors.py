"""Errors that a user can cause, each reported in one line: what is wrong, where, what would be right."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a command, config, file or call. `str(error)` is the one line that the user sees.

    The command line prints it as `scaling-dit: error: ...` and exits with `exit_code`, without a traceback.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


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
