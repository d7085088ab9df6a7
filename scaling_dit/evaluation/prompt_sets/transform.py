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
from scaling_dit.files import expand

NONE = "none"


def transform(prompts: Sequence[tuple[str, str]], text: str) -> tuple[list[str], str]:
    """The prompt to sample for each (id, prompt), and what was done in words.

    Args:
      text: "none", "repeat:N" (the prompt N times, with blanks between), or "rewrite:FILE", a .jsonl file of {"id",
        "prompt"} for each prompt.

    Raises:
      UserError: another text, or a file without one of the prompts.
    """
    if text == NONE:
        return [prompt for _, prompt in prompts], NONE
    kind, _, value = text.partition(":")
    if kind == "repeat" and re.fullmatch("[2-9]|[1-9][0-9]+", value):
        return [" ".join([prompt] * int(value)) for _, prompt in prompts], text
    if kind == "rewrite" and value:
        try:
            path = epath.Path(expand(value))
        except UserError as error:
            raise UserError(f"prompt_transform: {error}") from None
        return _rewritten(prompts, path)
    raise UserError(
        f"prompt_transform is {text!r}; it must be none, repeat:N with N from 2, or rewrite:FILE.jsonl"
    )


def _rewritten(prompts: Sequence[tuple[str, str]], path: epath.Path) -> tuple[list[str], str]:
    if not path.is_file():
        raise UserError(
            f"prompt_transform: no file {path}; it must hold a line of id and prompt for each prompt"
        )
    data = path.read_bytes()
    rewritten = {}
    for number, line in enumerate(data.decode().split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
                rewritten[str(row["id"])] = str(row["prompt"])
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f'prompt_transform: {path}, line {number} is not {{"id", "prompt"}}'
                ) from None
    missing = [id_ for id_, _ in prompts if id_ not in rewritten]
    if missing:
        raise UserError(f"prompt_transform: {path} has no prompt for {missing[0]!r} ({len(missing)} missing)")
    digest = hashlib.sha256(data).hexdigest()[:12]
    return [rewritten[id_] for id_, _ in prompts], f"rewrite:{path.name} ({digest})"
