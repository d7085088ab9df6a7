"""The metric `edits`: instruction edits of shapes, scored exactly from pixels, by kind of edit."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling_dit.data.shapes import edit_oracle
from scaling_dit.data.shapes.edit_source import ShapesEditsSource
from scaling_dit.data.shapes.edits import Edit
from scaling_dit.data.sources import Source
from scaling_dit.errors import UserError
from scaling_dit.evaluation.bases import Base, no_prompt_set
from scaling_dit.evaluation.intervals import mean_interval
from scaling_dit.evaluation.metric import Batch, Item, Items, Row, Rows, State

_MARKS = ("score", "success", "kept")


@dataclasses.dataclass(frozen=True, eq=False)
class EditItem(Item):
    """An edit with its scenes."""

    edit: Edit | None = None


@dataclasses.dataclass(frozen=True)
class Edits(Base):
    """Distinct held-out edits, each asked for by its plain instruction; a `metric.Metric`.

    The score of an image is success x kept objects (`data.shapes.edit_oracle`): 0 for the unedited image, 1 for the
    true one.

    Attributes:
      condition: the name of the condition that is the image before the edit.
    """

    condition: str = "edit"

    def items(self, source: Source, count: int) -> Sequence[Item]:
        """The first `count` distinct edits of the held-out split; kinds take turns.

        Raises:
          UserError: the source is not `shapes_edits`, or holds fewer edits out.
        """
        if not isinstance(source, ShapesEditsSource):
            raise UserError(
                "metric 'edits' needs edits whose pixels can be read: source shapes_edits, not "
                f"{source.describe()}"
            )
        held_out, chosen = source.held_out(), source.distinct(count)

        def make(number: int) -> Item:
            edit, record = held_out.edit(chosen[number]), held_out[chosen[number]]
            return EditItem(
                record["key"],
                record["captions"][0],
                truth=record["image"],
                meta={"kind": edit.kind},
                conditions={self.condition: record["conditions"]["edit"]},
                edit=edit,
            )

        return Items(count, make)

    def check_items(self, items: Sequence[Item], where: str) -> None:
        """Makes sure that items of a prompt set are edits with their scenes; raises UserError."""
        if items and not isinstance(items[0], EditItem):
            raise no_prompt_set(where, "edits whose pixels can be read", "edits", "source shapes_edits")

    def update(self, state: State, batch: Batch) -> tuple[State, Sequence[Row]]:
        """A row for each image: `kind`, `success`, `kept`, and their product as `score`."""
        rows = []
        for image, item in zip(batch.images, batch.items, strict=True):
            assert isinstance(item, EditItem) and item.edit is not None
            marks = edit_oracle.score(image, item.edit)
            rows.append(
                {
                    "kind": item.edit.kind,
                    "score": marks.product,
                    "success": marks.success,
                    "kept": marks.kept,
                }
            )
        return state, rows

    def result(self, state: State, rows: Rows, seed: int) -> dict[str, Any]:
        """Means with bootstrap intervals over edits, of all and by kind, and the `scalars`."""
        marks = {name: rows.column(name) for name in _MARKS}
        kinds = np.array([row["kind"] for row in rows])
        by_kind = {kind: _summary(marks, kinds == kind, seed) for kind in dict.fromkeys(kinds.tolist())}
        every = _summary(marks, np.ones(len(kinds), bool), seed)
        scalars = {f"edits{suffix}": every[name] for name, suffix in _SUFFIXES.items()}
        scalars |= {
            f"edits_{kind}{suffix}": found[name]
            for name, suffix in _SUFFIXES.items()
            for kind, found in by_kind.items()
        }
        return {
            "interval": every["score_interval"],
            "all": every,
            "by_kind": by_kind,
            "n": len(kinds),
            "scalars": scalars,
        }

    def about(self) -> dict[str, Any]:
        """The oracle, which reads images as they are."""
        return {"judge": edit_oracle.JUDGE}

    def table(self, result: Mapping[str, Any]) -> str:
        """`result` for people: a line for each kind, and one for all."""
        lines = [f"{'edit':<10}{'n':>6}{'success':>10}{'kept':>8}{'product':>10}  95 % interval"]
        for kind, found in (*result["by_kind"].items(), ("all", result["all"])):
            low, high = found["score_interval"]
            lines.append(
                f"{kind:<10}{found['n']:>6}{found['success']:>10.3f}{found['kept']:>8.3f}{found['score']:>10.3f}"
                f"  {low:.3f} to {high:.3f}"
            )
        lines.append("success: the instruction was followed; kept: unnamed objects that are unchanged")
        return "\n".join(lines)


_SUFFIXES = {"score": "", "success": "_success", "kept": "_kept"}


def _summary(marks: Mapping[str, np.ndarray], chosen: np.ndarray, seed: int) -> dict[str, Any]:
    """Mean and interval of each mark over the chosen edits."""
    found: dict[str, Any] = {"n": int(chosen.sum())}
    for name, values in marks.items():
        found[name] = float(values[chosen].mean())
        found[f"{name}_interval"] = mean_interval(values[chosen], seed)
    return found
