"""Tar files of images and captions, as img2dataset and the webdataset library write them: `webdataset:GLOB`.

The members of one sample follow one another and share a name up to the first dot: `000012.jpg` (jpg, png, webp, ...),
`000012.txt` (the caption) and `000012.json` (an object; what it says is `RawSample.metadata`). Members of other
endings, and those whose names begin with a dot, do not matter. The headers of a tar are read once, for an index of
where each member lies; from then on any sample is one read, and nothing is unpacked.

The index of `00000.tar` is kept as `00000.tar.index` beside it, or in `index_dir`. It holds the tar's size and time and
a checksum of its own, so one that is out of date or half written is made again; where nothing can be written it is
made at each start. It costs some 80 bytes of memory per sample: for more than tens of millions, `prepare` them first.

What is damaged (`data/damage.py`) is of one kind. Of the first five, what shows in the headers is found on opening:

    truncated_tar     the file ends within a member, or without the two empty blocks that end a tar, or is zero from a
                      place on, or for a while: the samples before and behind the place that are complete are used
    bad_tar           a header that is none, or data behind the end that are no tar: one for the tar; the samples before
                      the place are used
    duplicate_key     a key that came before in this tar
    missing_image     a sample without an image
    missing_condition  a sample without a condition of `conditions`, found when it is read
    bad_condition      a condition of another size than its image
    missing_caption   a sample without a caption: no txt, and none of the caption fields in the json
    bad_json          a json that is no JSON object, or not UTF-8
    bad_text          a caption that is not UTF-8, or no string
    empty_caption     every caption is blank
    unreadable_image  see `data/images.py`
    too_large         see `data/images.py`
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import IO

from etils import epath

from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.sources import beside, tar_index
from scaling_dit.data.sources.fields import CaptionFields
from scaling_dit.data.sources.image_files import Files, ImageFileSource, RawSample, Shard
from scaling_dit.data.sources.patterns import matching
from scaling_dit.data.sources.tar_index import IMAGE, JSON, TEXT
from scaling_dit.errors import UserError
from scaling_dit.files import parse_json


@dataclasses.dataclass(frozen=True)
class WebdatasetSource(ImageFileSource):
    """The samples of all tars that match a pattern, as RGB squares.

    Attributes:
      alt_fields: where alt-text stands: "txt" is that member, other names are keys of the json, whose values are
        strings or lists of strings.
      synthetic_fields: the same of synthetic captions, such as ("all_captions",) in LAION-COCO.
      long_fields: the same of long captions.
      index_dir: folder for the indexes, local or gs://; "" = beside each tar.
      conditions: those beside each image (`beside.py`): condition "edit" is a member `000012.edit.png` (jpg, ...),
        its mask `000012.edit.mask.png`.

    Raises:
      UserError: no tar matches, two have the same name, too much damage, or no image left to train on.
    """

    alt_fields: tuple[str, ...] = ("txt",)
    synthetic_fields: tuple[str, ...] = ()
    long_fields: tuple[str, ...] = ()
    index_dir: str = ""
    conditions: tuple[str, ...] = ()

    _noun = "webdataset"

    def texts(self) -> Iterator[str]:
        """Every caption of this split whose record is sound, without reading an image."""
        for index in range(len(self)):
            shard, row = self._sample_place(index)
            with contextlib.suppress(DamagedRecord):
                found = self._members(shard, row, (TEXT, JSON))
                yield from self._parse(shard, row, b"", found[TEXT], found[JSON]).captions

    def _list(self) -> Files:
        paths = matching(self.path, ".tar")
        index_dir = epath.Path(self.index_dir) if self.index_dir else None

        def opened(number: int) -> Shard:
            path = paths[number]
            index = tar_index.open_index(path, index_dir, self._parts)
            faults = [DamagedRecord(kind, f"{path} at byte {at}", what) for kind, at, what in index.faults]
            return Shard(index.hashes, tuple(faults), (path, index))

        return Files(tuple(path.name for path in paths), opened)

    @functools.cached_property
    def _fields(self) -> CaptionFields:
        return CaptionFields(self.alt_fields, self.synthetic_fields, self.long_fields)

    def _read(self, shard: int, row: int, file: IO[bytes] | None = None) -> RawSample:
        found = self._members(shard, row, range(3 + len(self._parts)), file)
        raw = self._parse(shard, row, found[IMAGE] or b"", found[TEXT], found[JSON])
        parts = {}
        for column, part in enumerate(self._parts, start=3):
            if not (data := found[column]):
                raise beside.missing(part, raw.where, f"the sample has no member {part}.png")
            parts[part] = data
        return raw._replace(conditions=parts)

    @functools.cached_property
    def _parts(self) -> tuple[str, ...]:
        return tuple(part for one in self.paired for part in one.parts)

    def _read_shard(self, shard: int) -> Iterator[Callable[[], RawSample]]:
        path, index = self._shard(shard).rows
        with path.open("rb") as file:
            for row in range(len(index.hashes)):
                yield functools.partial(self._read, shard, row, file)

    def _members(
        self, shard: int, row: int, wanted: Iterable[int], file: IO[bytes] | None = None
    ) -> dict[int, bytes | None]:
        """The wanted members of a sample, in one read; those that are not there are None."""
        path, index = self._shard(shard).rows
        spans = [index.spans[row, member] for member in wanted if index.spans[row, member, 0] >= 0]
        if not spans:
            return dict.fromkeys(wanted)
        start, end = min(offset for offset, _ in spans), max(offset + size for offset, size in spans)
        try:
            with contextlib.nullcontext(file) if file else path.open("rb") as opened:
                opened.seek(int(start))
                data = opened.read(int(end - start))
        except OSError as error:
            raise UserError(f"{path} at byte {start}: cannot read: {error}") from error
        if len(data) < end - start:
            raise UserError(f"{path} at byte {start}: the file became shorter since it was opened")
        held: dict[int, bytes | None] = {}
        for member in wanted:
            offset, size = index.spans[row, member]
            held[member] = None if offset < 0 else data[offset - start : offset - start + size]
        return held

    def _parse(
        self, shard: int, row: int, image: bytes, text: bytes | None, described: bytes | None
    ) -> RawSample:
        path, index = self._shard(shard).rows
        where = f"{path} at byte {index.spans[row, IMAGE, 0]}"
        metadata = {}
        if described is not None:
            try:
                metadata = parse_json(described)
            except ValueError as error:
                raise DamagedRecord("bad_json", where, f"the json is not JSON: {error}") from None
            if not isinstance(metadata, dict):
                raise DamagedRecord(
                    "bad_json", where, f"the json must be an object, not {type(metadata).__name__}"
                )
        fields = metadata if text is None else metadata | {"txt": text}
        captions, kinds = self._fields.read(fields, where)
        return RawSample(index.key(row), image, captions, kinds, metadata, where)
