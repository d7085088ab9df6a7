"""`python -m scaling_dit VERB ...` is `scaling-dit VERB ...`."""

import gc
import os
import sys

from scaling_dit import signals


def run() -> None:
    """Runs the command of this process and ends it."""
    # Imports and first traces make a million objects that stay, and a full collection walks through all that there are
    # so far: with Python's 10 in place of 100, that is an eighth of the time of a small run. The young are collected as
    # often as ever, and Python puts off a full collection of a large program by itself, until a quarter of it is new.
    gc.set_threshold(*gc.get_threshold()[:2], 100)
    # Before the imports of the command line: from here on a signal has its exit code.
    signals.install()
    from scaling_dit.cli.main import main

    code = main()
    if signals.first() is not None:
        # Python restores the default handlers while it ends, and a further signal would then change the exit code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
