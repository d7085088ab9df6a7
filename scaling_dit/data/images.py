"""Image files to pixels: one decoder for every source and for `prepare`.

What is right with a file is used: of an animation the first frame, pixels of every type that `data/pixels.py` reads,
transparent ones on white, colours in sRGB, the orientation that a camera recorded. What is not is a damaged record
(`data/damage.py`): missing_file, or of a kind that `data/image_header.py` lists.
"""

import errno

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from scaling_dit import files
from scaling_dit.data import image_header, pixels
from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.image_header import MAX_PIXELS
from scaling_dit.errors import UserError

# Of a mask's 255: less is what bicubic resampling adds beside an edge.
_TOUCHED = 8


def decode(data: bytes, where: str, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An encoded image as an upright RGB one, of its own size.

    Args:
      data: the file's bytes.
      where: the place of the record, for the error.
      name: of the image, for the error.
      max_pixels: larger images are not decoded.

    Raises:
      DamagedRecord: unreadable_image or too_large, at `where`.
    """
    with image_header.opened(data, where, name, max_pixels) as header:
        image = pixels.to_rgb(header.image, header.bits)
        image = image if header.turn is None else image.transpose(header.turn)
        if image.size != (header.width, header.height):
            raise ValueError(
                f"{image.width}x{image.height} pixels; its header says {header.width}x{header.height}"
            )
        return image


def read_bytes(path: epath.Path, where: str) -> bytes:
    """What a file holds.

    Raises:
      DamagedRecord: missing_file, at `where`.
      UserError: the file is there and cannot be read: a fault of the disk or network, not of the record.
    """
    if kind := files.special(path):
        raise DamagedRecord("missing_file", where, f"{path.name!r} in {path.parent} is {kind}, no file")
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise DamagedRecord("missing_file", where, f"no file {path.name!r} in {path.parent}") from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise UserError(f"{where}: cannot read file {path}: {error}") from error
        raise DamagedRecord(
            "missing_file", where, f"no file can have the name {path.name[:40]!r}..."
        ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB and upright, of an image in memory: as `decode` of its file.

    Raises:
      ValueError: pixels whose range is not known; for damaged data whatever Pillow raises.
    """
    turn = image_header.turn(image)
    image = pixels.to_rgb(image)
    return image if turn is None else image.transpose(turn)


def fit(image: Image.Image, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: an RGB image scaled to cover the box, the centre cut out.

    Antialiased bicubic resampling; an image of that size already is returned as it is.
    """
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))


def fit_mask(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """bool [height, width]: a mask bool [H, W] scaled and cut as `fit` does an image.

    A pixel that the mask touches is masked, so that no other pixel has anything of a masked one.
    """
    return fit(Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0))), width, height) > _TOUCHED
