"""Parquet files of images and captions, as the Hugging Face hub has them: `parquet:GLOB` (extra `[parquet]`).

The image column is a struct of `bytes` and `path` (the `Image` feature of datasets), or the encoded files themselves;
caption columns are strings or lists of strings. A file is read by row groups: an image costs its whole group, of which
the last ones read are kept. So shuffled training from groups of a thousand images reads most of them a thousand times;
for more than a small set, `prepare` it first, which reads each group once.

Training reads the columns of image and captions alone. `prepare`, `filter` and `stats` read the others too: a value
that has no form in Python, or cannot be read, is left out of the row's metadata, and the row is used.

What is damaged (`data/damage.py`) is of one kind. The first is found when the source is opened:

    unreadable_file   no whole Parquet file: one for the file; the others are used
    bad_columns       a file without the columns that are read, or with two of one name: one for the file
    unreadable_row    its image or captions cannot be read: a wrong checksum, or data that do not decode
    missing_image     the image is null, or its bytes are, and only a path is there
    missing_condition  the same of a condition of `conditions`
    bad_condition      a condition of another size than its image
    bad_text          a caption that is no string, or not UTF-8
    missing_caption   every caption column is null
    empty_caption     every caption is blank
    unreadable_image  see `data/images.py`
    too_large         see `data/images.py`
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.sources import beside, parquet_values
from scaling_dit.data.sources.fields import CaptionFields
from scaling_dit.data.sources.image_files import Files, ImageFileSource, RawSample, Shard, row_hashes
from scaling_dit.data.sources.patterns import matching
from scaling_dit.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class ParquetSource(ImageFileSource):
    """The rows of all files that match a pattern, as RGB squares.

    Attributes:
      image_field: name of the image column.
      alt_fields: names of columns with alt-text or human captions.
      synthetic_fields: the same of synthetic captions.
      long_fields: the same of long captions.
      groups: row groups kept in memory.
      conditions: those beside each image (`beside.py`): condition "edit" is an image column of that name, its mask the
        image column "edit_mask".

    Raises:
      UserError: no file matches, two have the same name, too much damage, or no image left to train on.
    """

    image_field: str = "image"
    alt_fields: tuple[str, ...] = ("text",)
    synthetic_fields: tuple[str, ...] = ()
    long_fields: tuple[str, ...] = ()
    groups: int = 16
    conditions: tuple[str, ...] = ()

    _noun = "parquet"

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise UserError(f"source.groups is {self.groups}; it must be at least 1")
        super().__post_init__()

    def _list(self) -> Files:
        paths = matching(self.path, ".parquet")
        return Files(tuple(path.name for path in paths), lambda number: self._open_file(paths[number]))

    def _open_file(self, path: epath.Path) -> Shard:
        where = f"{path}"
        try:
            metadata = _read_file(path, None, lambda file: file.metadata)
            names = _read_file(path, metadata, lambda file: file.schema_arrow.names)
        except _NotParquetError as error:
            fault = DamagedRecord("unreadable_file", where, f"no whole Parquet file: {error}")
            return Shard(np.zeros(0), (fault,))
        for name in self._read_always():
            count = names.count(name)
            if count != 1:
                what = f"{count} columns {name!r}" if count else f"no column {name!r}"
                fault = DamagedRecord("bad_columns", where, f"{what}; {nearest(name, names)}")
                return Shard(np.zeros(0), (fault,))
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        ends = np.cumsum(np.array(counts, np.int64))
        return Shard(
            row_hashes(path.name, metadata.num_rows), (), _Opened(path, metadata, tuple(names), ends)
        )

    def _read(self, shard: int, row: int, *, metadata: bool = False) -> RawSample:
        path, _, _, ends = self._shard(shard).rows
        where = f"{path} row {row}"
        group = int(np.searchsorted(ends, row, side="right"))
        try:
            table = self._group(shard, group)
        except _NotParquetError as error:
            what = f"row group {group} cannot be read: {error}"
            raise DamagedRecord("unreadable_row", where, what) from None
        place = row - int(ends[group]) + table.num_rows
        image = _image(table.column(self.image_field)[place], self.image_field, where)
        entry = {}
        for name in self._fields.names():
            try:
                entry[name] = parquet_values.value(table.column(name)[place])
            except MemoryError:
                raise
            except Exception as error:
                raise DamagedRecord("bad_text", where, f"{name!r} is not text: {_line(error)}") from None
        captions, kinds = self._fields.read(entry, where)
        parts = {}
        for part, name in beside.columns(self.paired).items():
            try:
                parts[part] = _image(table.column(name)[place], name, where)
            except DamagedRecord as fault:
                raise beside.missing(part, where, fault.what) from None
        key = f"{self._files.names[shard]}/{row}"
        rest = self._metadata(shard, group, place) if metadata else {}
        return RawSample(key, image, captions, kinds, rest, where, parts)

    def _read_shard(self, shard: int) -> Iterator[Callable[[], RawSample]]:
        for row in range(len(self._shard(shard).hashes)):
            yield functools.partial(self._read, shard, row, metadata=True)

    def _metadata(self, shard: int, group: int, place: int) -> dict[str, Any]:
        """What the columns beside the image say of a row; a value that cannot be read is left out."""
        table = self._group(shard, group)
        columns = self._rest(shard, group) | {name: table.column(name) for name in self._fields.names()}
        found = {name: parquet_values.plain_value(column, place) for name, column in columns.items()}
        return {name: value for name, value in found.items() if value is not None}

    def _read_always(self) -> tuple[str, ...]:
        """The columns of image, captions and conditions."""
        return (self.image_field, *self._fields.names(), *beside.columns(self.paired).values())

    @functools.cached_property
    def _fields(self) -> CaptionFields:
        return CaptionFields(self.alt_fields, self.synthetic_fields, self.long_fields)

    @functools.cached_property
    def _group(self) -> Callable[[int, int], Any]:
        """Shard and row group -> table of image and captions; a cache that several threads share."""
        used = list(dict.fromkeys(self._read_always()))

        def read(shard: int, group: int) -> Any:
            path, metadata, _, _ = self._shard(shard).rows
            return _read_columns(path, metadata, group, used)

        return functools.lru_cache(self.groups)(read)

    @functools.cached_property
    def _rest(self) -> Callable[[int, int], dict[str, Any]]:
        """Shard and row group -> the other columns that can be read, by name."""
        used = set(self._read_always())

        def read(shard: int, group: int) -> dict[str, Any]:
            path, metadata, names, _ = self._shard(shard).rows
            # Of two columns with one name neither is kept.
            names = [name for name in names if name not in used and names.count(name) == 1]
            try:
                table = _read_columns(path, metadata, group, names)
                return {name: table.column(name) for name in names}
            except _NotParquetError:
                # Read one at a time, to lose only those that are damaged.
                found = {}
                for name in names:
                    with contextlib.suppress(_NotParquetError):
                        found[name] = _read_columns(path, metadata, group, [name]).column(name)
                return found

        return functools.lru_cache(self.groups)(read)


def _image(value: Any, name: str, where: str) -> bytes:
    """The encoded file in a row of the image column; raises DamagedRecord, missing_image."""
    found = parquet_values.image_value(value)
    if found.data:
        return found.data
    if found.path:
        raise DamagedRecord("missing_image", where, f"only its path is there: {found.path!r}")
    raise DamagedRecord("missing_image", where, f"column {name!r} holds no bytes")


def _read_columns(path: epath.Path, metadata: Any, group: int, names: Sequence[str]) -> Any:
    """A table of some columns of a row group; raises as `_read_file`."""
    return _read_file(path, metadata, lambda file: file.read_row_group(group, columns=list(names)))


class _Opened(NamedTuple):
    """What is kept of a file to find its rows again."""

    path: epath.Path
    # pyarrow's.
    metadata: Any
    # Of its columns.
    names: tuple[str, ...]
    # Of each row group, the number of the first row after it.
    ends: np.ndarray


class _NotParquetError(Exception):
    """What is in the file is at fault, not the disk."""


def _read_file(path: epath.Path, metadata: Any, read: Callable[[Any], Any]) -> Any:
    """`read` of an opened file.

    Raises:
      _NotParquetError: its contents are damaged.
      UserError: pyarrow is missing, or the disk or network fails.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "a parquet: source needs the extra parquet: pip install 'scaling-dit[parquet]'"
        ) from None
    try:
        with path.open("rb") as opened:
            return read(
                pyarrow.parquet.ParquetFile(opened, metadata=metadata, page_checksum_verification=True)
            )
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        # pyarrow's own errors have no number.
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path}: cannot read: {error}") from error
        raise _NotParquetError(_line(error)) from None


def _line(error: Exception) -> str:
    """The first line of an error's message; some have none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
