"""Where the members of a tar lie: built from its headers once, kept as a file, checked when it is read.

A member belongs to a sample if its name has a known ending (`ENDINGS`) and does not begin with a dot. All others are
passed over: they neither begin a sample nor end one.
"""

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath

from scaling_dit import files
from scaling_dit.data.sources.image_files import key_hash
from scaling_dit.errors import UserError

# Columns of `Index.spans`.
IMAGE, TEXT, JSON = range(3)
ENDINGS = {
    "jpg": IMAGE, "jpeg": IMAGE, "png": IMAGE, "webp": IMAGE, "gif": IMAGE, "bmp": IMAGE, "tif": IMAGE, "tiff": IMAGE,
    "txt": TEXT, "json": JSON,
}  # fmt: skip
SUFFIX = ".index"
_VERSION = 2
_BLOCK = 512
# Two empty blocks end a tar, and zeros fill up its last record.
_END, _RECORD = 2 * _BLOCK, 20 * _BLOCK
# Bytes read at once in search of the end of zeros.
_CHUNK = 2**20
# Bytes at the end of a member that a download cut short leaves at zero.
_TAIL = 8
# Bytes of SHA-256.
_DIGEST = 32
_ABSENT = (-1, 0)

# The first bytes of a compressed file.
_GZIP = b"\x1f\x8b"

# Kind, offset, what.
Fault = tuple[str, int, str]


@dataclasses.dataclass(frozen=True)
class Index:
    """The samples of one tar that have an image and a caption or a json.

    Attributes:
      stem: the tar's name without its ending.
      keys: bytes [n], UTF-8, unique.
      spans: int64 [n, 3 + extra, 2], offset and size in bytes of IMAGE, TEXT, JSON and what else was asked for; offset
        -1 = not there.
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


def open_index(path: epath.Path, index_dir: epath.Path | None = None, extra: Sequence[str] = ()) -> Index:
    """The index of a tar: the kept one if it fits the tar as it is now, else made and kept.

    No lock: processes that make it at the same time write the same bytes.

    Args:
      path: the tar, local or gs://.
      index_dir: folder of the kept index; None = that of the tar.
      extra: further members of samples, such as "edit" for 000012.edit.png; the index of each choice is kept apart.

    Raises:
      UserError: the tar cannot be read.
    """
    kept = (index_dir or path.parent) / f"{path.name}{''.join(f'.{one}' for one in extra)}{SUFFIX}"
    for file in (path, kept):
        if kind := files.special(file):
            raise UserError(f"{file} is {kind}, it cannot be read as a file")
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from error
    state = [_VERSION, stat.length, stat.mtime, *extra]
    try:
        found = _loads(kept.read_bytes(), path.stem, state)
    except (OSError, ValueError):
        found = None
    if found is not None:
        return found
    try:
        with path.open("rb") as opened:
            index = build(opened, path.stem, extra)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from error
    try:
        if index_dir is not None:
            index_dir.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(_dumps(index, state))
    except OSError as error:
        # A read-only folder.
        message = "indexes of tars cannot be kept in %s (%s); set config.source.index_dir"
        logging.log_first_n(logging.WARNING, message, 1, kept.parent, error.strerror)
    return index


def build(file: IO[bytes], stem: str, extra: Sequence[str] = ()) -> Index:
    """Reads the headers of a tar; `file` is open for binary reading and can seek. `extra` is that of `open_index`."""
    groups: list[_Group] = []
    faults: list[Fault] = []
    joins = False
    for found in _walk(file):
        if isinstance(found, _Break):
            joins = False
            if found.fault is not None:
                faults.append(found.fault)
                if not _is_complete(groups, file):
                    groups.pop()
            continue
        name, offset, size = found
        key, ending = _split(name)
        column = _column(ending.lower(), extra)
        if key is None or column is None:
            continue
        if not joins or groups[-1].key != key or ending in groups[-1].endings:
            groups.append(_Group(key, offset, {}, set()))
            joins = True
        groups[-1].endings.add(ending)
        groups[-1].members.setdefault(column, (offset, size))
    keys: list[str] = []
    spans: list[list[tuple[int, int]]] = []
    seen: set[str] = set()
    for group in groups:
        if group.key in seen:
            faults.append(("duplicate_key", group.offset, f"a sample {group.key!r} came before in this tar"))
        elif IMAGE not in group.members:
            faults.append(("missing_image", group.offset, f"sample {group.key!r} has no image"))
        elif TEXT not in group.members and JSON not in group.members:
            faults.append(("missing_caption", group.offset, f"sample {group.key!r} has no txt and no json"))
        else:
            keys.append(group.key)
            spans.append([group.members.get(column, _ABSENT) for column in range(3 + len(extra))])
        seen.add(group.key)
    spanned = np.array(spans, np.int64).reshape(-1, 3 + len(extra), 2)
    return _index(stem, np.array([key.encode() for key in keys], "S"), spanned, faults)


def _column(ending: str, extra: Sequence[str]) -> int | None:
    """The column of a member; None for one that does not matter."""
    if ending in ENDINGS:
        return ENDINGS[ending]
    name, _, last = ending.rpartition(".")
    names = [one.lower() for one in extra]
    return 3 + names.index(name) if name in names and ENDINGS.get(last) == IMAGE else None


def _is_complete(groups: Sequence["_Group"], file: IO[bytes]) -> bool:
    """Whether the last sample before a place where a tar is cut has all of its members; True if there is none.

    It may have had more members, unless it has those of the samples before it. Where a download was cut whose file had
    its full size from the start, the rest of the last member is zeros.
    """
    if not groups:
        return True
    last = groups[-1].members
    if last.keys() != {column for group in groups[:-1] for column in group.members}:
        return False
    start, size = max(last.values())
    tail = min(size, _TAIL)
    file.seek(start + size - tail)
    return not tail or any(file.read(tail))


def _index(stem: str, keys: np.ndarray, spans: Any, faults: Iterable[Fault]) -> Index:
    hashes = np.array([key_hash(f"{stem}/{key.decode()}") for key in keys], np.float64)
    return Index(stem, keys, np.asarray(spans, np.int64), hashes, tuple(faults))


class _Group(NamedTuple):
    """The members of one sample."""

    key: str
    # Of its first member's data.
    offset: int
    # Column -> offset and size.
    members: dict[int, tuple[int, int]]
    # Of its members.
    endings: set[str]


class _Member(NamedTuple):
    """A regular member of a tar."""

    name: str
    # Of its data, in bytes.
    offset: int
    size: int


class _Break(NamedTuple):
    """A place that no sample crosses: the end of a tar that another follows, or damage."""

    fault: Fault | None


def _walk(file: IO[bytes]) -> Iterator[_Member | _Break]:
    """The regular members of a tar (ustar, GNU or pax) and of those behind it in the same file, and what is damaged.

    `tarfile.TarFile` is not used to walk: it takes a damaged header, or a block of zeros, for the end of the archive.
    """
    length = file.seek(0, io.SEEK_END)
    # Where the tar may have begun that is read: its last record is filled up from there.
    begins = [0]
    offset, long_name = 0, ""
    while True:
        file.seek(offset)
        header = file.read(_BLOCK)
        if header and not any(header):
            following = _after_zeros(file, offset, length)
            if following < length and following - offset < _END:
                # A lone empty block ends nothing, though another tar may begin behind it.
                offset = following
                begins.append(offset)
                continue
            yield _Break(_end_fault(begins, offset, following, length))
            if following == length:
                return
            offset = following
            begins = [offset]
            long_name = ""
            continue
        if not offset and header.startswith(_GZIP):
            yield _Break(("bad_tar", 0, "the tar is compressed with gzip; unpack it with gunzip"))
            return
        if len(header) < _BLOCK:
            where = "between members" if not header else "within a header"
            yield _Break(("truncated_tar", min(offset, length), f"the tar ends {where}"))
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
        except tarfile.HeaderError as error:
            what = "data after the end of the tar" if 0 < offset == begins[-1] else "no header of a member"
            yield _Break(("bad_tar", offset, f"{what}: {error}"))
            return
        start, size = offset + _BLOCK, member.size
        if size < 0:
            yield _Break(("bad_tar", offset, f"no header of a member: a size of {size} bytes"))
            return
        offset = start + -(-size // _BLOCK) * _BLOCK
        if start + size > length:
            what = f"the tar ends within member {long_name or member.name!r}"
            yield _Break(("truncated_tar", length, what))
            return
        if member.type == tarfile.GNUTYPE_LONGNAME:
            file.seek(start)
            long_name = file.read(size).rstrip(b"\0").decode("utf-8", "replace")
        elif member.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            file.seek(start)
            long_name = _pax_path(file.read(size)) or long_name
        elif member.type != tarfile.XGLTYPE:
            if member.isreg():
                yield _Member(long_name or member.name, start, size)
            long_name = ""


def _after_zeros(file: IO[bytes], offset: int, length: int) -> int:
    """Where the block begins that holds the first byte from `offset` on that is not zero; `length` if there is none."""
    file.seek(offset)
    at = offset
    while data := file.read(_CHUNK):
        kept = data.lstrip(b"\0")
        if kept:
            return (at + len(data) - len(kept)) // _BLOCK * _BLOCK
        at += len(data)
    return length


def _end_fault(begins: Sequence[int], end: int, following: int, length: int) -> Fault | None:
    """What is wrong with the zeros from `end` to `following`; None if nothing. The tar begins at one of `begins`.

    Two empty blocks end a tar, and more fill up its last record. A hole in a file is longer: a download that was cut,
    whose file had its full size from the start.
    """
    zeros = following - end
    if following == length and zeros < _END:
        return "truncated_tar", end, "the tar ends without the two empty blocks that end one"
    full = max(begin - (begin - end - _END) // _RECORD * _RECORD for begin in begins)
    if following > full:
        what = f"the tar ends {length - end:,} bytes before its file does"
        if following < length:
            what = f"the tar has a hole of {zeros:,} bytes"
        return "truncated_tar", end, f"{what}, all zero: a download that was cut?"
    return None


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


def _split(name: str) -> tuple[str | None, str]:
    """Key and ending of a member: up to the first dot of its file name, as webdataset has it.

    The key is None for a file whose name begins with a dot: macOS packs one beside every file.
    """
    folder, slash, file_name = name.removeprefix("./").rpartition("/")
    key, _, ending = file_name.partition(".")
    return folder + slash + key if key else None, ending


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
