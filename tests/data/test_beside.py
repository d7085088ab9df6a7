"""Conditions that stand beside images: in a folder, in tars and in Parquet files, and what is damaged about them."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.sources import beside, create_raw_source, create_source
from scaling_dit.errors import UserError

SIDE = 12
COUNT = 4
FIELDS = {"image_size": SIDE, "held_out_fraction": 0.0, "conditions": ("edit", "inpaint+mask")}
PARTS = ("edit", "inpaint", "inpaint.mask")


def array(number, part):
    """What the pixels of a file are: no two alike; a mask whose left half is to be generated."""
    if part.endswith("mask"):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[:, : SIDE // 2] = 255
        return mask
    return np.random.default_rng([number, len(part)]).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def files_of(number, spoil=None):
    """Part -> file; `spoil` maps (number, part) to other bytes, or None for no such file."""
    found = {part: png(array(number, part)) for part in ("image", *PARTS)}
    for (row, part), data in (spoil or {}).items():
        if row == number:
            found[part] = data
    return {part: data for part, data in found.items() if data is not None}


def write_folder(folder, spoil=None):
    lines = []
    for number in range(COUNT):
        line = {"file_name": f"{number}.png", "text": f"number {number}"}
        for part, data in files_of(number, spoil).items():
            name = f"{number}.png" if part == "image" else f"{part}/{number}.png"
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
            if part != "image":
                line[part.replace(".", "_") + "_file_name"] = name
        lines.append(json.dumps(line))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return f"folder:{folder}"


def write_tar(folder, spoil=None):
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(COUNT):
            members = {f"{number}.txt": f"number {number}".encode()}
            for part, data in files_of(number, spoil).items():
                members[f"{number}.png" if part == "image" else f"{number}.{part}.png"] = data
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return f"webdataset:{folder}/*.tar"


def write_parquet(folder, spoil=None):
    rows = [files_of(number, spoil) for number in range(COUNT)]
    columns = {
        part.replace(".", "_"): [{"bytes": row.get(part), "path": "x.png"} for row in rows]
        for part in ("image", *PARTS)
    }
    table = pa.table(columns | {"text": [f"number {number}" for number in range(COUNT)]})
    pq.write_table(table, folder / "0.parquet")
    return f"parquet:{folder}/*.parquet"


WRITERS = {"folder": write_folder, "webdataset": write_tar, "parquet": write_parquet}


@pytest.mark.parametrize("writer", WRITERS)
def test_records_carry_the_conditions_beside_their_images(writer, tmp_path):
    source = create_source(WRITERS[writer](tmp_path), **FIELDS)
    assert len(source) == COUNT
    for number in range(COUNT):
        record = source[number]
        np.testing.assert_array_equal(record["image"], array(number, "image"))
        assert set(record["conditions"]) == {"edit", "inpaint"}
        np.testing.assert_array_equal(record["conditions"]["edit"], array(number, "edit"))
        np.testing.assert_array_equal(record["conditions"]["inpaint"][..., :3], array(number, "inpaint"))
        np.testing.assert_array_equal(record["conditions"]["inpaint"][..., 3], array(number, "inpaint.mask"))
        assert record["captions"] == (f"number {number}",)


@pytest.mark.parametrize("writer", WRITERS)
def test_without_the_field_they_are_other_files(writer, tmp_path):
    source = create_source(WRITERS[writer](tmp_path), image_size=SIDE, held_out_fraction=0.0)
    record = source[1]
    assert "conditions" not in record
    np.testing.assert_array_equal(record["image"], array(1, "image"))


@pytest.mark.parametrize("writer", WRITERS)
def test_one_that_is_missing_of_another_size_or_no_image_is_a_damaged_record(writer, tmp_path):
    spoil = {
        (0, "inpaint.mask"): None,
        (1, "edit"): png(np.zeros((SIDE, SIDE + 1, 3), np.uint8)),
        (2, "inpaint"): b"no image",
    }
    name = WRITERS[writer](tmp_path, spoil)
    source = create_source(name, **FIELDS, max_damaged=9)
    for number in range(COUNT):
        np.testing.assert_array_equal(source[number]["image"], array(3, "image"))
    assert source.damage.counts() == {
        "bad_condition": 1, "missing_condition": 1, "unreadable_image": 1,
    }  # fmt: skip
    (fault,) = source.damage.examples("bad_condition")
    assert "edit has 13x12 pixels, its image 12x12" in fault.what
    assert "no inpaint mask" in source.damage.examples("missing_condition")[0].what
    with pytest.raises(UserError, match="no inpaint mask"):
        create_source(name, **FIELDS)[0]


def test_they_are_scaled_and_cropped_as_their_image(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    mask = np.zeros((20, 30), np.uint8)
    mask[:, 15:] = 255
    spoil = {
        (0, "image"): png(image),
        (0, "edit"): png(image),
        (0, "inpaint"): png(image),
        (0, "inpaint.mask"): png(mask),
    }
    record = create_source(write_folder(tmp_path, spoil), **FIELDS)[0]
    np.testing.assert_array_equal(record["image"], record["conditions"]["edit"])
    # The centre 20x20 is shown, of which the right half is masked, and the column that has anything of it.
    wanted = array(0, "inpaint.mask")[:, ::-1].copy()
    wanted[:, SIDE // 2 - 1] = 255
    np.testing.assert_array_equal(record["conditions"]["inpaint"][..., 3], wanted)


def test_a_scaled_mask_covers_every_pixel_that_it_touches(tmp_path):
    mask = np.zeros((36, 36), np.uint8)
    # A third of one row and column of the smaller image.
    mask[13, :], mask[:, 25] = 255, 255
    spoil = {(0, part): png(np.zeros((36, 36, 3), np.uint8)) for part in ("image", "edit", "inpaint")}
    record = create_source(write_folder(tmp_path, spoil | {(0, "inpaint.mask"): png(mask)}), **FIELDS)[0]
    found = record["conditions"]["inpaint"][..., 3] > 0
    assert found[4].all() and found[:, 8].all() and not found[:3, :7].any()


def test_the_index_of_a_tar_is_kept_apart_for_each_choice(tmp_path):
    name = write_tar(tmp_path)
    create_source(name, image_size=SIDE)
    create_source(name, **FIELDS)
    names = {path.name for path in tmp_path.glob("*.index")}
    assert names == {"0.tar.index", "0.tar.edit.inpaint.inpaint.mask.index"}
    # The kept one is read.
    assert set(create_source(name, **FIELDS)[2]["conditions"]) == {"edit", "inpaint"}


def test_a_file_outside_of_the_folder_is_refused(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "metadata.jsonl"
    path.write_text(path.read_text().replace('"edit/0.png"', '"../0.png"'))
    with pytest.raises(UserError, match=r"edit_file_name '../0.png' leaves the folder"):
        create_source(f"folder:{tmp_path}", **FIELDS)[0]


def test_samples_of_a_shard_have_the_files(tmp_path):
    source = create_raw_source(write_tar(tmp_path), conditions=("edit",))
    samples = list(source.samples(0))
    assert [set(sample.conditions) for sample in samples] == [{"edit"}] * COUNT
    assert not any(isinstance(sample, DamagedRecord) for sample in samples)


def test_names_are_checked():
    assert beside.parse(("a", "b+mask"))[1].parts == ("b", "b.mask")
    for entries, message in (
        (("a", "a+mask"), "names 'a' twice"),
        (("a+masks",), "has 'a\\+masks'; write the name of a condition"),
        (("a.b",), "has 'a.b'"),
        ((3,), "has 3"),
    ):
        with pytest.raises(UserError, match=message):
            beside.parse(entries)
