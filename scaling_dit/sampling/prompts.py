"""Prompts with ids: what is sampled, and the key that pictures, questions and scores share."""

import json
import re
from collections.abc import Sequence

from etils import epath

from scaling_dit.errors import UserError

Prompt = tuple[str, str]  # (id, caption)
_ID = re.compile(r"[\w.-]+")  # ids become file names


def gather_prompts(captions: Sequence[str], path: str | None = None) -> list[Prompt]:
    """Captions from the command line, numbered, and those of a file.

    Args:
      captions: captions as given; their ids are "00000", "00001", ...
      path: a text file with one caption per line, numbered on, or a `.jsonl` file with `prompt` and optionally `id`.

    Raises:
      UserError: no caption at all, no such file, a malformed line, or an id given twice.
    """
    rows: list[tuple[str | None, str]] = [(None, caption) for caption in captions]
    rows += _read(path) if path else []
    if not rows:
        raise UserError("no prompts: give captions as arguments, or --prompts_file=FILE (.txt or .jsonl)")
    prompts = {}
    for number, (given, caption) in enumerate(rows):
        key = given if given is not None else f"{number:05d}"
        if key in prompts:
            raise UserError(f"two prompts have the id {key!r}; each needs its own")
        prompts[key] = caption
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
    # Not splitlines(), which also splits at characters that a caption may hold.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    lines = [(number, line) for number, line in lines if line]
    if not path.endswith(".jsonl"):
        return [(None, line) for _, line in lines]
    return [_parse(line, f"{path}, line {number}") for number, line in lines]


def _parse(line: str, where: str) -> tuple[str | None, str]:
    right = '{"id": "a1", "prompt": "a red circle"}'
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}); a line looks like {right}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f"{where} has no text under 'prompt'; a line looks like {right}")
    key = row.get("id")
    if key is not None and not _ID.fullmatch(str(key)):
        raise UserError(f"{where}: the id {key!r} cannot name a file; use letters, digits, '.', '_' and '-'")
    return (None if key is None else str(key)), row["prompt"]
