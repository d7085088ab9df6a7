"""Parquet files of images and captions, as the Hugging Face hub has them: `parquet:GLOB` (extra `[parquet]`).

The image column is a struct of `bytes` and `path` (the `Image` feature of datasets), or the encoded files themselves;
caption columns are strings or lists of strings. A file is read by row groups: an image costs its whole group, of which
the last ones read are kept. So shuffled training from groups of a thousand images reads most of them a thousand times;
for more than a small set, `prepare` it first, which reads each group once.

What is damaged (`data/damage.py`) is of one kind. The first is found when the source is opened:

    unreadable_file   no whole Parquet file: one for the file; the others are used
    bad_columns       a file without the columns that are read: one for the file
    unreadable_row    its row group cannot be read: a wrong checksum, or data that do not decode
    missing_image     the image is null, or its bytes are, and only a path is there
    bad_text          a caption that is no string
    missing_caption   every caption column is null
    empty_caption     every caption is blank
    unreadable_image  see `data/images.py`
    too_large         see `data/images.py`
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.sources.fields import CaptionFields, plain
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

    Raises:
      UserError: no file matches, two have the same name, too much damage, or no image left to train on.
    """

    image_field: str = "image"
    alt_fields: tuple[str, ...] = ("text",)
    synthetic_fields: tuple[str, ...] = ()
    long_fields: tuple[str, ...] = ()
    groups: int = 16

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
            schema = metadata.schema.to_arrow_schema()
        except _NotParquetError as error:
            fault = DamagedRecord("unreadable_file", where, f"no whole Parquet file: {error}")
            return Shard(np.zeros(0), (fault,))
        for name in (self.image_field, *self._fields.names()):
            if name not in schema.names:
                fault = DamagedRecord(
                    "bad_columns", where, f"no column {name!r}; {nearest(name, schema.names)}"
                )
                return Shard(np.zeros(0), (fault,))
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        ends = np.cumsum(np.array(counts, np.int64))
        return Shard(row_hashes(path.name, metadata.num_rows), (), (path, metadata, ends))

    def _read(self, shard: int, row: int) -> RawSample:
        path, _, ends = self._shard(shard).rows
        where = f"{path} row {row}"
        group = int(np.searchsorted(ends, row, side="right"))
        try:
            table = self._group(shard, group)
        except _NotParquetError as error:
            what = f"row group {group} cannot be read: {error}"
            raise DamagedRecord("unreadable_row", where, what) from None
        entry = table.slice(row - int(ends[group]) + table.num_rows, 1).to_pylist()[0]
        image = entry.pop(self.image_field)
        if isinstance(image, dict):
            if image.get("bytes") is None and image.get("path"):
                raise DamagedRecord("missing_image", where, f"only its path is there: {image['path']!r}")
            image = image.get("bytes")
        if not isinstance(image, bytes) or not image:
            raise DamagedRecord("missing_image", where, f"column {self.image_field!r} holds no bytes")
        captions, kinds = self._fields.read(entry, where)
        return RawSample(f"{self._files.names[shard]}/{row}", image, captions, kinds, plain(entry), where)

    @functools.cached_property
    def _fields(self) -> CaptionFields:
        return CaptionFields(self.alt_fields, self.synthetic_fields, self.long_fields)

    @functools.cached_property
    def _group(self) -> Callable[[int, int], Any]:
        """Shard and row group -> table; a cache that several threads share."""

        def read(shard: int, group: int) -> Any:
            path, metadata, _ = self._shard(shard).rows
            return _read_file(path, metadata, lambda file: file.read_row_group(group))

        return functools.lru_cache(self.groups)(read)


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
        raise _NotParquetError(str(error).splitlines()[0]) from None
