"""Files that are there whole or not at all, local or remote.

A local file is written under another name and renamed; an object of a remote store appears when it is closed, and such
stores can neither rename nor append. Names of unfinished files differ between processes, so that two that write the
same file do not meet.
"""

import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

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
