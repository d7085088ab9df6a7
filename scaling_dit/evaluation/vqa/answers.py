"""Every question, answer and probability of a judge, kept by content: the trace of an evaluation, and its cache.

A key is a hash of the pixels, the judge's identity, the text of the question and its choices or accepted forms. So a
question that was asked before costs nothing, whatever metric or run asks it again. In memory an answer takes some 200
bytes.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from scaling_dit.evaluation.vqa import Asked
from scaling_dit.monitor.jsonl import JsonLines, read_rows

# What an answer is about: words, or a probability.
ANSWER, LIKELIHOOD = "answer", "log_p"


class Answers:
    """Answers by key; in memory until `keep_in` names a folder."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}
        self._lines: JsonLines | None = None
        self._folder: epath.Path | None = None
        self.asked = 0

    def keep_in(self, folder: epath.Path) -> None:
        """Reads what is kept in a folder, and keeps there what is asked from now on, in files of this process."""
        if self._folder == folder:
            return
        self._folder = folder
        own = f"process-{jax.process_index():05d}"
        if folder.exists():
            for part in sorted(folder.iterdir()):
                for segment in read_rows(part):
                    for row in segment:
                        self._known[row["key"]] = row["reply"]
        self._own = folder / own

    def get(self, key: str) -> Any:
        """What is known; None if nothing is."""
        return self._known.get(key)

    def put(self, key: str, reply: Any, trace: dict[str, Any]) -> None:
        """Keeps a reply, a JSON value, with what it replies to."""
        self._known[key] = reply
        self.asked += 1
        if self._folder is None:
            return
        if self._lines is None:
            # A file for each start, made when there is something to write.
            self._lines = JsonLines(self._own)
        self._lines.write({"key": key, "reply": reply, **trace})

    def flush(self) -> None:
        """Makes what was written readable by others."""
        if self._lines is not None:
            self._lines.flush()


def image_hash(image: np.ndarray) -> str:
    """Of the pixels of uint8 [H, W, 3]."""
    digest = hashlib.sha256(json.dumps(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()[:32]


def keys(identity: str, kind: str, asked: Sequence[Asked]) -> list[tuple[str, dict[str, Any]]]:
    """(key, trace) of each question; an image that occurs several times is hashed once."""
    hashes: dict[int, str] = {}
    found = []
    for one in asked:
        image = hashes.get(id(one.image)) or hashes.setdefault(id(one.image), image_hash(one.image))
        trace = {
            "judge": identity,
            "image": image,
            "asked": one.text,
            "choices" if kind == ANSWER else "accepted": list(one.options),
        }
        text = json.dumps([kind, trace], sort_keys=True, ensure_ascii=False)
        found.append((hashlib.sha256(text.encode()).hexdigest()[:32], trace))
    return found
