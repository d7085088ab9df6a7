"""Leases on objects of a bucket, by compare-and-swap on generations.

Every object has a generation, which each write replaces. A write names the generation that it read, and fails if the
object has another one by then. So of several slices that want the same object exactly one gets it, without a server.

A lease is a part of the object: who holds it, and until when. Its holder renews it well before it ends, and if it
cannot, stops its work `STOPPING` seconds before the end. Others may take the object once the lease ended more than
`GRACE` seconds ago by their own clocks. So two holders never overlap while clocks differ by less than that
(`scaling-dit doctor` checks them), unless a whole machine stands still longer: its holder notices at its next look.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import secrets
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, Self

from scaling_dit import files
from scaling_dit.errors import UserError

# Seconds that a lease lasts after it was taken or renewed.
SECONDS = 300.0
# Seconds by which the clocks of slices may differ.
GRACE = 30.0
# Seconds before the end of its lease at which a holder stops its work if it could not renew it.
STOPPING = 140.0
# Of an object that does not exist.
ABSENT = 0


class Store(Protocol):
    """Objects with generations; names have "/" between their parts."""

    def read(self, name: str) -> tuple[bytes, int] | None:
        """An object's contents and generation; None if there is none."""

    def write(self, name: str, data: bytes, generation: int) -> bool:
        """Writes an object that has this generation (`ABSENT`: that does not exist). False, and nothing, if it has not.

        An answer may be lost: then False, or an OSError, may follow a write that took place.
        """

    def names(self, prefix: str) -> list[str]:
        """The names of all objects that begin with `prefix`, sorted."""


class Lease(NamedTuple):
    """A hold on an object. `token` is new with each one, so that a holder knows its own."""

    owner: str
    token: str
    until: float

    @classmethod
    def of(cls, value: Any) -> Self | None:
        """From JSON."""
        return None if value is None else cls(str(value[0]), str(value[1]), float(value[2]))


def take(owner: str, now: float, seconds: float = SECONDS) -> Lease:
    """A new lease."""
    return Lease(owner, secrets.token_hex(8), now + seconds)


def free(lease: Lease | None, now: float) -> bool:
    """Whether somebody else may take the object."""
    return lease is None or now > lease.until + GRACE


def valid(lease: Lease, now: float) -> bool:
    """Whether its holder may continue its work."""
    return now < lease.until - STOPPING


def due(lease: Lease, now: float, seconds: float = SECONDS) -> bool:
    """Whether its holder should renew it: a tenth of it is over."""
    return now > lease.until - 0.9 * seconds


def swap(store: Store, name: str, data: bytes, generation: int) -> bool:
    """`Store.write`, whose answer is checked: True if the object has these contents now.

    Contents must be of their writer only, such as with the token of a lease.
    """
    try:
        if store.write(name, data, generation):
            return True
    except OSError:
        pass
    found = store.read(name)
    return found is not None and found[0] == data


def open_store(place: str) -> "LocalStore | BucketStore":
    """The store in a folder or under a gs:// prefix.

    Raises:
      UserError: another scheme, or the package for gs:// is not installed.
    """
    if place.startswith("gs://"):
        files.check_scheme(place)
        return BucketStore(place)
    if files.is_remote(place):
        raise UserError(f"{place}: a queue lies in a folder or on gs://, whose writes can have preconditions")
    return LocalStore(pathlib.Path(place))


class LocalStore:
    """A store in a folder that several processes of one machine, or of a shared file system with locks, use."""

    _GENERATION = b"generation "

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def read(self, name: str) -> tuple[bytes, int] | None:
        """See `Store`."""
        try:
            head, _, data = (self.folder / name).read_bytes().partition(b"\n")
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not head.startswith(self._GENERATION):
            raise UserError(f"{self.folder / name} is no object of a queue; give another folder")
        return data, int(head.removeprefix(self._GENERATION))

    def write(self, name: str, data: bytes, generation: int) -> bool:
        """See `Store`."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            found = self.read(name)
            if (ABSENT if found is None else found[1]) != generation:
                return False
            handle, partial = tempfile.mkstemp(dir=path.parent, suffix=files.PARTIAL)
            with os.fdopen(handle, "wb") as file:
                file.write(self._GENERATION + str(generation + 1).encode() + b"\n" + data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        return True

    def names(self, prefix: str) -> list[str]:
        """See `Store`."""
        paths = (path for path in self.folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        names = (path.relative_to(self.folder).as_posix() for path in paths)
        return sorted(name for name in names if name.startswith(prefix) and not name.endswith(files.PARTIAL))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class BucketStore:
    """A store under a gs:// prefix, by the preconditions of Cloud Storage on generations.

    Args:
      place: gs://BUCKET/PREFIX.
      filesystem: of gcsfs; by default one with the credentials of this machine.
    """

    def __init__(self, place: str, filesystem: Any = None) -> None:
        self._bucket, _, prefix = place.removeprefix("gs://").strip("/").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        if filesystem is None:
            import fsspec

            filesystem = fsspec.filesystem("gs")
        self._files = filesystem

    def read(self, name: str) -> tuple[bytes, int] | None:
        """See `Store`."""
        try:
            headers, data = self._call("GET", "b/{}/o/{}", self._bucket, self._prefix + name, alt="media")
        except FileNotFoundError:
            return None
        return bytes(data), int(headers["X-Goog-Generation"])

    def _call(self, *arguments: Any, **options: Any) -> Any:
        """One request; errors of the service become OSError."""
        try:
            return self._files.call(*arguments, **options)
        except OSError:
            raise
        except Exception as error:
            code = str(getattr(error, "code", ""))
            number = int(code) if code.isdecimal() else errno.EIO
            raise OSError(number, f"gs://{self._bucket}: {error}") from error

    def write(self, name: str, data: bytes, generation: int) -> bool:
        """See `Store`."""
        place = f"{self._files._location}/upload/storage/v1/b/{self._bucket}/o"
        try:
            self._call(
                "POST", place, uploadType="media", name=self._prefix + name, ifGenerationMatch=generation,
                data=data, headers={"Content-Type": "application/json"},
            )  # fmt: skip
        except FileExistsError:
            # So gcsfs calls a precondition that failed (412).
            return False
        return True

    def names(self, prefix: str) -> list[str]:
        """See `Store`."""
        found: list[str] = []
        page = None
        while True:
            more: dict[str, str] = {"pageToken": page} if page else {}
            answer = self._call(
                "GET", "b/{}/o", self._bucket, prefix=self._prefix + prefix, fields="items(name),nextPageToken",
                json_out=True, **more,
            )  # fmt: skip
            found += [item["name"].removeprefix(self._prefix) for item in answer.get("items", ())]
            page = answer.get("nextPageToken")
            if not page:
                return sorted(found)


def encode(value: Any) -> bytes:
    """A value as the contents of an object; equal values give equal contents."""
    return json.dumps(value, sort_keys=True, indent=1).encode() + b"\n"
