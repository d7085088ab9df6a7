"""Preparation of images: the values of Pillow's, torchvision's, clean-fid's and TensorFlow 1's own resizing."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from scaling_dit.encoders import clip_vision
from scaling_dit.evaluation.features import pixels
from tests.support import fidelity


def images(height, width, count=2):
    return np.random.default_rng(height + width).integers(0, 256, (count, height, width, 3), np.uint8)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (20, 20), (50, 31), (31, 58), (28, 28), (29, 40)])
def test_shorter_side_is_that_of_clip_s_processor(height, width):
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    given = images(height, width)
    theirs = CLIPImageProcessor(**size)(list(map(Image.fromarray, given)), return_tensors="np")[
        "pixel_values"
    ]
    ours = pixels.standardise(pixels.shorter_side(given, 28), clip_vision.MEAN, clip_vision.STD)
    # Where half a pixel is left over, its crop begins one pixel earlier than OpenAI's and open_clip's.
    np.testing.assert_allclose(ours, theirs.transpose(0, 2, 3, 1), atol=1e-5)


def test_centre_square_and_squash():
    wide = images(20, 33)
    square = Image.fromarray(wide[0]).crop((6, 0, 26, 20)).resize((9, 9), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels.centre_square(wide, 9)[0], square)
    np.testing.assert_array_equal(pixels.centre_square(wide, 20), wide[:, :, 6:26])
    squashed = Image.fromarray(wide[1]).resize((9, 9), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels.squash(wide, 9)[1], squashed)
    np.testing.assert_array_equal(pixels.squash(wide[:, :, :20], 20), wide[:, :, :20])


def test_clean_resizing_rounds_nothing():
    given = images(40, 40)
    ours = pixels.clean(given, 13)
    whole = np.stack(
        [np.asarray(Image.fromarray(x).resize((13, 13), Image.Resampling.BICUBIC)) for x in given]
    )
    assert ours.dtype == np.float32 and np.abs(np.clip(ours, 0, 255) - whole).max() <= 1.01
    assert np.abs(ours - np.round(ours)).max() > 0.1
    plane = Image.fromarray(given[0, ..., 2].astype(np.float32)).resize((13, 13), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(ours[0, ..., 2], plane)


@pytest.mark.parametrize(("height", "width", "side"), [(32, 32, 61), (40, 25, 17), (17, 17, 17)])
def test_tensorflow_1_s_resizing(height, width, side):
    given = images(height, width).astype(np.float32)
    theirs = fidelity.tensorflow1(
        torch.tensor(given.transpose(0, 3, 1, 2)), (side, side), align_corners=False
    )
    np.testing.assert_array_equal(pixels.tensorflow1(given, side), theirs.numpy().transpose(0, 2, 3, 1))
