"""The file of a lease: read, changed only by who knows its last version, removed.

Three kinds: a local file with a lock, an object of gs:// with generation preconditions, and an object of another store,
which has neither.
"""

import errno
import fcntl
import os
from collections.abc import Callable
from typing import Any, Protocol

from etils import epath

from scaling_dit import files
from scaling_dit.errors import StorageError

# Seconds for one request to a bucket.
_TIMEOUT = 30


class Taken(Exception):
    """The file is not the version that the caller knows."""


class Record(Protocol):
    """A small file that several processes change."""

    @property
    def is_exclusive(self) -> bool:
        """Whether two processes cannot both write the same version."""

    @property
    def is_locked(self) -> bool:
        """Whether this process has a lock, which no other process of this host has then."""

    def lock(self, refused: Callable[[], Exception]) -> None:
        """Takes the lock of this host, where there is one; raises `refused()` if another process has it."""

    def unlock(self) -> None:
        """Gives the lock up."""

    def read(self) -> tuple[bytes, Any] | None:
        """Contents and version; None if there is no such file."""

    def write(self, data: bytes, version: Any) -> Any:
        """Writes the file if it still has this version (None: does not exist); returns the new one, or raises Taken."""

    def remove(self, version: Any) -> None:
        """Removes the file if it still has this version."""

    def is_there(self) -> bool:
        """Whether the file is where it was written; answered at once, so a bucket is not asked."""


def record_of(path: epath.Path) -> Record:
    """The record at a path."""
    if not files.is_remote(path):
        return LocalRecord(path)
    bucket, _, name = os.fspath(path).partition("://")[2].partition("/")
    if os.fspath(path).startswith("gs://") and (session := _google_session()) is not None:
        return GcsRecord(bucket, name, session)
    return ObjectRecord(path)


class LocalRecord:
    """A file under an exclusive lock of the kernel, which ends with the process that holds it."""

    def __init__(self, path: epath.Path) -> None:
        self._path = os.fspath(path)
        self._file = -1
        self.is_locked = False

    @property
    def is_exclusive(self) -> bool:
        return self.is_locked

    def lock(self, refused: Callable[[], Exception]) -> None:
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            while True:
                opened = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self.is_locked = True
                except BlockingIOError:
                    os.close(opened)
                    raise refused() from None
                except OSError as error:
                    # A file system without locks: signs of life are all there is.
                    if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                        os.close(opened)
                        raise
                self._file = opened
                # Its last holder may have removed the file between the two calls.
                if self.is_there():
                    return
                self.unlock()
        except OSError as error:
            raise files.unwritten(epath.Path(self._path), error) from error

    def unlock(self) -> None:
        opened, self._file, self.is_locked = self._file, -1, False
        if opened >= 0:
            os.close(opened)

    def read(self) -> tuple[bytes, Any] | None:
        try:
            # Opened anew, so that a network file system asks its server.
            with open(self._path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return None
        return data, None

    def write(self, data: bytes, version: Any) -> Any:
        # In place: a rename would leave the lock on a file that nobody finds.
        size = os.fstat(self._file).st_size
        try:
            os.pwrite(self._file, data.ljust(size), 0)
        except OSError as error:
            raise files.unwritten(epath.Path(self._path), error) from error

    def remove(self, version: Any) -> None:
        if self.is_there():
            os.unlink(self._path)

    def is_there(self) -> bool:
        try:
            named, opened = os.stat(self._path), os.fstat(self._file)
        except OSError:
            return False
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


class GcsRecord:
    """An object of Google Cloud Storage, by its JSON API; every change names the generation that it replaces.

    Args:
      bucket, name: of the object.
      session: of `requests`, with credentials.
      endpoint: of the service.
    """

    is_exclusive = True
    is_locked = False

    def __init__(
        self, bucket: str, name: str, session: Any, endpoint: str = "https://storage.googleapis.com"
    ) -> None:
        from urllib.parse import quote

        self._where = f"gs://{bucket}/{name}"
        self._session = session
        self._object = f"{endpoint}/storage/v1/b/{bucket}/o/{quote(name, safe='')}"
        self._upload = f"{endpoint}/upload/storage/v1/b/{bucket}/o"
        self._name = name

    def lock(self, refused: Callable[[], Exception]) -> None:
        pass

    def unlock(self) -> None:
        pass

    def read(self) -> tuple[bytes, Any] | None:
        got = self._session.get(self._object, params={"alt": "media"}, timeout=_TIMEOUT)
        if got.status_code == 404:
            return None
        self._check(got)
        return got.content, got.headers["x-goog-generation"]

    def write(self, data: bytes, version: Any) -> Any:
        # Generation 0 stands for no object.
        params = {"uploadType": "media", "name": self._name, "ifGenerationMatch": version or "0"}
        sent = self._session.post(self._upload, params=params, data=data, timeout=_TIMEOUT)
        if sent.status_code == 412:
            raise Taken
        self._check(sent)
        return sent.json()["generation"]

    def remove(self, version: Any) -> None:
        self._session.delete(self._object, params={"ifGenerationMatch": version}, timeout=_TIMEOUT)

    def is_there(self) -> bool:
        return True

    def _check(self, answer: Any) -> None:
        if answer.status_code >= 400:
            raise StorageError(f"{self._where}: the bucket refuses: {answer.status_code} {answer.reason}")


class ObjectRecord:
    """An object of a store without preconditions: of two that write at once, the last one stays."""

    is_exclusive = False
    is_locked = False

    def __init__(self, path: epath.Path) -> None:
        self._path = path

    def lock(self, refused: Callable[[], Exception]) -> None:
        pass

    def unlock(self) -> None:
        pass

    def read(self) -> tuple[bytes, Any] | None:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        return data, data

    def write(self, data: bytes, version: Any) -> Any:
        found = self.read()
        if (None if found is None else found[1]) != version:
            raise Taken
        files.write_whole(self._path, data)
        return data

    def remove(self, version: Any) -> None:
        found = self.read()
        if found is not None and found[1] == version:
            self._path.unlink()

    def is_there(self) -> bool:
        return True


def _google_session() -> Any:
    """A session with this machine's credentials; None where google-auth is not installed or finds none."""
    try:
        import google.auth
        from google.auth.transport.requests import AuthorizedSession
    except ImportError:
        return None
    try:
        credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/devstorage.read_write"])
    except google.auth.exceptions.DefaultCredentialsError:
        return None
    return AuthorizedSession(credentials)
