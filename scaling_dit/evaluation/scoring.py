"""Scores a stream of images by a metric, part by part: in bounded memory, resumable, and in several processes."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from scaling_dit.errors import StorageError, UserError
from scaling_dit.evaluation.metric import (
    Batch,
    Item,
    Metric,
    Row,
    Rows,
    Skipped,
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
        stream = Stream(images, len(self.items))
        skipped = update_together([(self, parts)], stream, share)
        stream.finish()
        _raise(skipped)

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
        _raise(update_together([(self, parts)], read, share))

    def result(self, parts: Parts, seed: int) -> tuple[dict[str, Any], Rows]:
        """The result of all parts, which are merged in their order, and the rows.

        Raises:
          UserError: the metric returned an invalid result.
        """
        states = (decode_state(parts.read(number)) for number in self.numbers)
        state = check_state(functools.reduce(self.metric.merge, states), self.name)
        rows = Rows(lambda: (decode_rows(parts.read(number)) for number in self.numbers), len(self.items))
        return check_result(self.metric.result(state, rows, seed), self.name), rows

    def missing(self, parts: Parts, share: tuple[int, int] | None) -> list[int]:
        """The numbers of the parts that are this process's and not finished yet."""
        index, count = share or (jax.process_index(), jax.process_count())
        return [number for number in self.numbers[index::count] if not parts.has(number)]

    def part_of(self, number: int) -> range:
        """The numbers of the items of a part."""
        return range(number * self.part, min((number + 1) * self.part, len(self.items)))


class _Part:
    """The state and the rows of one part of a scoring, accumulated batch by batch."""

    def __init__(self, scoring: Scoring, number: int) -> None:
        self._scoring, self._number = scoring, number
        self._state, self._rows = check_state(scoring.metric.init(), scoring.name), list[Row]()

    def add(self, images: np.ndarray) -> None:
        """Accumulates the next images."""
        scoring = self._scoring
        start = scoring.part_of(self._number).start + len(self._rows)
        # Made once, for there may be images in them.
        items = list(scoring.items[start : start + len(images)])
        returned = scoring.metric.update(self._state, Batch(images, items))
        self._state, rows = check_update(returned, len(images), scoring.name)
        named = ({"id": item.id, "prompt": item.prompt} for item in items)
        self._rows += [head | row for head, row in zip(named, rows, strict=True)]

    def write(self, parts: Parts) -> None:
        """Keeps the part, of which all images are accumulated."""
        parts.write(self._number, encode(self._state, self._rows, self._scoring.name))


class Stream:
    """A stream of images from which those of some items are read by their numbers, in ascending order.

    Args:
      images: uint8 [some, H, W, 3], any number at a time.
      count: how many there are in all.
    """

    def __init__(self, images: Iterable[np.ndarray], count: int) -> None:
        self._images, self._count = iter(images), count
        # The number of the next image, and those at hand from there on.
        self._next, self._held = 0, np.empty((0, 0, 0, 3), np.uint8)

    def __call__(self, numbers: range) -> Iterator[np.ndarray]:
        """The images of these numbers; those before them are passed over.

        Raises:
          ValueError: the stream ends before them.
        """
        while self._next < numbers.stop and self._fill():
            stop = numbers.start if self._next < numbers.start else numbers.stop
            taken = self._held[: stop - self._next]
            self._held = self._held[len(taken) :]
            self._next += len(taken)
            if stop == numbers.stop:
                yield taken
        _check_count(self._next, self._count, numbers.stop)

    def finish(self) -> None:
        """Reads what is left: processes sample together, so none may stop before the others.

        Raises:
          ValueError: there were fewer images than items.
        """
        for _ in self(range(self._count, self._count)):
            pass
        for _ in self._images:
            pass

    def _fill(self) -> bool:
        """Whether there are images at hand, which are read if need be."""
        while not len(self._held):
            some = next(self._images, None)
            if some is None:
                return False
            self._held = some
        return True


def update_together(
    scored: Sequence[tuple[Scoring, Parts]],
    read: Callable[[range], Iterable[np.ndarray]],
    share: tuple[int, int] | None = None,
) -> dict[int, Skipped]:
    """As `Scoring.update_from` for several metrics of the same images, each of which is read once.

    Every batch is given to one metric after the other. So they find in turn what they share, such as the features of a
    network, and only that of one batch is kept (`Metric.tower`).

    Args:
      scored: metrics with equally many items and the same `batch`, and where their parts are kept.
      read, share: as of `Scoring.update_from`.

    Returns:
      Which metrics must be skipped, by their place in `scored`, and why. The others are done.
    """
    first = scored[0][0]
    missing = [set(scoring.missing(parts, share)) for scoring, parts in scored]
    skipped: dict[int, Skipped] = {}
    for number in sorted(set().union(*missing)):
        open_parts = {
            i: _Part(scored[i][0], number)
            for i, numbers in enumerate(missing)
            if number in numbers and i not in skipped
        }
        if not open_parts:
            continue
        wanted, found = first.part_of(number), 0
        for images in _chunks(read(wanted), first.batch):
            found += len(images)
            for i, part in list(open_parts.items()):
                try:
                    part.add(images)
                except Skipped as error:
                    skipped[i] = error
                    del open_parts[i]
            if not open_parts:
                break
        else:
            _check_count(wanted.start + found, len(first.items), wanted.stop)
        for i, part in open_parts.items():
            part.write(scored[i][1])
    return skipped


def _raise(skipped: dict[int, Skipped]) -> None:
    for error in skipped.values():
        raise error


def score(scoring: Scoring, images: Iterable[np.ndarray], seed: int) -> tuple[dict[str, Any], Rows]:
    """The result for few images, and the rows; every process of a run gets the same.

    Args:
      images: uint8 [some, H, W, 3], any number at a time, in the order of the items.

    Raises:
      Skipped: the metric must be skipped.
      UserError: the metric breaks its contract, or cannot read the images.
    """
    (found,) = score_together([scoring], images, seed)
    if isinstance(found, Skipped):
        raise found
    return found


def score_together(
    scorings: Sequence[Scoring], images: Iterable[np.ndarray], seed: int
) -> list[tuple[dict[str, Any], Rows] | Skipped]:
    """As `score` for several metrics of the same images, see `update_together`; why a metric must be skipped."""
    kept = [InMemory() for _ in scorings]
    stream = Stream(images, len(scorings[0].items))
    skipped = update_together(list(zip(scorings, kept, strict=True)), stream)
    stream.finish()
    found: list[tuple[dict[str, Any], Rows] | Skipped] = []
    for place, (scoring, parts) in enumerate(zip(scorings, kept, strict=True)):
        try:
            settle(parts, skipped.get(place))
            found.append(scoring.result(parts, seed))
        except Skipped as missing:
            found.append(missing)
    return found


def settle(parts: Parts, skipped: Skipped | None) -> None:
    """Shares a metric's parts among the processes, or raises Skipped in all of them if one has to skip it."""
    with together():
        if skipped is not None:
            raise skipped
    parts.share()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block in which a process may find a mistake, or that a metric must be skipped; then all raise it at its end.

    Whatever turns one into the other stands around this block: a process that left it otherwise would leave the others
    waiting.
    """
    fault: UserError | None = None
    try:
        yield
    except UserError as error:
        fault = error
    if (agreed := processes.agree(fault, (StorageError, UserError, Skipped))) is not None:
        raise agreed


def _check_count(found: int, items: int, wanted: int) -> None:
    """Makes sure that there were as many images so far as there are items up to this one."""
    if found != wanted:
        raise ValueError(f"{items} items, but {found} images")


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
