"""Tars in img2dataset's layout, made with tarfile: reading, the kept index, and every kind of damage."""

import io
import json
import logging
import os
import tarfile

import numpy as np
import pytest
from etils import epath

from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.sources import create_raw_source, create_source, source_fields, tar_index
from scaling_dit.data.sources.image_files import key_hash, scan
from scaling_dit.data.sources.webdataset import WebdatasetSource, matching
from scaling_dit.errors import UserError
from tests.support.image_sets import (
    SIZE,
    TOO_LARGE,
    UNREADABLE,
    check_same_rows_for_any_split,
    colour,
    picture,
)

TARS, PER_TAR = 3, 60
# Sample of a tar -> the kind of damage planted there; each kind has another count.
PLAN = {
    (0, 3): "missing_image", (0, 9): "missing_caption", (0, 20): "bad_json", (0, 21): "bad_json",
    (0, 59): "empty_caption",
    (1, 0): "unreadable_image", (1, 1): "unreadable_image", (1, 2): "unreadable_image", (1, 30): "too_large",
    (1, 31): "bad_text", (1, 40): "missing_caption", (2, 5): "duplicate_key", (2, 6): "duplicate_key",
    (2, 7): "duplicate_key", (2, 8): "duplicate_key", (2, 30): "missing_image", (2, 31): "missing_image",
    (2, 40): "empty_caption", (2, 41): "bad_text", (2, 42): "bad_text", (2, 43): "bad_text",
}  # fmt: skip


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def members(shard, row, kind):
    """Ending -> bytes of one sample, as img2dataset writes them, with damage of a kind."""
    number = shard * PER_TAR + row
    described = {"caption": f"number {number}", "synthetic": [f"synthetic {number}"] * 5, "width": SIZE}
    ending = "jpg" if kind == "duplicate_key" else ("jpg", "png", "webp", "jpeg")[row % 4]
    held = {
        # The file tells its format, not the name.
        ending: picture(number),
        "txt": f"number {number}".encode(),
        "json": json.dumps(described).encode(),
    }
    match kind:
        case "missing_image":
            del held[ending]
        case "missing_caption":
            del held["txt"]
            held["json"] = b'{"width": 8}'
            if row % 2:
                del held["json"]
        case "bad_json":
            held["json"] = (b"{broken", b"[1]")[row % 2]
        case "bad_text":
            held["txt"] = b"\xff\xfe caption"
        case "empty_caption":
            held["txt"] = b" \n"
        case "unreadable_image":
            held[ending] = UNREADABLE[row % 3]
        case "too_large":
            held[ending] = TOO_LARGE
    return held


def write(folder, plan, style=tarfile.PAX_FORMAT):
    """The tars; returns the keys of the sound samples with their numbers."""
    sound = {}
    for shard in range(TARS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=style) as tar:
            for row in range(PER_TAR):
                kind = plan.get((shard, row))
                key = f"{shard:05d}{0 if kind == 'duplicate_key' else row:04d}"
                for ending, data in members(shard, row, kind).items():
                    add(tar, f"{key}.{ending}", data)
                if kind is None:
                    sound[f"{shard:05d}/{key}"] = shard * PER_TAR + row
    return sound


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(folder of tars with all damage, sound key -> number)."""
    folder = tmp_path_factory.mktemp("planted")
    return folder, write(folder, PLAN)


FIELDS = {"image_size": SIZE, "held_out_fraction": 0.0, "max_pixels": 10_000, "max_damaged": 100}


def opened(folder, **fields):
    return create_source(f"webdataset:{folder}/*.tar", **(FIELDS | fields))


def expected_counts():
    kinds = list(PLAN.values())
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def test_every_sound_sample_is_read_with_what_belongs_to_it(planted):
    folder, sound = planted
    source = opened(folder, synthetic_fields=("synthetic",), long_fields=("long",))
    found = {}
    for shard in range(TARS):
        for sample in source.samples(shard):
            if not isinstance(sample, DamagedRecord):
                found[sample.key] = sample
    # Not decoded here; a synthetic caption is left.
    usable = (
        "unreadable_image",
        "too_large",
        "empty_caption",
    )
    assert found.keys() == sound.keys() | {
        f"{s:05d}/{s:05d}{r:04d}" for (s, r), kind in PLAN.items() if kind in usable
    }
    for key, number in sound.items():
        sample = found[key]
        assert sample.captions == (f"number {number}", *[f"synthetic {number}"] * 5)
        assert sample.kinds == ("alt", *["synthetic"] * 5)
        assert sample.metadata["width"] == SIZE and sample.metadata["caption"] == f"number {number}"
        assert sample.image == picture(number)
    assert source.shards() == ("00000.tar", "00001.tar", "00002.tar")
    # Only damage that is found on opening.
    assert not source.damage.counts().keys() & {"bad_json", "unreadable_image"}


def test_records_are_decoded_and_carry_their_kinds(planted):
    folder, sound = planted
    source = opened(folder, alt_fields=("caption",), synthetic_fields=("synthetic",))
    keys = {source[i]["key"] for i in range(len(source))}
    # The txt is not read here.
    assert keys == sound.keys() | {
        f"{s:05d}/{s:05d}{r:04d}" for (s, r), kind in PLAN.items() if kind in ("bad_text", "empty_caption")
    }
    record = source[10]
    number = int(record["captions"][0].split()[1])
    assert record["kinds"] == ("alt", *["synthetic"] * 5)
    assert (record["image"] == colour(number)).all() and record["image"].shape == (SIZE, SIZE, 3)


def test_damage_is_counted_by_kind_and_stood_in_for(planted):
    folder, sound = planted
    source = opened(folder)
    # Met twice, counted once.
    for _ in range(2):
        assert {source[i]["key"] for i in range(len(source))} == sound.keys()
    assert source.damage.counts() == expected_counts()
    assert scan(f"webdataset:{folder}/*.tar", max_pixels=10_000).counts() == expected_counts()
    for fault, data in zip(
        sorted(source.damage.examples("unreadable_image"), key=lambda fault: int(fault.where.split()[-1])),
        UNREADABLE,
        strict=True,
    ):
        path, offset = fault.where.split(" at byte ")
        with open(path, "rb") as file:
            file.seek(int(offset))
            assert file.read(len(data)) == data
    assert "to replace up to" in refused(folder, max_damaged=0)
    assert "more than config.source.max_damaged=5 records are damaged" in refused(folder, max_damaged=5)


def refused(folder, pattern="*.tar", **fields):
    with pytest.raises(UserError) as error:
        create_source(f"webdataset:{folder}/{pattern}", **(FIELDS | fields))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_any_split_over_processes_reads_the_same_rows(planted):
    check_same_rows_for_any_split(lambda: opened(planted[0]))


def test_the_split_follows_from_the_keys(planted):
    folder, _ = planted
    train = opened(folder, held_out_fraction=0.3)
    held_out = train.held_out()
    places = {
        split: {source._shard(s).rows[1].key(r) for s, r in map(source._sample_place, range(len(source)))}
        for split, source in (("train", train), ("held_out", held_out))
    }
    assert not places["train"] & places["held_out"]
    assert {key for key in places["train"] | places["held_out"] if key_hash(key) < 0.3} == places["held_out"]
    assert held_out.damage is train.damage
    few = create_source(f"webdataset:{folder}/00001.tar", **(FIELDS | {"held_out_fraction": 0.3})).held_out()
    assert {few[i]["key"] for i in range(len(few))} <= places["held_out"]


# A tar that is cut or damaged


@pytest.mark.parametrize("style", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_cut_anywhere_keeps_its_complete_samples(tmp_path, style):
    """At each of many places, the samples before it, found with the standard library, are there and no other."""
    write(tmp_path, {}, style)
    whole = (tmp_path / "00000.tar").read_bytes()
    with tarfile.open(tmp_path / "00000.tar") as tar:
        # Key -> end of its last member.
        ends = {}
        for member in tar.getmembers():
            ends[member.name.partition(".")[0]] = member.offset_data + member.size
    end_mark = max(ends.values()) // 512 * 512 + 512
    for cut in [700, *range(3000, end_mark, 9973), end_mark]:
        index = tar_index.build(io.BytesIO(whole[:cut]), "00000")
        complete = [key for key, end in ends.items() if end <= cut]
        if len(complete) == 1:
            # How many members a sample has is known from the samples before it, and there is none.
            complete = []
        assert [key.decode() for key in index.keys] == complete, cut
        ((kind, offset, what),) = index.faults
        assert kind == "truncated_tar" and 0 < offset <= cut and what.startswith("the tar ends")
    assert tar_index.build(io.BytesIO(whole), "00000").faults == ()


def test_a_truncated_tar_is_one_damaged_record_with_file_and_offset(tmp_path):
    sound = write(tmp_path, {})
    with tarfile.open(tmp_path / "00001.tar") as tar:
        # The txt of sample 30.
        member = tar.getmembers()[3 * 30 + 1]
    (tmp_path / "00001.tar").write_bytes((tmp_path / "00001.tar").read_bytes()[: member.offset_data + 4])
    message = refused(tmp_path, max_damaged=0)
    assert f"{tmp_path}/00001.tar at byte {member.offset_data + 4}: the tar ends within member" in message
    assert repr(member.name) in message
    source = opened(tmp_path, max_damaged=1)
    assert source.damage.counts() == {"truncated_tar": 1}
    keys = {source[i]["key"] for i in range(len(source))}
    assert keys == {key for key in sound if not key.startswith("00001/") or int(key[-4:]) < 30}
    (tmp_path / "00002.tar").write_bytes(b"")
    (tmp_path / "00000.tar").write_bytes(b"no tar at all" * 100)
    source = opened(tmp_path)
    assert source.damage.counts() == {"bad_tar": 1, "truncated_tar": 2}


def test_a_header_that_is_none_is_told(tmp_path):
    write(tmp_path, {})
    data = bytearray((tmp_path / "00000.tar").read_bytes())
    with tarfile.open(tmp_path / "00000.tar") as tar:
        # The first member of a sample.
        member = tar.getmembers()[33]
    data[member.offset + 3] ^= 0xFF
    (tmp_path / "00000.tar").write_bytes(data)
    source = opened(tmp_path)
    assert source.damage.counts() == {"bad_tar": 1}
    (fault,) = source.damage.examples("bad_tar")
    assert fault.where == f"{tmp_path}/00000.tar at byte {member.offset}"
    assert len(list(source.samples(0))) == 11 + 1


def test_long_names_folders_and_other_members(tmp_path):
    long = "a folder/" + "x" * 150 + "é"
    for style in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "set.tar", "w", format=style) as tar:
            folder = tarfile.TarInfo("a folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for name in (long, "./short"):
                add(tar, f"{name}.seg.npy", b"other")
                add(tar, f"{name}.PNG", picture(5))
                add(tar, f"{name}.txt", b"number 5")
        source = create_source(f"webdataset:{tmp_path}/set.tar", **FIELDS)
        assert {source[i]["key"] for i in range(len(source))} == {f"set/{long}", "set/short"}


def test_files_that_begin_with_a_byte_order_mark(tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for row in range(2):
            add(tar, f"{row}.png", picture(row))
            add(tar, f"{row}.txt", f"\ufeffnumber {row}".encode())
            add(tar, f"{row}.json", b"\xef\xbb\xbf" + json.dumps({"row": row}).encode())
    (_, sample) = create_raw_source(f"webdataset:{tmp_path}/*.tar").samples(0)
    assert sample.captions == ("number 1",) and sample.metadata == {"row": 1}


# The kept index


def test_the_index_is_kept_checked_and_made_again(tmp_path, monkeypatch):
    write(tmp_path, {})
    first = opened(tmp_path)
    kept = tmp_path / "00000.tar.index"
    data = kept.read_bytes()
    made = []
    build = tar_index.build
    monkeypatch.setattr(tar_index, "build", lambda file, stem, extra: made.append(stem) or build(file, stem))

    def again():
        made.clear()
        source = opened(tmp_path)
        assert [hashes.tolist() for hashes in source._hashes] == [hashes.tolist() for hashes in first._hashes]
        assert kept.read_bytes() == data
        return sorted(made)

    assert again() == []
    # Half written.
    kept.write_bytes(data[:-1])
    assert again() == ["00000"]
    kept.write_bytes(data[:900] + bytes([data[900] ^ 1]) + data[901:])
    assert again() == ["00000"]
    (tmp_path / "00001.tar.index").unlink()
    assert again() == ["00001"]
    with open(tmp_path / "00002.tar", "ab") as file:
        # Another tar than the index is of.
        file.write(bytes(512))
    assert again() == ["00002"]


def test_a_raw_source_opens_one_tar_at_a_time(tmp_path):
    """So that many processes can share the tars of a large set."""
    sound = write(tmp_path, PLAN)
    source = create_raw_source(f"webdataset:{tmp_path}/*.tar")
    assert source.shards() == ("00000.tar", "00001.tar", "00002.tar")
    assert not list(tmp_path.glob("*.index"))
    samples = list(source.samples(1))
    assert [path.name for path in tmp_path.glob("*.index")] == ["00001.tar.index"]
    kinds = [sample.kind for sample in samples if isinstance(sample, DamagedRecord)]
    # Images are not decoded.
    assert kinds == ["bad_text", "missing_caption"]
    assert {key for key in sound if key.startswith("00001/")} <= {
        getattr(sample, "key", "") for sample in samples
    }
    assert not source.damage.counts()
    with pytest.raises(UserError, match="source 'shapes' holds no image files; give folder:, webdataset:"):
        create_raw_source("shapes")


def test_faults_are_kept_with_the_index(planted):
    # The second from the kept indexes.
    counts = [opened(planted[0]).damage.counts() for _ in range(2)]
    assert counts[0] == counts[1] == {"duplicate_key": 4, "missing_caption": 1, "missing_image": 3}


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    write(tmp_path, {})

    def denied(self, data):
        raise PermissionError(13, "Permission denied", os.fspath(self))

    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path(tmp_path)), "write_bytes", denied)
        with caplog.at_level(logging.WARNING, logger="absl"):
            assert len(opened(tmp_path)) == TARS * PER_TAR
    # Once for all tars.
    (message,) = caplog.messages
    assert message == (
        f"indexes of tars cannot be kept in {tmp_path} (Permission denied); set config.source.index_dir"
    )
    assert not list(tmp_path.glob("*.index"))
    opened(tmp_path, index_dir=str(tmp_path / "cache" / "here"))
    assert len(list((tmp_path / "cache/here").glob("*.tar.index"))) == TARS
    assert not list(tmp_path.glob("*.index"))


# Names and fields


def test_patterns(tmp_path):
    for name in ("a/00001.tar", "a/00000.tar", "b/00002.tar", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in matching(f"{tmp_path}/a/*", ".tar")] == ["00000.tar", "00001.tar"]
    assert [path.name for path in matching(f"{tmp_path}/?/0000[02].tar", ".tar")] == [
        "00000.tar",
        "00002.tar",
    ]
    assert [path.name for path in matching(f"{tmp_path}/b/00002.tar", ".tar")] == ["00002.tar"]
    with pytest.raises(UserError, match="no file matches '.*/c/.*'; a pattern such as"):
        matching(f"{tmp_path}/c/*.tar", ".tar")
    (tmp_path / "b/00001.tar").write_bytes(b"")
    with pytest.raises(UserError, match="a/00001.tar and .*b/00001.tar share a name"):
        matching(f"{tmp_path}/*/*.tar", ".tar")


def test_names_and_fields_are_checked(planted):
    with pytest.raises(
        UserError, match="names no files; write webdataset:GLOB, for example webdataset:/data"
    ):
        create_source("webdataset:")
    with pytest.raises(UserError, match="no field 'alt_field'; did you mean 'alt_fields'"):
        opened(planted[0], alt_field=("txt",))
    assert "image_size is 0" in refused(planted[0], image_size=0)
    assert set(source_fields("webdataset:x")) == {
        "image_size", "held_out_fraction", "max_pixels", "max_damaged",
        "alt_fields", "synthetic_fields", "long_fields", "index_dir", "conditions",
    }  # fmt: skip


def test_a_file_that_shrinks_is_no_damaged_record(tmp_path):
    write(tmp_path, {})
    source = opened(tmp_path)
    (tmp_path / "00002.tar").write_bytes(b"")
    with pytest.raises(UserError, match="the file became shorter since it was opened"):
        source[len(source) - 1]
    (tmp_path / "00002.tar").unlink()
    with pytest.raises(UserError, match="00002.tar at byte .*cannot read"):
        source[len(source) - 1]
    assert not source.damage.counts()


def test_texts_are_those_of_the_split(planted):
    folder, sound = planted
    texts = list(opened(folder).texts())
    image_only = [
        s * PER_TAR + r for (s, r), kind in PLAN.items() if kind in ("unreadable_image", "too_large")
    ]
    assert sorted(texts) == sorted(f"number {n}" for n in [*sound.values(), *image_only])
    source = WebdatasetSource(f"{folder}/*.tar", **(FIELDS | {"held_out_fraction": 0.5}))
    assert sorted([*source.texts(), *source.held_out().texts()]) == sorted(texts)


def test_rows_are_spread_by_their_hash():
    from scaling_dit.data.sources.image_files import row_hashes

    hashes = row_hashes("train-00000.parquet", 100_000)
    counts, _ = np.histogram(hashes, bins=20, range=(0, 1))
    assert np.abs(counts - 5000).max() < 5 * 5000**0.5
    assert (row_hashes("train-00000.parquet", 10) == hashes[:10]).all()
    assert abs(np.corrcoef(hashes[1:], hashes[:-1])[0, 1]) < 0.02
    assert abs(np.corrcoef(hashes, row_hashes("train-00001.parquet", 100_000))[0, 1]) < 0.02
