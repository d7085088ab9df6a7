"""Resizes and crops raw images to the sizes that are encoded: a square, or the nearest aspect bucket."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from scaling_dit.data import images
from scaling_dit.data.buckets import Size, nearest_size
from scaling_dit.data.buckets import bucket_sizes as table


class Shaped(NamedTuple):
    """An image at the size of its bucket.

    Attributes:
      pixels: uint8 [bucket's height, bucket's width, 3].
      width: of the raw image, in pixels.
      height: of the raw image, in pixels.
      crop: left, top, right and bottom of the part that is kept, in raw pixels.
    """

    pixels: np.ndarray
    width: int
    height: int
    crop: tuple[float, float, float, float]

    @property
    def size(self) -> Size:
        """Height and width of `pixels`."""
        return self.pixels.shape[0], self.pixels.shape[1]


def bucket_sizes(image_size: int, buckets: bool) -> tuple[Size, ...]:
    """The sizes that images are resized to: the square, or the table of aspect buckets (`data/buckets.py`).

    Raises:
      UserError: the image size is no multiple of 8, for buckets.
    """
    return table(image_size, "--buckets") if buckets else ((image_size, image_size),)


def shape(image: Image.Image, sizes: tuple[Size, ...]) -> Shaped:
    """Scales an image to cover its nearest size and crops the centre, as `images.fit` does."""
    height, width = nearest_size(image.width, image.height, sizes)
    pixels = images.fit(image, width, height)
    return Shaped(pixels, image.width, image.height, crop_box(image.width, image.height, width, height))


def crop_box(width: int, height: int, to_width: int, to_height: int) -> tuple[float, float, float, float]:
    """The centred crop of a width x height image with another ratio: left, top, right, bottom in pixels."""
    ratio = to_width / to_height
    kept_width, kept_height = min(width, ratio * height), min(height, width / ratio)
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    return left, top, left + kept_width, top + kept_height
