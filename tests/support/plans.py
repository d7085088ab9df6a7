"""The verb `plan` in a process of its own."""

import subprocess
import sys

from tests.support import xla


def command(*flags, code=0):
    """Runs `scaling-dit plan` in a process of its own, as it sets up jax; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "scaling_dit", "plan", *flags],
        capture_output=True,
        text=True,
        env=xla.plain_environment(),
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done
