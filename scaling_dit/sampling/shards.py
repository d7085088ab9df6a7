"""Files of many images, in place of a file for each: tar, which WebDataset reads too, or ArrayRecord.

A shard holds consecutive images of a request, each as PNG with its manifest row. It is written whole or not at all. In
a tar an image is `ID.png` with `ID.txt`, the prompt, and `ID.json`, the row. A record of an ArrayRecord file is the
length of the row in 4 bytes (little-endian), the row as JSON, and the PNG.
"""

import io
import json
import struct
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from scaling_dit import files
from scaling_dit.errors import UserError
from scaling_dit.monitor.grid import decode_png, encode_png

PNG, TAR, ARRAY_RECORD = "png", "tar", "array_record"
STORES = (PNG, TAR, ARRAY_RECORD)
# Images of a shard: what a kill can lose.
SHARD = 256
_HEAD = struct.Struct("<I")
Row = Mapping[str, Any]


def shard_name(number: int, store: str) -> str:
    """The file of shard `number`."""
    return f"images-{number:05d}.{store}"


def write_shard(path: epath.Path, rows: Iterable[Row], images: Iterable[np.ndarray]) -> None:
    """Writes the images, uint8 [H, W, 3] each, with their rows."""
    with files.staged(path) as local:
        if path.suffix == f".{TAR}":
            with tarfile.open(local, "w", format=tarfile.USTAR_FORMAT) as tar:
                for row, image in zip(rows, images, strict=True):
                    for ending, data in (
                        ("png", encode_png(image)),
                        ("txt", row["prompt"].encode()),
                        ("json", _json(row)),
                    ):
                        # All else stays 0, so the same images give the same bytes.
                        member = tarfile.TarInfo(f"{row['id']}.{ending}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
            return
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(local), "group_size:1,uncompressed")
        for row, image in zip(rows, images, strict=True):
            head = _json(row)
            writer.write(_HEAD.pack(len(head)) + head + encode_png(image))
        writer.close()


def read_shard(path: epath.Path, places: range | None = None) -> Iterator[tuple[Row, np.ndarray]]:
    """The rows with their images, in order; those at some places of the shard alone, if they are given.

    Raises:
      UserError: a damaged file.
    """
    try:
        records = _read_tar(path) if path.suffix == f".{TAR}" else _read_records(path)
        for place, (row, data) in enumerate(records):
            # Decoding is what takes time.
            if places is None or place in places:
                yield row, decode_png(data)
    except (tarfile.TarError, ValueError, OSError, struct.error, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and give the command again") from None


def _read_tar(path: epath.Path) -> Iterator[tuple[Row, bytes]]:
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
        data: dict[str, bytes] = {}
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            data[member.name.rpartition(".")[2]] = content.read()
            if len(data) == 3:
                yield json.loads(data["json"]), data["png"]
                data = {}


def _read_records(path: epath.Path) -> Iterator[tuple[Row, bytes]]:
    from array_record.python.array_record_module import ArrayRecordReader

    with files.fetched(path) as local:
        reader = ArrayRecordReader(str(local))
        try:
            for number in range(reader.num_records()):
                (record,) = reader.read([number])
                size = _HEAD.unpack_from(record)[0]
                yield json.loads(record[_HEAD.size : _HEAD.size + size]), record[_HEAD.size + size :]
        finally:
            reader.close()


def _json(row: Row) -> bytes:
    return json.dumps(dict(row), ensure_ascii=False).encode()
