"""Finds near-duplicate images by a perceptual hash.

`perceptual_hash` is the DCT hash of pHash (Zauner 2010). It takes the luminance at 32 x 32 pixels and its
two-dimensional DCT-II. Each of the 64 coefficients of the frequencies 1 to 8 in each direction gives one bit: whether
it is above their median. Resizing, recompression and small changes of colour flip few bits; mirroring or rotation gives
another hash. An image without structure at these frequencies (a plain area) has no hash and no near-duplicates.

Two images are near-duplicates if their hashes differ in at most `distance` bits. All such pairs are found: the 64 bits
are divided into `distance` + 1 bands, and hashes that differ in at most `distance` bits agree in at least one band. So
only images with a band in common need to be compared.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import scipy.fft
from PIL import Image

BITS = 64
# With this distance bands have 4 bits. Images that look alike differ by far fewer bits.
MAX_DISTANCE = 15
_SIDE, _FREQUENCIES = 32, slice(1, 9)
# An image has no structure if its largest coefficient is below this, in grey levels.
_FLAT = 1.0
# Hashes that are compared at once with all better ones.
_BLOCK = 2048


def perceptual_hash(image: Image.Image) -> int | None:
    """The 64-bit hash of an RGB image of any size; None for an image without structure."""
    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    spectrum = scipy.fft.dctn(np.asarray(small, np.float64), norm="ortho")[_FREQUENCIES, _FREQUENCIES]
    if np.abs(spectrum).max() < _FLAT:
        return None
    bits = spectrum.ravel() > np.median(spectrum)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def bands(value: int, distance: int) -> Iterator[tuple[int, int]]:
    """(number, bits) of each of the `distance` + 1 bands of a hash."""
    edges = [BITS * band // (distance + 1) for band in range(distance + 2)]
    for band, (low, high) in enumerate(itertools.pairwise(edges)):
        yield band, (value >> low) & ((1 << (high - low)) - 1)


def first_near(hashes: Sequence[int], distance: int) -> list[int | None]:
    """For each hash the index of the first earlier hash within `distance` bits, or None.

    Time grows with the square of the number of hashes, memory linearly.
    """
    values = np.asarray(hashes, np.uint64)
    found: list[int | None] = []
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        best = np.full(len(block), -1)
        # The earliest block comes last and overrides the others.
        for other in reversed(range(0, start + len(block), _BLOCK)):
            near = np.bitwise_count(block[:, None] ^ values[None, other : other + _BLOCK]) <= distance
            columns = np.arange(other, other + near.shape[1])
            near &= columns[None] < np.arange(start, start + len(block))[:, None]
            best = np.where(near.any(1), other + near.argmax(1), best)
        found += [int(index) if index >= 0 else None for index in best]
    return found
