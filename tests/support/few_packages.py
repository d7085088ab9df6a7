"""Runs a script as if only jax, flax, optax, numpy, einops, absl and what these require were installed.

python tests/support/few_packages.py SCRIPT [ARGUMENT ...]

The environment variable FEW_PACKAGES may name others, as requirements separated by spaces.
"""

import importlib.abc
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import runpy
import sys

from packaging.requirements import Requirement

PACKAGES = os.environ.get("FEW_PACKAGES", "jax flax optax numpy einops absl-py").split()


def normal(name):
    """A distribution's name as all its spellings are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required(names):
    """The distributions that are installed with those of these names, themselves included."""
    found, left = set(), [Requirement(name) for name in names]
    while left:
        one = left.pop()
        try:
            asked = [Requirement(line) for line in importlib.metadata.requires(one.name) or ()]
        # For another Python or system.
        except importlib.metadata.PackageNotFoundError:
            continue
        for extra in ("", *one.extras):
            if (normal(one.name), extra) not in found:
                found.add((normal(one.name), extra))
                left += [
                    each for each in asked if each.marker is None or each.marker.evaluate({"extra": extra})
                ]
    return {name for name, _ in found}


class Refuse(importlib.abc.MetaPathFinder):
    """Finds no module that comes of another distribution."""

    def __init__(self):
        self.allowed = allowed = required(PACKAGES) | {"scaling-dit"}
        self.others = {
            module
            for module, owners in importlib.metadata.packages_distributions().items()
            if not allowed & set(map(normal, owners))
        }

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.others:
            raise ModuleNotFoundError(f"No module named {name!r} among few packages", name=name)


def find_spec(name, package=None, real=importlib.util.find_spec):
    """Of `importlib.util`: None, and no error, for a module that is refused."""
    try:
        return real(name, package)
    except ModuleNotFoundError as error:
        if "among few packages" in str(error):
            return None
        raise


def hide_others(allowed, real=importlib.metadata.Distribution.from_name):
    """Makes `importlib.metadata` know no other distribution, for packages that ask it before they import one."""

    def from_name(name):
        if normal(name) not in allowed:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    every = importlib.metadata.distributions
    importlib.metadata.Distribution.from_name = from_name
    importlib.metadata.distributions = lambda **how: (
        one for one in every(**how) if normal(one.name) in allowed
    )


if __name__ == "__main__":
    importlib.util.find_spec = find_spec
    sys.meta_path.insert(0, Refuse())
    hide_others(sys.meta_path[0].allowed)
    for module in [name for name in sys.modules if name.partition(".")[0] in sys.meta_path[0].others]:
        # Of what a start-up file imported.
        del sys.modules[module]
    sys.argv = sys.argv[1:]
    sys.path[0] = str(pathlib.Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
