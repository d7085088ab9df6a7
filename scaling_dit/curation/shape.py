"""Resizes and crops raw images to the sizes that are encoded: a square, or the nearest aspect bucket."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from scaling_dit.data import images
from scaling_dit.errors import UserError

# Height and width in pixels.
Size = tuple[int, int]

# Sides of the aspect buckets in eighths of `image_size`, the square included. Areas are within 6 % of the square's.
BUCKETS = ((5, 12), (6, 10), (7, 9), (8, 8), (9, 7), (10, 6), (12, 5))
_EIGHTHS = 8


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
    """The sizes that images are resized to: the square, or the fixed table of aspect buckets.

    Raises:
      UserError: the image size is no multiple of 8, for buckets.
    """
    if not buckets:
        return ((image_size, image_size),)
    if image_size % _EIGHTHS:
        raise UserError(
            f"config.source.image_size is {image_size}; for --buckets it must be a multiple of {_EIGHTHS}"
        )
    unit = image_size // _EIGHTHS
    return tuple((height * unit, width * unit) for height, width in BUCKETS)


def nearest_size(width: int, height: int, sizes: tuple[Size, ...]) -> Size:
    """The size whose ratio of height to width is nearest on a log scale; of two equally near sizes the first."""
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(height / width)))


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
