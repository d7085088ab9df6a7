"""`prepare`: every sound image of a raw set becomes one record, after any number of kills and by any process."""

import errno
import io
import os
import pathlib
import time
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from scaling_dit import config as config_lib
from scaling_dit import files
from scaling_dit.curation import encode, job, shape, sidecar
from scaling_dit.curation.progress import Progress
from scaling_dit.data import images
from scaling_dit.data.prepared import manifest
from scaling_dit.data.sources import create_source
from scaling_dit.data.sources.image_files import key_hash
from scaling_dit.encoders.codec import create_codec
from scaling_dit.errors import UserError
from tests.support import fake_store, raw_images
from tests.support.fake_clock import Clock
from tests.support.prepared_sets import SIDE, assert_holds, contents, prepare, read_all
from tests.support.small_webdataset import encoded, write_tar

TARS, SAMPLES = 5, 40


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """(folder of tars, what is in them)"""
    folder = tmp_path_factory.mktemp("raw")
    return folder, raw_images.write_webdataset(folder, TARS, SAMPLES, broken=0.2)


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory):
    """The set that one process makes in one go."""
    out = tmp_path_factory.mktemp("prepared") / "set"
    assert prepare(raw[0], out) == 0
    return out


def test_every_sound_image_is_there_and_every_fault_is_reported(raw, whole, capsys):
    _, made = raw
    # Every kind of damage is met.
    assert all(made.broken.values())
    assert_holds(whole, made)


def test_moments_captions_and_splits_are_those_of_each_image(raw, whole):
    """Against the raw source itself, one image at a time."""
    folder, _ = raw
    codec, records = create_codec("dct"), read_all(whole)
    source = create_source(
        f"webdataset:{folder}/*.tar", image_size=SIDE, held_out_fraction=0.05, max_damaged=10**6
    )
    for index in range(0, len(source), 7):
        record = source[index]
        moments = codec.moments({}, jnp.asarray(record["image"])[None])[0]
        stored = records[record["key"]]["latents"].astype(np.float32)
        # bfloat16 keeps 8 bits.
        np.testing.assert_allclose(stored, moments, rtol=2**-8, atol=1e-6)
        assert tuple(records[record["key"]]["captions"]) == tuple(record["captions"])
    for key, record in records.items():
        assert record["split"] == ("held_out" if key_hash(key) < 0.05 else "train")


def test_three_processes_make_the_same_files(raw, whole, tmp_path, capsys):
    # In any order.
    for process in (2, 0, 1):
        prepare(raw[0], tmp_path, process=(process, 3))
    assert contents(tmp_path) == contents(whole)
    printed = capsys.readouterr().out
    assert "1 of 5 parts are finished" in printed and f"latents:{tmp_path}" in printed


@pytest.mark.parametrize("moment", ["in a part", "between a part's files", "before the manifest"])
def test_resuming_after_a_kill_gives_the_same_files(raw, whole, tmp_path, monkeypatch, moment):
    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    calls = []

    def killed_later(path, data, write=files.write_whole):
        calls.append(path)
        # The request, two parts, and then this one's shards without their part.
        if len(calls) == 4:
            raise Killed
        write(path, data)

    if moment == "in a part":
        monkeypatch.setattr(encode._Writers, "close", killed)
    elif moment == "between a part's files":
        monkeypatch.setattr(files, "write_whole", killed_later)
    else:
        monkeypatch.setattr(manifest, "merge", killed)
    with pytest.raises(Killed):
        prepare(raw[0], tmp_path)
    assert not (tmp_path / manifest.MANIFEST).exists()
    monkeypatch.undo()
    (tmp_path / manifest.SHARDS / f"00000.train.array_record.abc{files.PARTIAL}").write_bytes(b"half")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / manifest.PARTS).glob("*.json")}
    prepare(raw[0], tmp_path, process=(0, 2))
    prepare(raw[0], tmp_path, process=(1, 2))
    assert contents(tmp_path) == contents(whole)
    # What is done is kept.
    assert all(path.stat().st_mtime_ns == then for path, then in done.items())


def test_again_changes_nothing_and_a_lost_shard_is_made_again(raw, whole, tmp_path):
    prepare(raw[0], tmp_path)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / manifest.SHARDS).iterdir()}
    lost = tmp_path / manifest.SHARDS / "00002.train.array_record"
    lost.write_bytes(lost.read_bytes()[:-1])
    prepare(raw[0], tmp_path)
    assert contents(tmp_path) == contents(whole)
    kept = [path for path, then in times.items() if path.stat().st_mtime_ns == then]
    assert len(kept) == len(times) - len(list((tmp_path / manifest.SHARDS).glob("00002.*")))


def test_another_request_does_not_mix(raw, whole):
    for options, key in (
        ({"min_size": 40}, "min_size"),
        ({"batch": 32}, "batch"),
        ({"columns": ("aesthetic",)}, "columns"),
    ):
        with pytest.raises(UserError, match=rf"prepared in another way: {key} differ .*; give another --out"):
            prepare(raw[0], whole, **options)
    with pytest.raises(UserError, match="codec differ"):
        prepare(raw[0], whole, "--config.codec.scale=2")


def test_an_object_store_gets_the_same_objects(raw, whole, tmp_path, monkeypatch):
    store = fake_store.install(monkeypatch, tmp_path)
    for process in (0, 1):
        prepare(raw[0], "s3://bucket/set", process=(process, 2))
    assert contents(tmp_path / "bucket/set") == contents(whole)
    assert not store.refused
    assert len(create_source("latents:s3://bucket/set", image_size=SIDE)) == len(
        create_source(f"latents:{whole}", image_size=SIDE)
    )


def small_raw(folder, count=12):
    """One tar of images with growing sides, 20 + 4 i by 30 + 4 i, with `score` i in the metadata."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    write_tar(
        folder / "a.tar",
        [
            (
                f"{i:03d}",
                encoded(rng.integers(0, 256, (20 + 4 * i, 30 + 4 * i, 3))),
                f"number {i}",
                {"score": i, "x": [1]},
            )
            for i in range(count)
        ],
    )
    return folder


def test_filters_and_columns(tmp_path, capsys):
    raw = small_raw(tmp_path / "raw")
    prepare(raw, tmp_path / "set", filter="score != 3 and width < 70", min_size=28, columns=("score", "x"))
    found = manifest.read(epath.Path(tmp_path / "set"))
    assert {reason: left["count"] for reason, left in found.left_out.items()} == {"too_small": 2, "filter": 3}
    assert sorted(read_all(tmp_path / "set")) == [f"a/{i:03d}" for i in (2, 4, 5, 6, 7, 8, 9)]
    assert found.request["filter"] == "score != 3 and width < 70"
    prepare(raw, tmp_path / "none", filter="scroe != 3")
    assert (
        "0 records (0 held out) of 12 samples in 1 raw shards; nothing to train on" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="filter"):
        prepare(raw, tmp_path / "other", filter="score >=")
    with pytest.raises(
        UserError, match=r"--columns=scroe: none of the first 12 samples has it; did you mean 'score'"
    ):
        prepare(raw, tmp_path / "other", columns=("x", "scroe"))
    # Nothing is claimed by a typo.
    assert not (tmp_path / "other").exists()


def test_the_fields_of_a_record_describe_its_image(tmp_path):
    raw = small_raw(tmp_path / "raw", 3)
    source = create_source(f"webdataset:{raw}/*.tar", image_size=8)
    selection = encode.Selection(((8, 8),), columns=("score", "x", "none"))
    ready = encode.prepare_sample(next(iter(source.samples(0))), selection)
    made = [sidecar.MadeCaption("a made one", "synthetic", 0.5)]
    record = encode.to_record(ready, np.zeros((2, 2, 4), jnp.bfloat16), selection.columns, made)
    assert (record.width, record.height, record.crop) == (30, 20, (5.0, 0.0, 25.0, 20.0))
    assert record.captions == ("number 0", "a made one") and record.kinds == ("alt", "synthetic")
    # Lists and missing ones are not kept.
    assert record.columns == {"score": 0}


def test_lists_of_filter_and_captions_of_caption(tmp_path):
    raw, out = small_raw(tmp_path / "raw", 4), tmp_path / "set"
    rows = [{"key": "a/000"}, {"key": "a/001", "dropped": "duplicate"}, {"key": "a/003"}]
    sidecar.write_lines(sidecar.path_of(tmp_path / "kept", "a.tar", sidecar.FILTER), rows)
    made = [("a/000", [sidecar.MadeCaption("longer", "long", 1.0)]), ("a/003", [])]
    sidecar.write_captions(tmp_path / "captions", "a.tar", made)
    lists = {"kept": str(tmp_path / "kept"), "captions": str(tmp_path / "captions")}
    with pytest.raises(UserError, match=r"no file .*filter\.json; `scaling-dit filter` writes it"):
        prepare(raw, out, **lists)
    # The corrected command is not refused.
    assert not (out / manifest.REQUEST).exists()
    (tmp_path / "kept/filter.json").write_text("{}")
    (tmp_path / "captions/caption.json").write_text("{}")
    prepare(raw, out, **lists)
    records = read_all(out)
    assert {key: record["captions"] for key, record in records.items()} == {
        "a/000": ("number 0", "longer"),
        "a/003": ("number 3",),
    }
    assert records["a/000"]["kinds"] == ("alt", "long")
    assert manifest.read(epath.Path(out)).left_out["not_kept"]["count"] == 2
    # Filtered anew into the same folder.
    (tmp_path / "kept/filter.json").write_text('{"kept": 3}')
    with pytest.raises(UserError, match="prepared in another way: kept_sha256 differ"):
        prepare(raw, out, **lists)


def test_the_table_of_buckets():
    sizes = shape.bucket_sizes(256, True)
    assert (256, 256) in sizes and len(set(sizes)) == len(sizes) == 7
    for height, width in sizes:
        assert height % 32 == width % 32 == 0 and (width, height) in sizes
        assert abs(height * width / 256**2 - 1) < 0.0626
    assert shape.nearest_size(300, 300, sizes) == (256, 256)
    assert shape.nearest_size(1920, 1080, sizes) == (192, 320)
    assert shape.nearest_size(100, 1000, sizes) == (384, 160)
    with pytest.raises(UserError, match="multiple of 8"):
        shape.bucket_sizes(36, True)


def test_buckets_are_written_apart_and_the_square_one_trains(tmp_path):
    (tmp_path / "raw").mkdir()
    sides = [(32, 32), (30, 50), (50, 30), (33, 32), (20, 80), (32, 31)]
    rng = np.random.default_rng(0)
    pixels = [encoded(rng.integers(0, 256, (h, w, 3))) for h, w in sides]
    write_tar(tmp_path / "raw/a.tar", [(f"{i}", data, "a caption", {}) for i, data in enumerate(pixels)])
    out = tmp_path / "set"
    prepare(tmp_path / "raw", out, "--config.source.held_out_fraction=0", buckets=True)
    found = manifest.read(epath.Path(out))
    assert Counter({shard.size: shard.records for shard in found.shards}) == {
        (16, 16): 3, (12, 20): 1, (20, 12): 1, (10, 24): 1,
    }  # fmt: skip
    assert found.moments["10x24"] == [5, 12, 4]
    source = create_source(f"latents:{out}", image_size=SIDE)
    assert sorted(record["key"] for record in source.__getitems__(range(3))) == ["a/0", "a/3", "a/5"]


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (33, 33), (16, 16), (100, 17)])
@pytest.mark.parametrize("to", [(16, 16), (24, 10)])
def test_the_recorded_crop_is_the_part_shown(size, to):
    """Cropped by hand and scaled, it is the image that `fit` gives."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    shaped = shape.shape(image, (to[::-1],))
    by_hand = image.resize(to, Image.Resampling.BICUBIC, box=shaped.crop)
    np.testing.assert_allclose(shaped.pixels.astype(int), np.asarray(by_hand).astype(int), atol=1)
    assert (shaped.width, shaped.height) == size
    np.testing.assert_array_equal(shaped.pixels, images.fit(image, *to))


def test_a_full_disk_is_one_line_and_finished_parts_stay(raw, whole, tmp_path, monkeypatch):
    """The third part's file lies on a device that is always full."""
    staged, opened = files.staged, []

    class Full(encode.ArrayRecordWriter):
        def __init__(self, path, options):
            opened.append(path)
            super().__init__("/dev/full" if "00002.train" in path else path, options)

    monkeypatch.setattr(encode, "ArrayRecordWriter", Full)
    with pytest.raises(
        UserError, match=r"cannot write .*00002\.train\.array_record: .*No space left"
    ) as error:
        prepare(raw[0], tmp_path)
    assert "\n" not in str(error.value)
    assert staged is files.staged and any("00002.train" in path for path in opened)
    assert sorted(path.name for path in (tmp_path / manifest.PARTS).iterdir()) == ["00000.json", "00001.json"]
    # Nothing half written is left.
    assert not list((tmp_path / manifest.SHARDS).glob("00002*"))
    monkeypatch.undo()
    assert job.read_part(epath.Path(tmp_path), 1) is not None
    prepare(raw[0], tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_a_disk_that_is_full_for_small_files_too(raw, tmp_path, monkeypatch):
    def full(self, data, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"cannot write .*prepare\.json: No space left on device"):
        prepare(raw[0], tmp_path)
    assert not list(tmp_path.glob("prepare.json*"))


def test_sources_and_processes_that_do_not_fit(tmp_path):
    config = config_lib.load("shapes:smoke", [])
    with pytest.raises(UserError, match=r"'shapes' holds no image files"):
        job.main(config, str(tmp_path), job.Options())
    assert job.process_of(None, None) == (0, 1)
    assert job.process_of(3, 8) == (3, 8)
    with pytest.raises(UserError, match="belong together"):
        job.process_of(0, None)
    with pytest.raises(UserError, match="process 8 of 8"):
        job.process_of(8, 8)


def test_images_come_in_their_order_from_threads():
    def slow(number):
        time.sleep(0.002 * (number % 3))
        return number * 2

    assert list(encode.in_order(range(50), slow, 4, 8)) == [2 * i for i in range(50)]
    reads = []
    given = encode.in_order((reads.append(i) or i for i in range(50)), lambda x: x, 2, 5)
    next(given)
    # No further ahead than asked for.
    assert len(reads) == 6


def test_progress_shows_rate_time_to_go_and_what_is_left_out():
    clock, stream = Clock(), io.StringIO()
    with Progress(10, stream=stream, clock=clock, every=5.0) as progress:
        progress.skip()
        for _ in range(3):
            for _ in range(4):
                clock.now += 1.0
                progress.add(25)
            progress.done(1, 2)
        assert progress.line() == "part 4/10, 300 images, 25 images/s, 00:24 to go, 6 filtered, 3 damaged"
    lines = stream.getvalue().splitlines()
    assert lines[-1].startswith("part 4/10") and 2 <= len(lines) <= 4


def test_the_rows_of_a_batch_do_not_depend_on_the_others():
    rng = np.random.default_rng(0)
    pixels = list(rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8))
    encoder = encode.Encoder(create_codec("dct"), {}, 5)
    # Rounded up to what they divide.
    assert encoder.batch == len(jax.local_devices())
    whole = np.asarray(encoder(pixels))
    assert whole.shape == (8, 8, 8, 4) == (8, *encoder.moments_shape((16, 16)))
    np.testing.assert_array_equal(np.asarray(encoder(pixels[:2]))[:2], whole[:2])
