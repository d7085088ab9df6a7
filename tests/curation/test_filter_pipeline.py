"""`filter` on Beam against a plain loop over the same samples."""

import hashlib
import io
import itertools
import json

import numpy as np
import pytest
import scipy.fft
from PIL import Image

from scaling_dit.curation import duplicates, filter_pipeline, filters, sidecar
from scaling_dit.curation.columns import columns
from scaling_dit.curation.raw import RawName, open_raw, raw_name
from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.sources.image_files import RawSample
from scaling_dit.errors import UserError
from tests.support import small_webdataset

pytestmark = pytest.mark.usefixtures("inspected_once")

KEEP = "min(width, height) >= 24 and aesthetic > 4.5 and nsfw != 'NSFW'"
DISTANCE = 6


def smooth(rng, side=32):
    """A random image with structure at the frequencies of the hash."""
    coarse = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Three tars, 60 samples each: new images, copies, resized and slightly changed ones, flat and broken ones."""
    folder, rng = tmp_path_factory.mktemp("tars"), np.random.default_rng(1)
    images = [smooth(rng) for _ in range(40)]
    for shard in range(3):
        samples = []
        for number in range(60):
            image = images[rng.integers(len(images))]
            side = int(rng.choice([16, 32, 32, 32, 48]))
            noise = rng.normal(0, rng.choice([0, 0, 4, 12]), (side, side, 3))
            changed = np.asarray(Image.fromarray(image).resize((side, side)), np.float64) + noise
            image = small_webdataset.encoded(np.clip(changed, 0, 255))
            if number % 20 == 3:
                image = small_webdataset.encoded(np.full((32, 32, 3), number))
            if number % 30 == 7:
                image = image[:20]
            metadata = {
                "aesthetic": float(rng.uniform(4, 7)),
                "nsfw": str(rng.choice(["NSFW", "UNLIKELY"], p=[0.1, 0.9])),
            }
            if rng.random() < 0.05:
                del metadata["aesthetic"]
            caption = "" if number == 50 else f"image {number}"
            samples.append((f"{shard}{number:04d}", image, caption, metadata))
        small_webdataset.write_tar(folder / f"{shard:05d}.tar", samples)
    return f"webdataset:{folder}/*.tar"


def by_hand(name, keep, near):
    """[(shard, row of its file)] of a plain loop over all pairs."""
    source = open_raw(RawName(name))
    rows, better = [], []
    entries = [
        (number, position, sample)
        for number in range(len(source.shards()))
        for position, sample in enumerate(source.samples(number))
    ]
    ranked = []
    for number, position, sample in entries:
        row = {"key": getattr(sample, "key", None) or sample.where}
        rows.append((source.shards()[number], row))
        if not hasattr(sample, "image"):
            row["dropped"] = f"damaged:{sample.kind}"
            continue
        try:
            image = Image.open(io.BytesIO(sample.image))
            image.load()
        except OSError:
            row["dropped"] = "damaged:unreadable_image"
            continue
        reason = filters.parse(keep).why_not(columns(sample))
        if reason:
            row["dropped"] = reason
            continue
        ranked.append(((-image.size[0] * image.size[1], number, position), sample, image, row))
    ranked.sort(key=lambda entry: entry[0])
    for _, sample, image, row in ranked:
        digest = hashlib.sha256(sample.image).digest()
        same = [key for key, other, _ in better if other == digest]
        if same:
            row |= {"dropped": "exact_duplicate", "of": same[0]}
            continue
        looks = duplicates.perceptual_hash(image.convert("RGB"))
        close = [k for k, _, h in better if None not in (h, looks) and (h ^ looks).bit_count() <= DISTANCE]
        if near and close:
            row |= {"dropped": "near_duplicate", "of": close[0]}
        better.append((sample.key, digest, looks))
    return rows


@pytest.mark.parametrize("kind", ["exact", "near"])
def test_the_lists_are_those_of_a_plain_loop(tars, tmp_path, capsys, kind):
    filter_pipeline.main(
        RawName(tars), str(tmp_path), keep=KEEP, duplicates=kind, distance=DISTANCE, as_json=True
    )
    printed = json.loads(capsys.readouterr().out)
    expected = by_hand(tars, KEEP, kind == "near")
    counts = {}
    for shard, rows in itertools.groupby(expected, key=lambda entry: entry[0]):
        rows = [row for _, row in rows]
        written = (tmp_path / f"{shard}.filter.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in written]
        assert found == rows
        assert sidecar.read_kept(tmp_path, shard) == {row["key"] for row in rows if "dropped" not in row}
        for row in rows:
            counts[row.get("dropped", "kept")] = counts.get(row.get("dropped", "kept"), 0) + 1
    assert printed["samples"] == 180 and printed["kept"] == counts.pop("kept")
    assert printed["dropped"] == counts == json.loads((tmp_path / "filter.json").read_text())["dropped"]
    wanted = {"filter", "missing:aesthetic", "exact_duplicate", "damaged:empty_caption"}
    assert wanted | ({"near_duplicate"} if kind == "near" else set()) <= set(counts)


def test_without_a_filter_only_damage_drops(tars, tmp_path, capsys):
    assert filter_pipeline.main(RawName(tars), str(tmp_path), duplicates="none") == 0
    shown = capsys.readouterr().out
    assert (
        "exact_duplicate" not in shown
        and "damaged:unreadable_image" in shown
        and f"lists: {tmp_path}" in shown
    )
    assert json.loads((tmp_path / "filter.json").read_text())["settings"] == {
        "source": tars, "filter": None, "duplicates": "none",
    }  # fmt: skip


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("side", [101, 20_000])
def test_a_large_image_is_too_large_whether_or_not_it_is_decoded(near, side):
    buffer = io.BytesIO()
    Image.new("1", (side, 100)).save(buffer, "PNG")
    sample = RawSample("k", buffer.getvalue(), ("c",), ("alt",), {}, "w")
    reader = filter_pipeline._Read(RawName("folder:nowhere"), None, near)
    with pytest.raises(DamagedRecord, match=f"image 'k' has {side}x100 pixels; source.max_pixels is 10000"):
        reader._examine(sample, 10_000)


@pytest.mark.slow
def test_more_workers_write_the_same_bytes(tars, tmp_path):
    for name, options in (
        ("one", []),
        ("two", ["--direct_num_workers=2", "--direct_running_mode=multi_threading"]),
    ):
        filter_pipeline.main(
            RawName(tars), str(tmp_path / name), keep=KEEP, duplicates="near", beam_options=options
        )
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 4
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_what_the_user_does_wrong_is_reported_in_one_line(tars, tmp_path):
    def run(source=tars, **options):
        filter_pipeline.main(RawName(source), str(tmp_path), **options)

    with pytest.raises(UserError, match="Unexpected pipeline runner"):
        run(runner="DirectRuner")
    with pytest.raises(UserError, match="'project' is no pipeline option"):
        run(beam_options=["project"])
    with pytest.raises(UserError, match="compare it with something"):
        run(keep="width + 1")
    with pytest.raises(UserError, match="holds no image files"):
        run(source="shapes")
    with pytest.raises(UserError, match=r"only --config.source.FIELD=VALUE"):
        raw_name(tars, ["--config.steps=3"])
    with pytest.raises(UserError, match="alt_fields"):
        raw_name(tars, ["--config.source.alt_field=a"])
    with pytest.raises(UserError, match="held_out_fraction has no meaning here"):
        raw_name(tars, ["--config.source.held_out_fraction=0.1"])
    fields = raw_name(tars, ["--config.source.synthetic_fields=('blip',)"]).fields
    assert fields == (("synthetic_fields", ("blip",)),)


def test_the_hash_is_the_sign_of_low_frequencies_around_their_median():
    image = smooth(np.random.default_rng(2), 64)
    small = Image.fromarray(image).convert("L").resize((32, 32), Image.Resampling.BOX)
    grey = np.asarray(small, np.float64)
    n = np.arange(32)
    # [frequency, pixel].
    cosines = np.cos(np.pi / 32 * (n[None] + 0.5) * np.arange(1, 9)[:, None])
    spectrum = cosines @ grey @ cosines.T
    assert np.allclose(spectrum / 16, scipy.fft.dctn(grey, norm="ortho")[1:9, 1:9])
    bits = (spectrum > np.median(spectrum)).ravel()
    assert duplicates.perceptual_hash(Image.fromarray(image)) == int(
        "".join("01"[b] for b in bits.astype(int)), 2
    )
    assert duplicates.perceptual_hash(Image.new("RGB", (40, 30), (10, 200, 30))) is None


def test_a_smaller_or_recompressed_image_is_near_and_another_is_not():
    rng = np.random.default_rng(3)
    images = [Image.fromarray(smooth(rng, 128)) for _ in range(20)]
    hashes = [duplicates.perceptual_hash(image) for image in images]
    for image, value in zip(images, hashes, strict=True):
        jpeg = io.BytesIO(small_webdataset.encoded(image.resize((60, 60)), "JPEG", quality=70))
        assert (duplicates.perceptual_hash(Image.open(jpeg).convert("RGB")) ^ value).bit_count() <= 6
        mirrored = duplicates.perceptual_hash(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        assert (mirrored ^ value).bit_count() > 10
    assert min((a ^ b).bit_count() for a, b in itertools.combinations(hashes, 2)) > 10


@pytest.mark.parametrize("distance", [0, 1, 3, 6, duplicates.MAX_DISTANCE])
def test_hashes_within_the_distance_share_a_band(distance):
    rng = np.random.default_rng(distance)
    for _ in range(300):
        value = int(rng.integers(2**63)) * 2 + int(rng.integers(2))
        other = value
        for bit in rng.choice(64, size=distance, replace=False):
            other ^= 1 << int(bit)
        pairs = zip(duplicates.bands(value, distance), duplicates.bands(other, distance), strict=True)
        assert any(a == b for a, b in pairs)
    whole = sum(bits << (64 * band // (distance + 1)) for band, bits in duplicates.bands(value, distance))
    assert whole == value


def test_the_first_near_one_is_found_across_blocks(monkeypatch):
    monkeypatch.setattr(duplicates, "_BLOCK", 7)
    rng = np.random.default_rng(5)
    hashes = [int(rng.integers(256)) << 20 for _ in range(40)]
    for distance in (0, 1, 2):
        expected = [
            next((j for j in range(i) if (hashes[i] ^ hashes[j]).bit_count() <= distance), None)
            for i in range(40)
        ]
        assert duplicates.first_near(hashes, distance) == expected
        assert any(index is not None for index in expected)


def test_a_missing_or_broken_list_is_reported(tmp_path):
    with pytest.raises(UserError, match="`scaling-dit filter` writes one"):
        sidecar.read_kept(tmp_path, "00000.tar")
    path = tmp_path / "00000.tar.filter.jsonl"
    for text, message in (
        ("{", "line 1 is no JSON"),
        ("[]", "line 1 is no JSON object"),
        ("{}", 'line 1 has no "key"'),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            sidecar.read_kept(tmp_path, "00000.tar")
