"""What a study ran on: one line for each start, for its report."""

import datetime
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from scaling_dit import files
from scaling_dit.doctor.probe import installed
from scaling_dit.errors import UserError
from scaling_dit.monitor.host import cores, processor

_REMEDY = "remove it; it says what earlier starts ran on"


def about() -> dict[str, Any]:
    """Time, command, hardware and versions of this start, as JSON values."""
    devices = jax.devices()
    # With the program's name alone: where it is installed is nobody's business.
    command = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
    return {
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command).replace("__main__.py", "scaling-dit"),
        "processor": processor(),
        # Those that this process may use.
        "cores": len(cores()),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "versions": installed(),
    }


def note(path: epath.Path) -> None:
    """Adds this start to the file of starts."""
    starts = [*read(path), about()]
    files.write_whole(path, files.to_json({"starts": starts}).encode())


def read(path: epath.Path) -> list[dict[str, Any]]:
    """All starts of a study; empty where none is noted."""
    if not path.exists():
        return []
    starts = files.read_json(path, dict, _REMEDY).get("starts")
    if not isinstance(starts, list) or not all(isinstance(one, dict) for one in starts):
        raise UserError(f"{path} is damaged: it holds no list of starts; {_REMEDY}")
    return starts


def lines(starts: Sequence[dict[str, Any]]) -> list[str]:
    """When a study ran, with which commands, on what and with which versions; sentences for its report."""
    if not starts:
        return []
    first, last = starts[0]["began"][:10], starts[-1]["began"][:10]
    when = first if first == last else f"{first} to {last}"
    times = "once" if len(starts) == 1 else f"{len(starts)} times"
    hosts = dict.fromkeys(
        f"{one['processor']} ({one['cores']} core{'' if one['cores'] == 1 else 's'}; devices: {one['devices']})"
        for one in starts
    )
    versions = dict.fromkeys(
        ", ".join(f"{name} {value}" for name, value in one["versions"].items()) for one in starts
    )
    commands = dict.fromkeys(one["command"] for one in starts)
    return [
        f"Run on {when}, started {times}, on {'; '.join(hosts)}.",
        f"Command: {'; '.join(commands)}.",
        f"Versions: {'; '.join(versions)}.",
    ]
