"""Conditions in `prepare`: encoded with their images, the same on every run, and read back by training."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from scaling_dit import config as config_lib
from scaling_dit.checkpoints.workdir import read_metrics
from scaling_dit.curation import conditions, job
from scaling_dit.data.conditions.edges import Edges
from scaling_dit.data.conditions.inpaint import Inpaint
from scaling_dit.data.sources import create_source
from scaling_dit.encoders.codec import create_codec
from scaling_dit.errors import UserError
from scaling_dit.training import loop
from tests.support.prepared_sets import contents

SIDE = 16
IMAGE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def test_variants_differ_and_equal_ones_are_kept_once():
    making = conditions.Making({"inpaint": Inpaint(), "edges": Edges()}, 4, 7)
    made = conditions.make(making, "k", IMAGE, {})
    assert len(made["inpaint"]) == 4 and len(made["edges"]) == 1
    again = conditions.make(making, "k", IMAGE, {})
    np.testing.assert_array_equal(made["inpaint"][2], again["inpaint"][2])
    for other in (making._replace(seed=8), making):
        key = "k" if other.seed == 8 else "l"
        changed = conditions.make(other, key, IMAGE, {})["inpaint"]
        assert any((a != b).any() for a, b in zip(made["inpaint"], changed, strict=False))
    # More variants keep those before.
    more = conditions.make(making._replace(variants=6), "k", IMAGE, {})["inpaint"]
    np.testing.assert_array_equal(more[3], made["inpaint"][3])
    given = {"inpaint": np.zeros((SIDE, SIDE, 4), np.uint8)}
    assert len(conditions.make(making, "k", IMAGE, given)["inpaint"]) == 1


def test_masks_are_averaged_over_the_cells_of_latents():
    mask = np.zeros((SIDE, SIDE, 1), np.uint8)
    mask[:6, :8] = 255
    small = conditions.reduced(mask, (4, 2))
    assert small.shape == (4, 2, 1) and small.dtype == np.float32
    np.testing.assert_allclose(small[..., 0], [[1, 0], [0.5, 0], [0, 0], [0, 0]])
    with pytest.raises(UserError, match="masks of 16x16 pixels cannot be divided into 3x5 latents"):
        conditions.reduced(mask, (5, 3))


def test_moments_and_masks_come_back_in_their_places():
    made = [
        conditions.make(conditions.Making({"inpaint": Inpaint()}, n, 0), str(n), IMAGE, {}) for n in (1, 3, 2)
    ]
    calls = []

    def moments(images):
        calls.append(len(images))
        rows = np.stack([image[::8, ::8].astype(np.float32) for image in images])
        return np.concatenate([rows, np.zeros((2 - len(rows), *rows.shape[1:]), np.float32)]).astype(
            ml_dtypes.bfloat16
        )

    encoded = conditions.encode(made, moments, 2)
    assert calls == [2, 2, 2] and [len(row["inpaint"]) for row in encoded] == [1, 3, 2]
    for row, held in zip(made, encoded, strict=True):
        for one, array in zip(row["inpaint"], held["inpaint"], strict=True):
            assert array.shape == (2, 2, 4) and array.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(array[..., :3], one[::8, ::8, :3].astype(ml_dtypes.bfloat16))
            np.testing.assert_allclose(
                array[..., 3:].astype(float), conditions.reduced(one[..., 3:], (2, 2)), atol=0.01
            )


def write_folder(folder):
    lines = []
    for number in range(6):
        for name in ("", "before"):
            (folder / name).mkdir(exist_ok=True, parents=True)
            pixels = np.random.default_rng([number, len(name)]).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
        row = {
            "file_name": f"{number}.png",
            "text": f"number {number}",
            "edit_file_name": f"before/{number}.png",
        }
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def prepare(folder, out, *overrides, **options):
    base = (
        f"--config.source.name=folder:{folder}", f"--config.source.image_size={SIDE}", "--config.codec.name=dct",
        "--config.conditioning.names=('inpaint','edit')", "--config.source.conditions=('edit',)",
        "--config.source.held_out_fraction=0.3",
    )  # fmt: skip
    config = config_lib.load("shapes:smoke", [*base, *overrides])
    return job.main(config, str(out), job.Options(**{"batch": 4, **options}))


def test_a_prepared_set_has_the_conditions_of_its_images(tmp_path):
    write_folder(tmp_path / "raw")
    for name in ("one", "two"):
        assert prepare(tmp_path / "raw", tmp_path / name, variants=2) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with pytest.raises(UserError, match="was prepared in another way"):
        prepare(tmp_path / "raw", tmp_path / "one", variants=3)
    source = create_source(f"latents:{tmp_path / 'one'}", image_size=SIDE)
    held = source.manifest.conditions
    assert held["inpaint"]["variants"] == 2 and held["inpaint"]["masks"] == 1
    assert held["inpaint"]["name"] == "inpaint" and "sha256" not in held["inpaint"]
    assert held["inpaint"]["fields"]["boxes"] == 0.4 and source.manifest.format == 2
    codec = create_codec(name="dct")
    raw = create_source(
        f"folder:{tmp_path / 'raw'}", image_size=SIDE, held_out_fraction=0.3, conditions=("edit",)
    )
    by_key = {raw[i]["key"]: raw[i] for i in range(len(raw))}
    assert len(source) == len(by_key)
    for i in range(len(source)):
        record = source[i]
        before = by_key[record["key"]]["conditions"]["edit"]
        expected = np.asarray(codec.moments({}, before[None])).astype(ml_dtypes.bfloat16)[0]
        # Of another batch, so up to rounding.
        found = record["conditions"]["edit"][0].astype(float)
        np.testing.assert_allclose(found, expected.astype(float), rtol=0.01, atol=1e-5)
        height, width, depth = record["latents"].shape
        assert record["conditions"]["inpaint"].shape == (2, height, width, depth + 1)
        masks = record["conditions"]["inpaint"][..., -1].astype(float)
        assert 0 < masks.mean() < 1 and masks.min() >= 0 and masks.max() <= 1


def test_buckets_have_no_conditions(tmp_path):
    write_folder(tmp_path / "raw")
    with pytest.raises(UserError, match="prepare --buckets makes no conditions"):
        prepare(tmp_path / "raw", tmp_path / "out", buckets=True)


def test_two_classes_of_one_name_are_two_requests():
    making = conditions.Making({"Grey": Edges()}, 1, 0)
    found = [
        conditions.about(making, {"Grey": {}}, {"Grey": name}, {name: digest})["Grey"]
        for name, digest in (("a:Grey", "1"), ("b:Grey", "1"), ("a:Grey", "2"))
    ]
    assert found[0]["name"] == "a:Grey" and found[0]["sha256"] == "1"
    assert all(found.count(one) == 1 for one in found)
    built_in = conditions.about(making, {"Grey": {}}, {"Grey": "edges"}, {})["Grey"]
    assert built_in["name"] == "edges" and "sha256" not in built_in


@pytest.mark.slow
def test_a_run_from_such_a_set_is_evaluated_while_it_trains(tmp_path):
    """Its grid and validation loss read moments in place of pixels."""
    write_folder(tmp_path / "raw")
    assert prepare(tmp_path / "raw", tmp_path / "set") == 0
    overrides = [
        f"--config.source.name=latents:{tmp_path / 'set'}", "--config.codec.name=dct",
        "--config.conditioning.names=('inpaint','edit')", "--config.steps=2", "--config.batch=8",
        "--config.eval.every=2", "--config.eval.metrics=()", "--config.eval.grid=2", "--config.eval.loss_images=2",
        "--config.sample.steps=2", "--config.sample.keep=true", "--config.backbone.patch=4",
        "--config.backbone.depth=1", "--config.log.tensorboard=false",
        f"--config.source.image_size={SIDE}",
    ]  # fmt: skip
    loop.train(config_lib.load("shapes:smoke", overrides), tmp_path / "run", jax.devices()[:1])
    assert any("validation/loss" in row for row in read_metrics(tmp_path / "run"))
