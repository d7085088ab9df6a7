"""JSON rows of a run on disk. Each start writes a file of its own, so no process renames or appends to another's."""

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from scaling_dit.errors import UserError
from scaling_dit.files import parse_json, special

_SEGMENT = re.compile(r"segment-(\d+)\.jsonl")


class JsonLines:
    """JSON rows in `segment-NNNNN.jsonl`, one file for each start of a run; `read_rows` reads all of them.

    A local segment grows line by line. Object stores cannot append, so `flush` rewrites a remote segment.

    Args:
      directory: created if it does not exist.
      append: whether files can be appended to; true for a local directory by default.
    """

    def __init__(self, directory: epath.PathLike, *, append: bool | None = None) -> None:
        self.directory = epath.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        taken = [int(m[1]) for p in self.directory.iterdir() if (m := _SEGMENT.fullmatch(p.name))]
        self.segment = self.directory / f"segment-{max(taken, default=0) + 1:05d}.jsonl"
        if append is None:
            append = "://" not in os.fspath(directory)
        self._lines: list[str] = []
        self._file = self.segment.open("a") if append else None
        # Create the file now, so that no other start takes its number.
        self.flush()

    def write(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row)
        if self._file is None:
            self._lines.append(line)
        else:
            self._file.write(line + "\n")
            self._file.flush()

    def flush(self) -> None:
        if self._file is None:
            self.segment.write_text("".join(line + "\n" for line in self._lines))
        else:
            self._file.flush()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


def read_rows(
    directory: epath.Path, fits: Callable[[dict[str, Any]], bool] = lambda row: True
) -> list[list[dict[str, Any]]]:
    """The rows of each segment that `JsonLines` wrote, in the order of the starts.

    Args:
      directory: of the segments.
      fits: whether a row has the form that its writer gives it.

    Raises:
      UserError: a line is no JSON object, or does not fit. A last line that a kill cut short is skipped.
    """
    if not directory.exists():
        return []
    if not directory.is_dir():
        raise UserError(
            f"{directory} is no folder; a run keeps files segment-NNNNN.jsonl there; move it away"
        )
    paths = [path for path in directory.iterdir() if _SEGMENT.fullmatch(path.name)]
    return [_segment_rows(path, fits) for path in sorted(paths, key=lambda path: path.name)]


def _segment_rows(path: epath.Path, fits: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    if kind := special(path):
        raise UserError(f"{path} is {kind}, and must be a file; move it away")
    rows = []
    # Split on newlines only: splitlines would also cut inside a text at other separators.
    lines = path.read_bytes().split(b"\n")
    for i, line in enumerate(lines):
        if not line:
            continue
        try:
            row = parse_json(line)
        except ValueError:
            # A kill can cut only the last line short; anything else is damage.
            if i == len(lines) - 1:
                continue
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {i + 1} is not JSON; put the file back, or delete that line")
        if not fits(row):
            raise UserError(
                f"{path}: line {i + 1} is no row that a run writes there; put the file back, or delete that line"
            )
        rows.append(row)
    return rows
