"""Random masks: boxes, brush strokes, borders. True = to be generated.

A mask depends on the generator and the size alone. `share` is the part of the area that it should cover; pixels are
whole, so small images miss it by some.
"""

import math

import numpy as np

# Log of the most that a box is longer one way than the other.
_ASPECT = math.log(2)
# Sides of an image that outpainting continues; "all" is a frame around what is given.
SIDES = ("left", "right", "top", "bottom", "all")
# Discs of one stroke, at most.
_DISCS = 24
# A stroke's radius, as parts of the shorter side.
_THIN, _THICK = 1 / 24, 1 / 8


def box(generator: np.random.Generator, height: int, width: int, share: float) -> np.ndarray:
    """A rectangle of any place, at most twice as long one way as the other where it fits: bool [height, width]."""
    stretch = math.exp(generator.uniform(-_ASPECT, _ASPECT) / 2)
    area = share * height * width
    tall = _whole(math.sqrt(area) * stretch, height)
    wide = _whole(area / tall, width)
    top, left = int(generator.integers(height - tall + 1)), int(generator.integers(width - wide + 1))
    mask = np.zeros((height, width), bool)
    mask[top : top + tall, left : left + wide] = True
    return mask


def strokes(generator: np.random.Generator, height: int, width: int, share: float) -> np.ndarray:
    """Strokes of a round brush, each on a winding way, until they cover the share: bool [height, width]."""
    mask = np.zeros((height, width), bool)
    covered, wanted = 0, share * height * width
    while covered < wanted:
        short = min(height, width)
        radius = max(generator.uniform(_THIN * short, _THICK * short), 0.5)
        place = generator.uniform((0, 0), (height, width))
        angle = generator.uniform(0, 2 * math.pi)
        for _ in range(_DISCS):
            covered += _stamp(mask, float(place[0]), float(place[1]), radius)
            if covered >= wanted:
                break
            angle += generator.normal(0, 0.5)
            place = np.clip(place + radius * np.array([math.sin(angle), math.cos(angle)]), 0, (height, width))
    return mask


def _stamp(mask: np.ndarray, y: float, x: float, radius: float) -> int:
    """Sets the pixels of a disc in a mask, in place; returns how many were not set before."""
    top, left = max(math.floor(y - radius), 0), max(math.floor(x - radius), 0)
    window = mask[top : math.ceil(y + radius), left : math.ceil(x + radius)]
    rows, columns = np.ogrid[: window.shape[0], : window.shape[1]]
    disc = (rows + top + 0.5 - y) ** 2 + (columns + left + 0.5 - x) ** 2 <= radius**2
    added = int(np.count_nonzero(disc & ~window))
    window |= disc
    return added


def border(generator: np.random.Generator, height: int, width: int, share: float) -> np.ndarray:
    """What lies outside of the given part, on a random one of SIDES: bool [height, width]."""
    side = SIDES[int(generator.integers(len(SIDES)))]
    mask = np.ones((height, width), bool)
    if side == "all":
        kept = math.sqrt(1 - share)
        tall, wide = _whole(kept * height, height - 1), _whole(kept * width, width - 1)
        top, left = (height - tall) // 2, (width - wide) // 2
        mask[top : top + tall, left : left + wide] = False
        return mask
    length = height if side in ("top", "bottom") else width
    gone = _whole(share * length, length - 1)
    top, bottom = (gone if side == "top" else 0), (height - gone if side == "bottom" else height)
    left, right = (gone if side == "left" else 0), (width - gone if side == "right" else width)
    mask[top:bottom, left:right] = False
    return mask


def _whole(length: float, most: int) -> int:
    """A length in pixels, at least 1."""
    return min(max(round(length), 1), max(most, 1))
