"""Scikit-learn's bundled handwritten digits as an image folder: real scans that need no download.

1,797 scans of 8x8 pixels with 17 grey levels (UCI "Optical Recognition of Handwritten Digits", test part),
written as 16x16 PNG files, white on black, with a `metadata.jsonl` of captions:

    python -m scaling_dit.data.digits OUT_DIR

Each pixel becomes a block of 2x2 equal ones, so that the scan can be had back exactly (`to_scans`).
"""

import argparse
import json
import sys
from collections.abc import Sequence

import numpy as np
from einops import reduce
from etils import epath
from PIL import Image

from scaling_dit.data.sources.folder import METADATA
from scaling_dit.errors import UserError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a handwritten {}",
    "a scan of the digit {}",
    "the digit {}, written by hand",
    "a handwritten digit: {}",
)
# A scan's brightest value.
LEVELS = 16
# Pixels of the image for each pixel of the scan, both ways.
BLOCK = 2


def captions(digit: int) -> list[str]:
    """Every caption of a digit; the first is the shortest."""
    return [template.format(WORDS[digit]) for template in TEMPLATES]


def to_images(scans: np.ndarray) -> np.ndarray:
    """Scans [N, 8, 8] in 0..16 -> grey images uint8 [N, 16, 16]."""
    grey = np.round(np.asarray(scans) * (255 / LEVELS)).astype(np.uint8)
    return grey.repeat(BLOCK, axis=1).repeat(BLOCK, axis=2)


def to_scans(images: np.ndarray) -> np.ndarray:
    """RGB images uint8 [N, 16, 16, 3] -> scans float64 [N, 8, 8] in 0..16, the mean of each block.

    The inverse of `to_images`, up to the rounding to 8 bits: within 0.04 of the scan's integer.
    """
    blocks = reduce(images.astype(np.float64), "n (h b) (w d) c -> n h w", "mean", b=BLOCK, d=BLOCK)
    return blocks * (LEVELS / 255)


def write(out_dir: str | epath.Path) -> epath.Path:
    """Writes the folder and returns it; a complete one is left as it is.

    `metadata.jsonl` comes last and whole, so a folder that has it is complete. Its rows also carry the `label`.

    Raises:
      UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("scikit-learn carries the scans and is missing: pip install scikit-learn") from None
    folder = epath.Path(out_dir)
    scans, labels = load_digits(return_X_y=True)
    names = [f"images/{i:04d}.png" for i in range(len(labels))]
    rows = [
        {"file_name": name, "texts": captions(int(label)), "label": int(label)}
        for name, label in zip(names, labels, strict=True)
    ]
    metadata = "".join(json.dumps(row) + "\n" for row in rows)
    target = folder / METADATA
    if target.exists() and target.read_text() == metadata:
        return folder
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, to_images(scans.reshape(-1, 8, 8)), strict=True):
        with (folder / name).open("wb") as file:
            Image.fromarray(image).save(file, format="PNG")
    partial = folder / f"{METADATA}.partial"
    partial.write_text(metadata)
    partial.replace(target)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `python -m scaling_dit.data.digits`."""
    parser = argparse.ArgumentParser(
        prog="python -m scaling_dit.data.digits",
        description="Write scikit-learn's handwritten digits as a folder of images and captions.",
    )
    parser.add_argument("out_dir", help="folder to write, local or gs://")
    try:
        folder = write(parser.parse_args(arguments).out_dir)
    except (UserError, OSError) as error:
        print(f"scaling_dit.data.digits: error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: handwritten digits; use --config.source.name=folder:{folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
