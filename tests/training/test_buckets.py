"""Runs on aspect buckets: one program a size, the same bits after a kill, sizes that do not fit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from scaling_dit import config as config_lib
from scaling_dit.checkpoints.workdir import Workdir
from scaling_dit.errors import UserError
from scaling_dit.model.build import build_model, make_tokenizer, open_source
from scaling_dit.training import loop
from scaling_dit.training.program import StepProgram, run_mesh
from scaling_dit.training.start import check_bucket
from tests.support.runs import assert_same_bits, losses, tiny

# Width, height.
SIZES = ((48, 48), (60, 36), (30, 72))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    lines, generator = [], np.random.default_rng(0)
    for number in range(48):
        width, height = SIZES[number % len(SIZES)]
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{number:02d}.png")
        lines.append(json.dumps({"file_name": f"{number:02d}.png", "text": f"image {number % 3}"}))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


def bucketed(folder, steps, backbone=None, image_size=32, **changes):
    """A run on the images of a folder."""
    config = tiny(steps, eval__metrics=(), **changes).copy_and_resolve_references()
    with config.unlocked():
        config.source = ConfigDict({"name": f"folder:{folder}", "image_size": image_size})
        config.backbone = ConfigDict(
            {"name": "uvit", "hidden": 32, "depth": 1, "heads": 2, "patch": 4} | (backbone or {})
        )
        del config["metrics"]
    return config_lib.resolve(config, ["--config.buckets=True"])


@pytest.mark.slow
def test_each_size_has_one_program_and_a_killed_run_ends_with_the_same_bits(folder, tmp_path, capfd):
    config = bucketed(folder, 12, checkpoint__every=5)
    one = jax.devices()[:1]
    whole = loop.train(config, tmp_path / "whole", one)
    said = capfd.readouterr().err
    assert "scaling-dit: buckets: 20x48 " not in said
    assert all(
        f"{size} " in said.split("buckets: ")[1].splitlines()[0] for size in ("24x40", "32x32", "48x20")
    )
    for size, number in zip(("24x40", "32x32", "48x20"), (1, 2, 3), strict=True):
        assert f"compiled for batches of {size}, program" in said
        assert f"program {number} of 3" in said
    assert len(losses(tmp_path / "whole")) == 12
    loop.train(bucketed(folder, 5, checkpoint__every=5), tmp_path / "parts", one)
    # The same run with more steps, as if it had been killed at step 5.
    Workdir(tmp_path / "parts").config.write_text(config_lib.to_json(config))
    parts = loop.train(config, tmp_path / "parts", one)
    assert_same_bits(whole, parts)


def test_sizes_that_codec_or_backbone_do_not_take_are_one_line(folder, tmp_path):
    with pytest.raises(UserError, match=r"config.buckets: images of \d+x\d+ px do not fit \(.*multiple"):
        loop.train(bucketed(folder, 2, {"patch": 8}), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(UserError, match="every image of the source has one size"):
        loop.train(
            config_lib.load("experiments/shapes.py:smoke", ["--config.buckets=True"]), tmp_path / "shapes"
        )


@dataclasses.dataclass
class Sized:
    """What `check_bucket` reads of a bucket: height and width in pixels."""

    bucket_size: tuple[int, int]


def opened(*overrides):
    """Model and program of a run that reads images and has a condition with a mask; nothing is trained."""
    config = tiny(2, batch=8, conditioning__names=("inpaint",)).copy_and_resolve_references()
    with config.unlocked():
        config.backbone = ConfigDict({"name": "uvit", "hidden": 32, "depth": 2, "heads": 2, "patch": 4})
    config = config_lib.resolve(config, list(overrides))
    source = open_source(config)
    model = build_model(config, make_tokenizer(config, source), source)
    return model, StepProgram.build(config, model, run_mesh(config))


def test_buckets_are_checked_with_conditions_and_on_the_mesh(monkeypatch):
    model, program = opened("--config.mesh.context=2")
    seen, encode = [], type(model).present_conditions

    def noted(model, frozen, given):
        seen.append({name: image.shape for name, image in given.items()})
        seen.append(jax.sharding.get_abstract_mesh().shape["context"])
        return encode(model, frozen, given)

    monkeypatch.setattr(type(model), "present_conditions", noted)
    check_bucket(Sized((28, 36)), model, program)
    assert seen == [{"inpaint": (8, 28, 36, 4)}, 2]

    def failing(*_):
        raise ValueError("shapes differ:\nat length")

    monkeypatch.setattr(type(model), "present_conditions", failing)
    with pytest.raises(UserError, match=r"config.buckets: images of 28x36 px do not fit \(shapes differ:\);"):
        check_bucket(Sized((28, 36)), model, program)
