"""What a launcher keeps on this machine: the job, the state of its machine, and the files it copies to the workers.

    ~/.local/state/scaling-dit/tpu/NAME/     ($XDG_STATE_HOME in place of ~/.local/state)
        job.json  state.json  source.tgz  startup.sh  env  stop  lock

If the folder is lost, a launcher finds the job's resource by its name and labels; only the budget used so far is
unknown to it then.
"""

import contextlib
import fcntl
import gzip
import io
import os
import pathlib
import subprocess
import tarfile
from collections.abc import Iterator

from etils import epath

from scaling_dit import files
from scaling_dit.errors import UserError

from . import job as job_lib
from .job import Job
from .state import State, from_dict

# Folders that are not copied where git does not say what belongs to the source.
_LEFT_OUT = {".git", ".venv", "venv", "__pycache__", "runs", "node_modules", ".mypy_cache", ".ruff_cache"}
_MOST = 200 * 2**20


def root() -> pathlib.Path:
    """The folder that holds the jobs' folders."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return pathlib.Path(base) / "scaling-dit" / "tpu"


def names() -> list[str]:
    """The jobs known on this machine."""
    return sorted(path.parent.name for path in root().glob("*/job.json"))


class Store:
    """The folder of one job."""

    def __init__(self, name: str) -> None:
        self.folder = root() / name
        self._job, self._state = self.folder / "job.json", self.folder / "state.json"
        self._stop = self.folder / "stop"
        self.source, self.startup, self.env = (
            self.folder / name for name in ("source.tgz", "startup.sh", "env")
        )

    def read_job(self) -> Job | None:
        """The job; None if none was kept. Raises UserError for a damaged file."""
        return job_lib.from_json(self._job.read_bytes()) if self._job.exists() else None

    def write_job(self, job: Job) -> None:
        """Keeps the job."""
        self._write(self._job, job.to_json())

    def read_state(self) -> State | None:
        """The state; None if none was kept. Raises UserError for a damaged file."""
        if not self._state.exists():
            return None
        remedy = "delete it: the job is found by its name, and its budget begins anew"
        values = files.read_json(epath.Path(self._state), dict, remedy)
        try:
            return from_dict(values)
        except (KeyError, TypeError) as error:
            raise UserError(f"{self._state} is damaged, or of another version; {remedy}") from error

    def write_state(self, state: State) -> None:
        """Keeps the state, whole or not at all."""
        self._write(self._state, files.to_json(state.to_dict()))

    def _write(self, path: pathlib.Path, text: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        files.write_whole(epath.Path(path), text.encode())

    def write_private(self, path: pathlib.Path, text: str) -> None:
        """Writes a file that only this user can read."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)

    def ask_to_stop(self) -> None:
        """Asks a launcher, this one or another, to end the job."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._stop.touch()

    def stop_asked(self) -> bool:
        """Whether somebody asked to end the job."""
        return self._stop.exists()

    def forget_stop(self) -> None:
        """A new launch begins."""
        self._stop.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Gives whether this is the only launcher of the job on this machine; it is until the block ends."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def pack(folder: str, target: pathlib.Path) -> None:
    """Packs a folder: what git knows or would add, else all but caches and runs. Equal files give an equal archive.

    Raises:
      UserError: no such folder, or more than 200 MiB.
    """
    base = pathlib.Path(folder)
    if not base.is_dir():
        raise UserError(f"--source={folder}: no such folder")
    listed = subprocess.run(
        ["git", "-C", str(base), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        paths = [base / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [path for path in base.rglob("*") if not _LEFT_OUT & set(path.relative_to(base).parts)]
    paths = sorted({path for path in paths if path.is_file()})
    size = sum(path.stat().st_size for path in paths)
    if size > _MOST:
        raise UserError(f"--source={folder}: it has {size / 2**20:.0f} MiB, and 200 are copied at most")
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for path in paths:
            entry = archive.gettarinfo(path, str(path.relative_to(base)))
            entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, 0, "", ""
            with path.open("rb") as file:
                archive.addfile(entry, file)
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    files.write_whole(epath.Path(target), gzip.compress(raw.getvalue(), mtime=0))
