"""Side-car files of a raw source, one per shard: lists of kept samples, and generated captions.

Each file is JSON lines, written atomically and named after the shard ("00000.tar" -> "00000.tar.captions.jsonl"). A
shard is finished if its file exists, so a killed job resumes with the other shards.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from scaling_dit.data.sources.fields import is_null
from scaling_dit.data.text import sound_value
from scaling_dit.errors import UserError
from scaling_dit.files import parse_json, sha256, special, write_whole

# Kinds of side-car files.
CAPTIONS, FILTER = "captions", "filter"
# The file beside them with the settings that they were made with.
SETTINGS = {CAPTIONS: "caption.json", FILTER: "filter.json"}
_MAKERS = {CAPTIONS: "scaling-dit caption", FILTER: "scaling-dit filter"}


class MadeCaption(NamedTuple):
    """A caption of a side-car file.

    Attributes:
      text: the caption.
      kind: "synthetic" or "long", by which caption policies choose.
      score: comparable within one image only; None if the captioner gives none.
    """

    text: str
    kind: str
    score: float | None


def path_of(folder: epath.PathLike, shard: str, what: str) -> epath.Path:
    """The file of one shard; `what` is CAPTIONS or FILTER."""
    return epath.Path(folder) / f"{shard}.{what}.jsonl"


def settings_sha256(folder: epath.PathLike, what: str) -> str:
    """The checksum of the settings of the side-cars in a folder. It changes if they are made again with others.

    Raises:
      UserError: the file is missing: the folder holds no side-cars, or unfinished ones.
    """
    path = epath.Path(folder) / SETTINGS[what]
    if not path.exists():
        raise UserError(f"no file {path}; `{_MAKERS[what]}` writes it")
    return sha256(path)


def share(shards: Sequence[str], process: int, processes: int) -> list[str]:
    """The shards of process `process` of `processes`: every n-th of the sorted names.

    Raises:
      UserError: `process` is out of range.
    """
    if not 0 <= process < processes:
        raise UserError(f"process {process} of {processes}: count from 0 to {processes - 1}")
    return sorted(shards)[process::processes]


def write_captions(
    folder: epath.PathLike, shard: str, captions: Iterable[tuple[str, Sequence[MadeCaption]]]
) -> None:
    """Writes a shard's captions: (key, captions, the best first) in the shard's order."""
    rows = ({"key": key, "captions": [made._asdict() for made in given]} for key, given in captions)
    write_lines(path_of(folder, shard, CAPTIONS), rows)


def read_captions(folder: epath.PathLike, shard: str) -> dict[str, list[MadeCaption]]:
    """A shard's captions by key, the best first. An image that could not be captioned has an empty list.

    Raises:
      UserError: the file is missing, or a line has another form than `write_captions` gives it.
    """
    found = {}
    for where, row in _lines(folder, shard, CAPTIONS):
        try:
            found[str(row["key"])] = [
                MadeCaption(str(made["text"]), str(made["kind"]), made["score"])
                for made in row["captions"]
                if not is_null(made["text"])
            ]
        except (KeyError, TypeError):
            raise UserError(
                f'{where}: a line holds "key" and "captions", a list of text, kind and score'
            ) from None
    return found


def read_kept(folder: epath.PathLike, shard: str) -> set[str]:
    """The keys of a shard that `filter` kept.

    Raises:
      UserError: the file is missing, or a line has another form than `filter` gives it.
    """
    kept = set()
    for where, row in _lines(folder, shard, FILTER):
        if "key" not in row:
            raise UserError(f'{where} has no "key"')
        if "dropped" not in row:
            kept.add(str(row["key"]))
    return kept


def write_lines(path: epath.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _lines(folder: epath.PathLike, shard: str, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = path_of(folder, shard, what)
    if not path.exists():
        raise UserError(f"no file {path}; `{_MAKERS[what]}` writes one for each shard, of the same source")
    if kind := special(path):
        raise UserError(f"{path} is {kind}, it cannot be read as a file")
    # Split on bytes: str.splitlines would also split at U+2028 and others, which are legal inside a JSON string.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = sound_value(parse_json(line))
        except ValueError as error:
            raise UserError(f"{where} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} is no JSON object")
        yield where, row
