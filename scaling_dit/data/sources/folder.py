"""A folder of images with a `metadata.jsonl` beside them, the Hugging Face imagefolder convention.

Each line of `metadata.jsonl` is a JSON object with `file_name` (relative to the folder) and `text` (one caption) or
`texts` (a list of captions); `kinds` may say of each text whether it is alt, synthetic or long (`data/captions.py`),
and other keys do not matter here. One line per image: several captions go into `texts`. A null is a caption that is
not there.

What is damaged (`data/damage.py`) is of one kind; `data/images.py` has more on images:

    bad_json          a line that is no JSON, or not UTF-8
    bad_line          JSON of another form: no object, a key missing or of a wrong type
    bad_text          a caption that holds half of a surrogate pair
    empty_caption     every caption is blank (blank ones beside others are left out)
    outside_folder    an absolute file name, or one that leaves the folder with ".." or, without `links`, through a link
    duplicate_file    a file that an earlier line has already
    missing_file      no such file, of the image or of a condition beside it
    missing_condition  the line names no file for a condition of `conditions`
    bad_condition      a condition of another size than its image
    unreadable_image  truncated, no image, or of a format or pixel type that is not read
    too_large         more pixels than `max_pixels`, known from the header; it is not decoded

The first six are found when the folder is opened, links apart, and such lines are no records. The others are met when
an image is read, and another image of the folder replaces it. A store that fails for another reason (a disk, a network)
is no damaged record: the run stops.
"""

import dataclasses
import functools
import os
import posixpath
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from scaling_dit import files
from scaling_dit.data import images
from scaling_dit.data.captions import KINDS
from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.sources import beside
from scaling_dit.data.sources.fields import is_null
from scaling_dit.data.sources.image_files import Files, ImageFileSource, RawSample, Shard, key_hash
from scaling_dit.data.text import is_sound
from scaling_dit.errors import UserError, nearest

METADATA = "metadata.jsonl"
# Those that are read; the others are `RawSample.metadata`.
KEYS = ("file_name", "text", "texts", "kinds")
# Lines that count as one shard, for those who share the work.
BLOCK = 10_000


class Row(NamedTuple):
    """One line of the metadata."""

    file_name: str
    texts: tuple[str, ...]
    # Of the texts: alt | synthetic | long
    kinds: tuple[str, ...]
    # The other keys.
    metadata: dict[str, Any]
    # 1-based, for error messages.
    line: int


@dataclasses.dataclass(frozen=True)
class FolderSource(ImageFileSource):
    """Images and captions of one folder, as RGB squares; its fields are those of every `ImageFileSource`, and `links`.

    Attributes:
      links: read files that a link in the folder finds outside of it, as in caches that link to a store of blobs.
      conditions: those beside each image (`beside.py`): the key "edit_file_name" holds the file of condition "edit",
        "edit_mask_file_name" that of its mask.

    Raises:
      UserError: no such folder or `metadata.jsonl`, too many damaged lines in it, or no image left to train on.
    """

    links: bool = False
    conditions: tuple[str, ...] = ()

    _noun = "folder"

    def texts(self) -> Iterator[str]:
        """Every caption of this split, without reading an image."""
        for index in range(len(self)):
            shard, row = self._sample_place(index)
            yield from self._shard(shard).rows[row].texts

    @property
    def _metadata(self) -> epath.Path:
        return epath.Path(self.path) / METADATA

    def _place(self) -> str:
        return str(self._metadata)

    def _list(self) -> Files:
        rows, faults = read_metadata(self._metadata)

        def block(number: int) -> Shard:
            lines = rows[number * BLOCK : (number + 1) * BLOCK]
            hashes = np.array([key_hash(line.file_name) for line in lines], np.float64)
            return Shard(hashes, () if number else tuple(faults), lines)

        blocks = max(-(-len(rows) // BLOCK), 1)
        return Files(tuple(f"{METADATA}-{number:05d}" for number in range(blocks)), block)

    def _read(self, shard: int, row: int) -> RawSample:
        line: Row = self._shard(shard).rows[row]
        where = f"{self._metadata} line {line.line}"
        data = self._bytes(line.file_name, "file_name", where)
        parts = {}
        for part, key in beside.columns(self.paired, "_file_name").items():
            name = line.metadata.get(key)
            if not isinstance(name, str) or not name:
                raise beside.missing(part, where, f"the line has no {key!r}, a file's name")
            if why := _outside(name):
                raise DamagedRecord("outside_folder", where, f"{key} {name!r} {why}")
            parts[part] = self._bytes(posixpath.normpath(name), key, where)
        return RawSample(line.file_name, data, line.texts, line.kinds, line.metadata, where, parts)

    def _bytes(self, name: str, key: str, where: str) -> bytes:
        """What a file of the folder holds; raises DamagedRecord."""
        path = epath.Path(self.path) / name
        if not (self.links or self._holds(path) or files.special(path)):
            what = (
                f"{key} {name!r} leads out of the folder through a link; set config.source.links "
                "for files that may lie elsewhere"
            )
            raise DamagedRecord("outside_folder", where, what)
        return images.read_bytes(path, where)

    def _holds(self, path: epath.Path) -> bool:
        """Whether a file lies in the folder once all links are followed. Remote stores have none."""
        if files.is_remote(path):
            return True
        return os.path.realpath(path).startswith(self._real)

    @functools.cached_property
    def _real(self) -> str:
        return os.path.join(os.path.realpath(self.path), "")


def read_metadata(path: epath.Path) -> tuple[list[Row], list[DamagedRecord]]:
    """The rows of a `metadata.jsonl`, and its damaged lines; blank lines are skipped.

    Raises:
      UserError: missing folder or file.
    """
    if kind := files.special(path):
        raise UserError(f"{path} is {kind}, it cannot be read as a file")
    if not path.parent.is_dir():
        raise UserError(
            f"no folder {path.parent}; source folder:PATH needs a folder of images with a {METADATA}"
        )
    if not path.exists():
        raise UserError(
            f'{path} is missing; write one line {{"file_name": "a.png", "text": "a caption"}} per image'
        )
    rows: dict[str, Row] = {}
    faults = []
    # Split on bytes: str.splitlines would also split at U+2028 and others, which are legal inside a JSON string.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = _parse(where, number, line)
            if row.file_name in rows:
                before = rows[row.file_name].line
                what = f"{row.file_name!r} is on line {before} already; several captions go into 'texts'"
                raise DamagedRecord("duplicate_file", where, what)
            rows[row.file_name] = row
        except DamagedRecord as fault:
            faults.append(fault)
    return list(rows.values()), faults


def _parse(where: str, number: int, line: bytes) -> Row:
    try:
        entry: Any = files.parse_json(line)
    except ValueError as error:
        raise DamagedRecord("bad_json", where, f"not JSON: {error}") from None

    def bad_line(what: str) -> DamagedRecord:
        return DamagedRecord("bad_line", where, what)

    if not isinstance(entry, dict):
        raise bad_line(f"a JSON object is needed, not {type(entry).__name__}")
    file_name = entry.get("file_name")
    if not isinstance(file_name, str) or not file_name or "\0" in file_name or not is_sound(file_name):
        raise bad_line(f"no 'file_name' (a string); {nearest('file_name', entry)}")
    kept = _captions(entry, where, bad_line)
    if not kept:
        raise DamagedRecord("empty_caption", where, f"the caption of {file_name!r} is empty")
    if why := _outside(file_name):
        raise DamagedRecord("outside_folder", where, f"file_name {file_name!r} {why}")
    normal = posixpath.normpath(file_name)
    metadata = {key: value for key, value in entry.items() if key not in KEYS}
    return Row(normal, tuple(text for text, _ in kept), tuple(kind for _, kind in kept), metadata, number)


def _outside(file_name: str) -> str:
    """Why a file's name cannot be one of the folder's; "" for one that can."""
    normal = posixpath.normpath(file_name)
    if normal.startswith(("/", "../")) or normal in (".", "..") or "://" in file_name or "\0" in file_name:
        return "leaves the folder; it must be relative to it"
    return ""


def _captions(
    entry: dict[str, Any], where: str, bad_line: Callable[[str], DamagedRecord]
) -> list[tuple[str, str]]:
    """The captions of a line with their kinds, without nulls and blank ones."""
    texts = entry.get("texts")
    if is_null(texts):
        if "text" not in entry and "texts" not in entry:
            raise bad_line(f"no 'text' (a string) or 'texts' (a list); {nearest('text', entry)}")
        texts = [entry.get("text")]
    form = "'text' must be a string, 'texts' a list of at least one string"
    if not isinstance(texts, list) or not texts:
        raise bad_line(form)
    kinds = entry.get("kinds")
    if is_null(kinds):
        kinds = ["alt"] * len(texts)
    right = f"'kinds' must be a list with one of {', '.join(KINDS)} for each text"
    if not isinstance(kinds, list) or len(kinds) != len(texts):
        raise bad_line(right)
    kept = []
    for text, kind in zip(texts, kinds, strict=True):
        if is_null(text):
            continue
        if not isinstance(text, str):
            raise bad_line(form)
        if kind not in KINDS:
            raise bad_line(right)
        if not is_sound(text):
            raise DamagedRecord("bad_text", where, f"{text!r} is not text: it holds half of a surrogate pair")
        if text.strip():
            kept.append((text, kind))
    return kept
