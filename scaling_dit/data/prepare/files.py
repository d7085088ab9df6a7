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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from etils import epath

from scaling_dit.errors import UserError

PARTIAL = ".partial"  # ends the name of an unfinished local file


def is_remote(path: epath.Path | str) -> bool:
    """Whether a path is that of a store such as gs://."""
    return "://" in str(path)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a small file whole; raises UserError as `staged`."""
    with staged(path) as local:
        local.write_text(text, encoding="utf-8")


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


def read_locally(path: epath.Path, read: Callable[[str], Any]) -> Any:
    """`read` of a local path: of the file itself, or of a copy that is removed afterwards."""
    if not is_remote(path):
        return read(os.fspath(path))
    with tempfile.NamedTemporaryFile() as copy:
        with path.open("rb") as source:
            shutil.copyfileobj(source, copy, 2**24)
        copy.flush()
        return read(copy.name)


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
