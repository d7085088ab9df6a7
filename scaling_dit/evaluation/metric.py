"""The protocol of a metric: it gives prompts, takes the images made of them batch by batch, and gives a result.

A metric is a component: a class whose constructor arguments are plain values with defaults, which are fields of
`config.metrics.NAME`. The images of a request arrive in order. They are cut into parts of a fixed number of images, and
each part is accumulated on its own:

    state = metric.init()
    for batch in part:
        state, rows = metric.update(state, batch)
    part_0, part_1, ... -> metric.merge(metric.merge(part_0, part_1), ...) -> metric.result(state, rows, seed)

Finished parts are kept on disk, so a killed evaluation resumes. Several processes score parts in turn. The parts do not
depend on how the images were sampled, on kills, or on the number of processes, and neither does the result.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from scaling_dit.data.sources import Source
from scaling_dit.errors import UserError

# Accumulators by name. Their shapes do not depend on how many images were seen, so memory does not grow.
State = dict[str, np.ndarray]
# The values kept for one image: JSON values, and arrays such as features.
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One prompt of a metric.

    id: names the image's file. questions: rows in TIFA's JSON layout about what the prompt asks for, if the metric asks
    questions. truth: a real image of the prompt, uint8 [H, W, 3], if there is one. meta: what else a prompt set says of
    the prompt, as JSON values. conditions: name -> the image condition that is sampled with, uint8 [H, W, 3 + M]: RGB
    and M masks (`data/conditions/contract.py`); the same names for all items of a metric.
    """

    id: str
    prompt: str
    questions: Sequence[Mapping[str, Any]] = ()
    truth: np.ndarray | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    conditions: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Some images of a request, in its order: uint8 [B, H, W, 3], and the B items that they were made for."""

    images: np.ndarray
    items: Sequence[Item]


class Items(Sequence[Item]):
    """Items that are made when they are asked for, so that images that belong to them are not all in memory.

    Args:
      count: how many there are.
      make: number from 0 to count - 1 -> item, always the same one.
    """

    def __init__(self, count: int, make: Callable[[int], Item]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any, /) -> Any:
        if isinstance(index, slice):
            chosen = range(*index.indices(self._count))
            return Items(len(chosen), lambda number: self._make(chosen[number]))
        if not -self._count <= index < self._count:
            raise IndexError(f"{index} is not in [0, {self._count})")
        return self._make(index % self._count)


class Rows:
    """The rows of all images in the order of the request, each with `id` and `prompt`; may be read several times.

    They are read part by part, so only one part of them is in memory.
    """

    def __init__(self, parts: Callable[[], Iterable[Sequence[Row]]], count: int) -> None:
        self._parts, self._count = parts, count

    def __iter__(self) -> Iterator[Row]:
        for rows in self._parts():
            yield from rows

    def __len__(self) -> int:
        return self._count

    def column(self, name: str) -> np.ndarray:
        """One number of every row: float64 [N]."""
        return np.fromiter((row[name] for row in self), np.float64, self._count)


class Skipped(UserError):
    """A metric cannot be scored here, such as for want of weights; the line says what is missing and where to get it.

    `items` raises it. The other metrics of a command are scored all the same.
    """


class NotFinite(Skipped):
    """A result is no score: a number in it is not finite. Its images are scored again by the next call."""


class Metric(Protocol):
    """Prompts and a score of the images made of them. `bases.py` has classes that do most of it.

    `init`, `update`, `merge` and `result` are pure: they change neither their arguments nor the metric.

    A metric may have a method `check_ready()`, which raises Skipped for weights, packages or a judge that are missing,
    as far as that can be known without loading a network; a study asks it before it trains.

    Besides, a metric may have a method `tower()`: the network that it runs over the images, with weights and batch, as
    a value to compare. `update` of metrics of one command with equal ones, prompts and `batch` is called in turn for
    each batch, so that a function with `features.sharded.Latest` around it computes features once for all of them.
    """

    def items(self, source: Source, count: int) -> Sequence[Item]:
        """`count` prompts with different ids, always the same ones for one source.

        Raises:
          UserError: the source cannot give what the metric needs.
          Skipped: weights or other files of the metric are missing.
        """

    def init(self) -> State:
        """The state before the first image."""

    def update(self, state: State, batch: Batch) -> tuple[State, Sequence[Row]]:
        """The state after one more batch, and a row for each of its images, in their order."""

    def merge(self, one: State, other: State) -> State:
        """The state of the images of `one` followed by those of `other`."""

    def result(self, state: State, rows: Rows, seed: int) -> dict[str, Any]:
        """The result as JSON values.

        `scalars` maps names to the numbers worth a curve, the most important one first; it is required. `interval` is
        [low, high] of the first. `seed` is the seed of the bootstrap or of random subsets. All numbers are finite: a
        result with NaN is skipped, with its name.
        """

    def about(self) -> dict[str, Any]:
        """Whatever else the scores depend on, besides images and fields, as JSON values.

        Such as the judge, the template of its questions, the hash of weights, how images are resized and cropped.
        """

    def table(self, result: dict[str, Any]) -> str:
        """The result for people."""


METHODS = ("items", "init", "update", "merge", "result", "about", "table")


def check_metric(candidate: Any, name: str) -> None:
    """Makes sure that something named in a config is a metric's class.

    Raises:
      UserError: it is no class, or lacks methods of `Metric`.
    """
    if not isinstance(candidate, type):
        raise UserError(f"metric {name} is no class but {type(candidate).__name__}; name a class")
    missing = [method for method in METHODS if not callable(getattr(candidate, method, None))]
    if missing:
        base = "a subclass of scaling_dit.evaluation.bases.PerImage has most of them"
        raise UserError(f"metric {name} is no metric: it has no method {', '.join(missing)}; {base}")


def check_items(items: Any, name: str) -> list[tuple[str, str]]:
    """(id, prompt) of each of a metric's items, which must be a sequence of `Item` with different ids.

    Raises:
      UserError: they are something else.
    """
    if not isinstance(items, Sequence) or not len(items):
        got = "none" if isinstance(items, Sequence) else type(items).__name__
        raise UserError(f"metric {name!r}: items must return a sequence of at least one Item, got {got}")
    prompts: dict[str, str] = {}
    for item in items:
        if not isinstance(item, Item):
            raise UserError(f"metric {name!r}: items must return Items, got {type(item).__name__}")
        if not isinstance(item.id, str) or not isinstance(item.prompt, str):
            raise UserError(
                f"metric {name!r}: id and prompt of an Item must be text, got {item.id!r}, {item.prompt!r}"
            )
        if item.id in prompts:
            raise UserError(
                f"metric {name!r}: two items have the id {item.id!r}; ids name files and must differ"
            )
        prompts[item.id] = item.prompt
    return list(prompts.items())


def check_update(returned: Any, count: int, name: str) -> tuple[State, list[Row]]:
    """The rows that `update` returned for `count` images, checked, with plain numbers in place of numpy's.

    Raises:
      UserError: it is something else than (state, rows).
    """
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise UserError(f"metric {name!r}: update must return (state, rows), got {type(returned).__name__}")
    state, rows = returned
    if not isinstance(rows, Sequence) or len(rows) != count or not all(isinstance(r, Mapping) for r in rows):
        got = f"{len(rows)} of them" if isinstance(rows, Sequence) else type(rows).__name__
        raise UserError(
            f"metric {name!r}: update must return one row (a dict) for each of {count} images, got {got}"
        )
    return check_state(state, name), [
        {key: value.item() if isinstance(value, np.generic) else value for key, value in row.items()}
        for row in rows
    ]


def check_state(state: Any, name: str) -> State:
    """A state as arrays by name.

    Raises:
      UserError: it is something else.
    """
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise UserError(
            f"metric {name!r}: a state must be a dict of arrays by name, got {type(state).__name__}"
        )
    arrays = {key: np.asarray(value) for key, value in state.items()}
    for key, value in arrays.items():
        if value.dtype.hasobject:
            raise UserError(f"metric {name!r}: {key!r} of its state is no array of numbers")
    return arrays


def check_result(result: Any, name: str) -> dict[str, Any]:
    """The result of a metric, checked: a dict with `scalars`, numbers by name.

    Raises:
      UserError: it is something else.
      NotFinite: a number in it is NaN or infinite, as the mean of no scores is.
    """
    if (
        not isinstance(result, Mapping)
        or not isinstance(result.get("scalars"), Mapping)
        or not result["scalars"]
    ):
        right = 'a dict with "scalars", such as {"scalars": {"brightness": 0.5}}'
        got = (
            f"a dict with {', '.join(map(str, result)) or 'nothing'}"
            if isinstance(result, Mapping)
            else (type(result).__name__)
        )
        raise UserError(f"metric {name!r}: result must return {right}, got {got}")
    scalars = {}
    for key, value in result["scalars"].items():
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            raise UserError(f"metric {name!r}: scalar {key!r} must be a number, got {type(value).__name__}")
        scalars[str(key)] = float(value)
    checked = {**result, "scalars": scalars}
    try:
        json.dumps(checked)
    except (TypeError, ValueError) as error:
        raise UserError(f"metric {name!r}: result must hold JSON values: {error}") from None
    for key, value in [*((f"scalar {key!r}", value) for key, value in scalars.items()), *_others(checked)]:
        if not _is_finite(value):
            raise NotFinite(
                f"metric {name!r}: {key} is {value}, which is no score; every number must be finite"
            )
    return checked


def _others(result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a result holds besides its scalars, with names for error lines."""
    return ((repr(key), value) for key, value in result.items() if key != "scalars")


def _is_finite(value: Any) -> bool:
    """Whether all numbers in a JSON value are finite."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True
