"""Batches for one process, in an order that depends on the seed and the step alone.

`sample(step, position) = dataset[step * batch + position]` on the globally shuffled, repeated index: a process reads
the positions of the global batch that its devices hold, whichever they are. So the data of a step do not depend on
the number of processes, and any step can be read without reading those before it. Shuffling is a permutation that
Grain computes per index, so the length of a source costs no memory. What stands in for a damaged record is the
source's business (`data/damage.py`): it depends on the index alone.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import grain
import numpy as np

from scaling_dit.data.captions import choose_caption
from scaling_dit.data.damage import damage_of
from scaling_dit.data.sources import Record, Source
from scaling_dit.errors import UserError

TINY = 16  # records; Grain's permutations of fewer are far from uniform

Tokenize = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


class HostBatch(TypedDict):
    """The rows of one global batch that one process holds, in the order of its positions."""

    images: np.ndarray  # uint8 [b, H, W, 3]
    ids: np.ndarray  # int32 [b, L]
    mask: np.ndarray  # bool [b, L]; True = real token


def make_loader(
    source: Source,
    tokenize: Tokenize,
    *,
    batch: int,
    seed: int,
    positions: Sequence[int] | np.ndarray,
    start_step: int = 0,
    data_step: Callable[[int], int] = int,
    threads: int = 4,
    prefetch: int = 8,
) -> grain.DatasetIterator[HostBatch]:
    """An endless iterator of host batches: its first item is that of `start_step`.

    Every epoch is a fresh permutation of the whole source. Whole batches are read, tokenised and stacked in
    background threads; the contents do not depend on `threads` or `prefetch`. `close()` on the iterator drops what
    was read ahead.

    Args:
      source: random access to records; read from several threads.
      tokenize: captions -> (ids int32 [b, L], mask bool [b, L]).
      batch: global batch size.
      seed: decides order and captions; in [0, 2**32).
      positions: the rows of the global batch that this process holds, each in [0, batch), in any order.
      start_step: the step to begin at.
      data_step: step -> the step whose place in the data it takes; its own by default (see `rewind.data_step`).
      threads: reading threads; 0 reads in the calling thread.
      prefetch: batches read ahead.

    Raises:
      UserError: an empty source or a seed out of range; when read, a record that the source did not promise.
      ValueError: positions outside the global batch.
    """
    if not len(source):
        raise UserError(f"the source has no examples: {source.describe()}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; it must be in [0, 2**32)")
    damage_of(source).announce()
    records = grain.MapDataset.source(source)
    shuffled = TinyShuffle(records, seed) if len(source) < TINY else records.seed(seed).shuffle().repeat()
    batches = HostBatches(
        shuffled,
        tokenize,
        batch=batch,
        seed=seed,
        positions=np.asarray(positions, np.int64),
        start_step=start_step,
        data_step=data_step,
        image_size=source.image_size,
    )
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(batches.to_iter_dataset(options))


class HostBatches(grain.MapDataset[HostBatch]):
    """Item i is the host batch of step `start_step + i`, built from a repeated dataset of records."""

    def __init__(
        self,
        parent: grain.MapDataset[Record],
        tokenize: Tokenize,
        *,
        batch: int,
        seed: int,
        positions: np.ndarray,
        start_step: int,
        data_step: Callable[[int], int],
        image_size: int,
    ) -> None:
        super().__init__(parent)
        if positions.ndim != 1 or not positions.size or positions.min() < 0 or positions.max() >= batch:
            raise ValueError(f"positions must be a non-empty list of rows in [0, {batch}), not {positions}")
        self._tokenize = tokenize
        self._batch = batch
        self._seed = seed
        self._positions = [int(position) for position in positions]
        self._start_step = start_step
        self._data_step = data_step
        self._image_shape = (image_size, image_size, 3)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        step = self._data_step(self._start_step + index)
        keyed = KeyedGenerator(self._seed)
        images, captions = [], []
        for position in self._positions:
            record = self._parent[step * self._batch + position]
            images.append(self._checked(record))
            captions.append(choose_caption(record["captions"], keyed.at(step, position)))
        ids, mask = self._tokenize(captions)
        return HostBatch(images=np.stack(images), ids=ids, mask=mask)

    def _checked(self, record: Record) -> np.ndarray:
        image = record["image"]
        if image.shape != self._image_shape or image.dtype != np.uint8:
            expected = "x".join(str(size) for size in self._image_shape)
            found = "x".join(str(size) for size in image.shape)
            raise UserError(
                f"image {record['key']!r} is {found} {image.dtype}; the source promises {expected} uint8"
            )
        return image


class TinyShuffle(grain.MapDataset[Record]):
    """A few records, repeated, every epoch in a permutation drawn uniformly from (seed, epoch)."""

    def __init__(self, parent: grain.MapDataset[Record], seed: int) -> None:
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

    def at(self, step: int, position: int) -> np.random.Generator:
        """The generator at the start of its stream for (step, position); valid until the next call."""
        # The low two words of the counter are left for the draws within a stream.
        self._state["state"]["counter"][:] = (0, 0, position, step)
        self._philox.state = self._state
        return self._generator
