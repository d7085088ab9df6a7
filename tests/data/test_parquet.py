"""Parquet files in the layout of Hugging Face's image datasets, made by pyarrow: reading, and damage of each kind."""

import concurrent.futures
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.sources import create_source, parquet, source_fields
from scaling_dit.data.sources.image_files import scan
from scaling_dit.errors import UserError
from tests.support.image_sets import (
    SIZE,
    TOO_LARGE,
    UNREADABLE,
    check_same_rows_for_any_split,
    colour,
    picture,
)

FILES, ROWS, GROUP = 3, 50, 8
FIELDS = {"image_size": SIZE, "held_out_fraction": 0.0, "max_pixels": 10_000, "max_damaged": 100}
# File and row -> the kind of damage planted there.
PLAN = {
    (0, 1): "missing_image", (0, 2): "missing_image", (0, 40): "missing_caption", (1, 0): "unreadable_image",
    (1, 1): "unreadable_image", (1, 2): "unreadable_image", (1, 20): "too_large", (2, 7): "empty_caption",
    (2, 8): "empty_caption",
}  # fmt: skip


def rows_of(file, plan):
    """The rows of a file as the Image feature of Hugging Face's datasets stores them."""
    for row in range(ROWS):
        number = file * ROWS + row
        kind = plan.get((file, row))
        data = {"unreadable_image": UNREADABLE[row % 3], "too_large": TOO_LARGE}.get(kind, picture(number))
        image = {"bytes": data, "path": f"{number}.png"}
        if kind == "missing_image":
            image = {"bytes": None, "path": "elsewhere.png"} if row % 2 else None
        text = {"missing_caption": None, "empty_caption": " "}.get(kind, f"number {number}")
        yield {"image": image, "text": text, "blip": [f"synthetic {number}"] * 5, "width": SIZE, "nsfw": None}


SCHEMA = pa.schema(
    {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "text": pa.string(),
        "blip": pa.list_(pa.string()),
        "width": pa.int32(),
        "nsfw": pa.string(),
    }
)


def write(folder, plan):
    for file in range(FILES):
        table = pa.Table.from_pylist(list(rows_of(file, plan)), SCHEMA)
        path = folder / f"train-{file:05d}-of-{FILES:05d}.parquet"
        pq.write_table(table, path, row_group_size=GROUP, write_page_checksum=True)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    write(folder, PLAN)
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    write(folder, {})
    return folder


def opened(folder, **fields):
    return create_source(f"parquet:{folder}/*.parquet", **(FIELDS | fields))


def test_every_row_is_read_with_what_belongs_to_it(sound):
    source = opened(sound, synthetic_fields=("blip",))
    assert source.shards() == tuple(f"train-{file:05d}-of-00003.parquet" for file in range(FILES))
    assert len(source) == FILES * ROWS
    for file in range(FILES):
        for row, sample in enumerate(source.samples(file)):
            number = file * ROWS + row
            assert sample.key == f"train-{file:05d}-of-00003.parquet/{row}"
            assert sample.image == picture(number)
            assert sample.captions == (f"number {number}", *[f"synthetic {number}"] * 5)
            assert sample.metadata["width"] == SIZE
            assert json.loads(json.dumps(sample.metadata)) == sample.metadata
    record = source[77]
    assert (record["image"] == colour(77)).all() and record["kinds"] == ("alt", *["synthetic"] * 5)


def test_images_as_plain_bytes(tmp_path):
    table = pa.table(
        {"jpg": [picture(number) for number in range(9)], "caption": [f"number {n}" for n in range(9)]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    source = opened(tmp_path, image_field="jpg", alt_fields=("caption",))
    assert all((source[n]["image"] == colour(n)).all() for n in range(9))


def test_damage_is_counted_by_kind_and_stood_in_for(planted):
    kinds = list(PLAN.values())
    expected = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    source = opened(planted)
    for _ in range(2):
        keys = {source[i]["key"] for i in range(len(source))}
    names = source.shards()
    assert keys == {
        f"{names[file]}/{row}" for file in range(FILES) for row in range(ROWS) if (file, row) not in PLAN
    }
    assert source.damage.counts() == expected
    assert scan(f"parquet:{planted}/*.parquet", max_pixels=10_000).counts() == expected
    (fault,) = source.damage.examples("too_large")
    assert fault.where == f"{planted}/{names[1]} row 20"
    (fault,) = source.damage.examples("missing_caption")
    assert fault.what == "field 'text' is null"
    strict = opened(planted, max_damaged=3)
    with pytest.raises(UserError, match=r"parquet row 0: .*more than config.source.max_damaged=3"):
        [strict[i] for i in range(len(strict))]


def test_any_split_over_processes_reads_the_same_rows(planted):
    check_same_rows_for_any_split(lambda: opened(planted, groups=2))


def test_several_threads_share_the_cache(sound):
    source = opened(sound, groups=2)
    order = [number * 37 % len(source) for number in range(len(source))]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        records = list(pool.map(source.__getitem__, order))
    assert [int(record["captions"][0].split()[1]) for record in records] == order
    assert source._group.cache_info().maxsize == 2


def test_a_file_that_is_cut_or_lacks_a_column_is_one_damaged_record(sound, tmp_path):
    write(tmp_path, {})
    names = sorted(path.name for path in tmp_path.iterdir())
    data = (tmp_path / names[0]).read_bytes()
    (tmp_path / names[0]).write_bytes(data[: len(data) // 2])
    pq.write_table(pa.table({"image": [picture(1)], "txt": ["a"]}), tmp_path / names[2])
    source = opened(tmp_path)
    assert source.damage.counts() == {"bad_columns": 1, "unreadable_file": 1}
    assert {source[i]["key"] for i in range(len(source))} == {f"{names[1]}/{row}" for row in range(ROWS)}
    (fault,) = source.damage.examples("bad_columns")
    assert fault.what == "no column 'text'; did you mean 'txt'?"
    with pytest.raises(
        UserError, match=f"{names[0]}: no whole Parquet file: .*set config.source.max_damaged=N"
    ):
        opened(tmp_path, max_damaged=0)


def test_a_page_whose_checksum_is_wrong_costs_its_row_group(sound, tmp_path):
    write(tmp_path, {})
    path = tmp_path / "train-00001-of-00003.parquet"
    data = bytearray(path.read_bytes())
    # Image bytes of rows 16 to 23.
    place = pq.read_metadata(path).row_group(2).column(0)
    data[place.data_page_offset + place.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(data)
    source = opened(tmp_path)
    found = list(source.samples(1))
    broken = [row for row, sample in enumerate(found) if isinstance(sample, DamagedRecord)]
    assert broken == list(range(16, 24))
    assert {found[row].kind for row in broken} == {"unreadable_row"}
    assert "row group 2 cannot be read" in found[16].what


def test_a_failing_store_is_no_damage(sound, monkeypatch):
    source = opened(sound)

    def broken(self, *args, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(type(source._shard(0).rows[0]), "open", broken)
    with pytest.raises(UserError, match="cannot read: .*Input/output error"):
        source[0]
    assert not source.damage.counts()


def test_names_and_fields_are_checked(sound, monkeypatch):
    with pytest.raises(UserError, match="names no files; write parquet:GLOB, for example"):
        create_source("parquet")
    with pytest.raises(UserError, match="no file matches"):
        create_source("parquet:/nowhere/*.parquet")
    with pytest.raises(UserError, match="source.groups is 0; it must be at least 1"):
        opened(sound, groups=0)
    assert {"image_field", "alt_fields", "synthetic_fields", "long_fields", "groups"} < set(
        source_fields("parquet:x")
    )
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs the extra parquet: pip install 'scaling-dit\[parquet\]'"):
        parquet.ParquetSource(f"{sound}/*.parquet")
