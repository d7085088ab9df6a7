"""The verb `plan` in a process of its own, and plans without kernels, which start one themselves."""

import json
import os
import subprocess
import sys
from typing import Any
from unittest import mock

from scaling_dit import config as config_lib
from scaling_dit.parallel.topologies import parse
from scaling_dit.planning import quick
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


def quickly(spec: str, topology: str, *overrides: str) -> dict[str, Any]:
    """What `scaling-dit plan --quick --json` prints of a config, such as "shapes:smoke", without a process more."""
    name, _, argument = spec.partition(":")
    with mock.patch.dict(os.environ, xla.plain_environment(), clear=True):
        made = quick.make(config_lib.load(f"experiments/{name}.py:{argument}", overrides), parse(topology))
    return json.loads(json.dumps(made.to_dict()))
