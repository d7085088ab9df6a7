"""Headers of image files: what an image will be, known before its pixels are decoded.

`opened` is the only way to an image file. So the size that a filter sees is the size of the decoded image, and each
fault has the same kind for every verb, whether pixels are needed or not:

    unreadable_image  truncated, no image, or of a format or pixel type that is not read
    too_large         more pixels than `max_pixels`; it is not decoded
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from scaling_dit.data import jpeg2000, pixels, png
from scaling_dit.data.damage import DamagedRecord

# Those that Pillow decodes itself; others would run programs of the system (EPS: Ghostscript).
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# 8192 x 8192, the default limit.
MAX_PIXELS = 2**26
# Pillow refuses more, and warns from half of it on.
PILLOW_MAX_PIXELS = 2 * 89_478_485
# `max_pixels` decides.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_ORIENTATION, _WIDTH, _HEIGHT = 0x0112, 256, 257
# Value of the orientation -> what makes the image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = range(5, 9)
# Where a format that is not read has its signature, for the message.
_OTHERS = (
    ("AVIF", 4, b"ftypavi"), ("HEIF", 4, b"ftyphe"), ("HEIF", 4, b"ftypmif1"), ("JPEG XL", 4, b"JXL "),
    ("JPEG XL", 0, b"\xff\x0a"), ("EPS", 0, b"%!PS"), ("PDF", 0, b"%PDF"), ("Photoshop", 0, b"8BPS"),
    ("OpenEXR", 0, b"v/1\x01"), ("ICO", 0, b"\0\0\1\0"), ("SVG", 0, b"<svg"),
)  # fmt: skip
# Of those that are read, where a pixel type that Pillow does not know looks like no image.
_KNOWN = (
    ("TIFF", 0, b"II*\0"), ("TIFF", 0, b"MM\0*"), ("TIFF", 0, b"II+\0"), ("TIFF", 0, b"MM\0+"), ("BMP", 0, b"BM"),
    ("PNG", 0, png.SIGNATURE), ("JPEG", 0, b"\xff\xd8\xff"), ("JPEG 2000", 4, b"jP  "), ("WebP", 8, b"WEBP"),
)  # fmt: skip


class Header(NamedTuple):
    """An opened image.

    Attributes:
      image: its pixels are not decoded yet.
      width: of the upright image, in pixels.
      height: of the upright image, in pixels.
      turn: what makes the decoded image upright; None if it is.
      bits: of 16-bit pixels that are used.
    """

    image: Image.Image
    width: int
    height: int
    turn: Image.Transpose | None
    bits: int


@contextlib.contextmanager
def opened(data: bytes, where: str, name: str, max_pixels: int = MAX_PIXELS) -> Iterator[Header]:
    """Opens an encoded image; errors inside the `with` are damage to the image too.

    Args:
      data: the file's bytes.
      where: the place of the record, for the error.
      name: of the image, for the error.
      max_pixels: larger images are refused.

    Raises:
      DamagedRecord: unreadable_image or too_large, at `where`.
    """
    try:
        file, profile = jpeg2000.readable(data) if data[4:8] == b"jP  " else png.readable(data)
        with Image.open(io.BytesIO(file), formats=FORMATS) as image:
            if profile:
                image.info["icc_profile"] = profile
            header = _header(image, data)
            if header.width * header.height > max_pixels:
                what = f"has {header.width}x{header.height} pixels; source.max_pixels is {max_pixels}"
                raise DamagedRecord("too_large", where, f"image {name!r} {what}")
            if why := pixels.refusal(image):
                raise ValueError(why)
            yield header
    except (MemoryError, DamagedRecord):
        raise
    except Image.DecompressionBombError as error:
        raise DamagedRecord("too_large", where, f"image {name!r}: {error}") from None
    except Exception as error:
        # Damaged bytes make Pillow's decoders raise nearly anything.
        # Pillow's own message would show an address in memory.
        why = _unidentified(data) if isinstance(error, UnidentifiedImageError) else str(error)
        raise DamagedRecord("unreadable_image", where, f"cannot read image {name!r}: {why}") from error


def shown_size(data: bytes, where: str, name: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of the image that `images.decode` gives, in pixels; arguments and errors as of `opened`."""
    with opened(data, where, name, max_pixels) as header:
        return header.width, header.height


def orientation(image: Image.Image) -> int:
    """1 to 8, as a camera recorded it; 1 if it did not, or if the record is damaged."""
    try:
        # Not PngImageFile's, which decodes the pixels first.
        found = Image.Image.getexif(image).get(_ORIENTATION)
        return int(found) if found in _TURNS else 1
    except Exception:
        return 1


def turn(image: Image.Image) -> Image.Transpose | None:
    """What makes an image upright."""
    return _TURNS.get(orientation(image))


def _header(image: Image.Image, data: bytes) -> Header:
    width, height = image.size
    found = orientation(image)
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        # Pillow turns a TIFF itself when it loads the pixels. Newer versions give the turned size before, others not.
        width, height = tags[_WIDTH], tags[_HEIGHT]
    if found in _SIDEWAYS:
        width, height = height, width
    bits = jpeg2000.bits(data) if image.format == "JPEG2000" else 16
    return Header(image, width, height, _TURNS.get(found) if tags is None else None, bits)


def _unidentified(data: bytes) -> str:
    """Names the format if it is a well-known one."""
    for kind, at, signature in _OTHERS:
        if data.startswith(signature, at):
            return f"{kind} is not read; save JPEG, PNG or WebP"
    for kind, at, signature in _KNOWN:
        if data.startswith(signature, at):
            return f"a {kind} file with a damaged header or a pixel type that is not read"
    return "no image of a known format"
