"""Writes files atomically: a local or remote file exists completely or not at all.

A local file is written under a temporary name and then renamed. An object of a remote store appears when it is closed;
such stores can neither rename nor append. Each process uses its own temporary names, so two processes that write the
same file do not disturb each other.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

from etils import epath

from scaling_dit import signals, storage
from scaling_dit.errors import StorageError, UserError

# Suffix of an unfinished local file.
PARTIAL = ".partial"


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path lies in a remote store such as gs://."""
    return "://" in str(path)


# Schemes of remote paths: the package that reads each, and the extra of this package with it.
_SCHEMES = {
    "gs": ("gcsfs", "; pip install 'scaling-dit[gcs]'"),
    "s3": ("s3fs", ""),
    "az": ("adlfs", ""),
    "hf": ("huggingface_hub", "; pip install 'scaling-dit[text]'"),
}


def check_scheme(path: epath.PathLike) -> None:
    """Makes sure that the store of a remote path can be read here; no request is sent.

    Raises:
      UserError: an unknown scheme, or one whose package is not installed.
    """
    scheme, separator, _ = os.fspath(path).partition("://")
    if not separator:
        return
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise UserError(f"{path}: {scheme}:// is not read; a path is local or begins with one of {known}")
    package, extra = _SCHEMES[scheme]
    # Where TensorFlow is installed, etils reads gs:// with it.
    others = ("tensorflow",) if scheme == "gs" else ()
    if not any(_is_installed(name) for name in (package, *others)):
        raise UserError(f"{path}: {scheme}:// needs the package {package}, which is not installed{extra}")


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


_SPECIAL = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def special(path: epath.PathLike) -> str:
    """What a local path is that cannot be read as a file: "a folder", "a pipe (FIFO)", ...; "" for all others.

    Reading a pipe waits for a writer, and some devices have no end. Remote stores hold files only.
    """
    if is_remote(path):
        return ""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return "a link to nothing" if os.path.islink(path) and not os.path.exists(path) else ""
    return next((what for holds, what in _SPECIAL if holds(mode)), "")


def write_whole(path: epath.Path, data: bytes) -> None:
    """Writes a file so that no reader ever sees half of it. Raises UserError as `staged` does."""
    if is_remote(path):
        try:
            path.write_bytes(data)
        except Exception as error:
            # Clients of buckets have exceptions of their own.
            if not storage.is_refusal(error):
                raise
            raise StorageError(f"cannot write {path}: {storage.reason(error)}") from error
        return
    with staged(path) as local:
        local.write_bytes(data)


def to_json(value: Any) -> str:
    """A value as JSON text: equal values give equal text."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, indent=1) + "\n"


def claim(path: epath.Path, asked: Mapping[str, Any], conflict: str) -> None:
    """Records in `path` the settings that a folder's files are made with, or checks them against the recorded ones.

    Args:
      path: the file that holds the settings as JSON. It is written if it does not exist.
      asked: the settings of this call.
      conflict: predicate of the error message if the settings differ, such as "was prepared in another way".

    Raises:
      UserError: the folder was made with other settings, or the recorded ones cannot be read.
    """
    text = to_json(asked)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
        return
    now = json.loads(text)
    try:
        then = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged; give another --out, or delete that folder") from None
    differs = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    if differs:
        key = differs[0]
        raise UserError(
            f"{path.parent} {conflict}: {', '.join(differs)} differ ({key} is {then.get(key)!r} "
            f"there, {now.get(key)!r} here); give another --out"
        )


@contextlib.contextmanager
def staged(target: epath.Path) -> Iterator[pathlib.Path]:
    """Gives a local path to write to. The file there becomes `target` when the block ends without an exception.

    Raises:
      StorageError: the disk or bucket refuses, for example because it is full.
      UserError: the path cannot be written.
    """
    folder = None if is_remote(target) else pathlib.Path(os.fspath(target)).parent
    try:
        handle, name = tempfile.mkstemp(suffix=PARTIAL, prefix=f"{target.name}.", dir=folder)
    except OSError as error:
        raise unwritten(target, error) from error
    os.close(handle)
    local = pathlib.Path(name)
    try:
        with signals.cleaning(local.unlink):
            yield local
        if is_remote(target):
            with local.open("rb") as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 2**24)
        else:
            # mkstemp makes files that only their owner can read.
            local.chmod(0o666 & ~_umask())
            local.replace(os.fspath(target))
    except OSError as error:
        raise unwritten(target, error) from error
    finally:
        # A disk that fails may refuse this as well.
        with contextlib.suppress(OSError):
            local.unlink(missing_ok=True)


def unwritten(target: epath.Path, error: OSError) -> UserError:
    """The error of a file that cannot be written: a StorageError if its disk or network refuses."""
    kind = StorageError if storage.is_fault(error) else UserError
    return kind(f"cannot write {target}: {storage.reason(error)}; files finished before are whole")


@contextlib.contextmanager
def fetched(source: epath.Path) -> Iterator[pathlib.Path]:
    """Gives a local path to read a file from: its own, or that of a copy of a remote one."""
    if not is_remote(source):
        yield pathlib.Path(os.fspath(source))
        return
    with tempfile.TemporaryDirectory() as folder:
        local = pathlib.Path(folder) / source.name
        with source.open("rb") as remote, local.open("wb") as copy:
            shutil.copyfileobj(remote, copy, 2**24)
        yield local


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256(path: epath.Path | pathlib.Path) -> str:
    """The checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in _blocks(file):
            digest.update(block)
    return digest.hexdigest()


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(2**22):
        yield block
