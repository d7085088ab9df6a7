"""One raw shard to prepared records: decode, filter, cut, encode in batches on the local accelerators, write.

The result depends on the raw shard and the request alone: pictures are decoded by threads but taken in the shard's
order, batches are made of one shard, and a last one is filled up to the shape of the others.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from scaling_dit import files
from scaling_dit.curation import columns, shape
from scaling_dit.curation.filters import Filter
from scaling_dit.curation.sidecar import MadeCaption
from scaling_dit.data import images
from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.prepared import manifest, records
from scaling_dit.data.sources.image_files import ImageFileSource, RawSample, key_hash
from scaling_dit.encoders.codec import Codec
from scaling_dit.errors import UserError
from scaling_dit.parallel import mesh as mesh_lib
from scaling_dit.parallel import rules

WRITER_OPTIONS = "group_size:1"  # each record by itself, for random access
_T = TypeVar("_T")
_R = TypeVar("_R")
_PLAIN = (str, int, float, bool)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which samples of a raw shard are encoded, and what of them is kept beside the moments.

    Attributes:
      sizes: height and width that pictures are brought to, see `shape.bucket_sizes`.
      min_size: px; pictures with a shorter side are left out ("too_small").
      keep: an expression over a sample's columns (`columns.py`); None keeps all.
      columns: names of metadata that records keep.
      held_out_fraction: share of the pictures that go to the held-out split, by a hash of their keys.
      max_pixels: larger pictures are damaged records.
    """

    sizes: tuple[shape.Size, ...]
    min_size: int = 0
    keep: Filter | None = None
    columns: tuple[str, ...] = ()
    held_out_fraction: float = 0.0
    max_pixels: int = images.MAX_PIXELS

    def split(self, key: str) -> str:
        """The split of a picture."""
        return manifest.SPLITS[key_hash(key) < self.held_out_fraction]

    def why_not(self, sample: RawSample) -> str | None:
        """Why a sample is left out, from its metadata and its image's header; None if it is not.

        Raises:
          DamagedRecord: unreadable_image.
        """
        if not self.min_size and self.keep is None:
            return None
        row = columns.columns(sample)
        if min(row["width"], row["height"]) < self.min_size:
            return "too_small"
        return None if self.keep is None else self.keep.why_not(row)


class Ready(NamedTuple):
    """A sample that will be a record."""

    sample: RawSample
    shaped: shape.Shaped


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A sample that will not; damaged ones come as DamagedRecord."""

    reason: str


Outcome = Ready | LeftOut | DamagedRecord


def prepare_sample(
    sample: RawSample | DamagedRecord, selection: Selection, kept: Callable[[str], bool] = lambda key: True
) -> Outcome:
    """Decides on one sample and brings its picture to size; runs in threads."""
    if isinstance(sample, DamagedRecord):
        return sample
    if not kept(sample.key):
        return LeftOut("not_kept")
    try:
        if reason := selection.why_not(sample):
            return LeftOut(reason)
        image = images.decode(sample.image, sample.where, sample.key, selection.max_pixels)
    except DamagedRecord as fault:
        return fault
    return Ready(sample, shape.shape(image, selection.sizes))


class Encoder:
    """Moments of pictures, computed on all local devices; one program for each size.

    Args:
      codec: gives the moments.
      params: its weights.
      batch: pictures at once; rounded up to what the local devices divide.
    """

    def __init__(self, codec: Codec, params: Any, batch: int) -> None:
        self._mesh = mesh_lib.make_mesh(devices=jax.local_devices())
        self.batch = rules.round_batch(self._mesh, batch)
        self._params = params
        self._codec = codec
        self._sharding = rules.batch_sharding(self._mesh)
        self._run = jax.jit(
            lambda weights, pictures: codec.moments(weights, pictures).astype(jnp.bfloat16),
            out_shardings=self._sharding,
        )

    def moments_shape(self, size: shape.Size) -> tuple[int, int, int]:
        """[h, w, M] of the moments of pictures of a size; nothing is computed."""
        pictures = jax.ShapeDtypeStruct((1, *size, 3), jnp.uint8)
        _, height, width, depth = jax.eval_shape(self._codec.moments, self._params, pictures).shape
        return height, width, depth

    def __call__(self, pictures: list[np.ndarray]) -> jax.Array:
        """At most `batch` pictures uint8 [H, W, 3] -> moments bfloat16 [batch, h, w, M], still being computed.

        The rows beyond the pictures are those of a repeated one.
        """
        rows = np.stack([*pictures, *itertools.repeat(pictures[0], self.batch - len(pictures))])
        with rules.activate(self._mesh):
            return self._run(self._params, jax.device_put(rows, self._sharding))


def encode_shard(
    source: ImageFileSource,
    number: int,
    selection: Selection,
    encoder: Encoder,
    out: epath.Path,
    *,
    threads: int,
    kept: Callable[[str], bool] = lambda key: True,
    captions: Mapping[str, Iterable[MadeCaption]] | None = None,
    tell: Callable[[int], None] = lambda pictures: None,
) -> manifest.Part:
    """Writes the records of one raw shard and returns what was done; the files are there once it returns.

    Args:
      number: of the raw shard.
      out: folder of the prepared set.
      threads: that decode.
      kept: whether a key is in the list of those that were kept.
      captions: further captions by key, after the sample's own.
      tell: called with the number of pictures written since the last call.

    Raises:
      UserError: a file cannot be read or written; files of this shard are then not there.
    """
    filtered, damaged, count = Counter[str](), list[dict[str, str]](), 0
    waiting: dict[shape.Size, list[Ready]] = {size: [] for size in selection.sizes}
    encoded: deque[tuple[list[Ready], jax.Array]] = deque()
    with contextlib.ExitStack() as stack:
        writers = _Writers(stack, out, number)

        def write() -> None:
            group, moments = encoded.popleft()
            for ready, rows in zip(group, np.asarray(moments), strict=False):
                made = (captions or {}).get(ready.sample.key, ())
                record = to_record(ready, rows, selection.columns, made)
                writers.write(selection.split(record.key), ready.shaped.size, records.encode(record))
            tell(len(group))

        def encode(group: list[Ready]) -> None:
            encoded.append((group, encoder([ready.shaped.pixels for ready in group])))
            if len(encoded) > 1:  # while the device works on this one, the one before is written
                write()

        samples = source.samples(number)
        for outcome in in_order(
            samples, lambda s: prepare_sample(s, selection, kept), threads, encoder.batch
        ):
            count += 1
            if isinstance(outcome, DamagedRecord):
                damaged.append({"kind": outcome.kind, "where": outcome.where, "what": outcome.what})
            elif isinstance(outcome, LeftOut):
                filtered[outcome.reason] += 1
            else:
                group = waiting[outcome.shaped.size]
                group.append(outcome)
                if len(group) == encoder.batch:
                    encode(group)
                    waiting[outcome.shaped.size] = []
        for group in waiting.values():
            if group:
                encode(group)
        while encoded:
            write()
        shards = writers.close()
    return manifest.Part(source.shards()[number], count, shards, dict(sorted(filtered.items())), damaged)


def to_record(
    ready: Ready, moments: np.ndarray, names: Iterable[str], made: Iterable[MadeCaption] = ()
) -> records.Prepared:
    """The record of an encoded sample with the metadata of these names, as far as it is there and of plain values."""
    sample, shaped = ready
    made = list(made)
    kept = {name: sample.metadata[name] for name in names if _is_plain(sample.metadata.get(name))}
    return records.Prepared(
        moments=moments,
        key=sample.key,
        captions=(*sample.captions, *(caption.text for caption in made)),
        kinds=(*sample.kinds, *(caption.kind for caption in made)),
        width=shaped.width,
        height=shaped.height,
        crop=shaped.crop,
        columns=kept,
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) and not (isinstance(value, float) and not math.isfinite(value))


def in_order(items: Iterable[_T], work: Callable[[_T], _R], threads: int, ahead: int) -> Iterator[_R]:
    """`map(work, items)` by threads, in order, at most `ahead` items ahead of the one given."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        pending: deque[concurrent.futures.Future[_R]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


class _Writers:
    """The files of one part, opened at their first record and published when the stack closes without an error."""

    def __init__(self, stack: contextlib.ExitStack, out: epath.Path, number: int) -> None:
        self._stack, self._out, self._number = stack, out, number
        self._open: dict[tuple[str, shape.Size], tuple[Any, Any, str]] = {}
        self._counts = Counter[tuple[str, shape.Size]]()

    def write(self, split: str, size: shape.Size, data: bytes) -> None:
        """Adds a record."""
        key = split, size
        if key not in self._open:
            square = size[0] == size[1]
            name = f"{self._number:05d}.{split}{'' if square else '.' + manifest.size_name(size)}"
            file = f"{manifest.SHARDS}/{name}.array_record"
            local = self._stack.enter_context(files.staged(self._out / file))
            self._open[key] = ArrayRecordWriter(str(local), WRITER_OPTIONS), local, file
        with self._told(self._open[key][2]):
            self._open[key][0].write(data)
        self._counts[key] += 1

    def close(self) -> tuple[manifest.Shard, ...]:
        """Finishes every file."""
        shards = []
        for key in sorted(self._open):
            writer, local, file = self._open[key]
            with self._told(file):
                writer.close()
            size, checksum = local.stat().st_size, files.sha256(local)
            shards.append(manifest.Shard(file, *key, self._counts[key], size, checksum))
        return tuple(shards)

    @contextlib.contextmanager
    def _told(self, file: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # ArrayRecord's only one, for a full disk as for anything else
            why = str(error).split(";")[0]
            raise UserError(
                f"cannot write {self._out / file}: {why}; files finished before are whole"
            ) from None
