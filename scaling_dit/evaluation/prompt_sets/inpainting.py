"""Readers of prompt sets that come with images and masks: BrushBench.

Images are decoded when an item is asked for, so that one is in memory at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling_dit.data import images
from scaling_dit.data.conditions.inpaint import masked
from scaling_dit.data.damage import DamagedRecord
from scaling_dit.evaluation.metric import Item, Items
from scaling_dit.evaluation.prompt_sets import Files
from scaling_dit.evaluation.prompt_sets.plain import load_json, take

MAPPING = "mapping_file.json"
# The masks of BrushBench: inside of an object, or all around it.
MASKS = ("inpainting_mask", "outpainting_mask")
# Pixels along a side of BrushBench's images: its own tool reads every mask as a square of them.
SIDE = 512


def brushbench(files: Files) -> Sequence[Item]:
    """BrushBench (arXiv 2403.06976): 600 images with their captions, and the mask of an object in each."""
    return _brushbench(files, MASKS[0])


def brushbench_outside(files: Files) -> Sequence[Item]:
    """BrushBench with the masks of all but the object."""
    return _brushbench(files, MASKS[1])


def _brushbench(files: Files, mask_key: str) -> Sequence[Item]:
    content = load_json(files, MAPPING)
    if not isinstance(content, dict) or not content:
        raise files.wrong("is no object with an entry for each image", MAPPING)
    rows = []
    for key, row in content.items():
        where = f"entry {key!r}"
        image, caption = (take(files, row, name, str, where, MAPPING) for name in ("image", "caption"))
        runs = take(files, row, mask_key, list, where, MAPPING)
        if len(runs) % 2 or not all(isinstance(run, int) and run >= 0 for run in runs):
            raise files.wrong(f"has in {where} a {mask_key} that is no list of starts and lengths", MAPPING)
        rows.append((key, image, caption, runs))

    def make(number: int) -> Item:
        key, image, caption, runs = rows[number]
        try:
            place = files.path / image
            pixels = np.asarray(images.decode(images.read_bytes(place, image), image, place.name))
            mask = from_runs(runs, *pixels.shape[:2])
        except (DamagedRecord, ValueError) as fault:
            raise files.wrong(f"names in entry {key!r} what cannot be used: {fault}", MAPPING) from None
        meta = {"image": image, "mask": mask_key, "key": key}
        return Item(str(key), caption, truth=pixels, meta=meta, conditions={"inpaint": masked(pixels, mask)})

    return Items(len(rows), make)


def from_runs(runs: Sequence[int], height: int, width: int) -> np.ndarray:
    """A mask bool [height, width] from its run-length encoding: start (from 1), length, start, length, ... row by row.

    Raises:
      ValueError: a run that leaves the image.
    """
    mask = np.zeros(height * width, bool)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        if start < 1 or start - 1 + length > mask.size:
            raise ValueError(f"a run of {length} pixels from {start} on leaves {width}x{height} pixels")
        mask[start - 1 : start - 1 + length] = True
    return mask.reshape(height, width)


def to_runs(mask: np.ndarray) -> list[int]:
    """What `from_runs` reads, of a mask bool [H, W]."""
    flat = np.concatenate([[False], mask.ravel(), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.stack([edges[::2] + 1, edges[1::2] - edges[::2]], axis=1)
    return [int(value) for value in runs.ravel()]


def entry(image: str, caption: str, mask: np.ndarray) -> Mapping[str, Any]:
    """An entry of the mapping file, with the mask and what it leaves."""
    return {
        "image": image,
        "caption": caption,
        MASKS[0]: to_runs(mask),
        MASKS[1]: to_runs(~mask),
    }
