"""The contract of a condition: checks of classes and arrays, records that carry theirs, and a user's files."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from scaling_dit.data.conditions import contract, create
from scaling_dit.data.conditions.inpaint import Inpaint
from scaling_dit.errors import UserError


@dataclasses.dataclass(frozen=True)
class Noise:
    """Random pixels and a mask."""

    masks: ClassVar[int] = 1

    def make(self, record, generator):
        return generator.integers(0, 256, (*record["image"].shape[:2], 4), np.uint8)

    def read(self, files):
        return contract.read_files(files, 1)


RECORD = {"image": np.zeros((4, 4, 3), np.uint8), "key": "k", "captions": ["x"]}


def test_what_the_mask_of_an_inpainting_condition_hides_never_shows():
    """The natural file beside a mask is the whole photo, whose hidden part is the answer."""
    photo = np.random.default_rng(0).integers(0, 100, (4, 4, 3), np.uint8)
    mask = np.zeros((4, 4, 1), np.uint8)
    mask[:2], mask[2] = 255, 100
    given = np.concatenate([photo, mask], axis=-1)
    record = RECORD | {"conditions": {"inpaint": given}}
    found = contract.make(Inpaint(), "inpaint", record, np.random.default_rng(0), 4)
    assert (found[:2, :, :3] == 128).all() and (found[..., 3] == np.where(mask > 127, 255, 0)[..., 0]).all()
    np.testing.assert_array_equal(found[2:, :, :3], photo[2:])
    np.testing.assert_array_equal(contract.hidden(Inpaint(), np.stack([given] * 2), "x"), [found] * 2)

    class Cut(Noise):
        def hide(self, image):
            return image[..., :3]

    with pytest.raises(
        UserError, match=r"condition 'mine'.*: hide\(\) must return an array as it was given, uint8 .4, 4, 4"
    ):
        contract.make(Cut(), "mine", RECORD | {"conditions": {"mine": given}}, np.random.default_rng(0), 4)


def test_a_condition_is_made_or_carried_by_the_record():
    made = contract.make(Noise(), "noise", RECORD, np.random.default_rng(3), 4)
    np.testing.assert_array_equal(made, np.random.default_rng(3).integers(0, 256, (4, 4, 4), np.uint8))
    own = np.full((4, 4, 4), 9, np.uint8)
    record = RECORD | {"conditions": {"noise": own}}
    assert contract.make(Noise(), "noise", record, np.random.default_rng(3), 4) is own
    with pytest.raises(
        UserError, match="condition 'noise' of record 'k' is 2x2x4 uint8; it must be uint8 .4, 4, 4."
    ):
        contract.make(Noise(), "noise", RECORD | {"conditions": {"noise": own[:2, :2]}}, None, 4)
    with pytest.raises(UserError, match=r"of record 'k': make\(\) raised AttributeError"):
        contract.make(Noise(), "noise", RECORD, None, 4)


def test_files_are_an_image_and_a_mask_of_its_size(tmp_path):
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (4, 4, 3), np.uint8), rng.integers(0, 256, (4, 4), np.uint8)
    files = [str(tmp_path / name) for name in ("image.png", "mask.png", "large.png")]
    for file, pixels in zip(files, (image, mask, np.zeros((8, 8), np.uint8)), strict=True):
        Image.fromarray(pixels).save(file)
    found = contract.read(Noise(), "noise", files[:2], 4)
    np.testing.assert_array_equal(found, np.concatenate([image, mask[..., None]], axis=-1))
    for wrong, message in (
        (files[:1], "got 1 file; it needs an image and a mask: write NAME:IMAGE,MASK"),
        (files, "got 3 files; it needs an image and a mask"),
        ([files[0], files[2]], r"large.png has 8x8 pixels; .*image.png has 4x4: a mask has its image's size"),
        (
            [files[2], files[2]],
            r"condition 'noise' in .* is 8x8x4 uint8; it must be uint8 .4, 4, 4.: RGB and a mask",
        ),
        ([files[0], str(tmp_path / "none.png")], "no file 'none.png'"),
    ):
        with pytest.raises(UserError, match=message) as error:
            contract.read(Noise(), "noise", wrong, 4)
        assert "\n" not in str(error.value)


class NoMasks:
    def make(self, record, generator): ...
    def read(self, files): ...


class NoRead:
    masks = 0

    def make(self, record, generator): ...


class OtherMake(NoRead):
    def make(self, record): ...
    def read(self, files): ...


@pytest.mark.parametrize(
    "candidate, message",
    [
        (NoMasks, "condition 'x' has no masks, the number of its mask channels"),
        (NoRead, r"condition 'x' has no read; a condition needs read\(files\)"),
        (OtherMake, r"condition 'x': a condition needs make\(record, generator\)"),
        (print, "condition 'x' must be a class, it is a builtin"),
    ],
)
def test_a_class_that_is_no_condition_is_refused(candidate, message):
    with pytest.raises(UserError, match=message):
        contract.check_class(candidate, "'x'")
    contract.check_class(Noise, "'x'")


@pytest.mark.parametrize("masks", [-1, 17, True, "1", None])
def test_masks_are_a_small_number(masks):
    with pytest.raises(UserError, match="masks must be an integer from 0 to 16"):
        contract.check_condition(type("Own", (), {"masks": masks})(), "'x'")


def test_names_are_those_of_the_registry():
    with pytest.raises(UserError, match="unknown condition 'inpant'; did you mean 'inpaint'"):
        create("inpant", {})
    assert create("inpaint", {}).masks == 1
