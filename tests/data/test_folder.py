"""A user's folder of images, and every mistake a metadata.jsonl can hold."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.images import fit, to_rgb
from scaling_dit.data.loader import make_loader
from scaling_dit.data.sources import create_raw_source, create_source, source_fields
from scaling_dit.data.sources.folder import FolderSource
from scaling_dit.data.sources.image_files import key_hash
from scaling_dit.encoders.scratch import UNK, build_tokenizer
from scaling_dit.errors import UserError


def write_folder(folder, count=40, size=(8, 8)):
    """`count` images of one grey level each, with captions; returns the levels by file name."""
    (folder / "images").mkdir()
    levels, lines = {}, []
    for i in range(count):
        name = f"images/{i}.png"
        levels[name] = 5 * i
        Image.new("RGB", size, (5 * i, 0, 255)).save(folder / name)
        captions = {"text": f"number {i}"} if i % 2 else {"texts": [f"number {i}", f"the {i}"]}
        lines.append(json.dumps({"file_name": name, **captions, "other": i}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    return levels


def test_reads_images_and_captions(tmp_path):
    levels = write_folder(tmp_path)
    source = create_source(f"folder:{tmp_path}", image_size=8, held_out_fraction=0.0)
    assert len(source) == 40
    assert "40 images, 8x8 px, train split" in source.describe()
    for i in (0, 1, 39):
        record = source[i]
        assert record["key"] == f"images/{i}.png"
        assert record["image"].dtype == np.uint8
        assert record["image"].shape == (8, 8, 3)
        assert (record["image"] == [levels[record["key"]], 0, 255]).all()
        assert list(record["captions"]) == ([f"number {i}"] if i % 2 else [f"number {i}", f"the {i}"])


def test_splits_are_disjoint_complete_and_stable(tmp_path):
    write_folder(tmp_path)
    train = FolderSource(str(tmp_path), image_size=8, held_out_fraction=0.3)
    held_out = train.held_out()
    names = [{source[i]["key"] for i in range(len(source))} for source in (train, held_out)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 40
    assert len(names[1]) == pytest.approx(12, abs=7)
    assert "held_out split" in held_out.describe()
    # Taking images away moves none of the rest to the other side.
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines[:25]))
    fewer = FolderSource(str(tmp_path), image_size=8, held_out_fraction=0.3)
    assert {fewer[i]["key"] for i in range(len(fewer))} <= names[0]
    # The same on any machine.
    assert key_hash("images/0.png") == pytest.approx(0.77541, abs=1e-5)


def test_a_small_folder_has_a_split_and_an_empty_one_is_told(tmp_path):
    write_folder(tmp_path, count=2)
    source = FolderSource(str(tmp_path), held_out_fraction=0.001)
    assert (len(source), len(source.held_out())) == (1, 1)
    with pytest.raises(UserError, match="no images in the held_out split"):
        FolderSource(str(tmp_path), held_out_fraction=0.0).held_out()
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no images in the train split"):
        FolderSource(str(tmp_path))


def to_square(image, size):
    return fit(to_rgb(image), size, size)


def test_square_of_the_same_size_is_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_square(Image.fromarray(pixels), 16), pixels)


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (96, 48)])
def test_square_keeps_the_centre_of_the_shorter_side(size):
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    along = x if width > height else y
    # Outer quarters red, inner half green.
    third = max(size) // 4
    inner = (along >= third) & (along < max(size) - third)
    pixels = np.where(inner[..., None], [0, 255, 0], [255, 0, 0]).astype(np.uint8)
    square = to_square(Image.fromarray(pixels), 8)
    assert square.shape == (8, 8, 3)
    assert (square[1:-1, 1:-1] == [0, 255, 0]).all()
    # Resampling reaches half a pixel beyond the cut.
    assert square[..., 0].max() < 40


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(to_square(Image.fromarray(stripes), 8).astype(int) - 127).max() < 12


def test_other_modes_become_rgb():
    grey16 = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert np.abs(to_square(grey16, 4).astype(int) - 128).max() <= 1
    assert (to_square(Image.new("L", (4, 4), 77), 4) == 77).all()
    # Transparent: white.
    assert (to_square(Image.new("RGBA", (4, 4), (10, 20, 30, 0)), 4) == 255).all()
    assert (to_square(Image.new("RGBA", (4, 4), (10, 20, 30, 255)), 4) == [10, 20, 30]).all()
    assert to_square(Image.new("CMYK", (4, 4)), 4).shape == (4, 4, 3)


def test_camera_orientation_is_applied(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    # Upside down.
    exif[0x0112] = 3
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(to_square(image, 8), pixels[::-1])


GOOD = '{"file_name": "a.png", "text": "a"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2: not JSON"),
        ("[1]", "line 2: a JSON object is needed, not list"),
        ('{"filename": "a.png", "text": "a"}', "line 2: no 'file_name'.*did you mean 'filename'"),
        ('{"file_name": 3, "text": "a"}', "line 2: no 'file_name'"),
        ('{"file_name": "a.png", "txt": "a"}', "line 2: no 'text'.*did you mean 'txt'"),
        ('{"file_name": "a.png", "text": 5}', "line 2: 'text' must be a string"),
        ('{"file_name": "a.png", "texts": "a"}', "line 2: 'text' must be a string, 'texts' a list"),
        ('{"file_name": "a.png", "texts": []}', "line 2: .* at least one string"),
        (b'{"file_name": "\xff"}', "line 2: not JSON"),
        ('{"file_name": "b.png", "text": "\\ud800"}', "line 2: .* half of a surrogate pair"),
        ("[" * 100_000, "line 2: not JSON"),
        ('{"file_name": "b\\ud800.png", "text": "a"}', "line 2: no 'file_name'"),
        ('{"file_name": "b.png", "texts": [null, null]}', "line 2: the caption of 'b.png' is empty"),
        ('{"file_name": "b.png", "text": null}', "line 2: the caption of 'b.png' is empty"),
        ('{"file_name": "b.png", "texts": ["a", 5, null]}', "line 2: 'text' must be a string"),
        ('{"file_name": "b\\u0000.png", "text": "a"}', "line 2: no 'file_name'"),
        ('{"file_name": "b.png", "text": " \\n"}', "line 2: the caption of 'b.png' is empty"),
        ('{"file_name": "/etc/b.png", "text": "a"}', "line 2: file_name '/etc/b.png' leaves the folder"),
        ('{"file_name": "c/../../b.png", "text": "a"}', "line 2: .* must be relative to it"),
        ('{"file_name": "gs://b/b.png", "text": "a"}', "line 2: .* leaves the folder"),
        ('{"file_name": "./a.png", "text": "b"}', "line 2: 'a.png' is on line 1 already"),
    ],
)
def test_damaged_metadata_is_one_line_with_its_number(tmp_path, line, message):
    body = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "metadata.jsonl").write_bytes(GOOD.encode() + b"\n" + body + b"\n")
    with pytest.raises(UserError, match=f"metadata.jsonl {message}") as error:
        create_source(f"folder:{tmp_path}")
    assert "\n" not in str(error.value)
    assert "set config.source.max_damaged=N" in str(error.value)
    assert len(create_source(f"folder:{tmp_path}", max_damaged=1)) == 1


def test_line_separators_inside_a_caption_are_no_line_ends(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "one\u2028two"}\r\n', "utf-8-sig"
    )
    assert list(FolderSource(str(tmp_path)).texts()) == ["one\u2028two"]


def test_missing_folder_metadata_and_images(tmp_path):
    with pytest.raises(UserError, match="no folder .*nowhere"):
        create_source(f"folder:{tmp_path}/nowhere")
    with pytest.raises(UserError, match="metadata.jsonl is missing; write one line"):
        create_source(f"folder:{tmp_path}")
    (tmp_path / "metadata.jsonl").write_text(f'\n{GOOD}\n{{"file_name": "b.png", "text": "b"}}\n')
    (tmp_path / "b.png").write_bytes(b"no image")
    source = create_source(f"folder:{tmp_path}", held_out_fraction=0.0)
    with pytest.raises(UserError, match=r"metadata.jsonl line 2: no file 'a.png' in"):
        source[0]
    with pytest.raises(UserError, match=r"metadata.jsonl line 3: cannot read image 'b.png'"):
        source[1]


def test_fields_are_checked(tmp_path):
    write_folder(tmp_path, count=2)
    assert source_fields(f"folder:{tmp_path}") == {
        "image_size": 64, "held_out_fraction": 0.05, "max_pixels": 2**26, "max_damaged": 0, "links": False,
        "conditions": (),
    }  # fmt: skip
    for fields, message in (
        ({"image_siz": 8}, "no field 'image_siz'; did you mean 'image_size'"),
        ({"split": "held_out"}, "no field 'split'"),
        ({"image_size": 0}, "image_size is 0"),
        ({"held_out_fraction": 1.0}, "held_out_fraction is 1.0"),
        ({"max_pixels": 0}, "max_pixels is 0; it must be from 1"),
        ({"max_pixels": 10**9}, "max_pixels is 1000000000; it must be from 1 to 178956970"),
        ({"max_damaged": -1}, "max_damaged is -1; it must be 0 or more"),
    ):
        with pytest.raises(UserError, match=message):
            create_source(f"folder:{tmp_path}", **fields)


def test_names_of_sources(tmp_path, monkeypatch):
    for name, message in (
        ("shape", "unknown source 'shape'; did you mean 'shapes'"),
        ("foldr:/data", "did you mean 'folder'"),
        ("folder", "names no folder; write folder:PATH"),
        ("no_such_module:Source", "no module 'no_such_module' in "),
        ("source_of_mine:Mine2", "source_of_mine has no class or function 'Mine2'; did you mean 'Mine'"),
    ):
        (tmp_path / "source_of_mine.py").write_text(
            "from tests.support.own_sources import Counted\n\n\nclass Mine(Counted):\n"
            "    def __init__(self, length=3, step=1):\n        self.length, self.step = length, step\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(UserError, match=message):
            create_source(name)
    assert source_fields("source_of_mine:Mine") == {"length": 3, "step": 1}
    assert create_source("source_of_mine:Mine", length=5).length == 5
    del sys.modules["source_of_mine"]


def test_a_folder_feeds_the_loader(tmp_path):
    levels = write_folder(tmp_path, size=(20, 12))
    source = create_source(f"folder:{tmp_path}", image_size=8)
    tokenizer = build_tokenizer(source)
    assert {"number", "the"} <= set(tokenizer.words)
    loader = make_loader(source, lambda c: tokenizer.encode(c, 6), batch=60, seed=0, positions=range(60))
    batch = next(loader)
    loader.close()
    for image, ids in zip(batch["images"], batch["ids"], strict=True):
        number = tokenizer.words[ids[ids > UNK][-1] - UNK - 1]
        assert (image == [levels[f"images/{number}.png"], 0, 255]).all()


# Links


def linked(tmp_path):
    """A folder with an image of its own, a link to that, and links that leave it: to a file, through a folder."""
    folder, store = tmp_path / "set", tmp_path / "set store"
    folder.mkdir()
    store.mkdir()
    write_folder(store, count=1)
    image = (store / "images/0.png").read_bytes()
    (folder / "own.png").write_bytes(image)
    (folder / "within.png").symlink_to("own.png")
    (folder / "out.png").symlink_to(store / "images/0.png")
    (folder / "beside").symlink_to(store, target_is_directory=True)
    (folder / "loop.png").symlink_to("loop.png")
    names = ("own.png", "within.png", "out.png", "beside/images/0.png", "loop.png")
    rows = [json.dumps({"file_name": name, "text": name}) + "\n" for name in names]
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


def test_links_are_followed_within_the_folder_only(tmp_path):
    folder = linked(tmp_path)
    found = list(create_raw_source(f"folder:{folder}").samples(0))
    kinds = [fault.kind if isinstance(fault, DamagedRecord) else "read" for fault in found]
    assert kinds == ["read", "read", "outside_folder", "outside_folder", "missing_file"]
    assert "'out.png' leads out of the folder through a link; set config.source.links" in found[2].what
    # The folder itself may be a link.
    (tmp_path / "alias").symlink_to(folder, target_is_directory=True)
    through = list(create_raw_source(f"folder:{tmp_path}/alias").samples(0))
    assert [isinstance(sample, DamagedRecord) for sample in through] == [False, False, True, True, True]


def test_a_field_allows_links_that_leave_it(tmp_path):
    found = list(create_raw_source(f"folder:{linked(tmp_path)}", links=True).samples(0))
    assert [isinstance(sample, DamagedRecord) for sample in found] == [False, False, False, False, True]
