"""What sources of image files share: shards of samples, a split by a hash of the key, replacements for damage.

A source gives its shards and the samples in them; from that follow random access to decoded records for training
(`source[index]`, for which every shard is opened at the start) and the samples of one shard in order for `prepare` and
`filter` (`source.samples(shard)`, for which only that one is).
"""

import abc
import concurrent.futures
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from scaling_dit.data import image_header, images
from scaling_dit.data.buckets import Chosen, Size, nearest_size
from scaling_dit.data.damage import Damage, DamagedRecord
from scaling_dit.data.sources import Record, beside, create_raw_source
from scaling_dit.data.text import sound_value
from scaling_dit.errors import UserError

# That open shards; they wait for a disk or a network most of the time.
THREADS = 8
# The longest side of an image in training, in pixels.
LARGEST = 2**14
# Images whose headers are read at a start to put them into aspect buckets.
MOST_BUCKETED = 200_000
# Opened shards that a raw source keeps: more than threads work on.
KEPT = 64


class RawSample(NamedTuple):
    """One image as it is stored, with what is known of it."""

    # Names the sample within its source.
    key: str
    # The file's bytes, not yet decoded.
    image: bytes
    # At least one, none blank.
    captions: tuple[str, ...]
    # Of the captions, in their order: alt | synthetic | long.
    kinds: tuple[str, ...]
    # Whatever else the record says, JSON values.
    metadata: dict[str, Any]
    # File and line or offset, for error lines.
    where: str
    # Part of a condition (`beside.Beside.parts`) -> its file's bytes; of sources with a field `conditions`.
    conditions: Mapping[str, bytes] = {}


class Shard(NamedTuple):
    """What is known of a shard once it is open, without reading its images.

    Attributes:
      hashes: float64 [n], of the key of each sample, in [0, 1); see `key_hash` and `row_hashes`.
      faults: what is no sample.
      rows: what the source keeps to find its samples again.
    """

    hashes: np.ndarray
    faults: tuple[DamagedRecord, ...] = ()
    rows: Any = None


class Files(NamedTuple):
    """The shards of a source before they are opened.

    Attributes:
      names: each unique; sorted.
      open: the number of a shard -> what it holds; may be called by several threads at once.
    """

    names: tuple[str, ...]
    open: Callable[[int], Shard]


@dataclasses.dataclass(frozen=True)
class ImageFileSource(abc.ABC):
    """Images and captions from files, as RGB squares.

    A subclass gives `_list`, `_read` and `_noun`.

    Attributes:
      path: what stands after the colon in the source's name.
      image_size: height and width, in pixels, that every image is brought to.
      held_out_fraction: share of the images kept for evaluation, chosen by a hash of the key alone, so that an image
        stays on its side when others are added or removed.
      max_pixels: larger images are damaged records.
      max_damaged: damaged records that are replaced; 0 stops at the first.
      damage: those met so far, in both splits.

    Raises:
      UserError: nothing at `path`, a field out of range, too much damage, or no image left to train on.
    """

    # Of the source's name.
    path: str = dataclasses.field(metadata={"config": False})
    image_size: int = 64
    held_out_fraction: float = 0.05
    max_pixels: int = image_header.MAX_PIXELS
    max_damaged: int = 0
    # train | held_out | both
    split: str = dataclasses.field(default="train", metadata={"config": False})
    damage: Damage = dataclasses.field(default=None, metadata={"config": False}, compare=False, repr=False)  # type: ignore[assignment]
    _files: Files = dataclasses.field(default=None, metadata={"config": False}, compare=False, repr=False)  # type: ignore[assignment]

    # Before the path, in one line of `describe`.
    _noun: ClassVar[str]

    def __post_init__(self) -> None:
        if not 1 <= self.image_size <= LARGEST:
            raise UserError(
                f"source.image_size is {self.image_size}; it must be at least 1 pixel, and at most {LARGEST}"
            )
        if not 0 <= self.held_out_fraction < 1:
            raise UserError(f"source.held_out_fraction is {self.held_out_fraction}; it must be in [0, 1)")
        if not 1 <= self.max_pixels <= image_header.PILLOW_MAX_PIXELS:
            raise UserError(
                f"source.max_pixels is {self.max_pixels}; it must be from 1 to {image_header.PILLOW_MAX_PIXELS}"
            )
        if self.max_damaged < 0:
            raise UserError(f"source.max_damaged is {self.max_damaged}; it must be 0 or more")
        _ = self.paired
        if self.damage is None:
            object.__setattr__(self, "damage", Damage(self.max_damaged, "config.source.max_damaged"))
        if self._files is None:
            files = self._list()
            opener = functools.lru_cache(KEPT if self.split == "both" else None)(files.open)
            object.__setattr__(self, "_files", files._replace(open=opener))
        if self.split == "both":
            # `samples` opens one after the other.
            return
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            shards = tuple(pool.map(self._files.open, range(len(self._files.names))))
        self.damage.meet_all(fault for shard in shards for fault in shard.faults)
        if not len(self):
            raise UserError(
                f"{self._place()}: no images in the {self.split} split "
                f"(source.held_out_fraction is {self.held_out_fraction})"
            )

    @abc.abstractmethod
    def _list(self) -> Files:
        """The shards; each sample of one has a place in its `hashes`."""

    @abc.abstractmethod
    def _read(self, shard: int, row: int) -> RawSample:
        """One sample; raises DamagedRecord."""

    def _read_shard(self, shard: int) -> Iterator[Callable[[], RawSample]]:
        """A reader for each sample of a shard, in order; a subclass may keep a file open meanwhile."""
        for row in range(len(self._shard(shard).hashes)):
            yield functools.partial(self._read, shard, row)

    def _shard(self, number: int) -> Shard:
        return self._files.open(number)

    def _place(self) -> str:
        """For errors about the source as a whole."""
        return self.path

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int, /) -> Record:
        """Reads and decodes one image, or the one that replaces it if it is damaged.

        Raises:
          IndexError: past the end.
          UserError: more damaged records than `max_damaged`.
        """
        return self.damage.read(index, len(self), self._record)

    def describe(self) -> str:
        """One line for logs."""
        size = f"{self.image_size}x{self.image_size}"
        return f"{self._noun} {self.path}: {len(self):,} images, {size} px, {self.split} split"

    def held_out(self) -> Self:
        """The images kept for evaluation; raises UserError if there are none."""
        return dataclasses.replace(self, split="held_out")

    @functools.cached_property
    def paired(self) -> tuple[beside.Beside, ...]:
        """The conditions that stand beside each image; UserError for a field `conditions` that names none."""
        return beside.parse(getattr(self, "conditions", ()))

    def shards(self) -> tuple[str, ...]:
        """The names of the shards, sorted."""
        return self._files.names

    def samples(self, shard: int) -> Iterator[RawSample | DamagedRecord]:
        """Everything in one shard, of both splits: what is damaged about it as a whole first, then its samples.

        A damaged sample comes as the DamagedRecord; it is not counted in `damage`. Images are not decoded. Every text
        of the metadata is sound (`data/text.py`), whatever the source reads.
        """
        yield from self._shard(shard).faults
        for read in self._read_shard(shard):
            try:
                yield _sound(read())
            except DamagedRecord as fault:
                yield fault

    def buckets(self, sizes: tuple[Size, ...]) -> list[Chosen]:
        """The images of this split by the size with the nearest aspect ratio, as their files' headers say.

        It reads every file once. A file with a damaged header counts as a square; it is met again when it is read.

        Raises:
          UserError: too many images for that.
        """
        if len(self) > MOST_BUCKETED:
            raise UserError(
                f"{self._place()} has {len(self):,} images, and config.buckets reads all of them at each start to "
                f"learn their sizes; beyond {MOST_BUCKETED:,} prepare them once, with `prepare --buckets`"
            )
        square = (self.image_size, self.image_size)

        def nearest(index: int) -> int:
            shard, row = self._sample_place(index)
            try:
                raw = self._read(shard, row)
                width, height = image_header.shown_size(raw.image, raw.where, raw.key, self.max_pixels)
            except DamagedRecord:
                return sizes.index(square)
            return sizes.index(nearest_size(width, height, sizes))

        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            chosen = np.fromiter(pool.map(nearest, range(len(self))), np.int64, len(self))
        return [
            Chosen(size, np.flatnonzero(chosen == i), functools.partial(self._at_size, size))
            for i, size in enumerate(sizes)
        ]

    def _at_size(self, size: Size, index: int) -> Record:
        """As `self[index]`, the image at another size; so is the one that replaces a damaged one."""
        return self.damage.read(index, len(self), functools.partial(self._record, size=size))

    def _record(self, index: int, size: Size | None = None) -> Record:
        shard, row = self._sample_place(index)
        raw = self._read(shard, row)
        image = images.decode(raw.image, raw.where, raw.key, self.max_pixels)
        height, width = size or (self.image_size, self.image_size)
        pixels = images.fit(image, width, height)
        record: Record = {"image": pixels, "captions": raw.captions, "kinds": raw.kinds, "key": raw.key}
        if self.paired:
            record["conditions"] = beside.decode(
                self.paired, raw.conditions, image, (height, width), raw.where, self.max_pixels
            )
        return record

    def _sample_place(self, index: int) -> tuple[int, int]:
        """Shard and row of record `index` of this split."""
        place = int(self._chosen[index])
        shard = int(np.searchsorted(self._starts, place, side="right")) - 1
        return shard, place - int(self._starts[shard])

    @property
    def _hashes(self) -> list[np.ndarray]:
        return [self._shard(number).hashes for number in range(len(self._files.names))]

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """The place of each shard's first sample among all samples, int64 [shards]."""
        counts = np.array([len(hashes) for hashes in self._hashes], np.int64)
        return np.cumsum(counts) - counts

    @functools.cached_property
    def _chosen(self) -> np.ndarray:
        """The places of this split's samples among all samples, in their order."""
        hashes = np.concatenate([np.zeros(0), *self._hashes])
        if self.split == "both":
            return np.arange(len(hashes))
        held_out = hashes < self.held_out_fraction
        if self.held_out_fraction and len(hashes) > 1 and not held_out.any():
            # A small set still has a split.
            held_out[np.argmin(hashes)] = True
        return np.flatnonzero(held_out == (self.split == "held_out"))


def scan(name: str, **fields: Any) -> Damage:
    """Reads and decodes every sample, both splits: exact counts by kind, and the damaged records themselves.

    Args:
      name: of a source of image files, such as "folder:data/mine".
      **fields: its fields, as in `create_source`; there is no limit to the damage.

    Raises:
      UserError: as `create_raw_source`.
    """
    source = create_raw_source(name, **fields)
    damage = Damage()
    for shard in range(len(source.shards())):
        for sample in source.samples(shard):
            try:
                if isinstance(sample, DamagedRecord):
                    raise sample
                images.decode(sample.image, sample.where, sample.key, source.max_pixels)
            except DamagedRecord as fault:
                damage.meet(fault, log=False)
    return damage


def _sound(sample: RawSample) -> RawSample:
    try:
        return sample._replace(metadata=sound_value(sample.metadata))
    except RecursionError:
        raise DamagedRecord("bad_json", sample.where, "its metadata are nested too deeply") from None


def key_hash(key: str) -> float:
    """A number in [0, 1) that depends on the key alone, on any machine."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def row_hashes(name: str, count: int) -> np.ndarray:
    """float64 [count] in [0, 1): a number for each row of a shard, from its name and the row's number alone.

    For shards whose rows have no keys of their own: the finaliser of SplitMix64 (Steele et al., 2014), which costs
    nanoseconds where `key_hash` costs a microsecond.
    """
    start = np.uint64(int(key_hash(name) * 2**63))
    with np.errstate(over="ignore"):
        x = (start + np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) / 2**53
