"""Parts of an evaluation: the state and the rows of some images as bytes, kept in memory or in a folder."""

import io
import json
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from scaling_dit import files
from scaling_dit.errors import UserError
from scaling_dit.evaluation.metric import Row, State
from scaling_dit.parallel import processes

_CLAIM = "claim.json"


def encode(state: State, rows: Sequence[Row], name: str) -> bytes:
    """A part as an npz file: `state/KEY`, `rows` as JSON lines, and `rows/KEY` [N, ...] for arrays in the rows.

    Raises:
      UserError: a row of metric `name` holds a value that is neither JSON nor an array, or rows with different arrays.
    """
    arrays: dict[str, list[np.ndarray]] = {}
    lines = []
    for row in rows:
        for key, value in row.items():
            if isinstance(value, np.ndarray):
                arrays.setdefault(key, []).append(value)
        plain = {key: value for key, value in row.items() if not isinstance(value, np.ndarray)}
        try:
            lines.append(json.dumps(plain, ensure_ascii=False))
        except (TypeError, ValueError) as error:
            raise UserError(f"metric {name!r}: a row must hold JSON values and arrays: {error}") from None
    for key, values in arrays.items():
        if len({value.shape for value in values}) > 1 or len(values) != len(rows):
            raise UserError(f"metric {name!r}: {key!r} must be an array of the same shape in every row")
    buffer = io.BytesIO()
    content = {f"state/{key}": value for key, value in state.items()}
    content |= {f"rows/{key}": np.stack(values) for key, values in arrays.items()}
    content["rows"] = np.frombuffer("\n".join(lines).encode(), np.uint8)
    np.savez(buffer, **content)  # type: ignore[arg-type]
    return buffer.getvalue()


def decode_state(data: bytes) -> State:
    """The state in what `encode` wrote."""
    with np.load(io.BytesIO(data), allow_pickle=False) as content:
        keys = [key for key in content.files if key.startswith("state/")]
        return {key.removeprefix("state/"): content[key] for key in keys}


def decode_rows(data: bytes) -> list[Row]:
    """The rows in what `encode` wrote, with their arrays."""
    with np.load(io.BytesIO(data), allow_pickle=False) as content:
        # Split at newlines only: splitlines would also cut at characters that a prompt may hold.
        rows = [json.loads(line) for line in bytes(content["rows"]).decode().split("\n") if line]
        for key in content.files:
            if key.startswith("rows/"):
                for row, value in zip(rows, content[key], strict=True):
                    row[key.removeprefix("rows/")] = value
    return rows


class Parts(Protocol):
    """Where parts are kept, by number."""

    def has(self, number: int) -> bool:
        """Whether a part is finished."""

    def write(self, number: int, data: bytes) -> None:
        """Keeps a part."""

    def read(self, number: int) -> bytes:
        """A finished part."""

    def share(self) -> None:
        """Makes the parts of all processes known to each; called by all of them, once each has written its own."""


class InMemory:
    """Parts of an evaluation with few images; nothing of it is kept when the process ends."""

    def __init__(self) -> None:
        self._parts: dict[int, bytes] = {}

    def has(self, number: int) -> bool:
        return number in self._parts

    def write(self, number: int, data: bytes) -> None:
        self._parts[number] = data

    def read(self, number: int) -> bytes:
        return self._parts[number]

    def share(self) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **{str(k): np.frombuffer(v, np.uint8) for k, v in self._parts.items()})  # type: ignore[arg-type]
        for sent in processes.gather_bytes(buffer.getvalue()):
            with np.load(io.BytesIO(sent), allow_pickle=False) as parts:
                self._parts |= {int(key): bytes(parts[key]) for key in parts.files}


class InFolder:
    """Parts in a folder that all processes see; those that an evaluation with the same `claim` finished are kept.

    Args:
      claim: JSON values that say what the parts are made with; parts made with something else are removed.
    """

    def __init__(self, folder: epath.Path, claim: dict[str, Any]) -> None:
        self._folder = folder
        text = files.to_json(claim)
        if jax.process_index() == 0:
            note = folder / _CLAIM
            if folder.exists() and not (note.exists() and note.read_text() == text):
                folder.rmtree()
            folder.mkdir(parents=True, exist_ok=True)
            files.write_whole(note, text.encode())
        processes.gather_bytes(b"")

    def has(self, number: int) -> bool:
        return self._path(number).exists()

    def write(self, number: int, data: bytes) -> None:
        files.write_whole(self._path(number), data)

    def read(self, number: int) -> bytes:
        return self._path(number).read_bytes()

    def share(self) -> None:
        # Waits for the others: the folder has what they wrote.
        processes.gather_bytes(b"")

    def remove(self) -> None:
        """Removes the folder; called once nothing is read from it any more."""
        processes.gather_bytes(b"")
        if jax.process_index() == 0:
            self._folder.rmtree()

    def _path(self, number: int) -> epath.Path:
        return self._folder / f"{number:06d}.npz"
