"""Scores an edited image from its pixels alone: was the instruction followed, and was the rest left alone?

The image is read into objects (`oracle.read`). An object is in its place if its centre is at most half its side away.

    success  1 if every object that the edit makes is there, in its place, and of each (colour, shape) that the edit
             touches there are as many as the target has; an added object may stand wherever the words allow
    kept     share of the objects that the edit does not name that are there unchanged, in their places; every piece
             beyond those of source and target counts as one more that is not
    product  success x kept, the instruction following x content consistency of EdiVal-Agent (arXiv 2509.13399)

The unedited source gets success 0 and kept 1, the target 1 and 1. Where more than `oracle.MAX_UNEXPLAINED` of the
foreground is in no object, nothing is credited.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from scaling_dit.data.shapes import oracle
from scaling_dit.data.shapes.edits import Edit
from scaling_dit.data.shapes.scenes import PRESETS, Object, relations

# Raise the number when marks can change: scores compare only within one.
JUDGE = "shapes-edit-oracle-1"


@dataclasses.dataclass(frozen=True)
class Marks:
    """The score of one image: `success` is 0 or 1, `kept` in [0, 1]."""

    success: float
    kept: float

    @property
    def product(self) -> float:
        """Both together, in [0, 1]."""
        return self.success * self.kept


def score(image: np.ndarray, edit: Edit) -> Marks:
    """The marks of an image uint8 [canvas, canvas, 3] that should be the edit's target.

    Raises:
      UserError: the image has another size than the preset's canvas.
    """
    seen = oracle.read(image, edit.source.preset)
    if seen.unexplained > oracle.MAX_UNEXPLAINED:
        return Marks(0.0, 0.0)
    pixels = PRESETS[edit.source.preset].pixels

    def followed(wanted: Object, found: Object) -> bool:
        if edit.anchor is None:
            return _in_place(wanted, found, pixels[wanted.size])
        return edit.words["new"] in relations(found, edit.anchor, pixels)

    made = all(any(_alike(item, one) and followed(item, one) for one in seen.objects) for item in edit.made)
    touched = {(item.colour, item.shape) for item in (*edit.made, *edit.gone)}
    counts = all(_count(seen.objects, pair) == _count(edit.target.objects, pair) for pair in touched)
    there = sum(
        any(_alike(item, one) and _in_place(item, one, pixels[item.size]) for one in seen.objects)
        for item in edit.kept
    )
    most = max(len(edit.source.objects), len(edit.target.objects))
    asked = len(edit.kept) + max(0, seen.pieces - most)
    return Marks(float(made and counts), there / asked if asked else 1.0)


def _alike(one: Object, other: Object) -> bool:
    return (one.colour, one.shape, one.size) == (other.colour, other.shape, other.size)


def _in_place(wanted: Object, found: Object, side: int) -> bool:
    return max(abs(wanted.x - found.x), abs(wanted.y - found.y)) <= side // 2


def _count(objects: Sequence[Object], pair: tuple[str, str]) -> int:
    return sum((item.colour, item.shape) == pair for item in objects)
