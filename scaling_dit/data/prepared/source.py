"""A prepared set as a source: moments of latents that `scaling-dit prepare` has computed, read at random.

Records are read from ArrayRecord shards by their number, without a server, an index in memory or an order. What the
manifest promises is checked when the set is opened: every shard is there and has its size. A record whose bytes are
damaged is found when it is read, by ArrayRecord's own checksums, and is a damaged record (`data/damage.py`) of the kind
`damaged_record`. With `verify` every shard is read once at opening and its sha256 compared.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from scaling_dit import files
from scaling_dit.data.buckets import Size, bucket_sizes
from scaling_dit.data.damage import Damage, DamagedRecord
from scaling_dit.data.prepared import manifest as manifest_lib
from scaling_dit.data.prepared import records
from scaling_dit.data.prepared.readers import Readers
from scaling_dit.data.sources import Record
from scaling_dit.errors import UserError, nearest

if TYPE_CHECKING:
    from array_record.python.array_record_module import ArrayRecordReader

# That check shards when a set is opened.
_THREADS = 32


@dataclasses.dataclass(frozen=True)
class PreparedSource:
    """Images as the moments of their latents, with captions, from a folder that `prepare` wrote.

    Attributes:
      path: the folder, local or gs://.
      image_size: height and width of the images the set was made of, in pixels.
      max_damaged: damaged records that are replaced; 0 stops at the first.
      verify: compare the checksum of every shard at opening, which reads the whole set.
      damage: those met so far, in both splits.

    Raises:
      UserError: no finished set, another image size, a shard that is missing or not the manifest's, or no records;
        a training split may have none but in other buckets.
    """

    # Of the source's name.
    path: str = dataclasses.field(metadata={"config": False})
    image_size: int = 256
    max_damaged: int = 0
    verify: bool = False
    # train | held_out
    split: str = dataclasses.field(default="train", metadata={"config": False})
    # Height and width of the records that are read, where it is no square.
    bucket_size: Size | None = dataclasses.field(default=None, metadata={"config": False})
    damage: Damage = dataclasses.field(default=None, metadata={"config": False}, compare=False, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.max_damaged < 0:
            raise UserError(f"source.max_damaged is {self.max_damaged}; it must be 0 or more")
        if self.damage is None:
            object.__setattr__(self, "damage", Damage(self.max_damaged, "config.source.max_damaged"))
        wanted = manifest_lib.size_name(self._size)
        sizes = self.manifest.moments
        if wanted not in sizes:
            right = nearest(wanted, sizes) if len(sizes) > 1 else f"it holds {next(iter(sizes), 'none')}"
            raise UserError(
                f"{self.path} holds no images of {wanted} px; {right}; set config.source.image_size "
                "(training takes the square bucket of a set, and with config.buckets all of them)"
            )
        # A run on all buckets needs no squares to train on.
        if not len(self) and not self._elsewhere:
            raise UserError(
                f"{self.path}: no records in the {self.split} split of {wanted} px; "
                "`prepare` divides them by config.source.held_out_fraction"
            )
        # Once for all of the set's sizes.
        if self.split == "train" and self.bucket_size is None:
            self._check_files()

    @functools.cached_property
    def manifest(self) -> manifest_lib.Manifest:
        """What the set says of itself."""
        return manifest_lib.read(epath.Path(self.path))

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """(height, width, M) of the moments of every record."""
        height, width, depth = self.manifest.moments[manifest_lib.size_name(self._size)]
        return height, width, depth

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int, /) -> Record:
        """One record, or the one that replaces it if it is damaged.

        Raises:
          IndexError: past the end.
          UserError: more damaged records than `max_damaged`.
        """
        return self.damage.read(index, len(self), self._read)

    def __getitems__(self, indices: Sequence[int], /) -> list[Record]:
        """`[self[index] for index in indices]`, with one read for all records of a shard."""
        wanted = np.asarray(indices, np.int64)
        shards = np.searchsorted(self._ends, wanted, side="right")
        order = np.argsort(shards, kind="stable")
        found: list[Any] = [None] * len(wanted)
        for group in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1) if len(order) else ():
            number = int(shards[group[0]])
            rows = (wanted[group] - self._begins[number]).tolist()
            try:
                for place, data in zip(group, self._reader(number).read(rows), strict=True):
                    found[place] = self._record(data)
            except (RuntimeError, ValueError):
                # Read one at a time, to find which are damaged.
                for place in group:
                    found[place] = self[int(wanted[place])]
        return found

    def describe(self) -> str:
        """One line for logs."""
        shape = "x".join(map(str, self.moments_shape))
        found = f"latents {self.path}: {len(self):,} records of {shape}, {self.split} split"
        return (
            f"{found} ({self._elsewhere:,} of other sizes, for config.buckets=True)"
            if not len(self)
            else found
        )

    def held_out(self) -> "PreparedSource":
        """The records kept for evaluation; raises UserError if there are none."""
        return dataclasses.replace(self, split="held_out")

    def buckets(self, sizes: tuple[Size, ...]) -> "list[PreparedSource]":
        """The records of this split by the size that `prepare --buckets` gave them; only sizes that have records.

        Raises:
          UserError: a set of squares alone.
        """
        if len(self.manifest.moments) == 1:
            raise UserError(
                f"{self.path} was prepared without --buckets, so all of its images are squares; prepare it again, or "
                "set config.buckets=False"
            )
        there = {shard.size for shard in self.manifest.shards if shard.split == self.split and shard.records}
        return [dataclasses.replace(self, bucket_size=size) for size in sizes if size in there]

    def texts(self) -> Iterator[str]:
        """Every caption of this split and size; reads all of its records."""
        for index in range(len(self)):
            yield from self[index]["captions"]

    def bucket_texts(self) -> Iterator[str]:
        """Every caption of this split in all buckets; raises as `buckets`."""
        for bucket in self.buckets(bucket_sizes(self.image_size, "config.buckets")):
            yield from bucket.texts()

    def _read(self, index: int) -> Record:
        number = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._begins[number])
        where = f"{epath.Path(self.path) / self._shards[number].file} record {row}"
        try:
            (data,) = self._reader(number).read([row])
            return self._record(data)
        except (RuntimeError, ValueError) as error:
            raise DamagedRecord("damaged_record", where, " ".join(str(error).split())) from None

    def _record(self, data: bytes) -> Record:
        record = records.decode(data)
        if record.moments.shape != self.moments_shape:
            raise ValueError(f"moments of {record.moments.shape} in a set of {self.moments_shape}")
        if record.conditions.keys() != self.manifest.conditions.keys():
            raise ValueError(
                f"conditions {sorted(record.conditions)} in a set of {sorted(self.manifest.conditions)}"
            )
        found: Record = {
            "latents": record.moments,
            "captions": record.captions,
            "kinds": record.kinds,
            "key": record.key,
        }
        if record.conditions:
            found["conditions"] = record.conditions
        return found

    @property
    def _size(self) -> Size:
        return self.bucket_size or (self.image_size, self.image_size)

    @property
    def _elsewhere(self) -> int:
        """Records to train on in other buckets than the square; 0 for other splits and for one bucket."""
        if self.split != "train" or self.bucket_size is not None:
            return 0
        shards = self.manifest.shards
        return sum(s.records for s in shards if s.split == self.split and s.size != self._size)

    @functools.cached_property
    def _shards(self) -> list[manifest_lib.Shard]:
        return [s for s in self.manifest.shards if s.split == self.split and s.size == self._size]

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([shard.records for shard in self._shards], dtype=np.int64)

    @functools.cached_property
    def _begins(self) -> np.ndarray:
        return self._ends - [shard.records for shard in self._shards]

    def _reader(self, number: int) -> "ArrayRecordReader":
        """Of a shard of this split; kept open for a while, and used by all threads.

        Raises:
          UserError: the shard cannot be opened, or holds another number of records than the manifest says.
        """
        shard = self._shards[number]
        return self._readers.get(epath.Path(self.path) / shard.file, shard.records)

    @functools.cached_property
    def _readers(self) -> Readers:
        return Readers()

    def _check_files(self) -> None:
        """Compares the shards of both splits with the manifest: that they are there, their sizes, their checksums."""
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            # Listed, so that the error names the first shard at fault.
            for error in list(pool.map(self._fault, self.manifest.shards)):
                if error:
                    raise UserError(error)

    def _fault(self, shard: manifest_lib.Shard) -> str:
        """What is wrong with a shard, in one line; "" for nothing."""
        path = epath.Path(self.path) / shard.file
        if kind := files.special(path):
            return f"shard {path} is {kind}, no file"
        again = "copy the set again, or delete its part and run `prepare` again"
        try:
            size = path.stat().length
        except FileNotFoundError:
            return f"shard {path} is missing; {again}"
        if size != shard.bytes:
            return f"shard {path} has {size:,} bytes; its manifest says {shard.bytes:,}; {again}"
        if self.verify and files.sha256(path) != shard.sha256:
            return f"shard {path} has another checksum than its manifest says; {again}"
        return ""
