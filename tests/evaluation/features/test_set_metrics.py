"""fid, kid, mind, cmmd and fd_dinov2 as metrics, on a small network; statistics of real images in a file."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from etils import epath
from PIL import Image
from safetensors.numpy import load_file

from scaling_dit.errors import UserError
from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.features import kernels, moments, networks, published, references
from scaling_dit.evaluation.features.moments import Gaussian
from scaling_dit.evaluation.features.networks import Network
from scaling_dit.evaluation.features.tables import FeatureTable
from scaling_dit.evaluation.metric import Item, Items
from scaling_dit.evaluation.parts import InFolder
from scaling_dit.evaluation.scoring import Scoring, score
from scaling_dit.evaluation.vqa.choices import create_matcher

COUNT, WIDTH = 60, 12
RNG = np.random.default_rng(0)
REAL, FAKE = (RNG.integers(low, 256, (COUNT, 4, 4, 3), np.uint8) for low in (0, 40))
FIELDS = {
    "fid": {},
    "fd_dinov2": {},
    "cmmd": {},
    "kid": {"subsets": 3, "subset_size": 20},
    "mind": {"directions": 7},
}


class Real:
    """Images of a user's own as a source."""

    image_size = 4

    def __init__(self, image_size: int = 4, images=REAL):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "captions": [f"number {index}"], "key": str(index)}

    def describe(self):
        return f"{len(self)} images"

    def held_out(self):
        return self


def features(images):
    """Means of 2 x 2 pixels, as a row of length 1."""
    x = images.reshape(len(images), 2, 2, 2, 2, 3).mean((2, 4)).reshape(len(images), -1)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file that stands for weights, and the small network in place of every other."""
    small = Network(
        "inception", WIDTH, networks.CLIP_L_336.weights, "2x2 means", lambda place, batch: features
    )
    monkeypatch.setitem(networks.INCEPTION, "tensorflow1", small)
    monkeypatch.setattr(networks, "CLIP_L_336", dataclasses.replace(small, name="clip-l-336"))
    monkeypatch.setattr(networks, "DINOV2_L", dataclasses.replace(small, name="dinov2-l"))
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"weights")
    return str(path)


def make(name, weights, **fields):
    return METRICS[name](weights=weights, **FIELDS[name], **fields)


def run(metric, images=FAKE, source=None):
    items = metric.items(source or Real(), len(images))
    return score(Scoring(metric.NAME, metric, items, 16), [images], 5)[0]


def expected(name):
    ours, real = (FeatureTable.spill([features(x)], WIDTH) for x in (FAKE, REAL))
    if name in ("fid", "fd_dinov2"):
        return moments.frechet(*(Gaussian.of(moments.of(features(x))) for x in (FAKE, REAL)))
    if name == "cmmd":
        return kernels.cmmd(ours, real)
    if name == "mind":
        return kernels.mind(ours, real, directions=7, seed=2020)
    return kernels.kid(ours, real, subsets=3, size=20, seed=2020).mean()


@pytest.mark.parametrize("name", FIELDS)
def test_by_the_images_of_the_prompts_and_by_a_file(name, weights, tmp_path):
    metric = make(name, weights)
    result = run(metric)
    assert result["scalars"][name] == pytest.approx(expected(name), abs=1e-9) and result["scalars"][name] > 0
    assert (result["n"], result["n_reference"]) == (COUNT, COUNT)
    assert metric.about()["reference"] == {
        "images": "the real images of the same prompts, from the run's own data"
    }
    low, high = result["interval"]
    assert low < result["scalars"][name] < high and metric.table(result)

    built = metric.with_reference(f"{__name__}:Real", 4, epath.Path(tmp_path / "built"))
    assert run(built)["scalars"][name] == pytest.approx(expected(name), abs=1e-9)
    about = built.about()
    assert about["reference"]["n"] == COUNT and about["reference"]["network"] == metric.network.name
    assert "centred square, resized to 4 px" in about["reference"]["crop"] and about["resize"] == "2x2 means"
    assert len(about["reference"]["sha256"]) == len(about["reference"]["pixels_sha256"]) == 64
    # A folder of statistics holds one file for each network.
    folder = epath.Path(built.reference).parent
    assert run(make(name, weights, reference=str(folder)))["scalars"] == run(built)["scalars"]
    json.dumps(about)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("name", FIELDS)
def test_parts_and_processes_do_not_matter(name, parts, weights, tmp_path):
    metric = make(name, weights)
    items = metric.items(Real(), COUNT)
    scoring = Scoring(name, metric, items, 16)
    shared = InFolder(epath.Path(tmp_path / "parts"), {})
    for index in range(parts):
        scoring.update(np.array_split(FAKE, parts), shared, share=(index, parts))
    found = scoring.result(shared, 5)[0]["scalars"]
    assert found[name] == pytest.approx(expected(name), abs=1e-9)


def test_fid_at_several_numbers_with_its_extrapolation_and_interval(weights):
    result = run(make("fid", weights, resamples=20))
    curve = [(row["n"], row["fid"]) for row in result["by_number"]]
    assert [n for n, _ in curve] == [12, 24, 36, 48, 60] and curve[-1][1] == result["scalars"]["fid"]
    # Fewer images give a larger distance.
    assert curve[0][1] > curve[-1][1] > result["scalars"]["fid_infinity"]
    assert result["scalars"]["fid_infinity"] == pytest.approx(moments.extrapolate(*zip(*curve, strict=True)))
    low, high = result["interval"]
    assert 0 < low < high
    plain = run(make("fid", weights, points=0))
    assert list(plain["scalars"]) == ["fid"] and "by_number" not in plain


def test_statistics_are_a_safetensors_file_that_others_read(weights, tmp_path):
    metric = make("fid", weights).with_reference(f"{__name__}:Real", 4, epath.Path(tmp_path))
    content = load_file(metric.reference)
    np.testing.assert_array_equal(content["features"], features(REAL))
    np.testing.assert_allclose(content["mean"], features(REAL).astype(float).mean(0), rtol=1e-12)
    assert content["scatter"].dtype == np.float64 and content["n"] == COUNT
    np.savez(tmp_path / "mu.npz", mu=content["mean"], sigma=content["scatter"] / (COUNT - 1))
    by_moments = make("fid", weights, reference=str(tmp_path / "mu.npz"))
    assert run(by_moments)["scalars"]["fid"] == pytest.approx(expected("fid"), abs=1e-9)
    with pytest.raises(
        UserError, match=r"metric 'kid' needs the features of all real images, .*mu.npz holds moments only"
    ):
        run(make("kid", weights, reference=str(tmp_path / "mu.npz")))


def test_a_plain_folder_of_images(weights, tmp_path):
    folder = tmp_path / "real" / "below"
    folder.mkdir(parents=True)
    for number, image in enumerate(REAL):
        Image.fromarray(image).save((folder if number % 2 else folder.parent) / f"{number:02d}.png")
    (folder / "notes.txt").write_text("x")
    metric = make("fid", weights).with_reference(str(folder.parent), 4, epath.Path(tmp_path / "kept"))
    assert run(metric)["scalars"]["fid"] == pytest.approx(expected("fid"), abs=1e-9)
    assert metric.about()["reference"]["images"] == f"60 images in {folder.parent}"
    (folder / "01.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"below/01.png"):
        make("fid", weights).with_reference(str(folder.parent), 4, epath.Path(tmp_path / "again"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"no image in .*empty or below: no file that ends in .png"):
        metric.with_reference(str(empty), 4, epath.Path(tmp_path / "again"))


def test_a_build_that_was_killed_computes_only_what_is_missing(weights, tmp_path, monkeypatch):
    calls = []

    def dies(images):
        calls.append(len(images))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return features(images)

    network = dataclasses.replace(
        networks.INCEPTION["tensorflow1"], build=lambda place, batch: dies, name="dying"
    )
    path = epath.Path(tmp_path / "kept" / "a.safetensors")
    build = functools.partial(references.build, Real(), "real", network, weights, path, batch=8)
    with pytest.raises(KeyboardInterrupt):
        build()
    assert not path.exists()
    build()
    # 8 parts in all: 4 before the kill, one that died, 4 that were missing.
    assert len(calls) == 9
    whole = epath.Path(tmp_path / "whole.safetensors")
    references.build(Real(), "real", network, weights, whole, batch=8)
    assert path.read_bytes() == whole.read_bytes() and [p.name for p in path.parent.iterdir()] == [
        "a.safetensors"
    ]
    count = len(calls)
    build()
    assert len(calls) == count
    with pytest.raises(UserError, match="is of another source: 'real', not 'other'"):
        references.build(Real(), "other", network, weights, path)


def test_mistakes(weights, tmp_path):
    metric = make("fid", weights)
    with pytest.raises(
        UserError, match="no reference nowhere; give statistics, a folder of images, or a source"
    ):
        metric.with_reference("nowhere", 4, epath.Path(tmp_path))
    with pytest.raises(UserError, match="its images are to be compared with images of 8 px"):
        metric.with_reference(f"{__name__}:Real", 8, epath.Path(tmp_path))
    built = metric.with_reference(f"{__name__}:Real", 4, epath.Path(tmp_path / "a"))
    with pytest.raises(
        UserError, match="was built with network inception, the metric has clip-l-336; build it anew"
    ):
        run(make("cmmd", weights, reference=built.reference))
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"other weights")
    with pytest.raises(
        UserError, match=r"was built with weights_sha256 .*, the metric has .*; build it anew"
    ):
        run(make("fid", str(other), reference=built.reference))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(epath.Path(built.reference).read_bytes()[:-5])
    with pytest.raises(
        UserError, match=r"cut.safetensors is damaged or no reference .*bytes, its header says"
    ):
        run(make("fid", weights, reference=str(cut)))
    with pytest.raises(UserError, match="the prompts have no real images; give --reference"):
        blind = Items(4, lambda i: Item(str(i), "x"))
        score(Scoring("fid", metric, blind, 4), [FAKE[:4]], 0)
    for name, fields, message in (
        ("fid", {"resize": "bilinear"}, "metrics.fid.resize is 'bilinear'; known: clean, tensorflow1"),
        ("fid", {"points": 1}, "metrics.fid.points is 1; it must be 0 or at least 2"),
        ("fd_dinov2", {"resamples": -1}, "metrics.fd_dinov2.resamples is -1; it must be 0 or more"),
        ("kid", {"subsets": 0}, "metrics.kid.subsets is 0; it must be at least 1"),
        ("mind", {"directions": 0}, "metrics.mind.directions is 0; it must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            METRICS[name](**fields)


@pytest.mark.parametrize(
    "read",
    [
        lambda place: METRICS["fid"]().with_reference(place, 4, epath.Path("kept")),
        lambda place: references.open_reference(place, METRICS["fid"]().network, ""),
        lambda place: published.CLIP_L.find(place, "clip_score"),
        create_matcher,
    ],
)
def test_a_variable_that_is_not_set_is_refused_wherever_a_place_is_named(read, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(UserError, match="variable NOWHERE is not set"):
        read("$NOWHERE/x")
