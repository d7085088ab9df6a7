"""Where the members of a tar lie: built from its headers once, kept as a file, checked when it is read."""

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath

from scaling_dit.data.sources.image_files import key_hash

# Columns of `Index.spans`.
IMAGE, TEXT, JSON = range(3)
ENDINGS = {
    "jpg": IMAGE, "jpeg": IMAGE, "png": IMAGE, "webp": IMAGE, "gif": IMAGE, "bmp": IMAGE, "tif": IMAGE, "tiff": IMAGE,
    "txt": TEXT, "json": JSON,
}  # fmt: skip
SUFFIX = ".index"
_VERSION = 1
_BLOCK = 512
# Bytes of SHA-256.
_DIGEST = 32
_ABSENT = (-1, 0)

# Kind, offset, what.
Fault = tuple[str, int, str]


@dataclasses.dataclass(frozen=True)
class Index:
    """The samples of one tar that have an image and a caption or a json.

    Attributes:
      stem: the tar's name without its ending.
      keys: bytes [n], UTF-8, unique.
      spans: int64 [n, 3, 2], offset and size in bytes of IMAGE, TEXT and JSON; offset -1 = not there.
      hashes: float64 [n], `key_hash` of each `key`.
      faults: what is no sample.
    """

    stem: str
    keys: np.ndarray
    spans: np.ndarray
    hashes: np.ndarray
    faults: tuple[Fault, ...]

    def key(self, row: int) -> str:
        """The key of a sample among all tars: "00000/000000012"."""
        return f"{self.stem}/{self.keys[row].decode()}"


def open_index(path: epath.Path, index_dir: epath.Path | None = None) -> Index:
    """The index of a tar: the kept one if it fits the tar as it is now, else made and kept.

    No lock: processes that make it at the same time write the same bytes.

    Args:
      path: the tar, local or gs://.
      index_dir: folder of the kept index; None = that of the tar.
    """
    kept = (index_dir or path.parent) / f"{path.name}{SUFFIX}"
    stat = path.stat()
    state = [_VERSION, stat.length, stat.mtime]
    try:
        found = _loads(kept.read_bytes(), path.stem, state)
    except (OSError, ValueError):
        found = None
    if found is not None:
        return found
    with path.open("rb") as file:
        index = build(file, path.stem)
    try:
        if index_dir is not None:
            index_dir.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(_dumps(index, state))
    except OSError as error:
        # A read-only folder.
        message = "indexes of tars cannot be kept in %s (%s); set config.source.index_dir"
        logging.log_first_n(logging.WARNING, message, 1, kept.parent, error.strerror)
    return index


def build(file: IO[bytes], stem: str) -> Index:
    """Reads the headers of a tar; `file` is open for binary reading and can seek."""
    groups: list[_Group] = []
    faults: list[Fault] = []
    try:
        for name, offset, size in _members(file):
            key, ending = _split(name)
            if not groups or groups[-1].key != key or ending in groups[-1].endings:
                groups.append(_Group(key, offset, {}, set()))
            groups[-1].endings.add(ending)
            if ending.lower() in ENDINGS:
                groups[-1].members.setdefault(ENDINGS[ending.lower()], (offset, size))
    except _CutError as cut:
        faults.append((cut.kind, cut.offset, cut.what))
        earlier = {column for group in groups[:-1] for column in group.members}
        if groups and (not earlier or groups[-1].members.keys() != earlier):
            # It may have had more members.
            groups.pop()
    keys: list[str] = []
    spans: list[list[tuple[int, int]]] = []
    seen: set[str] = set()
    for group in groups:
        if group.key in seen:
            faults.append(("duplicate_key", group.offset, f"a sample {group.key!r} came before in this tar"))
        elif IMAGE not in group.members:
            faults.append(("missing_image", group.offset, f"sample {group.key!r} has no image"))
        elif len(group.members) == 1:
            faults.append(("missing_caption", group.offset, f"sample {group.key!r} has no txt and no json"))
        else:
            keys.append(group.key)
            spans.append([group.members.get(column, _ABSENT) for column in (IMAGE, TEXT, JSON)])
        seen.add(group.key)
    return _index(stem, np.array([key.encode() for key in keys], "S"), spans, faults)


def _index(stem: str, keys: np.ndarray, spans: Any, faults: Iterable[Fault]) -> Index:
    hashes = np.array([key_hash(f"{stem}/{key.decode()}") for key in keys], np.float64)
    return Index(stem, keys, np.array(spans, np.int64).reshape(-1, 3, 2), hashes, tuple(faults))


class _Group(NamedTuple):
    """The members of one sample."""

    key: str
    # Of its first member's data.
    offset: int
    # Column -> offset and size.
    members: dict[int, tuple[int, int]]
    # Of all its members.
    endings: set[str]


class _CutError(Exception):
    """A tar cannot be read any further."""

    def __init__(self, kind: str, offset: int, what: str) -> None:
        super().__init__(what)
        self.kind, self.offset, self.what = kind, offset, what


def _members(file: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each regular member of a tar: ustar, GNU or pax.

    `tarfile.TarFile` is not used to walk: it takes a damaged header for the end of the archive.

    Raises:
      _CutError: truncated_tar or bad_tar.
    """
    length = file.seek(0, io.SEEK_END)
    offset, long_name = 0, ""
    while True:
        file.seek(offset)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            where = "between members" if not header else "within a header"
            raise _CutError("truncated_tar", min(offset, length), f"the tar ends {where}")
        if not any(header):
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
        except tarfile.HeaderError as error:
            raise _CutError("bad_tar", offset, f"no header of a member: {error}") from None
        start, size = offset + _BLOCK, member.size
        offset = start + -(-size // _BLOCK) * _BLOCK
        if start + size > length:
            raise _CutError(
                "truncated_tar", length, f"the tar ends within member {long_name or member.name!r}"
            )
        if member.type == tarfile.GNUTYPE_LONGNAME:
            file.seek(start)
            long_name = file.read(size).rstrip(b"\0").decode("utf-8", "replace")
        elif member.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            file.seek(start)
            long_name = _pax_path(file.read(size)) or long_name
        elif member.type != tarfile.XGLTYPE:
            if member.isreg():
                yield long_name or member.name, start, size
            long_name = ""


def _pax_path(records: bytes) -> str:
    """The path in the records of a pax header, "LENGTH path=NAME" and a line end; "" if it has none."""
    while records:
        length, _, _ = records.partition(b" ")
        if not length.isdigit() or int(length) <= len(length) + 1:
            return ""
        keyword, _, value = records[len(length) + 1 : int(length) - 1].partition(b"=")
        if keyword == b"path":
            return value.decode("utf-8", "replace")
        records = records[int(length) :]
    return ""


def _split(name: str) -> tuple[str, str]:
    """Key and ending of a member: up to the first dot of its file name, as webdataset has it."""
    folder, slash, file_name = name.removeprefix("./").rpartition("/")
    key, _, ending = file_name.partition(".")
    return folder + slash + key, ending


def _dumps(index: Index, state: list[Any]) -> bytes:
    """The index with what it was made from, and a checksum of both."""
    buffer = io.BytesIO()
    described = json.dumps({"state": state, "faults": index.faults}).encode()
    np.savez(buffer, keys=index.keys, spans=index.spans, described=np.frombuffer(described, np.uint8))
    return hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


def _loads(data: bytes, stem: str, state: list[Any]) -> Index | None:
    """What `_dumps` wrote; None if it was made from another tar, or is not whole."""
    if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
        return None
    with np.load(io.BytesIO(data[_DIGEST:])) as held:
        described = json.loads(held["described"].tobytes())
        if described["state"] != state:
            return None
        faults = [(kind, offset, what) for kind, offset, what in described["faults"]]
        return _index(stem, held["keys"], held["spans"], faults)
