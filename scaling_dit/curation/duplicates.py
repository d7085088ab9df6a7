"""Near-duplicate pictures by a perceptual hash.

`perceptual_hash` is the DCT hash of pHash (Zauner 2010): luminance at 32 x 32 pixels, its two-dimensional DCT-II, and
of the 64 coefficients of the frequencies 1 to 8 in each direction one bit each: whether it is above their median.
Resizing, recompression and small changes of colour move few bits; a mirrored or rotated picture is another one. A
picture without structure at these frequencies (a plain area) has no hash and is nobody's near-duplicate.

Two pictures are near-duplicates if their hashes differ in at most `distance` bits. All such pairs are found, exactly:
the 64 bits are cut into `distance` + 1 bands, and two hashes that differ in `distance` bits agree in at least one whole
band, so only pictures with a band in common need be compared.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import scipy.fft
from PIL import Image

BITS = 64
MAX_DISTANCE = 15  # bands of 4 bits; far beyond what pictures that look alike differ by
_SIDE, _FREQUENCIES = 32, slice(1, 9)
_FLAT = 1.0  # largest coefficient, in grey levels, of a picture without structure
_BLOCK = 2048  # hashes compared with all better ones at once


def perceptual_hash(image: Image.Image) -> int | None:
    """The 64-bit hash of an RGB picture of any size; None if it has no structure."""
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
    """For each hash the index of the first one before it that is within `distance` bits; None if there is none.

    Time grows with the square of the number of hashes, memory does not.
    """
    values = np.asarray(hashes, np.uint64)
    found: list[int | None] = []
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        best = np.full(len(block), -1)
        for other in reversed(range(0, start + len(block), _BLOCK)):  # the earliest block has the last word
            near = np.bitwise_count(block[:, None] ^ values[None, other : other + _BLOCK]) <= distance
            columns = np.arange(other, other + near.shape[1])
            near &= columns[None] < np.arange(start, start + len(block))[:, None]
            best = np.where(near.any(1), other + near.argmax(1), best)
        found += [int(index) if index >= 0 else None for index in best]
    return found
