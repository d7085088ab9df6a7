"""Files that are there whole or not at all, local or remote.

A local file is written under another name and renamed; an object of a remote store appears when it is closed, and such
stores can neither rename nor append. Names of unfinished files differ between processes, so that two that write the
same file do not meet.
"""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from etils import epath

from scaling_dit.errors import UserError

PARTIAL = ".partial"  # ends the name of an unfinished local file


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is that of a store such as gs://."""
    return "://" in str(path)


def write_whole(path: epath.Path, data: bytes) -> None:
    """Writes a file so that no reader ever sees half of it; raises UserError as `staged`."""
    if is_remote(path):
        path.write_bytes(data)
        return
    with staged(path) as local:
        local.write_bytes(data)


def to_json(value: Any) -> str:
    """The same text for the same value."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, indent=1) + "\n"


def claim(path: epath.Path, asked: Mapping[str, Any], told: str) -> None:
    """Notes in `path` what the other files of its folder are made with, or checks that it is the same.

    Args:
      told: what the folder is if they were not, such as "was prepared in another way".

    Raises:
      UserError: they were made with something else, or the note is damaged.
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
            f"{path.parent} {told}: {', '.join(differs)} differ ({key} is {then.get(key)!r} "
            f"there, {now.get(key)!r} here); give another --out"
        )


@contextmanager
def staged(target: epath.Path) -> Iterator[pathlib.Path]:
    """A local path to write to; what lies there when the block ends becomes `target`, and nothing does if it fails.

    Raises:
      UserError: the file cannot be written, such as for a full disk.
    """
    folder = None if is_remote(target) else pathlib.Path(os.fspath(target)).parent
    handle, name = tempfile.mkstemp(suffix=PARTIAL, prefix=f"{target.name}.", dir=folder)
    os.close(handle)
    local = pathlib.Path(name)
    try:
        yield local
        if is_remote(target):
            with local.open("rb") as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 2**24)
        else:
            local.chmod(0o666 & ~_umask())  # mkstemp gives it to its owner alone
            local.replace(os.fspath(target))
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror or error}; files finished before are whole"
        ) from error
    finally:
        local.unlink(missing_ok=True)


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
