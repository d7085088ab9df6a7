"""The metric `tifa`: TIFA on the built-in shapes, where an oracle answers every question exactly from pixels."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from scaling_dit.data.shapes import oracle
from scaling_dit.data.shapes.source import ShapesSource
from scaling_dit.data.sources import Source
from scaling_dit.errors import UserError
from scaling_dit.evaluation import tifa
from scaling_dit.evaluation.metric import Item


class ExactTifa:
    """TIFA over distinct held-out scenes, each asked for by its fullest caption; a `metric.Metric`."""

    def items(self, source: Source, count: int) -> list[Item]:
        """The first `count` distinct scenes of the held-out split.

        Raises:
          UserError: the source is not `shapes`, or holds fewer scenes out.
        """
        if not isinstance(source, ShapesSource):
            raise UserError(
                f"metric 'tifa' needs scenes whose pixels can be read: source shapes, not {source.describe()}"
            )
        held_out = source.held_out()
        items = []
        for index in source.distinct(count):
            questions = held_out.questions(index)
            record = held_out[index]
            items.append(Item(record["key"], questions[0]["caption"], questions, record["image"]))
        return items

    def score(self, images: Sequence[np.ndarray], items: Sequence[Item], seed: int) -> dict[str, Any]:
        """TIFA's result (`tifa.score`) with `scalars` and `baseline`: true pictures dealt to wrong captions."""
        questions = [item.questions for item in items]
        result = tifa.score(images, questions, oracle.answer, oracle.VQA_MODEL, seed)
        truths = [item.truth for item in items if item.truth is not None]
        baseline = tifa.wrong_scene_baseline(truths, questions, oracle.answer, oracle.VQA_MODEL, seed)
        result["baseline"] = {
            "tifa_average": baseline["tifa_average"],
            "accuracy_by_type": baseline["accuracy_by_type"],
        }
        by_type = {f"tifa_{kind}": value for kind, value in result["accuracy_by_type"].items()}
        result["scalars"] = {"tifa": result["tifa_average"]} | by_type
        return result

    def table(self, result: dict[str, Any]) -> str:
        """`score`'s result for people, with what perfect pictures of the wrong scenes get."""
        baseline = result["baseline"]
        colour = baseline["accuracy_by_type"].get("color")
        by_colour = "" if colour is None else f", color {colour:.3f}"
        low = f"baseline, true pictures of wrong scenes: TIFA {baseline['tifa_average']:.3f}{by_colour}"
        return f"{tifa.table(result)}\n{low}"
