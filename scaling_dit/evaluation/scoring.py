"""Scores a stream of images by a metric, part by part: in bounded memory, resumable, and in several processes."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from scaling_dit.evaluation.metric import (
    Batch,
    Item,
    Metric,
    Row,
    Rows,
    Skipped,
    State,
    check_items,
    check_result,
    check_state,
    check_update,
)
from scaling_dit.evaluation.parts import InMemory, Parts, decode_rows, decode_state, encode
from scaling_dit.parallel import processes

# Parts that a request of few images is cut into, so that several processes share the work.
_FEWEST = 16
# Images of a part of a long request. Of a metric with a large state, such as a covariance, few parts are then kept.
_MOST = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Scoring:
    """A metric with its items.

    Attributes:
      name: of the metric, for error lines.
      batch: images that are given to the metric at once.
      prompts: (id, prompt) of each item.
    """

    name: str
    metric: Metric
    items: Sequence[Item]
    batch: int = 64
    prompts: list[tuple[str, str]] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Read once, here: an item may have images that are made or read with it.
        object.__setattr__(self, "prompts", check_items(self.items, self.name))

    @property
    def part(self) -> int:
        """Images of one part: it depends on the number of items and on `batch` alone."""
        wanted = min(_MOST, len(self.items) // _FEWEST)
        return self.batch * max(1, wanted // self.batch)

    @property
    def numbers(self) -> range:
        """The numbers of the parts."""
        return range(-(-len(self.items) // self.part))

    def update(
        self, images: Iterable[np.ndarray], parts: Parts, share: tuple[int, int] | None = None
    ) -> None:
        """Accumulates the parts that are this process's and not finished yet, from a stream of all images.

        Args:
          images: uint8 [some, H, W, 3], any number at a time, all images of the request in the order of the items.
          parts: where finished parts are kept.
          share: (i, n) for parts i, i + n, ...; by default the parts of this process of jax's.
        """
        mine = set(self._missing(parts, share))
        stream = _chunks(images, self.batch)
        for number in self.numbers:
            size = self._range(number)
            chunks = itertools.islice(stream, -(-len(size) // self.batch))
            if number in mine:
                self._write(number, chunks, parts)
            else:
                _check_count(sum(map(len, chunks)), size, len(self.items))

    def update_from(
        self,
        read: Callable[[range], Iterable[np.ndarray]],
        parts: Parts,
        share: tuple[int, int] | None = None,
    ) -> None:
        """As `update`, but reads only the images of the parts that are to be accumulated.

        Args:
          read: gives the images of some items, by their numbers.
        """
        for number in self._missing(parts, share):
            self._write(number, _chunks(read(self._range(number)), self.batch), parts)

    def result(self, parts: Parts, seed: int) -> tuple[dict[str, Any], Rows]:
        """The result of all parts, which are merged in their order, and the rows.

        Raises:
          UserError: the metric returned an invalid result.
        """
        states = (decode_state(parts.read(number)) for number in self.numbers)
        state = check_state(functools.reduce(self.metric.merge, states), self.name)
        rows = Rows(lambda: (decode_rows(parts.read(number)) for number in self.numbers), len(self.items))
        return check_result(self.metric.result(state, rows, seed), self.name), rows

    def _missing(self, parts: Parts, share: tuple[int, int] | None) -> list[int]:
        """The numbers of the parts that are this process's and not finished yet."""
        index, count = share or (jax.process_index(), jax.process_count())
        return [number for number in self.numbers[index::count] if not parts.has(number)]

    def _range(self, number: int) -> range:
        """The numbers of the items of a part."""
        return range(number * self.part, min((number + 1) * self.part, len(self.items)))

    def _write(self, number: int, chunks: Iterable[np.ndarray], parts: Parts) -> None:
        """Accumulates one part from its images."""
        wanted = self._range(number)
        start = wanted.start
        state, rows = check_state(self.metric.init(), self.name), list[Row]()
        for some in chunks:
            state, added = self._update(state, some, start)
            rows += added
            start += len(some)
        _check_count(start - wanted.start, wanted, len(self.items))
        parts.write(number, encode(state, rows, self.name))

    def _update(self, state: State, images: np.ndarray, start: int) -> tuple[State, list[Row]]:
        """The state after images of the items from `start` on, and their rows."""
        # Made once, for there may be images in them.
        items = list(self.items[start : start + len(images)])
        state, rows = check_update(self.metric.update(state, Batch(images, items)), len(images), self.name)
        return state, [
            {"id": item.id, "prompt": item.prompt} | row for item, row in zip(items, rows, strict=True)
        ]


def score(scoring: Scoring, images: Iterable[np.ndarray], seed: int) -> tuple[dict[str, Any], Rows]:
    """The result for few images, and the rows; every process of a run gets the same.

    Args:
      images: uint8 [some, H, W, 3], any number at a time, in the order of the items.

    Raises:
      UserError: the metric breaks its contract, or cannot read the images.
    """
    parts, stream = InMemory(), iter(images)
    with together():
        try:
            scoring.update(stream, parts)
        except Skipped:
            # All processes sample together, so none may stop before the others.
            for _ in stream:
                pass
            raise
    parts.share()
    return scoring.result(parts, seed)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block in which a process may find that a metric must be skipped; then all raise Skipped at its end."""
    missing = ""
    try:
        yield
    except Skipped as error:
        missing = str(error)
    found = [text.decode() for text in processes.gather_bytes(missing.encode()) if text]
    if found:
        raise Skipped(found[0])


def _check_count(found: int, wanted: range, items: int) -> None:
    if found != len(wanted):
        raise ValueError(f"{items} items, but {wanted.start + found} images")


def _chunks(images: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same images, `size` at a time; the last chunk may be smaller."""
    held: list[np.ndarray] = []
    count = 0
    for some in images:
        while len(some):
            taken, some = some[: size - count], some[size - count :]
            held.append(taken)
            count += len(taken)
            if count == size:
                yield np.concatenate(held)
                held, count = [], 0
    if held:
        yield np.concatenate(held)
