"""What is done to prompts before they are sampled: nothing, repetition, or a model's rewriting from a file.

A rewritten prompt can raise a score by more than any change of the model (arXiv 2606.11289), so every result names the
transform. Metrics score the images against the original prompts.
"""

import hashlib
import json
import re
from collections.abc import Sequence

from etils import epath

from scaling_dit.errors import UserError
from scaling_dit.evaluation.metric import Item

NONE = "none"


def transform(items: Sequence[Item], text: str) -> tuple[list[str], str]:
    """The prompt to sample for each item, and what was done in words.

    Args:
      text: "none", "repeat:N" (the prompt N times, with blanks between), or "rewrite:FILE", a .jsonl file of {"id",
        "prompt"} for each prompt.

    Raises:
      UserError: another text, or a file without one of the prompts.
    """
    if text == NONE:
        return [item.prompt for item in items], NONE
    kind, _, value = text.partition(":")
    if kind == "repeat" and re.fullmatch("[2-9]|[1-9][0-9]+", value):
        return [" ".join([item.prompt] * int(value)) for item in items], text
    if kind == "rewrite" and value:
        return _rewritten(items, epath.Path(value).expanduser())
    raise UserError(
        f"prompt_transform is {text!r}; it must be none, repeat:N with N from 2, or rewrite:FILE.jsonl"
    )


def _rewritten(items: Sequence[Item], path: epath.Path) -> tuple[list[str], str]:
    if not path.is_file():
        raise UserError(
            f"prompt_transform: no file {path}; it must hold a line of id and prompt for each prompt"
        )
    data = path.read_bytes()
    prompts = {}
    for number, line in enumerate(data.decode().split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
                prompts[str(row["id"])] = str(row["prompt"])
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f'prompt_transform: {path}, line {number} is not {{"id", "prompt"}}'
                ) from None
    missing = [item.id for item in items if item.id not in prompts]
    if missing:
        raise UserError(f"prompt_transform: {path} has no prompt for {missing[0]!r} ({len(missing)} missing)")
    digest = hashlib.sha256(data).hexdigest()[:12]
    return [prompts[item.id] for item in items], f"rewrite:{path.name} ({digest})"
