"""From a free answer to one of the choices of a question, as TIFA does it (arXiv 2303.11897).

TIFA v1.0 takes an answer that literally is one of the choices, and else the choice whose sentence embedding is nearest
(all-mpnet-base-v2: mean over tokens, unit length). Without that model only the first half of the rule can be followed:
an answer that is no choice, but for case, blanks and a full stop, is then wrong, and counted as unmatched.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from scaling_dit.evaluation.metric import Skipped
from scaling_dit.evaluation.vqa.hashes import weights_hash
from scaling_dit.files import expand

LITERAL = "literal: equal to a choice but for case, blanks and a final full stop; else none"


class Matcher(Protocol):
    """Maps answers to choices."""

    @property
    def rule(self) -> str:
        """The rule in words, for results."""

    def match(self, answers: Sequence[str], choices: Sequence[Sequence[str]]) -> list[str | None]:
        """The choice that each answer means; None if it means none of its choices."""


class Literal:
    """The first half of the rule alone."""

    rule = LITERAL

    def match(self, answers: Sequence[str], choices: Sequence[Sequence[str]]) -> list[str | None]:
        """See `Matcher`."""
        return [literal(answer, some) for answer, some in zip(answers, choices, strict=True)]


def literal(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that an answer is, but for case, blanks and a final full stop; an exact one is preferred."""
    if answer in choices:
        return answer
    plain = _plain(answer)
    return next((choice for choice in choices if _plain(choice) == plain), None)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(". ")


@dataclasses.dataclass(frozen=True)
class NearestSentence:
    """TIFA's whole rule, with a sentence encoder of transformers such as sentence-transformers/all-mpnet-base-v2.

    Attributes:
      folder: of the encoder, with its tokenizer.

    Raises:
      Skipped: no such folder, or transformers is missing.
    """

    folder: str

    def __post_init__(self) -> None:
        if not pathlib.Path(self.folder).is_dir():
            raise Skipped(
                f"no folder {self.folder!r} with a sentence encoder; TIFA's is sentence-transformers/all-mpnet-base-v2 "
                "on huggingface.co"
            )

    @property
    def rule(self) -> str:
        """The rule in words, with the hash of the encoder's weights."""
        digest = weights_hash(self.folder)[:12]
        return f"TIFA v1.0: equal to a choice, else the nearest one by sentence embedding ({digest})"

    def match(self, answers: Sequence[str], choices: Sequence[Sequence[str]]) -> list[str | None]:
        """See `Matcher`; there is always a nearest choice."""
        found: list[str | None] = []
        for answer, some in zip(answers, choices, strict=True):
            if answer in some:
                found.append(answer)
            else:
                vectors = self._embed([answer, *some])
                found.append(some[int((vectors[1:] @ vectors[0]).argmax())])
        return found

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self._embed_one(text) for text in texts])

    @functools.cached_property
    def _embed_one(self) -> Any:
        """Text -> unit vector; answers and choices repeat, so it remembers them."""
        from scaling_dit.evaluation.vqa.transformers_models import SentenceEncoder

        encoder = SentenceEncoder(self.folder)
        return functools.lru_cache(maxsize=2**16)(encoder)


def create_matcher(folder: str) -> Matcher:
    """The whole rule with the encoder in a folder; the literal half of it for ""."""
    return NearestSentence(expand(folder)) if folder else Literal()
