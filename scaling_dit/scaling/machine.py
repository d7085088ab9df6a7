"""What a study ran on: a file for each start, and sentences for its report."""

import datetime
import pathlib
import re
import secrets
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
from scaling_dit.scaling.folder import StudyFolder

# The member that a command trains.
_MEMBER = re.compile(r"--member[= ]('[^']*'|\S+)")
# What `about` gives.
_FIELDS = {"began", "command", "processor", "cores", "devices", "versions"}
_REMEDY = "remove it; it says what earlier starts ran on"


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def about() -> dict[str, Any]:
    """Time, command, hardware and versions of this start, as JSON values."""
    devices = jax.devices()
    # With the program's name alone: where it is installed is nobody's business.
    command = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
    return {
        "began": _now().isoformat(timespec="seconds"),
        "command": shlex.join(command).replace("__main__.py", "scaling-dit"),
        "processor": processor(),
        # Those that this process may use.
        "cores": len(cores()),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "versions": installed(),
    }


def note(folder: StudyFolder) -> None:
    """Adds a file for this start to the folder of a study."""
    start = about()
    folder.starts.mkdir(parents=True, exist_ok=True)
    # Several slices may start within a second.
    name = f"{start['began'].replace(':', '')}-{secrets.token_hex(4)}.json"
    files.write_whole(folder.starts / name, files.to_json(start).encode())


def read(folder: StudyFolder) -> list[dict[str, Any]]:
    """All starts of a study, the first one first; empty where none is noted. Raises UserError for a damaged file."""
    starts = []
    if folder.machines.exists():
        starts += _checked(folder.machines, files.read_json(folder.machines, dict, _REMEDY).get("starts"))
    if folder.starts.exists():
        for path in sorted(path for path in folder.starts.iterdir() if path.suffix == ".json"):
            starts += _checked(path, [files.read_json(path, dict, _REMEDY)])
    return starts


def _checked(path: epath.Path, starts: Any) -> list[dict[str, Any]]:
    """Starts as they were read from a file, if they are."""
    if not isinstance(starts, list):
        raise UserError(f"{path} is damaged: it holds no list of starts; {_REMEDY}")
    for one in starts:
        if not isinstance(one, dict) or not one.keys() >= _FIELDS or not isinstance(one["versions"], dict):
            raise UserError(f"{path} is damaged: a start has {', '.join(sorted(_FIELDS))}; {_REMEDY}")
    return starts


def lines(starts: Sequence[dict[str, Any]]) -> list[str]:
    """When a study ran, with which commands, on what and with which versions; sentences for its report."""
    if not starts:
        return []
    days = [one["began"][:10] for one in starts]
    first, last = min(days), max(days)
    when = first if first == last else f"{first} to {last}"
    times = "once" if len(starts) == 1 else f"{len(starts)} times"
    hosts = dict.fromkeys(
        f"{one['processor']} ({one['cores']} core{'' if one['cores'] == 1 else 's'}; devices: {one['devices']})"
        for one in starts
    )
    versions = dict.fromkeys(
        ", ".join(f"{name} {value}" for name, value in one["versions"].items()) for one in starts
    )
    # Members that a queue ran have a command each, which differ in the name alone.
    commands = dict.fromkeys(_MEMBER.sub("--member=NAME", one["command"]) for one in starts)
    return [
        f"Run on {when}, started {times}, on {'; '.join(hosts)}.",
        f"Command: {'; '.join(commands)}.",
        f"Versions: {'; '.join(versions)}.",
    ]
