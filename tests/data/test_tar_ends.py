"""What belongs to a sample of a tar, and where a tar ends: files that are no samples, zeros and data behind the end."""

import io
import os
import tarfile

import pytest

from scaling_dit.data.sources import tar_index
from scaling_dit.data.sources.image_files import scan
from scaling_dit.errors import UserError
from tests.support.image_sets import picture

RECORD = tarfile.RECORDSIZE
IMAGE = picture(1)


def tar_of(members, padded=True):
    """The bytes of a tar of (name, data)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        end = tar.offset
    return buffer.getvalue() if padded else buffer.getvalue()[: end + 1024]


def samples(names, image=IMAGE):
    return [(f"{name}.{ending}", data) for name in names for ending, data in (("png", image), ("txt", b"a"))]


def read(data):
    """Keys and the kinds of the faults."""
    index = tar_index.build(io.BytesIO(data), "00000")
    return [key.decode() for key in index.keys], [kind for kind, _, _ in index.faults]


STRAYS = [
    "._a.png",
    ".DS_Store",
    ".txt",
    ".gitattributes",
    "LICENSE",
    "Makefile",
    "README.md",
    "list.lst",
    "b.npy",
]


@pytest.mark.parametrize("folder", ["", "./", "set/", "set/sub.dir/"])
@pytest.mark.parametrize("stray", STRAYS)
def test_other_files_begin_no_sample_and_cut_none_apart(stray, folder):
    """Before, within, between and behind samples; a png without a name is none."""
    (a_png, a_txt), (b_png, b_txt) = (samples([f"{folder}{name}"]) for name in ("a", "b"))
    other = (folder + stray, b"other")
    expected = [f"{folder}{name}".removeprefix("./") for name in ("a", "b")]
    members = [other, a_png, other, a_txt, other, other, b_png, other, b_txt, other]
    assert read(tar_of(members)) == (expected, [])


def test_a_known_ending_alone_is_a_damaged_sample():
    assert read(tar_of([*samples("a"), ("README.txt", b"hello"), ("c.png", IMAGE)])) == (
        ["a"],
        ["missing_image", "missing_caption"],
    )


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("parts", [("ab", "cd"), ("a", "b", "c"), ("ab", "c", "d")])
def test_tars_joined_in_one_file_are_read_to_the_end(parts, padded):
    data = b"".join(tar_of(samples(part), padded) for part in parts)
    assert read(data) == (list("".join(parts)), [])


def test_a_sample_does_not_cross_the_end_of_a_tar():
    first, second = tar_of([*samples("a"), ("b.png", IMAGE)]), tar_of([("b.txt", b"a"), *samples("c")])
    assert read(first + second) == (["a", "c"], ["missing_caption", "duplicate_key"])


def test_a_lone_empty_block_ends_nothing():
    first, second = tar_of(samples("ab"), padded=False)[:-1024], tar_of([("b.json", b"{}"), *samples("c")])
    assert read(first + bytes(512) + second) == (["a", "b", "c"], [])
    index = tar_index.build(io.BytesIO(first + bytes(512) + second), "0")
    assert index.spans[1, tar_index.JSON, 0] >= 0
    assert read(first + bytes(512)) == (["a", "b"], ["truncated_tar"])


@pytest.mark.parametrize("behind", [b"junk", b"\1" * 512, b"\1" * 5000, bytes(3000) + b"junk"])
def test_data_behind_the_end_are_counted(behind):
    keys, faults = read(tar_of(samples("abc")) + behind)
    assert keys == list("abc") and set(faults) <= {"bad_tar", "truncated_tar"} and faults


@pytest.mark.parametrize("cut", range(2000, 110_000, 9_700))
def test_a_download_whose_file_had_its_full_size_is_counted(cut):
    """The rest of the file is zeros; what is read is complete."""
    image = IMAGE + os.urandom(3000) + b"\xff" * 8
    names = [f"{number:02d}" for number in range(30)]
    whole = tar_of(samples(names, image))
    assert read(whole) == (names, [])
    keys, faults = read(whole[:cut] + bytes(len(whole) - cut))
    assert faults == ["truncated_tar"] or (faults == [] and keys == names) or faults[0] == "bad_tar"
    assert keys == names[: len(keys)]
    # A sample is a header, its image, a header and its text, of one byte.
    assert len(keys) * (2 * 512 + -(-len(image) // 512) * 512 + 512) - 511 <= cut


def test_a_hole_is_counted_and_what_follows_it_is_read():
    names = [f"{number:02d}" for number in range(60)]
    data = bytearray(tar_of(samples(names)))
    size = len(tar_of(samples(names[:1]), padded=False)) - 1024
    data[10 * size : 40 * size] = bytes(30 * size)
    keys, faults = read(bytes(data))
    assert keys == names[:10] + names[40:] and faults == ["truncated_tar"]


def test_the_zeros_of_a_last_record_are_no_damage():
    for count in range(1, 25):
        assert read(tar_of(samples([f"{number:02d}" for number in range(count)])))[1] == []
    whole = tar_of(samples("a"))
    assert read(whole + bytes(RECORD))[1] == ["truncated_tar"]


def test_a_size_below_zero_and_a_compressed_tar(tmp_path):
    member = tarfile.TarInfo("b.png")
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 12
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    data = tar_of(samples("ab"), padded=False)[:-1024] + bytes(header) + bytes(1024)
    assert read(data) == (["a", "b"], ["bad_tar"])
    with tarfile.open(tmp_path / "a.tar", "w:gz"):
        pass
    (fault,) = scan(f"webdataset:{tmp_path}/a.tar").examples("bad_tar")
    assert "compressed with gzip" in fault.what


def test_what_cannot_be_read_as_a_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(UserError, match=r"a\.tar is a pipe \(FIFO\), it cannot be read as a file"):
        scan(f"webdataset:{tmp_path}/*.tar")
    (tmp_path / "a.tar").unlink()
    (tmp_path / "a.tar").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"a\.tar is a device"):
        scan(f"webdataset:{tmp_path}/a.tar")
    (tmp_path / "a.tar").unlink()
    (tmp_path / "a.tar").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"a\.tar is a link to nothing"):
        scan(f"webdataset:{tmp_path}/*.tar")
    (tmp_path / "a.tar").unlink()
    (tmp_path / "a.tar").write_bytes(tar_of(samples("a")))
    os.mkfifo(tmp_path / "a.tar.index")
    with pytest.raises(UserError, match=r"a\.tar\.index is a pipe"):
        scan(f"webdataset:{tmp_path}/*.tar")
