"""Aspect buckets: images grouped by their ratio of height to width, one group to a batch.

An image goes to the size with the nearest ratio, all of about equal area, instead of being cropped to a square. Every
batch holds images of one size, so a step has one compiled program for each size that occurs. Which bucket the batch of
a step is from, and which of its records, depend on the seed, the step and the position alone:

    sample(step, position) = bucket(step)[count(step) * batch + position]

where count(step) are the earlier steps of that bucket, and each bucket is shuffled and repeated like a whole source.
Steps come in cycles. A cycle has each bucket as often as its share of the records says, at least once, in a random
order of its own. So records of all buckets are seen about equally often, and any step is found without those before.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from scaling_dit.errors import UserError

# Height and width in pixels.
Size = tuple[int, int]

# Sides of the aspect buckets in eighths of `image_size`, the square included. Areas are within 6 % of the square's,
# which is the largest.
BUCKETS = ((5, 12), (6, 10), (7, 9), (8, 8), (9, 7), (10, 6), (12, 5))
_EIGHTHS = 8
# Steps of a cycle, at least and at most: shares are right to a hundredth, and a cycle is a small array.
_SHORTEST, _LONGEST = 100, 2**16


class Bucket(Protocol):
    """The records of one size: random access as of a source, by `__getitems__` too where it has that."""

    @property
    def bucket_size(self) -> Size:
        """Height and width of their images, in pixels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Some records of a source, at one size.

    Attributes:
      bucket_size: height and width, in pixels.
      numbers: of the records in their source, int64 [n].
      read: number -> the record with its image at that size.
    """

    bucket_size: Size
    numbers: np.ndarray
    read: Callable[[int], Any]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any, /) -> Any:
        return self.read(int(self.numbers[index]))


def bucket_sizes(image_size: int, what: str) -> tuple[Size, ...]:
    """The table of sizes whose square is `image_size` wide.

    Raises:
      UserError: the image size is no multiple of 8; `what` asked for buckets.
    """
    if image_size % _EIGHTHS:
        raise UserError(
            f"config.source.image_size is {image_size}; for {what} it must be a multiple of {_EIGHTHS}"
        )
    unit = image_size // _EIGHTHS
    return tuple((height * unit, width * unit) for height, width in BUCKETS)


def nearest_size(width: int, height: int, sizes: tuple[Size, ...]) -> Size:
    """The size whose ratio of height to width is nearest on a log scale; of two equally near sizes the first."""
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(height / width)))


def open_buckets(source: Any) -> tuple[Bucket, ...]:
    """The buckets of a source that have records, in the order of the table.

    Raises:
      UserError: a source that knows no sizes.
    """
    if not hasattr(source, "buckets"):
        raise UserError(
            f"config.buckets is set, but every image of the source has one size ({source.describe()}); take a source "
            "of image files, or a set that `prepare --buckets` wrote, or set config.buckets=False"
        )
    found: Sequence[Bucket] = source.buckets(bucket_sizes(source.image_size, "config.buckets"))
    return tuple(bucket for bucket in found if len(bucket))


class BucketOrder:
    """Which bucket each step takes its batch from.

    Args:
      counts: records of each bucket, at least one each.
      batch: global batch.
      seed: of the run.
    """

    def __init__(self, counts: Sequence[int], batch: int, seed: int) -> None:
        total = sum(counts)
        self.length = min(max(-(-total // batch), _SHORTEST, len(counts)), _LONGEST)
        self.shares = _shares(counts, self.length)
        self._seed = seed
        # Several threads read batches of neighbouring steps.
        self._cycle = functools.lru_cache(4)(self._ordered)

    def at(self, step: int) -> tuple[int, int]:
        """(bucket of the step, number of earlier steps with that bucket)."""
        cycle, place = divmod(step, self.length)
        order, earlier = self._cycle(cycle)
        bucket = int(order[place])
        return bucket, cycle * int(self.shares[bucket]) + int(earlier[place])

    def _ordered(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """The buckets of one cycle in their order, and of each step how many before it in the cycle have the same."""
        # A word of the counter that no other stream of the loader has set.
        philox = np.random.Philox(key=self._seed, counter=[0, 2, 0, cycle])
        buckets = np.repeat(np.arange(len(self.shares)), self.shares)
        order = np.random.Generator(philox).permutation(buckets)
        earlier = np.empty(self.length, np.int64)
        for bucket, share in enumerate(self.shares):
            earlier[order == bucket] = np.arange(share)
        return order, earlier


def _shares(counts: Sequence[int], length: int) -> np.ndarray:
    """`length` divided in proportion to `counts`, at least 1 each, by largest remainders: int64 [buckets]."""
    wanted = np.asarray(counts, np.float64) / sum(counts) * length
    shares = np.maximum(np.floor(wanted), 1).astype(np.int64)
    while shares.sum() != length:
        # Those that were raised to 1 take from the largest, whose share changes least.
        missing = length - int(shares.sum())
        if missing > 0:
            shares[np.argmax(wanted - shares)] += 1
        else:
            shares[np.argmin(np.where(shares > 1, wanted - shares, np.inf))] -= 1
    return shares


def seed_of(seed: int, bucket: int) -> int:
    """The seed that a bucket is shuffled by, in [0, 2**32)."""
    return int(np.random.Philox(key=seed, counter=[0, 3, 0, bucket]).random_raw() % 2**32)


def describe(buckets: Sequence[Bucket]) -> str:
    """One line for logs: the sizes and how many records each has."""
    return ", ".join(f"{name_of(bucket)} {len(bucket):,}" for bucket in buckets)


def name_of(bucket: Bucket) -> str:
    """Its size as "HxW"."""
    height, width = bucket.bucket_size
    return f"{height}x{width}"
