"""How a command ends: errors as one line on stderr and an exit code."""

import os
import sys
from collections.abc import Callable

from scaling_dit import signals, storage
from scaling_dit.errors import StorageError, UserError

PROGRAM = "scaling-dit"
# A verb returns its other codes itself, see `training.loop.main`.
USER_ERROR, INTERRUPTED = UserError.exit_code, signals.INTERRUPTED
# Errors of jax that say what a device refused, under the names of its versions.
_OF_DEVICES = ("JaxRuntimeError", "XlaRuntimeError")


def report_errors(run: Callable[[], int]) -> int:
    """Calls `run` and returns its exit code; prints a user's mistake as one line. A fault keeps its traceback."""
    try:
        code = run()
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `| head` has closed the pipe: nobody reads the rest, nor what Python flushes when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    except OSError as error:
        # A path that cannot be read or written; UserError makes its name printable.
        line = UserError(f"{error.strerror or error}: {error.filename or ''}")
        print(f"{PROGRAM}: error: {line}", file=sys.stderr)
        return StorageError.exit_code if storage.is_fault(error) else USER_ERROR
    except Exception as error:
        # The client of a bucket, or devices without memory, whose kinds of errors are not imported here.
        if storage.is_fault(error):
            print(f"{PROGRAM}: error: {storage.reason(error)}", file=sys.stderr)
            return StorageError.exit_code
        if type(error).__name__ in _OF_DEVICES and "RESOURCE_EXHAUSTED" in str(error):
            first = str(error).splitlines()[0][:200]
            print(
                f"{PROGRAM}: error: the devices have no memory for this ({first}); lower the batch",
                file=sys.stderr,
            )
            return USER_ERROR
        raise
