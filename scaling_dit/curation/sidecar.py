"""Files that stand beside a raw source, one per shard: which samples are kept, and captions that were made for them.

Each is JSON lines, written whole, and named after the shard ("00000.tar" -> "00000.tar.captions.jsonl"), so that a
finished shard is one whose file exists, and work goes on where it was killed.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from scaling_dit.errors import UserError
from scaling_dit.files import sha256, write_whole

CAPTIONS, FILTER = "captions", "filter"  # kinds of files
SETTINGS = {CAPTIONS: "caption.json", FILTER: "filter.json"}  # beside them: what they were made with
_MAKERS = {CAPTIONS: "scaling-dit caption", FILTER: "scaling-dit filter"}


class MadeCaption(NamedTuple):
    """A caption of a side-car file."""

    text: str
    kind: str  # "synthetic" or "long", as a policy tells captions apart
    score: float | None  # comparable within one image only; None if the captioner gives none


def path_of(folder: epath.PathLike, shard: str, what: str) -> epath.Path:
    """The file of one shard; `what` is CAPTIONS or FILTER."""
    return epath.Path(folder) / f"{shard}.{what}.jsonl"


def settings_sha256(folder: epath.PathLike, what: str) -> str:
    """The checksum of what the side-cars in a folder were made with: others made there later have another.

    Raises:
      UserError: no such file; the folder is not theirs, or not finished.
    """
    path = epath.Path(folder) / SETTINGS[what]
    if not path.exists():
        raise UserError(f"no file {path}; `{_MAKERS[what]}` writes it")
    return sha256(path)


def share(shards: Sequence[str], process: int, processes: int) -> list[str]:
    """The shards that process `process` of `processes` works on: every n-th of the sorted names.

    Raises:
      UserError: no such process.
    """
    if not 0 <= process < processes:
        raise UserError(f"process {process} of {processes}: count from 0 to {processes - 1}")
    return sorted(shards)[process::processes]


def write_captions(
    folder: epath.PathLike, shard: str, captions: Iterable[tuple[str, Sequence[MadeCaption]]]
) -> None:
    """Writes a shard's captions: (key, captions with the best first) in the shard's order."""
    rows = ({"key": key, "captions": [made._asdict() for made in given]} for key, given in captions)
    write_lines(path_of(folder, shard, CAPTIONS), rows)


def read_captions(folder: epath.PathLike, shard: str) -> dict[str, list[MadeCaption]]:
    """A shard's captions by key, the best first; a key whose image could not be captioned has none.

    Raises:
      UserError: no such file, or a line that `write_captions` would not write.
    """
    found = {}
    for where, row in _lines(folder, shard, CAPTIONS):
        try:
            found[str(row["key"])] = [
                MadeCaption(str(made["text"]), str(made["kind"]), made["score"]) for made in row["captions"]
            ]
        except (KeyError, TypeError):
            raise UserError(
                f'{where}: a line holds "key" and "captions", a list of text, kind and score'
            ) from None
    return found


def read_kept(folder: epath.PathLike, shard: str) -> set[str]:
    """The keys of a shard that `filter` kept.

    Raises:
      UserError: no such file, or a line that `filter` would not write.
    """
    kept = set()
    for where, row in _lines(folder, shard, FILTER):
        if "key" not in row:
            raise UserError(f'{where} has no "key"')
        if "dropped" not in row:
            kept.add(str(row["key"]))
    return kept


def write_lines(path: epath.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines so that no reader sees half of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _lines(folder: epath.PathLike, shard: str, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = path_of(folder, shard, what)
    if not path.exists():
        raise UserError(f"no file {path}; `{_MAKERS[what]}` writes one for each shard, of the same source")
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} is no JSON object")
        yield where, row
