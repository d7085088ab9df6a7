"""Conditions that stand beside an image in files: paired data, such as an image before and after an edit.

The field `conditions` of a source names them: "edit" for a condition that is an image alone, "inpaint+mask" for one
with a mask. The mask is a file of its own, so no format with an alpha channel is needed. Each has the size of the image
that it belongs to, and is scaled and cropped as that is.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from scaling_dit.data import images
from scaling_dit.data.damage import DamagedRecord
from scaling_dit.errors import UserError

_NAME = re.compile(r"([A-Za-z_]\w*)(\+mask)?")
# Of a mask's file or column, behind the name of its condition.
MASK = "mask"


class Beside(NamedTuple):
    """A condition that is read."""

    name: str
    masked: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """A name for each of its files: "edit", or "inpaint" and "inpaint.mask"."""
        return (self.name, f"{self.name}.{MASK}") if self.masked else (self.name,)


def parse(entries: Sequence[str]) -> tuple[Beside, ...]:
    """The conditions that a field names.

    Raises:
      UserError: an entry that is no NAME or NAME+mask, or a name that is there twice.
    """
    found = []
    for entry in entries:
        match = _NAME.fullmatch(entry) if isinstance(entry, str) else None
        if match is None:
            raise UserError(
                f"source.conditions has {entry!r}; write the name of a condition, or NAME+mask for one with a mask"
            )
        found.append(Beside(match[1], bool(match[2])))
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"source.conditions names {name!r} twice")
    return tuple(found)


def columns(wanted: Sequence[Beside], ending: str = "") -> dict[str, str]:
    """Part -> the column or key that holds it: "inpaint.mask" -> "inpaint_mask", and `ending` behind it."""
    return {part: part.replace(".", "_") + ending for one in wanted for part in one.parts}


def missing(part: str, where: str, what: str) -> DamagedRecord:
    """The damage of a record that lacks a condition, or its mask."""
    return DamagedRecord("missing_condition", where, f"no {part.replace('.', ' ')}: {what}")


def decode(
    wanted: Sequence[Beside],
    encoded: Mapping[str, bytes],
    image: Image.Image,
    size: tuple[int, int],
    where: str,
    max_pixels: int,
) -> dict[str, np.ndarray]:
    """The conditions of a record: name -> uint8 [height, width, 3 + M].

    Args:
      encoded: part -> encoded file.
      image: that they belong to, upright and of its own size.
      size: height and width that it is brought to.

    Raises:
      DamagedRecord: unreadable_image or too_large, or bad_condition for one of another size than its image.
    """
    found = {}
    for one in wanted:
        channels = []
        for part in one.parts:
            read = images.decode(encoded[part], where, part, max_pixels)
            if read.size != image.size:
                what = (
                    f"{part.replace('.', ' ')} has {read.width}x{read.height} pixels, its image "
                    f"{image.width}x{image.height}; they must be equal"
                )
                raise DamagedRecord("bad_condition", where, what)
            channels.append(_fitted(read, size, part != one.name))
        found[one.name] = np.concatenate(channels, axis=-1)
    return found


def _fitted(image: Image.Image, size: tuple[int, int], is_mask: bool) -> np.ndarray:
    """uint8 [height, width, 3], or of a mask [height, width, 1] with 0 and 255 alone."""
    height, width = size
    if not is_mask:
        return images.fit(image, width, height)
    mask = images.fit_mask(np.asarray(image.convert("L")) > 127, width, height)
    return np.where(mask, np.uint8(255), np.uint8(0))[..., None]
