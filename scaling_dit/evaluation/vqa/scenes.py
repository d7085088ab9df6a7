"""The pixel oracle of the built-in scenes as a judge: it answers exactly, and so shows what a metric itself does."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from scaling_dit.data.shapes import oracle
from scaling_dit.errors import UserError
from scaling_dit.evaluation.vqa import Asked, Likelihood


class Oracle:
    """Reads the questions' rows, which `data.shapes.text` wrote, not their texts."""

    identity = oracle.VQA_MODEL
    template = "{question}"
    # It answers all questions of a caption together, so an answer does not depend on its own question alone.
    kept = False

    def answer(self, image: np.ndarray, question: str, choices: Sequence[str]) -> str:
        """Raises UserError: without the rows of its questions it cannot read English."""
        raise UserError("judge 'shapes' answers only questions that scaling_dit wrote for its shapes")

    def probability(self, image: np.ndarray, question: str, accepted: Sequence[str]) -> float:
        """As `answer`."""
        return float(self.answer(image, question, accepted) in accepted)

    def answers(self, asked: Sequence[Asked]) -> list[str | None]:
        """One of the choices of each row, or "no" or "none"."""
        found: list[str | None] = []
        for some in _by_image(asked):
            found += oracle.answer(some[0].image, [one.row for one in some])
        return found

    def likelihoods(self, asked: Sequence[Asked]) -> list[Likelihood | None]:
        """1 where the answer is accepted, else 0."""
        answers = self.answers(asked)
        right = [answer in one.options for answer, one in zip(answers, asked, strict=True)]
        return [Likelihood(0.0 if one else -math.inf) for one in right]


def _by_image(asked: Sequence[Asked]) -> Iterator[list[Asked]]:
    """Neighbours about the same image and caption."""
    some: list[Asked] = []
    for one in asked:
        if some and (some[0].image is not one.image or some[0].row.get("id") != one.row.get("id")):
            yield some
            some = []
        some.append(one)
    if some:
        yield some
