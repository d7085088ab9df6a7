"""Judges: what answers questions about an image. One file each, behind one protocol.

`transformers:FOLDER` is a model of transformers: BLIP-VQA, BLIP-2, or any image-text-to-text model such as Qwen3-VL.
`openai:URL` is a server with OpenAI's chat interface and log-probabilities. `shapes` reads the built-in scenes exactly.
"package.module:Name" is a user's own, whose replies are checked.

Scores of different judges do not compare. So a judge has an identity, which says what its answers depend on, and which
every result and every kept answer names.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

# Fills a template's places.
MULTIPLE_CHOICE = "Answer the multiple-choice question. Question: {question} Choices: {choices} Answer:"


class Asked(NamedTuple):
    """One question about one image.

    Attributes:
      image: uint8 [H, W, 3].
      text: the question as the judge gets it.
      options: the choices of an answer, or the accepted forms of which the probability is asked.
      row: the question's row of its prompt set, which only the oracle reads.
    """

    image: np.ndarray
    text: str
    options: tuple[str, ...]
    row: Mapping[str, Any]


class Likelihood(NamedTuple):
    """The probability of an accepted answer.

    Attributes:
      log_p: its natural logarithm; -inf for 0.
      bound: whether the true one is at most this: the judge does not give so small probabilities.
    """

    log_p: float
    bound: bool = False


class Judge(Protocol):
    """Answers questions about images. These two methods are all that a user's own needs.

    Built-in judges have forms of both for many questions at once: `answers(asked)` and `likelihoods(asked)`, which give
    None for a question that cannot be answered, and a text `identity`.
    """

    def answer(self, image: np.ndarray, question: str, choices: Sequence[str]) -> str:
        """The answer in words, at best one of the choices.

        Args:
          image: uint8 [H, W, 3].
          choices: what is allowed, which `question` may state already; empty for a free answer.
        """

    def probability(self, image: np.ndarray, question: str, accepted: Sequence[str]) -> float:
        """The probability, from 0 to 1, that the first token of the answer begins one of the accepted forms."""


def fill(template: str, question: str, choices: Sequence[str]) -> str:
    """The text that a judge gets: {question} and {choices} of a template replaced.

    Other braces stay, so a question may hold any.
    """
    return template.replace("{choices}", ", ".join(choices)).replace("{question}", question)
