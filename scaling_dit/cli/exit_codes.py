"""How a command ends: errors as one line on stderr and an exit code."""

import os
import sys
from collections.abc import Callable

from scaling_dit.errors import UserError

PROGRAM = "scaling-dit"
# A verb returns its other codes itself, see `training.loop.main`.
USER_ERROR, INTERRUPTED = UserError.exit_code, 130


def report_errors(run: Callable[[], int]) -> int:
    """Calls `run` and returns its exit code; prints a user's mistake as one line. A fault keeps its traceback."""
    try:
        code = run()
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # `| head` has closed the pipe: nobody reads the rest, nor what Python flushes when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    except OSError as error:
        # A path that cannot be read or written.
        line = UserError(f"{error.strerror or error}: {error.filename or ''}")
        print(f"{PROGRAM}: error: {line}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED
