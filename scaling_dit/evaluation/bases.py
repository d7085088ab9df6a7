"""Bases for most metrics: `PerImage` for a score of each image by itself, `Base` for statistics over all images."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from scaling_dit.data.sources import Source, contract
from scaling_dit.errors import UserError
from scaling_dit.evaluation.intervals import mean_interval
from scaling_dit.evaluation.metric import Batch, Item, Items, Row, Rows, State


class Base:
    """A `metric.Metric` but for `update` and `result`: prompts are held-out captions, and states add up.

    Counts and sums add up, and so do sums of products, from which means and covariances follow. Replace `merge` for
    anything else.
    """

    def items(self, source: Source, count: int) -> Sequence[Item]:
        """The first captions of the first `count` held-out records; see `held_out_items`."""
        return held_out_items(source, count)

    def init(self) -> State:
        """No accumulators."""
        return {}

    def merge(self, one: State, other: State) -> State:
        """The sum, name by name."""
        return {key: one[key] + other[key] for key in one}

    def about(self) -> dict[str, Any]:
        """Nothing besides the fields."""
        return {}

    def table(self, result: Mapping[str, Any]) -> str:
        """One line for each scalar, the first with its interval."""
        width = max(map(len, result["scalars"]))
        lines = [f"{name:<{width}}  {value:.4g}" for name, value in result["scalars"].items()]
        if result.get("interval"):
            lines[0] += "  95 % interval {:.4g} to {:.4g}".format(*result["interval"])
        return "\n".join(lines)


class PerImage(Base):
    """A metric whose result is the mean of one score for each image, with a bootstrap interval over images.

    A subclass gives `rows`. Its scalar has the name in `NAME`, by default that of the class.
    """

    NAME: ClassVar[str] = ""

    def rows(self, batch: Batch) -> Sequence[Row]:
        """A row for each image, with its `score`, a number, and whatever else is worth keeping."""
        raise NotImplementedError(f"{type(self).__name__} has no method `rows`")

    def update(self, state: State, batch: Batch) -> tuple[State, Sequence[Row]]:
        """The rows; nothing is accumulated."""
        return state, self.rows(batch)

    def result(self, state: State, rows: Rows, seed: int) -> dict[str, Any]:
        """The mean score and its interval."""
        scores = rows.column("score")
        return {
            "interval": mean_interval(scores, seed),
            "scalars": {self.NAME or type(self).__name__: float(scores.mean())},
        }


def no_prompt_set(where: str, lacks: str, name: str, source: str) -> UserError:
    """The error of prompts from a set, for a metric that scores the data it knows alone; for `check_items`.

    Args:
      where: the prompts are from. lacks: what they do not have. name: of the metric. source: whose data it takes.
    """
    return UserError(
        f"{where} has no {lacks}; metric {name!r} takes the run's data, {source}: leave out prompt_set"
    )


def held_out_items(source: Source, count: int) -> Sequence[Item]:
    """The first captions of the first `count` held-out records, with their images as truth.

    Raises:
      UserError: fewer records are held out.
    """
    held_out = contract.held_out(source)
    if len(held_out) < count:
        raise UserError(
            f"{count} prompts are asked for, but {held_out.describe()}; ask for at most {len(held_out)}"
        )

    def make(number: int) -> Item:
        record = contract.read(held_out, number)
        return Item(f"held-out-{number:06d}", record["captions"][0], truth=record.get("image"))

    return Items(count, make)
