"""Batches for one process, in an order that depends on the seed and the step alone.

`sample(step, position) = dataset[step * batch + position]` on the globally shuffled, repeated index: a process reads
the positions of the global batch that its devices hold, whichever they are. So the data of a step do not depend on
the number of processes, and any step can be read without reading those before it. Shuffling is a permutation that
Grain computes per index, so the length of a source costs no memory. The source replaces a
damaged record (`data/damage.py`), depending on the index alone.
"""

import functools
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import grain
import numpy as np

from scaling_dit.data.buckets import Bucket, BucketOrder, seed_of
from scaling_dit.data.captions import UNIFORM, CaptionPolicy
from scaling_dit.data.conditions import records as conditions_lib
from scaling_dit.data.conditions.contract import Condition
from scaling_dit.data.damage import damage_of
from scaling_dit.data.sources import Record, Source, contract
from scaling_dit.errors import UserError

# Records; Grain's permutations of fewer are far from uniform.
TINY = 16

Tokenize = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]
# (step, positions) -> the records and the indices in them of these positions.
Place = Callable[[int, Sequence[int]], tuple[Any, list[int]]]


class HostBatch(TypedDict):
    """The rows of one global batch that one process holds, in the order of its positions."""

    # uint8 [b, H, W, 3]; with buckets H and W are those of the step's.
    images: NotRequired[np.ndarray]
    # In place of images: moments of latents, bfloat16 [b, h, w, M].
    latents: NotRequired[np.ndarray]
    # int32 [b, L].
    ids: np.ndarray
    # bool [b, L]; True = real token.
    mask: np.ndarray
    # Name -> uint8 [b, H, W, 3 + M]: RGB and M masks; beside latents the moments and masks of a prepared set,
    # bfloat16 [b, h, w, Mo + M].
    conditions: NotRequired[dict[str, np.ndarray]]


def make_loader(
    source: Source,
    tokenize: Tokenize,
    *,
    batch: int,
    seed: int,
    positions: Sequence[int] | np.ndarray,
    start_step: int = 0,
    data_step: Callable[[int], int] = int,
    captions: CaptionPolicy = UNIFORM,
    conditions: Mapping[str, Condition] | None = None,
    threads: int = 4,
    prefetch: int = 8,
    buckets: Sequence[Bucket] = (),
) -> grain.DatasetIterator[HostBatch]:
    """An endless iterator of host batches: its first item is that of `start_step`.

    Every epoch is a fresh permutation of the whole source. Whole batches are read, tokenised and stacked in
    background threads; the contents do not depend on `threads` or `prefetch`. `close()` on the iterator drops what
    was read ahead.

    Args:
      source: random access to records; read from several threads, all rows of a batch at once if it has
        `__getitems__(indices)`.
      tokenize: captions -> (ids int32 [b, L], mask bool [b, L]).
      batch: global batch size.
      seed: decides order and captions; in [0, 2**32).
      positions: the rows of the global batch that this process holds, each in [0, batch), in any order.
      start_step: the step to begin at.
      data_step: step -> the step whose place in the data it takes; its own by default (see `rewind.data_step`).
      captions: chooses a record's caption.
      conditions: name -> what makes it of a record, by random numbers of its own: captions are the same without.
      threads: reading threads; 0 reads in the calling thread.
      prefetch: batches read ahead.
      buckets: those of the source, of which each batch then holds one; see `buckets.py`.

    Raises:
      UserError: an empty source or a seed out of range; when read, a record that the source did not promise.
      ValueError: positions outside the global batch.
    """
    if not len(source):
        raise UserError(f"the source has no examples: {source.describe()}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; it must be in [0, 2**32)")
    damage_of(source).announce()
    batches = HostBatches(
        _by_bucket(buckets, batch, seed) if buckets else _whole(source, batch, seed),
        tokenize,
        batch=batch,
        seed=seed,
        positions=np.asarray(positions, np.int64),
        start_step=start_step,
        data_step=data_step,
        captions=captions,
        conditions=conditions or {},
    )
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(batches.to_iter_dataset(options))


class HostBatches(grain.MapDataset[HostBatch]):
    """Item i is the host batch of step `start_step + i`.

    Args:
      place: (step, positions) -> what to read and the indices of these positions in it.
    """

    def __init__(
        self,
        place: Place,
        tokenize: Tokenize,
        *,
        batch: int,
        seed: int,
        positions: np.ndarray,
        start_step: int,
        data_step: Callable[[int], int],
        captions: CaptionPolicy,
        conditions: Mapping[str, Condition],
    ) -> None:
        super().__init__()
        if positions.ndim != 1 or not positions.size or positions.min() < 0 or positions.max() >= batch:
            raise ValueError(f"positions must be a non-empty list of rows in [0, {batch}), not {positions}")
        self._place = place
        self._tokenize = tokenize
        self._seed = seed
        self._positions = [int(position) for position in positions]
        self._start_step = start_step
        self._data_step = data_step
        self._captions = captions
        self._conditions = conditions

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        step = self._data_step(self._start_step + index)
        keyed = KeyedGenerator(self._seed)
        records = _read(*self._place(step, self._positions))
        captions = [
            self._captions.choose(record, keyed.at(step, position))
            for record, position in zip(records, self._positions, strict=True)
        ]
        ids, mask = self._tokenize(captions)
        batch: dict[str, Any] = {**stack_images(records), "ids": ids, "mask": mask}
        if self._conditions:
            batch["conditions"] = self._made(records, keyed, step)
        return batch

    def _made(self, records: Sequence[Record], keyed: "KeyedGenerator", step: int) -> dict[str, np.ndarray]:
        """The conditions of a batch. Each has a stream of its own, by its name, so none depends on the others."""
        made = {}
        for name, condition in self._conditions.items():
            stream = stream_of(name)
            rows = [
                conditions_lib.of_record(condition, name, record, keyed.at(step, position, stream))
                for record, position in zip(records, self._positions, strict=True)
            ]
            made[name] = np.stack(rows)
        return made


def _whole(source: Source, batch: int, seed: int) -> Place:
    """The places of all records of a source, in one order."""
    order = _shuffled(len(source), seed)
    return lambda step, positions: (source, [int(order[step * batch + p]) for p in positions])


def _by_bucket(buckets: Sequence[Bucket], batch: int, seed: int) -> Place:
    """The places of the records of each step's bucket."""
    steps = BucketOrder([len(bucket) for bucket in buckets], batch, seed)
    orders = [_shuffled(len(bucket), seed_of(seed, i)) for i, bucket in enumerate(buckets)]

    def place(step: int, positions: Sequence[int]) -> tuple[Any, list[int]]:
        bucket, number = steps.at(step)
        order = orders[bucket]
        return buckets[bucket], [int(order[number * batch + p]) for p in positions]

    return place


def _shuffled(length: int, seed: int) -> grain.MapDataset[int]:
    """The indices of so many records, repeated, every epoch in an order of its own."""
    numbers = grain.MapDataset.range(length)
    return TinyShuffle(numbers, seed) if length < TINY else numbers.seed(seed).shuffle().repeat()


def _read(source: Any, indices: list[int]) -> Sequence[Record]:
    if hasattr(source, "__getitems__"):
        return contract.read_many(source, indices)
    return [contract.read(source, index) for index in indices]


def stack_images(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """The part of a batch that holds the images: "images", or "latents" of records from a prepared set."""
    if "latents" in records[0]:
        return {"latents": np.stack([record["latents"] for record in records])}
    return {"images": np.stack([record["image"] for record in records])}


@functools.cache
def stream_of(name: str) -> int:
    """The stream of a condition, in [4, 2**64).

    0 are captions, 1 is `TinyShuffle`'s, 2 and 3 are those of the order and the seeds of buckets (`buckets.py`).
    """
    return max(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"), 4)


class TinyShuffle(grain.MapDataset[int]):
    """A few indices, repeated, every epoch in a uniform random permutation from (seed, epoch)."""

    def __init__(self, parent: grain.MapDataset[int], seed: int) -> None:
        super().__init__(parent)
        self._key = seed

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self._parent))
        # A word of the counter that no stream of `KeyedGenerator` has set.
        philox = np.random.Philox(key=self._key, counter=[0, 1, 0, epoch])
        return self._parent[int(np.random.Generator(philox).permutation(len(self._parent))[place])]


class KeyedGenerator:
    """A numpy Generator for each (seed, step, position), independent of the others (Philox: key and counter).

    Moving one generator costs a microsecond, a tenth of making a new one. Not for use by two threads at once.
    """

    def __init__(self, seed: int) -> None:
        self._philox = np.random.Philox(key=seed)
        self._generator = np.random.Generator(self._philox)
        self._state = self._philox.state

    def at(self, step: int, position: int, stream: int = 0) -> np.random.Generator:
        """The generator at the start of a stream for (step, position); valid until the next call.

        `stream` is 0 for captions, else that of a condition, `stream_of`.
        """
        # The lowest word of the counter is left for the numbers within a stream: 2**64 of them.
        self._state["state"]["counter"][:] = (0, stream, position, step)
        self._philox.state = self._state
        return self._generator
