"""Text that cannot be encoded, and captions that are not there, in every source and every kind of metadata."""

import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from scaling_dit.curation import sidecar
from scaling_dit.data import text
from scaling_dit.data.captions import CaptionPolicy
from scaling_dit.data.damage import Damage, DamagedRecord
from scaling_dit.data.sources import create_raw_source
from scaling_dit.data.sources.fields import CaptionFields, lookup, plain
from scaling_dit.files import to_json
from tests.support.image_sets import picture

HALF = "\ud83d"
# What a record says, and what is kept of it.
TITLES = {
    "half": (f"nice {HALF}", "nice \ufffd"),
    "other half": ("\ude00 nice", "\ufffd nice"),
    "two halves in the wrong order": ("\ude00\ud83d", "\ufffd\ufffd"),
    "whole": ("nice \U0001f600", "nice \U0001f600"),
}


def written_folder(folder, records):
    for number, _ in enumerate(records):
        (folder / f"{number}.png").write_bytes(picture(number))
    rows = [
        {"file_name": f"{n}.png", "text": record.pop("caption"), **record} for n, record in enumerate(records)
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"folder:{folder}", {}


def written_tar(folder, records):
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, record in enumerate(records):
            for ending, data in (("png", picture(number)), ("json", json.dumps(record).encode())):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return f"webdataset:{folder}/0.tar", {"alt_fields": ("caption",)}


def strings(values):
    """A column of text that Arrow does not check, the halves as bytes that are no UTF-8."""
    data = [value.encode("utf-8", "surrogatepass") for value in values]
    return pc.cast(pa.array(data, pa.binary()), options=pc.CastOptions(pa.string(), allow_invalid_utf8=True))


def written_parquet(folder, records):
    columns = {"image": pa.array([{"bytes": picture(n), "path": None} for n in range(len(records))])}
    columns |= {name: strings([record[name] for record in records]) for name in records[0]}
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return f"parquet:{folder}/a.parquet", {"alt_fields": ("caption",)}


SOURCES = [written_folder, written_tar, written_parquet]


@pytest.mark.parametrize("write", SOURCES)
@pytest.mark.parametrize("case", TITLES)
def test_metadata_that_cannot_be_encoded_are_replaced(tmp_path, write, case):
    given, kept = TITLES[case]
    name, fields = write(tmp_path, [{"caption": f"a {n}", "title": given} for n in range(3)])
    source = create_raw_source(name, **fields)
    found = list(source.samples(0))
    assert [sample.captions for sample in found] == [(f"a {n}",) for n in range(3)]
    for sample in found:
        to_json(sample.metadata).encode()
        # Bytes that are no UTF-8 are replaced one by one, as three.
        assert sample.metadata["title"].replace("\ufffd\ufffd\ufffd", "\ufffd") == kept


@pytest.mark.parametrize("write", SOURCES)
@pytest.mark.parametrize("case", ["half", "other half", "two halves in the wrong order"])
def test_a_caption_that_cannot_be_encoded_is_one_damaged_record(tmp_path, write, case):
    name, fields = write(tmp_path, [{"caption": TITLES[case][0] if n == 1 else f"a {n}"} for n in range(3)])
    found = list(create_raw_source(name, **fields).samples(0))
    (fault,) = [sample for sample in found if isinstance(sample, DamagedRecord)]
    assert fault.kind == "bad_text" and len(found) == 3
    to_json([fault.where, fault.what]).encode()


def test_keys_and_values_at_any_depth():
    value = {f"a{HALF}": [{"b": (HALF, 1, None, True, 1.5)}], "c": "ok"}
    expected = {"a\ufffd": [{"b": ["\ufffd", 1, None, True, 1.5]}], "c": "ok"}
    assert text.sound_value(value) == expected
    assert plain({f"a{HALF}": [HALF, b"\xff", np.array(["x", HALF])]}) == {
        "a\ufffd": ["\ufffd", "\ufffd", ["x", "\ufffd"]]
    }


def test_damage_that_quotes_such_text_can_be_written(tmp_path):
    fault = DamagedRecord("bad_line", f"a{HALF}.tar at byte 3", f"{HALF} is wrong")
    assert str(fault) == "a\ufffd.tar at byte 3: \ufffd is wrong"
    damage = Damage()
    damage.meet(fault)
    (damage.examples("bad_line")[0].where + str(fault)).encode()


def test_a_json_nested_too_deeply_is_one_damaged_record(tmp_path):
    name, fields = written_tar(tmp_path, [{"caption": "a"}])
    for depth in (100, 600, 950, 5_000, 100_000):
        deep = b'{"caption": "a", "b": ' + b"[" * depth + b"]" * depth + b"}"
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            for ending, data in (("png", picture(0)), ("json", deep)):
                member = tarfile.TarInfo(f"{0}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        (found,) = create_raw_source(name, **fields).samples(0)
        if depth == 100:
            assert found.captions == ("a",) and found.metadata["b"]
        elif isinstance(found, DamagedRecord) or depth > 1000:
            assert found.kind == "bad_json"


def test_a_side_car_of_captions(tmp_path):
    lines = [
        {"key": "a", "captions": [{"text": f"cut {HALF}", "kind": "long", "score": None}]},
        {
            "key": "b",
            "captions": [
                {"text": None, "kind": "long", "score": 1},
                {"text": "x", "kind": "long", "score": 1},
            ],
        },
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    data += (
        b'{"key": "c", "captions": [{"text": "caf\xc3\xa9 \xe2\x80\xa8 x", "kind": "alt", "score": 0}]}\n\n'
    )
    (tmp_path / "0.tar.captions.jsonl").write_bytes(data)
    found = sidecar.read_captions(tmp_path, "0.tar")
    assert {key: [made.text for made in given] for key, given in found.items()} == {
        "a": ["cut \ufffd"],
        "b": ["x"],
        "c": ["café \u2028 x"],
    }
    for bad in (b"\xff", b'"\\ud83d', b"[" * 100_000):
        (tmp_path / "0.tar.captions.jsonl").write_bytes(b'{"key": ' + bad + b"\n")
        with pytest.raises(sidecar.UserError, match="line 1 is no JSON"):
            sidecar.read_captions(tmp_path, "0.tar")
    os.remove(tmp_path / "0.tar.captions.jsonl")
    os.mkfifo(tmp_path / "0.tar.captions.jsonl")
    with pytest.raises(sidecar.UserError, match="is a pipe"):
        sidecar.read_captions(tmp_path, "0.tar")


def test_the_caption_shown_can_be_encoded_whatever_the_source():
    shown = CaptionPolicy().choose({"captions": [f"a {HALF}"], "key": "a"}, np.random.default_rng(0))
    assert shown == "a \ufffd"


# Captions that are not there


@pytest.mark.parametrize(
    "value, expected",
    [
        (["a cat", None, None], ("a cat",)),
        ([None, "a dog", float("nan")], ("a dog",)),
        (np.array(["a", None, b"b"], object), ("a", "b")),
        (("a", " ", None), ("a",)),
    ],
)
def test_a_null_among_captions_is_left_out(value, expected):
    captions, kinds = CaptionFields(("text",), ("more",), ()).read({"text": value, "more": None}, "here")
    assert captions == expected and kinds == ("alt",) * len(expected)


@pytest.mark.parametrize("value", [[None, None], [], [float("nan")], [None, " "]])
def test_nothing_but_nulls_is_an_empty_caption(value):
    with pytest.raises(DamagedRecord) as error:
        CaptionFields(("text",), (), ()).read({"text": value}, "here")
    assert error.value.kind == "empty_caption"


def test_a_null_field_inside_a_list_of_records():
    record = {"captions": [{"text": "a"}, {"text": None}, {}, {"text": "b"}]}
    assert lookup(record, "captions/text") == ["a", "b"]
    assert lookup({"captions": [{"other": "a"}]}, "captions/text") is None
    assert CaptionFields(("captions/text",), (), ()).read(record, "here")[0] == ("a", "b")


@pytest.mark.parametrize(
    "line, captions, kinds",
    [
        ({"texts": ["a", None, "b"], "kinds": ["alt", None, "long"]}, ("a", "b"), ("alt", "long")),
        ({"texts": [None, "b"], "text": "c", "kinds": None}, ("b",), ("alt",)),
        ({"texts": None, "text": "c", "kinds": ["long"]}, ("c",), ("long",)),
        ({"texts": ["a"], "text": None}, ("a",), ("alt",)),
    ],
)
def test_nulls_in_a_folder(tmp_path, line, captions, kinds):
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", **line}))
    (sample,) = create_raw_source(f"folder:{tmp_path}").samples(0)
    assert (sample.captions, sample.kinds) == (captions, kinds)
