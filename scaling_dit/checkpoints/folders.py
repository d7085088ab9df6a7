"""Folders of checkpoints: names that Orbax cannot write to, and checkpoints that are moved out of the way."""

import os
import sys
from collections.abc import Callable

from etils import epath

from scaling_dit import files
from scaling_dit.errors import UserError

# Orbax looks for the parts of a checkpoint by a glob of its whole path; TensorStore takes a backslash for a slash.
_MISREAD = "*?[]\\"


def spelled_for_orbax(directory: epath.Path, *, make: bool) -> tuple[epath.Path, Callable[[], None]]:
    """A path of a folder that Orbax and TensorStore understand, and a function that gives it up.

    It is the folder itself, or if its name has characters that they misread, this process's name for the open folder.

    Args:
      directory: absolute, or of a remote store.
      make: make the folder; else one that does not exist is given as it is.

    Raises:
      UserError: such a name on a system without /proc.
    """
    name = os.fspath(directory)
    plain = name.isprintable() and not any(character in name for character in _MISREAD)
    if plain or files.is_remote(directory):
        return directory, lambda: None
    if make:
        directory.mkdir(parents=True, exist_ok=True)
    elif not directory.exists():
        return directory, lambda: None
    if not sys.platform.startswith("linux"):
        raise UserError(
            f"{name!r}: the name of a workdir may not hold any of {_MISREAD} here; give another --workdir"
        )
    opened = os.open(name, os.O_RDONLY | os.O_DIRECTORY)
    return epath.Path(f"/proc/self/fd/{opened}"), lambda: os.close(opened)


def set_aside(folder: epath.Path, aside: epath.Path) -> epath.Path | None:
    """Moves a folder into another one under a free name; removes it where the store cannot move, and returns None."""
    aside.mkdir(parents=True, exist_ok=True)
    taken = {path.name for path in aside.iterdir()} if aside.exists() else set()
    name = next(
        name for name in (folder.name, *(f"{folder.name}-{n}" for n in range(2, 10**6))) if name not in taken
    )
    try:
        folder.rename(aside / name)
    except (OSError, NotImplementedError):
        folder.rmtree()
        return None
    return aside / name
