"""Raw pictures to the sizes that are encoded: what is too small, which bucket, what is cut away."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from scaling_dit.data import images
from scaling_dit.errors import UserError

Size = tuple[int, int]  # height, width, in px

# Sides of the aspect buckets in eighths of `image_size`: areas within 6 % of the square's, which is among them.
BUCKETS = ((5, 12), (6, 10), (7, 9), (8, 8), (9, 7), (10, 6), (12, 5))
_EIGHTHS = 8


class Shaped(NamedTuple):
    """A picture at the size of its bucket."""

    pixels: np.ndarray  # uint8 [height, width, 3]
    width: int  # px, of the raw picture
    height: int
    crop: tuple[float, float, float, float]  # left, top, right, bottom of the part shown, in raw pixels

    @property
    def size(self) -> Size:
        """Height and width of `pixels`."""
        return self.pixels.shape[0], self.pixels.shape[1]


def bucket_sizes(image_size: int, buckets: bool) -> tuple[Size, ...]:
    """The sizes that pictures are brought to: the square, or the fixed table of aspect buckets.

    Raises:
      UserError: an image size whose eighths are no whole pixels.
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
    """The size whose ratio of height to width is nearest on a log scale; the first of two equally near."""
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(height / width)))


def shape(image: Image.Image, sizes: tuple[Size, ...]) -> Shaped:
    """Scales a picture to cover its nearest size and cuts out the centre, as `images.fit` does."""
    height, width = nearest_size(image.width, image.height, sizes)
    pixels = images.fit(image, width, height)
    return Shaped(pixels, image.width, image.height, crop_box(image.width, image.height, width, height))


def crop_box(width: int, height: int, to_width: int, to_height: int) -> tuple[float, float, float, float]:
    """The centred part of a width x height picture with the ratio of another: left, top, right, bottom in pixels."""
    ratio = to_width / to_height
    kept_width, kept_height = min(width, ratio * height), min(height, width / ratio)
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    return left, top, left + kept_width, top + kept_height
