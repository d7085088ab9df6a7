"""Values of columns that are not used: whatever they hold, the images and captions of their rows are read."""

import datetime
import decimal
import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.sources import create_raw_source, create_source
from scaling_dit.data.sources.image_files import scan
from tests.support.image_sets import SIZE, picture

ROWS = 6


def unchecked(values, kind=pa.string()):  # noqa: B008
    """A column of text that may hold bytes that are no UTF-8."""
    return pc.cast(pa.array(values, pa.binary()), options=pc.CastOptions(kind, allow_invalid_utf8=True))


def nested(values):
    return pa.ListArray.from_arrays(list(range(len(values) + 1)), unchecked(values))


BAD = [b"ok", b"caf\xe9", None, b"\xff\xfe", b"", b"\xed\xa0\xbd"]
FAR = 2**62
# Columns of values that have no form in Python, in JSON, or at all.
COLUMNS = {
    "string": unchecked(BAD),
    "large_string": unchecked(BAD, pa.large_string()),
    "list": nested(BAD),
    "struct": pa.StructArray.from_arrays([unchecked(BAD), pa.array(range(ROWS))], ["text", "number"]),
    "map": pa.MapArray.from_arrays(
        list(range(ROWS + 1)), unchecked([b"key"] * ROWS), unchecked([b"\xff"] * ROWS)
    ),
    "dictionary": unchecked([value or b"" for value in BAD]).dictionary_encode(),
    "timestamp": pa.array([FAR] * ROWS, pa.timestamp("us")),
    "nanoseconds": pa.array([FAR + 1] * ROWS, pa.timestamp("ns")),
    "zone": pa.array([0] * ROWS, pa.timestamp("s", tz="No/Where")),
    "date": pa.array([2**31 - 1] * ROWS, pa.int32()).view(pa.date32()),
    "time": pa.array([2**60] * ROWS, pa.int64()).view(pa.time64("us")),
    "duration": pa.array([FAR] * ROWS, pa.duration("us")),
    "decimal": pa.array([decimal.Decimal("1.50")] * ROWS),
    "half": pa.array(np.array([np.nan, np.inf, 1, 2, 3, 4], np.float16)),
    "days": pa.array([datetime.date(2026, 1, 1)] * ROWS),
    "binary": pa.array([b"\xff\x00"] * ROWS),
    "null": pa.nulls(ROWS),
    "uuid": pa.array([bytes(16)] * ROWS, pa.binary(16)),
    "interval": pa.array([(1, 2, 3)] * ROWS, pa.month_day_nano_interval()),
}
WRITABLE = [name for name in COLUMNS if name != "interval"]


def write(path, /, **columns):
    images = pa.array([{"bytes": picture(n), "path": None} for n in range(ROWS)])
    texts = pa.array([f"number {n}" for n in range(ROWS)])
    pq.write_table(pa.table({"image": images, "text": texts, **columns}), path)


@pytest.mark.parametrize("name", WRITABLE)
def test_a_column_that_is_not_used_costs_at_most_its_value(tmp_path, name):
    write(
        tmp_path / "a.parquet",
        before=pa.array(range(ROWS)),
        other=COLUMNS[name],
        after=pa.array(["x"] * ROWS),
    )
    found = list(create_raw_source(f"parquet:{tmp_path}/a.parquet").samples(0))
    for row, sample in enumerate(found):
        assert (sample.image, sample.captions) == (picture(row), (f"number {row}",))
        assert sample.metadata["before"] == row and sample.metadata["after"] == "x"
        json.dumps(sample.metadata, ensure_ascii=False).encode()
    assert len(found) == ROWS
    source = create_source(f"parquet:{tmp_path}/a.parquet", image_size=SIZE, held_out_fraction=0.0)
    assert [source[row]["captions"] for row in range(ROWS)] == [(f"number {row}",) for row in range(ROWS)]


def test_text_that_is_not_utf8_is_replaced_at_any_depth(tmp_path):
    names = ("string", "large_string", "list", "struct", "dictionary")
    write(tmp_path / "a.parquet", **{name: COLUMNS[name] for name in names})
    found = list(create_raw_source(f"parquet:{tmp_path}/a.parquet").samples(0))
    for name, of in {
        "string": lambda text: text,
        "large_string": lambda text: text,
        "list": lambda text: [text],
        "struct": lambda text: {"text": text, "number": 1},
        "dictionary": lambda text: text,
    }.items():
        assert found[1].metadata[name] == of("caf\ufffd"), name


@pytest.mark.parametrize("kind", ["string", "large_string", "list", "dictionary"])
def test_a_caption_that_is_not_utf8_is_one_damaged_record(tmp_path, kind):
    values = [f"number {n}".encode() for n in range(ROWS)]
    values[2] = b"caf\xe9"
    texts = {
        "string": unchecked(values),
        "large_string": unchecked(values, pa.large_string()),
        "list": nested(values),
        "dictionary": unchecked(values).dictionary_encode(),
    }[kind]
    write(tmp_path / "a.parquet", caption=texts)
    name, fields = f"parquet:{tmp_path}/a.parquet", {"alt_fields": ("caption",)}
    assert scan(name, **fields).counts() == {"bad_text": 1}
    found = list(create_raw_source(name, **fields).samples(0))
    assert isinstance(found[2], DamagedRecord) and found[3].captions == ("number 3",)


@pytest.mark.parametrize("name", ["timestamp", "struct", "decimal", "null", "time"])
def test_a_caption_of_another_type_is_a_damaged_record(tmp_path, name):
    write(tmp_path / "a.parquet", caption=COLUMNS[name])
    counts = scan(f"parquet:{tmp_path}/a.parquet", alt_fields=("caption",)).counts()
    assert counts == {"missing_caption" if name == "null" else "bad_text": ROWS}


def test_images_beside_a_path_that_is_no_text_and_in_other_types(tmp_path):
    data = [picture(n) for n in range(ROWS)]
    kinds = {
        "path": pa.StructArray.from_arrays([pa.array(data), unchecked([b"\xff"] * ROWS)], ["bytes", "path"]),
        "more": pa.StructArray.from_arrays([pa.array(range(ROWS)), pa.array(data)], ["height", "bytes"]),
        "large": pa.array(data, pa.large_binary()),
        "string": unchecked(data),
        "dictionary": pa.array(data).dictionary_encode(),
    }
    write(tmp_path / "a.parquet", **kinds)
    for name in kinds:
        samples = create_raw_source(f"parquet:{tmp_path}/a.parquet", image_field=name).samples(0)
        assert [sample.image for sample in samples] == data, name
    assert scan(f"parquet:{tmp_path}/a.parquet", image_field="text").counts() == {"unreadable_image": ROWS}


def test_a_damaged_page_of_a_column_that_is_not_used_costs_its_values(tmp_path):
    path = tmp_path / "a.parquet"
    images, numbers = pa.array([picture(n) for n in range(ROWS)]), list(range(ROWS))
    table = pa.table({"image": images, "text": ["a"] * ROWS, "bad": numbers, "good": numbers})
    pq.write_table(table, path, use_dictionary=False, write_page_checksum=True)
    place = pq.read_metadata(path).row_group(0).column(2)
    data = bytearray(path.read_bytes())
    data[place.data_page_offset + place.total_compressed_size - 3] ^= 0xFF
    path.write_bytes(data)
    found = list(create_raw_source(f"parquet:{path}").samples(0))
    assert [sample.metadata for sample in found] == [{"text": "a", "good": row} for row in range(ROWS)]


def test_two_columns_of_one_name(tmp_path):
    images, texts = pa.array([picture(n) for n in range(ROWS)]), pa.array(["a"] * ROWS)
    twice = pa.Table.from_arrays([images, texts, texts, texts], ["image", "text", "other", "other"])
    pq.write_table(twice, tmp_path / "a.parquet")
    found = list(create_raw_source(f"parquet:{tmp_path}/a.parquet").samples(0))
    assert [sample.metadata for sample in found] == [{"text": "a"}] * ROWS
    twice = pa.Table.from_arrays([images, texts, texts], ["image", "text", "text"])
    pq.write_table(twice, tmp_path / "a.parquet")
    (fault,) = scan(f"parquet:{tmp_path}/a.parquet").examples("bad_columns")
    assert fault.what.startswith("2 columns 'text'")
