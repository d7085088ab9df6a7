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
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

from etils import epath

from scaling_dit import signals, storage
from scaling_dit.errors import StorageError, UserError

# How deep JSON of this program is nested, at most.
_DEEPEST = 64
# Suffix of an unfinished local file.
PARTIAL = ".partial"


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path lies in a remote store such as gs://."""
    return "://" in str(path)


_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def expand(path: epath.PathLike) -> str:
    """A path that a user wrote, with ~ and $VARIABLES replaced as a shell does, which has not seen most of them.

    A path that exists as it stands, with its dollar signs, is that path.

    Raises:
      UserError: a user or variable that does not exist, a NUL character, or a scheme that `check_scheme` refuses.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise UserError(f"{path!r} is no path; give the name of a file or folder")
    text = str(os.fspath(path))
    if "\0" in text:
        raise UserError(f"{text!r} is no path: it holds a NUL character")
    if text.startswith("~"):
        user, slash, rest = text.partition("/")
        home = os.path.expanduser(user)
        if home == user:
            raise UserError(
                f"{text}: there is no home folder of {user!r}; write ./{text} for a file of that name"
            )
        text = f"{home}{slash}{rest}"

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if not os.environ.get(name):
            raise UserError(f"{text}: the environment variable {name} is not set")
        return os.environ[name]

    if is_remote(text) or not os.path.lexists(text):
        text = _VARIABLE.sub(value, text)
    check_scheme(text)
    return text


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
      UserError: an unknown scheme, one whose package is not installed, or a path without a bucket.
    """
    scheme, separator, _ = os.fspath(path).partition("://")
    if not separator:
        return
    check_known(path)
    if not os.fspath(path).partition("://")[2].partition("/")[0]:
        raise UserError(f"{path}: it names no bucket; write {scheme}://BUCKET/FOLDER")
    package, extra = _SCHEMES[scheme]
    # Where TensorFlow is installed, etils reads gs:// with it.
    others = ("tensorflow",) if scheme == "gs" else ()
    if not any(_is_installed(name) for name in (package, *others)):
        raise UserError(f"{path}: {scheme}:// needs the package {package}, which is not installed{extra}")


def check_known(path: epath.PathLike, flag: str = "") -> None:
    """Makes sure that paths of that scheme are read at all, on a machine with the package for it.

    Args:
      flag: what stands before the path in the message.

    Raises:
      UserError: an unknown scheme.
    """
    scheme, separator, _ = os.fspath(path).partition("://")
    if separator and scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise UserError(
            f"{flag}{path}: {scheme}:// is not read; a path is local or begins with one of {known}"
        )


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


def parse_json(text: bytes | str) -> Any:
    """The JSON value in a text, or in bytes of UTF-8 with or without a byte order mark.

    Raises:
      ValueError: no JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: epath.Path, kind: type, remedy: str) -> Any:
    """The JSON value that a file of this program holds.

    Args:
      path: of the file.
      kind: dict or list.
      remedy: what to do if it is damaged, the end of the error line.

    Raises:
      UserError: no UTF-8, no JSON, nested too deeply, or another kind of value.
    """
    named = "a JSON object" if kind is dict else "a JSON list"
    if what := special(path):
        raise UserError(f"{path} is {what}, and must be a file with {named}; {remedy}")
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        what = "not UTF-8" if isinstance(error, UnicodeDecodeError) else f"no JSON ({error})"
        raise UserError(f"{path} is damaged: {what}; {remedy}") from None
    if _is_deep(value):
        raise UserError(f"{path} is damaged: its JSON is nested more than {_DEEPEST} deep; {remedy}")
    if not isinstance(value, kind):
        found = {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(
            type(value), "a number"
        )
        raise UserError(f"{path} is damaged: {found}, and must be {named}; {remedy}")
    return value


def _is_deep(value: Any) -> bool:
    """Whether a JSON value is nested deeper than any file of this program."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [item for one in level if isinstance(one, dict | list) for item in _items(one)]
        if not level:
            return False
    return True


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value


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
    then = read_json(path, dict, "give another --out, or delete that folder")
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
    except Exception as error:
        # Clients of buckets have exceptions of their own.
        if isinstance(error, UserError) or not storage.is_fault(error):
            raise
        raise unwritten(target, error) from error
    finally:
        # A disk that fails may refuse this as well.
        with contextlib.suppress(OSError):
            local.unlink(missing_ok=True)


def unwritten(target: epath.Path, error: Exception) -> UserError:
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
