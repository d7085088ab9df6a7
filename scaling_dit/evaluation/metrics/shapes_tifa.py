"""The metric `shapes_tifa`: TIFA on the built-in shapes, where an oracle answers every question exactly from pixels."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling_dit.data.shapes import oracle
from scaling_dit.data.shapes.source import ShapesSource
from scaling_dit.data.sources import Source
from scaling_dit.errors import UserError
from scaling_dit.evaluation import tifa
from scaling_dit.evaluation.bases import Base, no_prompt_set
from scaling_dit.evaluation.metric import Batch, Item, Items, Row, Rows, State


@dataclasses.dataclass(frozen=True, eq=False)
class SceneItem(Item):
    """A scene, with the true image of the next one, uint8 [H, W, 3]."""

    next_truth: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class ShapesTifa(Base):
    """TIFA over distinct held-out scenes, each asked for by its fullest caption; a `metric.Metric`.

    Attributes:
      baseline: also score true images of wrong scenes, the next caption's: what a model reaches that makes perfect
        scenes and does not read.
    """

    baseline: bool = True

    def items(self, source: Source, count: int) -> Sequence[Item]:
        """The first `count` distinct scenes of the held-out split.

        Raises:
          UserError: the source is not `shapes`, or holds fewer scenes out.
        """
        if not isinstance(source, ShapesSource):
            raise UserError(
                f"metric 'shapes_tifa' needs scenes whose pixels can be read: source shapes, not {source.describe()}"
            )
        return scene_items(source, count)

    def check_items(self, items: Sequence[Item], where: str) -> None:
        """Makes sure that items of a prompt set are scenes; raises UserError."""
        if items and not isinstance(items[0], SceneItem):
            raise no_prompt_set(where, "scenes whose pixels can be read", "shapes_tifa", "source shapes")

    def update(self, state: State, batch: Batch) -> tuple[State, Sequence[Row]]:
        """TIFA's rows; `baseline` in a row are the marks of the wrong scene's image."""
        rows = []
        for image, item in zip(batch.images, batch.items, strict=True):
            row = tifa.caption_row(image, item.questions, oracle.answer)
            if self.baseline:
                assert isinstance(item, SceneItem) and item.next_truth is not None
                wrong = tifa.caption_row(item.next_truth, item.questions, oracle.answer)
                row["baseline"] = [question["right"] for question in wrong["questions"]]
            rows.append(row)
        return state, rows

    def result(self, state: State, rows: Rows, seed: int) -> dict[str, Any]:
        """TIFA's result (`tifa.summary`) with `scalars` and, if it is asked for, `baseline`."""
        result = tifa.summary(rows, oracle.VQA_MODEL, seed)
        if self.baseline:
            wrong = tifa.Tally()
            for row in rows:
                wrong.add([question["element_type"] for question in row["questions"]], row["baseline"])
            result["baseline"] = wrong.averages()
        by_type = {f"shapes_tifa_{kind}": value for kind, value in result["accuracy_by_type"].items()}
        result["scalars"] = {"shapes_tifa": result["tifa_average"]} | by_type
        return result

    def about(self) -> dict[str, Any]:
        """The oracle, which reads images as they are."""
        return {"judge": oracle.VQA_MODEL}

    def table(self, result: Mapping[str, Any]) -> str:
        """`result` for people, with what perfect images of the wrong scenes get."""
        if "baseline" not in result:
            return tifa.table(result)
        baseline = result["baseline"]
        colour = baseline["accuracy_by_type"].get("color")
        by_colour = "" if colour is None else f", color {colour:.3f}"
        low = f"baseline, true images of wrong scenes: TIFA {baseline['tifa_average']:.3f}{by_colour}"
        return f"{tifa.table(result)}\n{low}"


def scene_items(source: ShapesSource, count: int) -> Sequence[Item]:
    """The first `count` distinct scenes of the held-out split, with their questions.

    Raises:
      UserError: fewer scenes are held out.
    """
    held_out, chosen = source.held_out(), source.distinct(count)

    def make(number: int) -> Item:
        index = chosen[number]
        questions, record = held_out.questions(index), held_out[index]
        wrong = held_out[chosen[(number + 1) % count]]["image"]
        return SceneItem(record["key"], questions[0]["caption"], questions, record["image"], next_truth=wrong)

    return Items(count, make)
