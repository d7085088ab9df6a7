"""The condition "inpaint": an image of which a part is missing, and the mask of that part.

Outpainting is the same with a border that is missing. Missing pixels are grey, so that nothing of them shows.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from scaling_dit.data.conditions import contract, masks
from scaling_dit.data.conditions.records import image_of
from scaling_dit.errors import UserError

GREY = 128
# EditBench's three sizes of masks (arXiv 2212.06909), as shares of the area: from, up to.
EDITBENCH_SIZES = {"small": (0.057, 0.215), "medium": (0.215, 0.369), "large": (0.369, 1.0)}
_FORMS = ("boxes", "strokes", "objects", "outpaint")


@dataclasses.dataclass(frozen=True)
class Inpaint:
    """Masks of several forms; a `contract.Condition` with one mask.

    The first four fields are weights: a form is chosen with its weight over the sum of all that the record allows.

    Attributes:
      boxes: weight of rectangles.
      strokes: weight of brush strokes.
      objects: weight of the exact mask of one object, where the record has those (`record["objects"]`; of the
        built-in sources `shapes` alone).
      outpaint: weight of borders: one side, or all around.
      smallest: least share of the area that boxes, strokes and borders cover; shares are chosen uniformly.
      largest: greatest such share. EditBench's small masks are 0.057 to 0.215, its medium ones up to 0.369.
    """

    boxes: float = 0.4
    strokes: float = 0.3
    objects: float = 0.2
    outpaint: float = 0.1
    smallest: float = 0.057
    largest: float = 0.6

    masks: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for form in _FORMS:
            if not 0 <= getattr(self, form) < float("inf"):
                raise UserError(f"conditions.inpaint.{form} is {getattr(self, form)}; it must be 0 or more")
        if not any(getattr(self, form) for form in _FORMS):
            raise UserError(f"conditions.inpaint: {', '.join(_FORMS)} are all 0; give one of them a weight")
        if not 0 < self.smallest <= self.largest < 1:
            raise UserError(
                f"conditions.inpaint.smallest and largest are {self.smallest} and {self.largest}; shares of the "
                "area must be above 0, below 1 and in this order"
            )

    def make(self, record: Mapping[str, Any], generator: np.random.Generator) -> np.ndarray:
        """The record's image with a random part missing, and the mask: uint8 [H, W, 4].

        Raises:
          UserError: the record has no image, or no objects while all other weights are 0.
        """
        image = image_of(record, "inpaint")
        return masked(image, self.mask(record, generator))

    def mask(self, record: Mapping[str, Any], generator: np.random.Generator) -> np.ndarray:
        """The mask alone, bool [H, W], True = missing; raises as `make`."""
        height, width, _ = image_of(record, "inpaint").shape
        # One number for the form whatever the record has, so that the rest of the stream stays in step.
        drawn = generator.random()
        objects = record.get("objects", ())
        weights = {form: getattr(self, form) for form in _FORMS if form != "objects" or len(objects)}
        total = sum(weights.values())
        if not total:
            raise UserError(
                f"record {record.get('key')!r} has no masks of objects, and conditions.inpaint.objects is the only "
                "form with a weight; give boxes, strokes or outpaint one, too"
            )
        edges = np.cumsum(list(weights.values())) / total
        form = list(weights)[int(np.searchsorted(edges[:-1], drawn, side="right"))]
        if form == "objects":
            return np.array(objects[int(generator.integers(len(objects)))], bool)
        share = generator.uniform(self.smallest, self.largest)
        makers = {"boxes": masks.box, "strokes": masks.strokes, "outpaint": masks.border}
        mask = makers[form](generator, height, width, share)
        # Of a few pixels a brush or a box may cover all; something is given always.
        mask[0, 0] &= not mask.all()
        return mask

    def read(self, files: Sequence[str]) -> np.ndarray:
        """An image and its mask, in which white is to be generated: uint8 [H, W, 4].

        Raises:
          UserError: the mask is missing, or of another size than the image; a file that is no image.
        """
        return self.hide(contract.read_files(files, self.masks))

    def hide(self, image: np.ndarray) -> np.ndarray:
        """An image and a mask uint8 [..., H, W, 4] as a condition: grey where the mask is more white than black."""
        return masked(image[..., :3], image[..., 3] > 127)


def masked(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The condition uint8 [..., H, W, 4] of an image [..., H, W, 3] and a mask bool [..., H, W], True = missing."""
    shown = np.where(mask[..., None], np.uint8(GREY), image)
    return np.concatenate([shown, np.where(mask, np.uint8(255), np.uint8(0))[..., None]], axis=-1)


def size_name(share: float) -> str:
    """The name of EditBench's size of a mask that covers a share of the area; below its range it is "small", too."""
    return next(name for name, (_, end) in EDITBENCH_SIZES.items() if share < end or name == "large")
