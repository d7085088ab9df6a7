"""The contract of an image condition, and the checks that every condition passes, a user's own too.

A condition is an image of the run's size that the backbone reads beside the text: RGB, and M masks. Its fields are
plain config values, each with a default. In data and in a user's files it is uint8 [H, W, 3 + M]: RGB, then the masks,
in which 255 marks what is to be generated and 0 what is given.

A record may carry its conditions itself, as paired data do: `record["conditions"]` maps a name to such an array, which
is used as it is. If the condition has a method

    hide(image) -> image                  uint8 [..., H, W, 3 + M]: the same, with nothing to see of what its masks hide

arrays that it did not make, of records or of users, go through that first.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from scaling_dit.components import check_class_methods, one_line
from scaling_dit.errors import UserError
from scaling_dit.files import expand

# Method -> how many arguments it is called with, `self` among them, and how it reads.
_METHODS = {
    "make": (3, "make(record, generator) -> uint8 [H, W, 3 + masks]"),
    "read": (2, "read(files) -> uint8 [H, W, 3 + masks]"),
}
# More would be no image.
MOST_MASKS = 16
# How a backbone may read it, and which positions its tokens may have.
CONCAT = ("token", "channel")
POSITIONS = ("shared", "shifted")


class Condition(Protocol):
    """What makes one condition; see the module's docstring."""

    @property
    def masks(self) -> int:
        """Number M of mask channels behind RGB."""

    def make(self, record: Mapping[str, Any], generator: np.random.Generator) -> np.ndarray:
        """The condition of a record, uint8 [H, W, 3 + M]; it depends on the record and the generator alone."""

    def read(self, files: Sequence[str]) -> np.ndarray:
        """The condition in a user's files, uint8 [H, W, 3 + M]: of `sample --condition=NAME:FILE,...`."""


def check_class(candidate: Any, where: str) -> None:
    """Makes sure that a class has the members of a condition.

    Raises:
      UserError: a member that is missing or cannot be called as the contract says; `where` names the class.
    """
    if not isinstance(candidate, type):
        raise UserError(f"condition {where} must be a class, it is a {type(candidate).__name__}")
    fields = getattr(candidate, "__dataclass_fields__", {})
    if not hasattr(candidate, "masks") and "masks" not in fields:
        raise UserError(
            f"condition {where} has no masks, the number of its mask channels; 0 for an image alone"
        )
    check_class_methods(candidate, where, "condition", _METHODS)


def check_condition(condition: Any, where: str) -> None:
    """Makes sure that a condition has a usable number of masks.

    Raises:
      UserError: it has not.
    """
    masks = condition.masks
    whole = isinstance(masks, int) and not isinstance(masks, bool)
    if not whole or not 0 <= masks <= MOST_MASKS:
        raise UserError(
            f"condition {where}: masks must be an integer from 0 to {MOST_MASKS}, it is {masks!r}"
        )


def check_image(image: Any, size: int | tuple[int, int], masks: int, where: str) -> np.ndarray:
    """An array that passes as a condition for images of this height and width in pixels; one number is both.

    Raises:
      UserError: it is no uint8 [height, width, 3 + masks]; `where` says where it is from.
    """
    height, width = (size, size) if isinstance(size, int) else size
    right = f"uint8 [{height}, {width}, {3 + masks}]: RGB" + (f" and {_masks(masks)}" if masks else "")
    if not isinstance(image, np.ndarray):
        raise UserError(f"{where} is a {type(image).__name__}; it must be a NumPy array, {right}")
    if image.shape != (height, width, 3 + masks) or image.dtype != np.uint8:
        found = f"{'x'.join(map(str, image.shape))} {image.dtype}"
        raise UserError(f"{where} is {found}; it must be {right}")
    return image


def make(
    condition: Condition,
    name: str,
    record: Mapping[str, Any],
    generator: np.random.Generator,
    size: int | tuple[int, int],
) -> np.ndarray:
    """The condition called `name` of a record, checked: the record's own, if it carries one, else made.

    Raises:
      UserError: the condition raises one, or fails otherwise; or an array that is not as the contract says.
    """
    where = f"condition {name!r} of record {record.get('key')!r}"
    if name in record.get("conditions", {}):
        return hidden(condition, check_image(record["conditions"][name], size, condition.masks, where), where)
    with one_line(f"{where}: make()"):
        made = condition.make(record, generator)
    return check_image(made, size, condition.masks, where)


def hidden(condition: Condition, image: np.ndarray, where: str) -> np.ndarray:
    """A condition uint8 [..., H, W, 3 + M] that was given, without what its masks hide.

    Raises:
      UserError: the condition's `hide` fails, or gives another array.
    """
    hide = getattr(condition, "hide", None)
    if hide is None:
        return image
    with one_line(f"{where}: hide()"):
        found = hide(image)
    if not isinstance(found, np.ndarray) or found.shape != image.shape or found.dtype != np.uint8:
        raise UserError(f"{where}: hide() must return an array as it was given, uint8 {list(image.shape)}")
    return found


def read(condition: Condition, name: str, files: Sequence[str], size: int) -> np.ndarray:
    """The condition called `name` in a user's files, checked.

    Raises:
      UserError: as `make`.
    """
    with one_line(f"condition {name!r}: read()"):
        found = condition.read(tuple(files))
    return check_image(found, size, condition.masks, f"condition {name!r} in {', '.join(map(str, files))}")


def read_files(files: Sequence[str], masks: int) -> np.ndarray:
    """uint8 [H, W, 3 + masks] of an image file and, behind it, one file for each mask; of their own size.

    Of a mask the brightness counts: white is to be generated, black is given.

    Raises:
      UserError: a file that is missing or no image, another number of files, or files of several sizes.
    """
    # Loads Pillow, which a config can do without.
    from scaling_dit.data import images

    if len(files) != 1 + masks:
        needed = "an image" + (f" and {_masks(masks)}" if masks else " alone")
        form = ",".join(["IMAGE", *["MASK"] * masks])
        raise UserError(
            f"got {len(files)} file{'s' * (len(files) != 1)}; it needs {needed}: write NAME:{form}"
        )
    read = []
    for file in files:
        path = epath.Path(expand(file))
        read.append(images.decode(images.read_bytes(path, str(file)), str(file), path.name))
    for file, image in zip(files, read, strict=True):
        if image.size != read[0].size:
            sizes = "{}x{} pixels".format(*image.size), "{}x{}".format(*read[0].size)
            raise UserError(f"{file} has {sizes[0]}; {files[0]} has {sizes[1]}: a mask has its image's size")
    channels = [np.asarray(read[0]), *(np.asarray(mask.convert("L"))[..., None] for mask in read[1:])]
    return np.concatenate(channels, axis=-1)


def _masks(count: int) -> str:
    return "a mask" if count == 1 else f"{count} masks"
