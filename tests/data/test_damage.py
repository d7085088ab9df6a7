"""A folder with every kind of damage: counted exactly, replaced, and without any influence on the rest."""

import io
import json
import logging
import types

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from scaling_dit.data.damage import Damage, DamagedRecord, damage_of
from scaling_dit.data.loader import make_loader
from scaling_dit.data.sources.folder import FolderSource
from scaling_dit.data.sources.image_files import key_hash, scan
from scaling_dit.encoders.scratch import build_tokenizer
from scaling_dit.errors import UserError
from scaling_dit.training.loop import train

COUNT, BATCH, SIZE = 800, 50, 8
PLANNED = {
    "bad_json": 6, "bad_line": 8, "empty_caption": 5, "outside_folder": 4, "duplicate_file": 7,
    "missing_file": 9, "unreadable_image": 12, "too_large": 3,
}  # fmt: skip

# Met when read, the others when opened.
OF_IMAGES = ("missing_file", "unreadable_image", "too_large")


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def line(name, text):
    return json.dumps({"file_name": name, "text": text}).encode()


def damaged(kind, number, name, folder):
    """The metadata line of a damaged record, whose file, if any, is written; `number` picks the variety."""
    good = encoded(
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (30, 30, 3), dtype=np.uint8))
    )
    files = {
        "too_large": lambda: encoded(Image.new("1", (101, 100))),
        "unreadable_image": lambda: (
            good[: len(good) // 2], b"", b"text", good[:200] + bytes(40) + good[240:],
            encoded(Image.new("F", (4, 4)), "TIFF"), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        )[number % 6],
    }  # fmt: skip
    if kind in files:
        (folder / name).write_bytes(files[kind]())
    varieties = {
        "bad_json": [b"{broken", b'{"file_name": "\xff", "text": "a"}', b'{"file_name": "a" "text"}'],
        "bad_line": [b"[1]", b'{"text": "a"}', b'{"file_name": 7, "text": "a"}', b'{"file_name": "x.png", "text": 1}'],
        "empty_caption": [line(name, ""), line(name, " \t"), b'{"file_name": "y.png", "texts": ["", " "]}'],
        "outside_folder": [line("/etc/a.png", "a"), line("../a.png", "a")],
        "duplicate_file": [line("0.png", "again"), line("./0.png", "again")],
    }  # fmt: skip
    return varieties.get(kind, [line(name, f"number {number}")])[number % len(varieties.get(kind, [0]))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a folder of 800 lines with all damage, the places of damaged images in it, one of its sound records alone)."""
    mixed, sound = tmp_path_factory.mktemp("mixed"), tmp_path_factory.mktemp("sound")
    kinds = [kind for kind, count in PLANNED.items() for _ in range(count)]
    places = np.random.default_rng(0).choice(np.arange(1, COUNT), len(kinds), replace=False)
    plan = dict(zip(places.tolist(), kinds, strict=True))
    lines, sound_lines, image_faults = [], [], []
    for i in range(COUNT):
        name = f"{i}.png"
        if i in plan:
            lines.append(damaged(plan[i], i, name, mixed))
            if plan[i] in OF_IMAGES:
                image_faults.append(name)
            continue
        data = encoded(Image.new("RGB", (SIZE, SIZE), (i % 256, i // 256, 9)), compress_level=0)
        for folder in (mixed, sound):
            (folder / name).write_bytes(data)
        lines.append(line(name, f"number {i}"))
        sound_lines.append(lines[-1])
    (mixed / "metadata.jsonl").write_bytes(b"\n".join(lines))
    (sound / "metadata.jsonl").write_bytes(b"\n".join(sound_lines))
    return mixed, sound, set(image_faults)


def open_mixed(folders, **fields):
    fields = {"image_size": SIZE, "held_out_fraction": 0.0, "max_pixels": 10_000, "max_damaged": 100} | fields
    return FolderSource(str(folders[0]), **fields)


def rows_of(source):
    """The lines of the metadata behind the records of a source, in their order."""
    places = [source._sample_place(i) for i in range(len(source))]
    return [source._shard(shard).rows[row] for shard, row in places]


def batches(source, steps, *, start=0, positions=range(BATCH), threads=2):
    def tokenize(captions):
        ids = np.array([[int(caption.split()[1])] for caption in captions], np.int32)
        return ids, ids >= 0

    loader = make_loader(
        source, tokenize, batch=BATCH, seed=1, positions=list(positions), start_step=start, threads=threads
    )
    read = [next(loader) for _ in range(steps)]
    loader.close()
    return read


def test_counts_by_kind_are_exact(folders):
    found = scan(f"folder:{folders[0]}", max_pixels=10_000)
    assert found.counts() == PLANNED
    images = {fault.what.split("'")[1] for kind in OF_IMAGES for fault in found.examples(kind)}
    assert images == folders[2]
    lines = (folders[0] / "metadata.jsonl").read_bytes().split(b"\n")
    # Each is reported in a line of its own.
    for kind in PLANNED:
        for fault in found.examples(kind):
            number = int(fault.where.rpartition(" ")[2])
            if kind in OF_IMAGES or kind == "duplicate_file":
                assert json.loads(lines[number - 1])["file_name"].removeprefix("./") in fault.what
    source = open_mixed(folders)
    opened = {kind: count for kind, count in PLANNED.items() if kind not in OF_IMAGES}
    assert source.damage.counts() == dict(sorted(opened.items()))
    # Met twice, counted once.
    for _ in range(2):
        for i in range(len(source)):
            source[i]
    assert source.damage.counts() == dict(sorted(PLANNED.items()))
    assert source.damage.check(source.damage.counts())["data/damaged_too_large"] == 3.0


@pytest.mark.slow
def test_training_is_unaffected_otherwise(folders):
    """An epoch of the damaged folder: each sound record once at its place, each damaged one replaced by a sound one."""
    mixed = open_mixed(folders)
    sound = FolderSource(str(folders[1]), image_size=SIZE, held_out_fraction=0.0)
    wanted = {sound[i]["key"]: sound[i]["image"] for i in range(len(sound))}
    names = [row.file_name for row in rows_of(mixed)]
    steps = len(mixed) // BATCH
    # What the loader is to read, from the names alone: the same dataset over a source that cannot be damaged.
    order = batches(Names(names), steps)
    replaced = 0
    for batch, plan in zip(batches(mixed, steps), order, strict=True):
        for image, number, index in zip(batch["images"], batch["ids"][:, 0], plan["ids"][:, 0], strict=True):
            key = f"{number}.png"
            # Picture and caption of one sound record.
            np.testing.assert_array_equal(image, wanted[key])
            replaced += names[index] != key
            assert (names[index] != key) == (names[index] in folders[2])
    # All 24 in an epoch but those of a last partial batch.
    assert 20 <= replaced <= 24


class Names:
    """Record i has the caption "number i"."""

    image_size = 1

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index, /):
        return {"image": np.zeros((1, 1, 3), np.uint8), "captions": [f"number {index}"], "key": str(index)}

    def describe(self):
        return "names"


@pytest.mark.slow
def test_stand_ins_depend_on_the_index_alone(folders):
    # More than an epoch.
    steps = 20
    whole = batches(open_mixed(folders), steps)
    # Of two processes.
    even, odd = range(0, BATCH, 2), range(1, BATCH, 2)
    for start, positions, threads in ((0, even, 4), (0, odd, 0), (9, range(BATCH), 1)):
        part = batches(open_mixed(folders), steps - start, start=start, positions=positions, threads=threads)
        for found, expected in zip(part, whole[start:], strict=True):
            for key in ("images", "ids"):
                np.testing.assert_array_equal(found[key], expected[key][list(positions)])
    source = open_mixed(folders)
    backwards = [source[i]["key"] for i in reversed(range(len(source)))][::-1]
    forwards = open_mixed(folders)
    assert backwards == [forwards[i]["key"] for i in range(len(source))]
    replaced = [i for i, row in enumerate(rows_of(source)) if backwards[i] != row.file_name]
    # Opened anew, which reads the whole list, so for some of them alone.
    for i in replaced[::6]:
        assert open_mixed(folders)[i]["key"] == backwards[i]
    stand_ins = [backwards[i] for i in replaced]
    # Spread over the folder.
    assert len(stand_ins) == 24 and len(set(stand_ins)) > 20


def test_an_index_past_either_end_is_refused():
    damage = Damage()
    assert damage.read(np.int64(2), 3, lambda index: type(index)) is int
    for index in (-1, 3):
        with pytest.raises(IndexError, match=rf"{index} is not in \[0, 3\)"):
            damage.read(index, 3, lambda index: index)


def test_the_split_of_sound_images_does_not_move(folders):
    train = open_mixed(folders, held_out_fraction=0.3)
    held_out = train.held_out()
    assert {row.file_name for row in rows_of(held_out)} == {
        row.file_name
        for source in (train, held_out)
        for row in rows_of(source)
        if key_hash(row.file_name) < 0.3
    }
    for i in range(len(held_out)):
        held_out[i]
    # One count of a run.
    assert held_out.damage is train.damage
    assert sum(train.damage.counts().values()) < sum(PLANNED.values())


def test_the_limit_stops_with_file_and_line(folders):
    with pytest.raises(
        UserError, match=r"metadata.jsonl line \d+: .*more than config.source.max_damaged=29 .*bad_json"
    ):
        open_mixed(folders, max_damaged=29)
    # Every line at fault, and no image.
    source = open_mixed(folders, max_damaged=30)
    with pytest.raises(UserError, match=r"line \d+: .* more than config.source.max_damaged=30") as error:
        batches(source, 40)
    assert "\n" not in str(error.value)


def test_nothing_but_damage_is_an_error(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(line(f"{i}.png", "a 1") for i in range(30)))
    source = FolderSource(str(tmp_path), held_out_fraction=0.0, max_damaged=1000)
    with pytest.raises(UserError, match="no file .*100 records tried in place of one are all damaged"):
        source[0]
    assert source.damage.counts()["missing_file"] > 20


def test_a_failing_store_is_no_damage(tmp_path, monkeypatch):
    (tmp_path / "metadata.jsonl").write_bytes(line("a.png", "a"))
    source = FolderSource(str(tmp_path), held_out_fraction=0.0, max_damaged=5)
    assert len(source) == 1

    def broken(self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "read_bytes", broken)
    with pytest.raises(UserError, match="line 1: cannot read file .*Input/output error"):
        source[0]
    assert not source.damage.counts()


ODD = {
    "cmyk.jpg": (encoded(Image.new("CMYK", (9, 7), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
    "grey.png": (encoded(Image.new("L", (9, 7), 77)), (77, 77, 77)),
    "grey16.png": (encoded(Image.fromarray(np.full((9, 7), 77 * 257, np.uint16))), (77, 77, 77)),
    "bilevel.png": (encoded(Image.new("1", (9, 7), 1)), (255, 255, 255)),
    "palette.png": (encoded(Image.new("RGB", (9, 7), (9, 99, 199)).quantize(4)), (9, 99, 199)),
    "alpha.png": (encoded(Image.new("RGBA", (9, 7), (9, 99, 199, 0))), (255, 255, 255)),
    "grey_alpha.webp": (encoded(Image.new("LA", (9, 7), (50, 255)), "WEBP", lossless=True), (50, 50, 50)),
    "animated.gif": (
        encoded(
            Image.new("RGB", (9, 7), (255, 0, 0)), "GIF",
            save_all=True, append_images=[Image.new("RGB", (9, 7), (0, 255, 0))],
        ),
        (255, 0, 0),
    ),
    "tiny.png": (encoded(Image.new("RGB", (1, 1), (1, 2, 3))), (1, 2, 3)),
    "line.png": (encoded(Image.new("RGB", (3000, 1), (1, 2, 3))), (1, 2, 3)),
    "exif.png": (encoded(Image.new("RGB", (9, 7), (1, 2, 3)), exif=b"Exif\0\0II*\0damaged"), (1, 2, 3)),
    "日本 é.png": (encoded(Image.new("RGB", (9, 7), (4, 5, 6))), (4, 5, 6)),
    "no_extension": (encoded(Image.new("RGB", (9, 7), (4, 5, 6)), "BMP"), (4, 5, 6)),
}  # fmt: skip


def test_unusual_images_are_read_right(tmp_path):
    for name, (data, _) in ODD.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(line(name, name) for name in ODD))
    # Stops at any damage.
    source = FolderSource(str(tmp_path), image_size=SIZE, held_out_fraction=0.0)
    for i, (name, (_, colour)) in enumerate(ODD.items()):
        assert source[i]["key"] == name
        expected = np.full((SIZE, SIZE, 3), colour)
        np.testing.assert_allclose(source[i]["image"].astype(int), expected, atol=2, err_msg=name)
    assert not source.damage.counts()


def test_captions_of_any_script_and_length(tmp_path):
    texts = ["ein gelbes Öl 🎨 日本語", "word " * 200_000, "x" * 1_000_000, "\u202eright to left"]
    (tmp_path / "metadata.jsonl").write_bytes(
        b"\n".join(line(f"{i}.png", text) for i, text in enumerate(texts))
    )
    source = FolderSource(str(tmp_path), held_out_fraction=0.0)
    assert list(source.texts()) == texts
    tokenizer = build_tokenizer(source)
    ids, mask = tokenizer.encode(texts, 16)
    assert ids.shape == mask.shape == (4, 16)
    # With bos and eos; the long one is cut.
    assert mask.sum(1).tolist() == [7, 16, 3, 6]
    assert (ids[1, 1:15] == ids[1, 1]).all()
    # The end of the text.
    assert ids[1, 15] == ids[0, 6]


@pytest.mark.slow
def test_a_run_tells_its_damage(folders, tmp_path):
    from scaling_dit import config as config_lib
    from scaling_dit.checkpoints.workdir import read_metrics

    config = config_lib.load(
        "shapes:smoke",
        [
            f"--config.source.name=folder:{folders[0]}", "--config.source.image_size=8", "--config.eval.every=0",
            "--config.source.max_pixels=10000", "--config.source.max_damaged=100", "--config.log.tensorboard=false",
            "--config.batch=16", "--config.steps=2", "--config.backbone.depth=1",
        ],
    )  # fmt: skip
    train(config, tmp_path, jax.devices()[:1])
    row = {name: value for row in read_metrics(tmp_path) for name, value in row.items()}
    assert row["data/damaged_bad_json"] == PLANNED["bad_json"]
    listed = [json.loads(text)["kind"] for text in (tmp_path / "damaged.jsonl").read_text().splitlines()]
    assert listed.count("bad_line") == PLANNED["bad_line"]


def test_the_list_keeps_what_earlier_starts_met(tmp_path):
    path = tmp_path / "damaged.jsonl"
    for places in (["a", "b", "c"], ["c", "d"]):
        damage = Damage()
        for place in places:
            damage.meet(DamagedRecord("missing_file", place, "gone"))
        damage.save(epath.Path(tmp_path) / "damaged.jsonl")
        listed = [json.loads(text)["where"] for text in path.read_text().splitlines()]
        if places[0] == "a":
            # Cut by a kill.
            path.write_text(path.read_text()[:-5])
    assert listed == ["a", "b", "c", "d"]


def test_a_run_that_damage_ends_lists_it(tmp_path):
    from scaling_dit.checkpoints.workdir import Workdir
    from scaling_dit.training.loop import damage_listed

    damage = Damage(limit=1, field="config.source.max_damaged")
    run = types.SimpleNamespace(source=types.SimpleNamespace(damage=damage), workdir=Workdir(tmp_path))
    with pytest.raises(UserError, match="more than config.source.max_damaged=1"), damage_listed(run):
        for place in ("a", "b"):
            damage.meet(DamagedRecord("missing_file", place, "gone"))
    assert [json.loads(text)["where"] for text in (tmp_path / "damaged.jsonl").read_text().splitlines()] == [
        "a",
        "b",
    ]


def test_log_lines_are_few_and_the_list_is_whole(tmp_path, caplog):
    damage = Damage(limit=40)
    with caplog.at_level(logging.WARNING, logger="absl"):
        damage.announce()
        for i in [*range(30), *range(30)]:
            damage.meet(DamagedRecord("missing_file", f"file line {i}", "gone"))
        damage.announce()
    assert len(caplog.messages) == 11
    assert caplog.messages[0] == "damaged record left out (missing_file): file line 0: gone"
    assert "further ones are counted and listed, not logged" in caplog.messages[9]
    assert caplog.messages[10].startswith(
        "30 damaged records left out (missing_file 30); the first: file line 0"
    )
    for process, name in enumerate(("damaged.jsonl", "damaged-1.jsonl")):
        damage._saved = 0
        damage.save(epath.Path(tmp_path) / "damaged.jsonl", process)
        rows = [json.loads(text) for text in (tmp_path / name).read_text().splitlines()]
        assert rows[29] == {"kind": "missing_file", "where": "file line 29", "what": "gone"}
    (tmp_path / "damaged.jsonl").unlink()
    # Nothing new.
    damage.save(epath.Path(tmp_path) / "damaged.jsonl")
    assert not (tmp_path / "damaged.jsonl").exists()
    assert damage_of(object()).counts() == {}
