"""JSON rows of a run on disk. Each start writes a file of its own, so no process renames or appends to another's."""

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from scaling_dit import storage
from scaling_dit.errors import UserError
from scaling_dit.files import parse_json, special

_SEGMENT = re.compile(r"segment-(\d+)\.jsonl")


class JsonLines:
    """JSON rows in `segment-NNNNN.jsonl`, one file for each start of a run; `read_rows` reads all of them.

    A local segment grows line by line. Object stores cannot append, so `flush` rewrites a remote segment. A line that
    the disk refuses is kept and written, from where it was cut, by the next call.

    Args:
      directory: created if it does not exist.
      append: whether files can be appended to; true for a local directory by default.
      patience: seconds that a call tries again while the disk or bucket refuses.

    Raises:
      StorageError: from every method, if it still refuses then.
    """

    def __init__(
        self, directory: epath.PathLike, *, append: bool | None = None, patience: float = 0.0
    ) -> None:
        self._patience = patience
        self.directory = epath.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        taken = [int(m[1]) for p in self.directory.iterdir() if (m := _SEGMENT.fullmatch(p.name))]
        self.segment = self.directory / f"segment-{max(taken, default=0) + 1:05d}.jsonl"
        if append is None:
            append = "://" not in os.fspath(directory)
        self._lines: list[str] = []
        # Unbuffered: of a line that does not fit on the disk, what is written is known.
        self._file = open(os.fspath(self.segment), "ab", buffering=0) if append else None  # noqa: SIM115
        self._pending = b""
        # Create the file now, so that no other start takes its number.
        self.flush()

    def write(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row)
        if self._file is None:
            self._lines.append(line)
        else:
            self._pending += f"{line}\n".encode()
            self.flush()

    def flush(self) -> None:
        storage.patiently(self._flush, str(self.segment), self._patience)

    def _flush(self) -> None:
        if self._file is None:
            self.segment.write_text("".join(line + "\n" for line in self._lines))
            return
        while self._pending:
            written = self._file.write(self._pending) or 0
            self._pending = self._pending[written:]

    def close(self) -> None:
        try:
            self.flush()
        finally:
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
