"""Helpers for the tests of sources of encoded images: image files, and reading through the loader."""

import io

import numpy as np
from PIL import Image

from scaling_dit.data.loader import make_loader

SIZE, BATCH = 8, 16


def encoded(image, kind="PNG", **options):
    """An image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(number, kind="PNG"):
    """The file of an image of one colour, which encodes its number."""
    return encoded(Image.new("RGB", (SIZE, SIZE), colour(number)), kind)


def colour(number):
    return (number % 256, number // 256, 9)


UNREADABLE = (
    b"text",
    picture(1)[:40],
    encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)))[:900],
)
# For max_pixels=10_000.
TOO_LARGE = encoded(Image.new("1", (101, 100)))


def rows(source, steps, positions=range(BATCH), *, start=0, threads=2):
    """(images, numbers of the captions) of steps from `start`, at positions of the global batch."""

    def tokenize(captions):
        ids = np.array([[int(caption.split()[1])] for caption in captions], np.int32)
        return ids, ids >= 0

    loader = make_loader(
        source, tokenize, batch=BATCH, seed=3, positions=list(positions), start_step=start, threads=threads
    )
    read = [next(loader) for _ in range(steps)]
    loader.close()
    return [(batch["images"], batch["ids"][:, 0]) for batch in read]


def check_same_rows_for_any_split(make, steps=6):
    """Every process split, resume and number of threads reads the same rows; `make()` opens the source anew."""
    whole = rows(make(), steps)
    for start, positions, threads in ((0, range(0, BATCH, 2), 4), (0, range(1, BATCH, 2), 0), (2, [7, 3], 1)):
        part = rows(make(), steps - start, positions, start=start, threads=threads)
        for found, expected in zip(part, whole[start:], strict=True):
            for mine, all_rows in zip(found, expected, strict=True):
                np.testing.assert_array_equal(mine, all_rows[list(positions)])
    # Image and caption belong to one record.
    for images, numbers in whole:
        np.testing.assert_array_equal(images[:, 0, 0], [colour(int(number)) for number in numbers])
