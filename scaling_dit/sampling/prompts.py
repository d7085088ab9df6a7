"""Prompts with ids; an id is the key that images, questions and scores share."""

import re
from collections.abc import Sequence

from etils import epath

from scaling_dit.errors import UserError
from scaling_dit.files import parse_json

# (id, text)
Prompt = tuple[str, str]
# Ids become file names.
_ID = re.compile(r"[\w.-]+")


def gather_prompts(given: Sequence[str], path: str | None = None) -> list[Prompt]:
    """Prompts from the command line, numbered, and those of a file.

    Args:
      given: texts of prompts; their ids are "00000", "00001", ...
      path: a text file with one prompt per line, numbered on, or a `.jsonl` file with `prompt` and optionally `id`.

    Raises:
      UserError: no prompt at all, no such file, a malformed line, or an id given twice.
    """
    rows: list[tuple[str | None, str]] = [(None, text) for text in given]
    rows += _read(path) if path else []
    if not rows:
        raise UserError("no prompts: give them as arguments, or --prompts_file=FILE (.txt or .jsonl)")
    prompts = {}
    for number, (id_, text) in enumerate(rows):
        key = id_ if id_ is not None else f"{number:05d}"
        if key in prompts:
            raise UserError(f"two prompts have the id {key!r}; each needs its own")
        prompts[key] = text
    return list(prompts.items())


def _read(path: str) -> list[tuple[str | None, str]]:
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"--prompts_file: no file {path}")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompts_file: {path} is not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from None
    # Not splitlines(), which also splits at characters that a prompt may hold.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    lines = [(number, line) for number, line in lines if line]
    if not path.endswith(".jsonl"):
        return [(None, line) for _, line in lines]
    return [_parse(line, f"{path}, line {number}") for number, line in lines]


def _parse(line: str, where: str) -> tuple[str | None, str]:
    right = '{"id": "a1", "prompt": "a red circle"}'
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); a line looks like {right}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f"{where} has no text under 'prompt'; a line looks like {right}")
    key = row.get("id")
    if key is not None and not _ID.fullmatch(str(key)):
        raise UserError(f"{where}: the id {key!r} cannot name a file; use letters, digits, '.', '_' and '-'")
    return (None if key is None else str(key)), row["prompt"]
