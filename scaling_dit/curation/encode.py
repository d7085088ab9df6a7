"""Converts one raw shard to prepared records: decodes, filters, crops, encodes on the local accelerators, writes.

The result depends only on the raw shard and the request. Threads decode images, but batches take them in the shard's
order; a batch has images of one shard only, and the last batch is padded to the shape of the others.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from scaling_dit import files
from scaling_dit.curation import columns, conditions, shape
from scaling_dit.curation.filters import Filter
from scaling_dit.curation.sidecar import MadeCaption
from scaling_dit.data import image_header, images
from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.prepared import manifest, records
from scaling_dit.data.sources import beside
from scaling_dit.data.sources.image_files import ImageFileSource, RawSample, key_hash
from scaling_dit.encoders.codec import Codec
from scaling_dit.errors import StorageError
from scaling_dit.parallel import rules
from scaling_dit.parallel.mesh import make_mesh

# Each record is its own group, for random access.
WRITER_OPTIONS = "group_size:1"
_T = TypeVar("_T")
_R = TypeVar("_R")
_PLAIN = (str, int, float, bool)
_NO_CONDITIONS = conditions.Making()


@dataclasses.dataclass(frozen=True)
class Selection:
    """Selects the samples of a raw shard that are encoded, and the metadata that their records keep.

    Attributes:
      sizes: heights and widths that images are resized to, see `shape.bucket_sizes`.
      min_size: in pixels; images with a shorter side are left out ("too_small").
      keep: an expression over a sample's columns (`columns.py`); None keeps all.
      columns: names of metadata that records keep.
      held_out_fraction: share of the images that go to the held-out split, by a hash of their keys.
      max_pixels: larger images are damaged records.
    """

    sizes: tuple[shape.Size, ...]
    min_size: int = 0
    keep: Filter | None = None
    columns: tuple[str, ...] = ()
    held_out_fraction: float = 0.0
    max_pixels: int = image_header.MAX_PIXELS

    def split(self, key: str) -> str:
        """The split of the image with this key."""
        return manifest.SPLITS[key_hash(key) < self.held_out_fraction]

    def why_not(self, sample: RawSample) -> str | None:
        """The reason to leave out a sample, by its metadata and its image's header; None to encode it.

        Raises:
          DamagedRecord: unreadable_image or too_large.
        """
        if not self.min_size and self.keep is None:
            return None
        row = columns.columns(sample, self.max_pixels)
        if min(row["width"], row["height"]) < self.min_size:
            return "too_small"
        return None if self.keep is None else self.keep.why_not(row)


class Ready(NamedTuple):
    """A sample that becomes a record.

    Attributes:
      conditions: name -> its variants, uint8 [H, W, 3 + M] each.
    """

    sample: RawSample
    shaped: shape.Shaped
    conditions: Mapping[str, list[np.ndarray]] = {}


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A sample that becomes no record. Damaged samples are a DamagedRecord instead."""

    reason: str


Outcome = Ready | LeftOut | DamagedRecord


def prepare_sample(
    sample: RawSample | DamagedRecord,
    selection: Selection,
    kept: Callable[[str], bool] = lambda key: True,
    making: conditions.Making = _NO_CONDITIONS,
    given: Sequence[beside.Beside] = (),
) -> Outcome:
    """Decides on one sample, resizes its image and makes its conditions. Runs in threads.

    Args:
      making: the conditions that the set gets.
      given: those of them that stand beside the image.
    """
    if isinstance(sample, DamagedRecord):
        return sample
    if not kept(sample.key):
        return LeftOut("not_kept")
    try:
        if reason := selection.why_not(sample):
            return LeftOut(reason)
        image = images.decode(sample.image, sample.where, sample.key, selection.max_pixels)
        shaped = shape.shape(image, selection.sizes)
        held = beside.decode(given, sample.conditions, image, shaped.size, sample.where, selection.max_pixels)
    except DamagedRecord as fault:
        return fault
    return Ready(sample, shaped, conditions.make(making, sample.key, shaped.pixels, held))


class Encoder:
    """Computes moments of images on all local devices, with one program for each size.

    Args:
      codec: gives the moments.
      params: the codec's weights.
      batch: images at once; rounded up to a multiple of the local devices.
    """

    def __init__(self, codec: Codec, params: Any, batch: int) -> None:
        self._mesh = make_mesh(devices=jax.local_devices())
        self.batch = rules.round_batch(self._mesh, batch)
        self._params = params
        self._codec = codec
        self._sharding = rules.batch_sharding(self._mesh)
        self._run = jax.jit(
            lambda weights, pixels: codec.moments(weights, pixels).astype(jnp.bfloat16),
            out_shardings=self._sharding,
        )

    def moments_shape(self, size: shape.Size) -> tuple[int, int, int]:
        """The shape [h, w, M] of the moments of images of a size, without computing any."""
        pixels = jax.ShapeDtypeStruct((1, *size, 3), jnp.uint8)
        _, height, width, depth = jax.eval_shape(self._codec.moments, self._params, pixels).shape
        return height, width, depth

    def __call__(self, pixels: list[np.ndarray]) -> jax.Array:
        """At most `batch` images uint8 [H, W, 3] -> moments bfloat16 [batch, h, w, M], computed asynchronously.

        The remaining rows repeat the first image.
        """
        rows = np.stack([*pixels, *itertools.repeat(pixels[0], self.batch - len(pixels))])
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
    making: conditions.Making = _NO_CONDITIONS,
    on_progress: Callable[[int], None] = lambda count: None,
) -> manifest.Part:
    """Writes the records of one raw shard and returns its part of the manifest. The files exist once it returns.

    Args:
      source: the raw source.
      number: index of the raw shard.
      selection: which samples to encode.
      encoder: computes the moments.
      out: folder of the prepared set.
      threads: number of threads that decode.
      kept: whether the list of kept samples has a key.
      captions: further captions by key, added after the sample's own.
      making: the conditions that each record gets.
      on_progress: called with the number of images written since the last call.

    Raises:
      UserError: a file cannot be read or written. Then no file of this shard exists.
    """
    filtered, damaged, count = Counter[str](), list[dict[str, str]](), 0
    waiting: dict[shape.Size, list[Ready]] = {size: [] for size in selection.sizes}
    encoded: deque[tuple[list[Ready], jax.Array]] = deque()
    with contextlib.ExitStack() as stack:
        writers = _Writers(stack, out, number)

        def write() -> None:
            group, moments = encoded.popleft()
            held = conditions.encode([ready.conditions for ready in group], encoder, encoder.batch)
            for ready, rows, seen in zip(group, np.asarray(moments), held, strict=False):
                made = (captions or {}).get(ready.sample.key, ())
                record = to_record(ready, rows, selection.columns, made)._replace(conditions=seen)
                writers.write(selection.split(record.key), ready.shaped.size, records.encode(record))
            on_progress(len(group))

        def encode(group: list[Ready]) -> None:
            encoded.append((group, encoder([ready.shaped.pixels for ready in group])))
            # Write the previous batch while the device computes this one.
            if len(encoded) > 1:
                write()

        samples = source.samples(number)
        given = [one for one in source.paired if one.name in making.conditions]
        for outcome in in_order(
            samples, lambda s: prepare_sample(s, selection, kept, making, given), threads, encoder.batch
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
    """The record of an encoded sample. It keeps the named metadata that exists and has plain values."""
    sample, shaped = ready.sample, ready.shaped
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
    """`map(work, items)` in threads, in order, working at most `ahead` items ahead of the consumer."""
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
    """The files of one part. Each is opened at its first record, and renamed when the stack closes without an error."""

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
        with self._write_errors(self._open[key][2]):
            self._open[key][0].write(data)
        self._counts[key] += 1

    def close(self) -> tuple[manifest.Shard, ...]:
        """Finishes every file."""
        shards = []
        for key in sorted(self._open):
            writer, local, file = self._open[key]
            with self._write_errors(file):
                writer.close()
            size, checksum = local.stat().st_size, files.sha256(local)
            shards.append(manifest.Shard(file, *key, self._counts[key], size, checksum))
        return tuple(shards)

    @contextlib.contextmanager
    def _write_errors(self, file: str) -> Iterator[None]:
        """Raises an error of ArrayRecord as a StorageError that names the file."""
        try:
            yield
        # ArrayRecord raises a RuntimeError for every fault, a full disk included.
        except RuntimeError as error:
            why = str(error).split(";")[0]
            raise StorageError(
                f"cannot write {self._out / file}: {why}; files finished before are whole"
            ) from None
