"""Every pixel type of every format: what its 8-bit twin holds, or refused by name; and the page that says so."""

import numpy as np
import pytest
from PIL import Image

from scaling_dit.data import image_header, images
from scaling_dit.data.damage import DamagedRecord
from tools import image_modes
from tools.image_files import P3, chunk, png, profile, saved, tiff
from tools.image_modes import COLOUR, RAMP

CASES = image_modes.cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.format}-{case.pixels}")
def test_equals_its_8_bit_twin_or_is_refused_by_name(case):
    found, difference = image_modes.outcome(case)
    assert difference <= case.within
    # What is refused by its header is refused for a filter too, and an image that is read has the size it says.
    if found == "read":
        assert image_header.shown_size(case.data, "w", "k") == (image_modes.SIDE, image_modes.SIDE)
    else:
        assert found.startswith("refused: ") and len(found) > 20
        assert "truncated" not in found and "mode" not in found


def test_the_page_is_what_the_script_writes():
    assert image_modes.PAGE.read_text() == image_modes.text(), "run: python -m tools.image_modes"


def test_the_common_types_are_read():
    refused = {(c.format, c.pixels) for c in CASES if image_modes.outcome(c)[0] != "read"}
    assert len(CASES) > 100 and len(refused) < 35
    assert not {kind for kind, _ in refused} & {"BMP", "GIF", "WebP", "PGM", "PPM", "PBM"}


def test_a_dark_image_of_16_bits_is_read_if_it_uses_them():
    grey = RAMP.astype(np.uint16) * 20
    np.testing.assert_allclose(
        np.asarray(images.decode(tiff(grey, 1), "w", "k"))[..., 0], grey / 257, atol=0.51
    )
    black = np.zeros_like(grey)
    assert not np.asarray(images.decode(tiff(black, 1), "w", "k")).any()
    # The range of a PNG is fixed by its specification.
    found = np.asarray(images.decode(png(RAMP.astype(np.int64), 16, 0), "w", "k"))
    assert found.max() == 1


def test_a_profile_that_is_srgb_in_another_notation_changes_nothing():
    from PIL import ImageCms

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    data = saved(Image.fromarray(pixels), "PNG", icc_profile=srgb)
    np.testing.assert_array_equal(np.asarray(images.decode(data, "w", "k")), pixels)


@pytest.mark.parametrize("size", [0, 100, 127, 128, 200, 400])
def test_a_profile_that_is_cut_short_or_of_other_pixels_is_ignored(size):
    data = saved(Image.fromarray(COLOUR), "PNG", icc_profile=profile(P3)[:size])
    np.testing.assert_array_equal(np.asarray(images.decode(data, "w", "k")), COLOUR)
    data = saved(Image.fromarray(COLOUR), "TIFF", icc_profile=profile(None))
    np.testing.assert_array_equal(np.asarray(images.decode(data, "w", "k")), COLOUR)


def test_a_profile_holds_under_transparency():
    rgba = np.dstack([COLOUR, np.full_like(RAMP, 255)])
    data = saved(Image.fromarray(rgba), "PNG", icc_profile=profile(P3))
    found = np.asarray(images.decode(data, "w", "k")).astype(int)
    assert np.abs(found - image_modes.shown(COLOUR, P3)).max() <= 2


def test_colours_coded_as_srgb_are_read():
    data = png(COLOUR, 8, 2, chunk(b"cICP", bytes((1, 13, 0, 1))))
    np.testing.assert_array_equal(np.asarray(images.decode(data, "w", "k")), COLOUR)


def test_images_in_memory_are_refused_too():
    with pytest.raises(ValueError, match="floating-point pixels have no known range"):
        images.to_rgb(Image.new("F", (4, 4)))
    with pytest.raises(DamagedRecord, match="cannot read image 'k': AVIF is not read"):
        images.decode(b"\0\0\0\x20ftypavif" + bytes(99), "w", "k")
