"""Inpainting, edges and edits as conditions: what is masked, how much of it, and what cannot be made."""

import numpy as np
import pytest
from PIL import Image
from skimage.feature import canny

from scaling_dit.data import conditions
from scaling_dit.data.conditions import contract, masks
from scaling_dit.data.conditions.edges import Edges
from scaling_dit.data.conditions.edit import Edit
from scaling_dit.data.conditions.inpaint import EDITBENCH_SIZES, Inpaint, size_name
from scaling_dit.data.shapes.source import ShapesSource
from scaling_dit.errors import UserError

FORMS = ("boxes", "strokes", "objects", "outpaint")
PHOTO = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)


def generator(seed=0):
    return np.random.default_rng(seed)


def only(form, **fields):
    return Inpaint(**{one: float(one == form) for one in FORMS}, **fields)


def record(**fields):
    return {"image": PHOTO, "captions": ["x"], "key": "k", **fields}


def test_masked_pixels_are_grey_and_all_others_as_they_were():
    made = conditions.create("inpaint", {}).make(record(), generator())
    missing = made[..., 3] == 255
    assert made.dtype == np.uint8 and made.shape == (64, 64, 4) and set(np.unique(made[..., 3])) == {0, 255}
    assert (made[missing][:, :3] == 128).all() and 0 < missing.sum() < missing.size
    np.testing.assert_array_equal(made[~missing][:, :3], PHOTO[~missing])


@pytest.mark.parametrize("form", ["boxes", "strokes", "outpaint"])
def test_masks_cover_the_shares_that_are_asked_for_over_their_whole_range(form):
    condition = only(form, smallest=0.1, largest=0.5)
    shares = np.array([condition.mask(record(), generator(i)).mean() for i in range(150)])
    assert shares.min() > 0.08 and shares.max() < 0.53
    assert shares.min() < 0.16 and shares.max() > 0.44 and 0.26 < shares.mean() < 0.34


def test_each_form_looks_as_its_name_says():
    for i in range(20):
        rng = generator(i)
        box = masks.box(rng, 40, 64, 0.3)
        rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        assert box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        # What outpainting is given is a rectangle too.
        given = ~masks.border(rng, 40, 64, 0.3)
        rows, columns = np.flatnonzero(given.any(1)), np.flatnonzero(given.any(0))
        assert given[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert len(rows) < 40 or len(columns) < 64
    stroke = masks.strokes(generator(3), 64, 64, 0.2)
    assert 0.2 <= stroke.mean() < 0.25


def test_objects_are_masked_exactly_and_only_where_a_record_has_them():
    source = ShapesSource(preset="free32")
    for i in range(20):
        held = source[i]
        mask = only("objects").mask(held, generator(i))
        assert any((mask == one).all() for one in held["objects"])
        # Every pixel of the objects together is one that is not background.
        together = np.any(list(held["objects"]), axis=0)
        np.testing.assert_array_equal(together, (held["image"] != 128).any(-1))
    with pytest.raises(UserError, match="no masks of objects"):
        only("objects").mask(record(), generator())
    # The other forms take over.
    assert Inpaint(boxes=1, strokes=0, objects=9, outpaint=0).mask(record(), generator()).any()


def test_forms_come_with_their_weights():
    source = ShapesSource(preset="grid16")
    condition = Inpaint(boxes=0.0, strokes=0.0, objects=3.0, outpaint=1.0)
    exact = 0
    for i in range(400):
        mask = condition.mask(source[i], generator(i))
        exact += any((mask == one).all() for one in source[i]["objects"])
    assert 0.69 < exact / 400 < 0.81


def test_equal_generators_give_equal_masks_and_tiny_images_keep_a_pixel():
    one, other = (Inpaint().make(record(), generator(5)) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    small = record(image=PHOTO[:2, :2])
    for form in ("boxes", "strokes", "outpaint"):
        for i in range(20):
            mask = only(form, smallest=0.9, largest=0.95).mask(small, generator(i))
            assert 0 < mask.sum() < mask.size


def test_editbench_names_sizes_by_shares():
    assert [size_name(share) for share in (0.01, 0.1, 0.215, 0.3, 0.369, 1.0)] == [
        "small", "small", "medium", "medium", "large", "large",
    ]  # fmt: skip
    assert EDITBENCH_SIZES["small"] == (0.057, 0.215)


def test_edges_are_canny_s_of_the_luma():
    image = ShapesSource(preset="free64")[2]["image"]
    made = Edges(sigma=0.8, low=0.05, high=0.3).make(record(image=image), generator())
    grey = (0.2126 * image[..., 0] + 0.7152 * image[..., 1] + 0.0722 * image[..., 2]) / 255.0
    expected = canny(grey, sigma=0.8, low_threshold=0.05, high_threshold=0.3)
    assert expected.any() and Edges.masks == 0
    np.testing.assert_array_equal(made, np.repeat(expected[..., None] * np.uint8(255), 3, axis=-1))


def test_an_edit_is_given_and_never_made():
    with pytest.raises(UserError, match=r"carries no condition 'edit'.*shapes_edits"):
        Edit().make(record(), generator())
    given = record(conditions={"edit": PHOTO})
    np.testing.assert_array_equal(contract.make(Edit(), "edit", given, generator(), 64), PHOTO)
    with pytest.raises(UserError, match=r"condition 'edit' of record 'k' is 32x64x3 uint8"):
        contract.make(Edit(), "edit", record(conditions={"edit": PHOTO[:32]}), generator(), 64)


def test_a_prepared_record_without_the_condition_is_one_line():
    latents = {"latents": np.zeros((2, 2, 4)), "captions": ["x"], "key": "k"}
    for condition in (Inpaint(), Edges()):
        with pytest.raises(UserError, match="prepare the set with a config whose conditioning.names has it"):
            condition.make(latents, generator())


def test_files_of_a_user_become_the_same_arrays(tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[:20] = 255
    for name, array in (("a.png", PHOTO), ("m.png", mask), ("small.png", mask[:32])):
        Image.fromarray(array).save(tmp_path / name)
    image, masked = str(tmp_path / "a.png"), str(tmp_path / "m.png")
    found = Inpaint().read((image, masked))
    np.testing.assert_array_equal(found[..., 3], mask)
    assert (found[:20, :, :3] == 128).all()
    np.testing.assert_array_equal(found[20:, :, :3], PHOTO[20:])
    np.testing.assert_array_equal(Edges().read((image,)), PHOTO)
    for files, message in (
        ((image,), "got 1 file; it needs an image and a mask"),
        ((image, str(tmp_path / "small.png")), "a mask has its image's size"),
        ((image, str(tmp_path / "none.png")), "no file 'none.png'"),
    ):
        with pytest.raises(UserError, match=message):
            Inpaint().read(files)


def test_fields_are_checked():
    for fields, message in (
        ({"boxes": -1.0}, "inpaint.boxes is -1.0"),
        ({"boxes": 0.0, "strokes": 0.0, "objects": 0.0, "outpaint": 0.0}, "are all 0"),
        ({"smallest": 0.5, "largest": 0.4}, "smallest and largest are 0.5 and 0.4"),
        ({"largest": 1.0}, "below 1"),
    ):
        with pytest.raises(UserError, match=message):
            Inpaint(**fields)
    for fields, message in (
        ({"sigma": -1.0}, "sigma is -1.0"),
        ({"low": 0.3}, "low and high are 0.3 and 0.2"),
    ):
        with pytest.raises(UserError, match=message):
            Edges(**fields)
