"""`python -m scaling_dit VERB ...` is `scaling-dit VERB ...`."""

import os
import sys

from scaling_dit import signals


def run() -> None:
    """Runs the command of this process and ends it."""
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
