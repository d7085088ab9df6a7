"""Aspect buckets: the order of the batches, what a batch holds, and which sources have buckets."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scaling_dit.data import buckets
from scaling_dit.data.buckets import BucketOrder, bucket_sizes, nearest_size, open_buckets
from scaling_dit.data.loader import make_loader
from scaling_dit.data.sources import create_source
from scaling_dit.errors import UserError
from tests.support import prepared_sets, raw_images

SIDE = 32
# Width, height -> the height and width of its bucket.
SIZES = {(64, 64): (32, 32), (70, 40): (24, 40), (40, 96): (48, 20), (90, 72): (28, 36), (33, 33): (32, 32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """90 images of five sizes; the red of an image is its number."""
    path = tmp_path_factory.mktemp("images")
    lines = []
    for number in range(90):
        size = list(SIZES)[number % len(SIZES)]
        Image.new("RGB", size, (number, 0, 0)).save(path / f"{number:02d}.png")
        lines.append(json.dumps({"file_name": f"{number:02d}.png", "text": f"number {number}"}))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


def open_folder(folder, **fields):
    return create_source(f"folder:{folder}", image_size=SIDE, held_out_fraction=0.0, **fields)


def tokenize(captions):
    ids = np.array([[int(caption.split()[-1])] for caption in captions], np.int32)
    return ids, np.ones(ids.shape, bool)


def load(source, steps, positions, start=0, batch=8, seed=5):
    iterator = make_loader(
        source, tokenize, batch=batch, seed=seed, positions=positions, start_step=start, threads=2, prefetch=2,
        buckets=open_buckets(source),
    )  # fmt: skip
    found = [next(iterator) for _ in range(steps)]
    iterator.close()
    return found


def test_the_table_is_of_about_equal_areas_and_the_square_is_the_largest():
    sizes = bucket_sizes(256, "config.buckets")
    assert (256, 256) in sizes
    assert all(0.93 * 256**2 < height * width <= 256**2 for height, width in sizes)
    assert {(width, height) for height, width in sizes} == set(sizes)
    with pytest.raises(UserError, match=r"image_size is 36; for config.buckets it must be a multiple of 8"):
        bucket_sizes(36, "config.buckets")
    assert [nearest_size(*size, bucket_sizes(SIDE, "")) for size in SIZES] == list(SIZES.values())


def test_every_batch_holds_images_of_one_bucket_and_each_its_own_bucket(folder):
    source = open_folder(folder)
    seen = set()
    for batch in load(source, 40, np.arange(8)):
        shape = batch["images"].shape[1:3]
        seen.add(shape)
        for image, (number,) in zip(batch["images"], batch["ids"], strict=True):
            assert SIZES[list(SIZES)[number % len(SIZES)]] == shape
            # Not cropped away, not another image's.
            assert (image[..., 0] == number).all()
    assert seen == set(SIZES.values())


def test_a_batch_depends_on_seed_step_and_position_alone(folder):
    whole = load(open_folder(folder), 8, np.arange(8))
    for positions in (np.arange(4), np.array([7, 2]), np.array([3])):
        for step, part in enumerate(load(open_folder(folder), 8, positions)):
            for name, rows in part.items():
                np.testing.assert_array_equal(rows, whole[step][name][positions])
    for step, batch in enumerate(load(open_folder(folder), 3, np.arange(8), start=5), start=5):
        np.testing.assert_array_equal(batch["images"], whole[step]["images"])
    others = load(open_folder(folder), 2, np.arange(8), seed=6)
    assert any(a["ids"].tolist() != b["ids"].tolist() for a, b in zip(whole, others, strict=False))


def test_over_an_epoch_of_its_bucket_every_record_comes_equally_often(folder):
    source = open_folder(folder)
    batch, counts = 2, [len(bucket) for bucket in open_buckets(source)]
    steps = BucketOrder(counts, batch, 5).length * 2
    seen = np.concatenate([rows["ids"][:, 0] for rows in load(source, steps, np.arange(batch), batch=batch)])
    times = np.bincount(seen, minlength=90)
    # Two cycles of 100 batches of 2: every record of a bucket as often as the others, to one.
    for bucket in open_buckets(source):
        own = times[[int(bucket[i]["key"][:2]) for i in range(len(bucket))]]
        assert own.max() - own.min() <= 1
    assert times.min() >= 0.75 * times.mean()


@given(
    st.lists(st.integers(1, 10**9), min_size=1, max_size=7),
    st.integers(1, 4096),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_the_order_counts_the_earlier_steps_of_a_bucket(counts, batch, seed):
    order = BucketOrder(counts, batch, seed)
    assert order.shares.sum() == order.length
    assert order.shares.min() >= 1
    wanted = np.array(counts) / sum(counts) * order.length
    assert (np.abs(order.shares - wanted) <= len(counts) + 1).all()
    met = [0] * len(counts)
    for step in range(min(order.length + 5, 300)):
        bucket, number = order.at(step)
        assert number == met[bucket]
        met[bucket] += 1
    # A step far ahead is found at once, and the cycles before it have their shares.
    bucket, number = order.at(1000 * order.length)
    assert number == 1000 * order.shares[bucket]
    assert BucketOrder(counts, batch, seed).at(7) == order.at(7)


def test_sources_without_sizes_are_refused_in_one_line(folder, monkeypatch):
    with pytest.raises(UserError, match=r"every image of the source has one size .*prepare --buckets"):
        open_buckets(create_source("shapes"))
    monkeypatch.setattr("scaling_dit.data.sources.image_files.MOST_BUCKETED", 10)
    with pytest.raises(
        UserError, match=r"90 images, and config.buckets reads all of them .*`prepare --buckets`"
    ):
        open_buckets(open_folder(folder))


def test_a_damaged_image_is_a_square_until_it_is_read(tmp_path, folder):
    for name in ("metadata.jsonl", *(f"{number:02d}.png" for number in range(90))):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    # Of another bucket.
    (tmp_path / "01.png").write_bytes(b"no image")
    source = open_folder(tmp_path, max_damaged=1)
    square = next(bucket for bucket in open_buckets(source) if bucket.bucket_size == (SIDE, SIDE))
    assert len(square) == 2 * 18 + 1
    records = [square[i] for i in range(len(square))]
    assert {record["image"].shape for record in records} == {(SIDE, SIDE, 3)}
    assert "01.png" not in {record["key"] for record in records}


@pytest.mark.slow
def test_prepared_sets_have_the_buckets_they_were_prepared_with(tmp_path):
    raw_images.write_webdataset(tmp_path / "raw", 1, 60, broken=0.0, sides=(20, 64))
    prepared_sets.prepare(tmp_path / "raw", tmp_path / "squares")
    prepared_sets.prepare(tmp_path / "raw", tmp_path / "set", buckets=True)
    source = create_source(f"latents:{tmp_path / 'set'}", image_size=prepared_sets.SIDE)
    found = open_buckets(source)
    assert len(found) > 1
    assert sum(map(len, found)) == source.manifest.records["train"]
    for bucket in found:
        height, width = bucket.bucket_size
        # The DCT codec's blocks.
        assert bucket[0]["latents"].shape[:2] == bucket.moments_shape[:2]
        assert bucket.moments_shape[0] * width == bucket.moments_shape[1] * height
    keys = [bucket[i]["key"] for bucket in found for i in range(len(bucket))]
    assert len(set(keys)) == len(keys)
    assert f"16x16 {len(next(b for b in found if b.bucket_size == (16, 16)))}" in buckets.describe(found)
    with pytest.raises(UserError, match="prepared without --buckets"):
        open_buckets(create_source(f"latents:{tmp_path / 'squares'}", image_size=prepared_sets.SIDE))
