"""What a metric is: prompts it asks a model to draw, and a score of the pictures."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from scaling_dit.data.sources import Source


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One prompt of a metric.

    id: names the picture's file. questions: rows in TIFA's JSON layout about what the prompt asks for.
    truth: a real picture of the prompt, uint8 [H, W, 3], if there is one.
    """

    id: str
    prompt: str
    questions: list[dict[str, Any]]
    truth: np.ndarray | None = None


class Metric(Protocol):
    """A score of pictures against prompts, from pictures in memory (training) or from a folder (`evaluate`)."""

    def items(self, source: Source, count: int) -> list[Item]:
        """`count` prompts, always the same ones for one source.

        Raises:
          UserError: the source cannot give what the metric needs.
        """

    def score(self, images: Sequence[np.ndarray], items: Sequence[Item], seed: int) -> dict[str, Any]:
        """Images uint8 [H, W, 3], one an item -> a JSON-able result.

        `result["scalars"]` maps names to the figures worth a curve; `seed` is the bootstrap's.
        """

    def table(self, result: dict[str, Any]) -> str:
        """The result of `score` for people."""
