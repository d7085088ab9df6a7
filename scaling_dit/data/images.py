"""Image files to pixels: one decoder for every source and for `prepare`.

What is right with a file is used: of an animation the first frame, of 16-bit grey the upper byte, transparent pixels
on white, the orientation that a camera recorded. What is not is a damaged record (`data/damage.py`), of one kind:

    missing_file      no such file
    unreadable_image  truncated, no image, or of a format or pixel type that is not read
    too_large         more pixels than `max_pixels`, known from the header; it is not decoded
"""

import errno
import io
import warnings

import numpy as np
from etils import epath
from PIL import Image, ImageOps, UnidentifiedImageError

from scaling_dit.data.damage import DamagedRecord
from scaling_dit.errors import UserError

# Those that Pillow decodes itself; others would run programs of the system (EPS: Ghostscript).
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# 8192 x 8192, the default limit.
MAX_PIXELS = 2**26
# Pillow refuses more, and warns from half of it on.
PILLOW_MAX_PIXELS = 2 * 89_478_485
# `max_pixels` decides.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


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
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height <= max_pixels:
                return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise DamagedRecord("too_large", where, f"image {name!r}: {error}") from None
    except MemoryError:
        raise
    except Exception as error:
        # Damaged bytes make Pillow's decoders raise nearly anything.
        # Pillow's own message would show an address in memory.
        why = "no image of a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DamagedRecord("unreadable_image", where, f"cannot read image {name!r}: {why}") from error
    what = f"image {name!r} has {width}x{height} pixels; source.max_pixels is {max_pixels}"
    raise DamagedRecord("too_large", where, what)


def read_bytes(path: epath.Path, where: str) -> bytes:
    """What a file holds.

    Raises:
      DamagedRecord: missing_file, at `where`.
      UserError: the file is there and cannot be read: a fault of the disk or network, not of the record.
    """
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
    """RGB and upright: transparent pixels on white, the orientation that a camera recorded applied.

    Raises:
      ValueError: floating-point pixels, whose range is not known; for damaged data whatever Pillow raises.
    """
    # Damage to the pixels shows here.
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:
        # A damaged EXIF block says nothing about the orientation.
        image = image.copy()
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save 8 or 16 bits")
    # 16-bit grey: PIL's own conversion clips at 255 instead of scaling.
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image: Image.Image, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: an RGB image scaled to cover the box, the centre cut out.

    Antialiased bicubic resampling; an image of that size already is returned as it is.
    """
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
