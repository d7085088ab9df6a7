"""Pixels of every type to RGB of 8 bits: what each format stores, and what its 8-bit twin would hold.

`docs/image_modes.md` lists every type with the result; `tools/image_modes.py` writes it. A type whose range is not
known from the file is refused, because a guess would give wrong values in silence.
"""

from typing import Any

import numpy as np
from PIL import Image

from scaling_dit.data.colours import to_srgb

# Tags of TIFF.
_BITS, _PHOTOMETRIC, _INKS, _EXTRA, _SAMPLE_FORMAT = 258, 262, 332, 338, 339
_WHITE_IS_ZERO, _YCBCR, _NO_CMYK = 0, 6, 2
_SIGNED, _FLOAT = 2, 3
# The upper four bits of 16 are never used below this.
_LOWER_BITS = 2**12


def refusal(image: Image.Image) -> str | None:
    """Why the pixels of an opened image are not read, known from its header; None if they are."""
    tags = _tags(image)
    formats = np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1))
    if image.mode == "F" or _FLOAT in formats:
        return "floating-point pixels have no known range; save 8 or 16 bits"
    if _SIGNED in formats:
        return "signed pixels have no known range; save unsigned ones of 8 or 16 bits"
    if np.max(tags.get(_BITS, 1)) > 16:
        return "32-bit pixels have no known range; save 8 or 16 bits"
    if tags.get(_PHOTOMETRIC) == _YCBCR and image.info.get("compression") == "raw":
        return "TIFF with luma and chroma that are not compressed is not read; save RGB"
    if image.mode == "CMYK" and tags.get(_INKS) == _NO_CMYK:
        return "inks other than cyan, magenta, yellow and black are not read; save RGB"
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        return "a CMYK JPEG without Adobe's marker does not say whether it is inverted; save RGB"
    if image.mode == "RGB" and ";16" in _raw_mode(image) and "transparency" in image.info:
        return "a transparent colour of 16-bit RGB is not read; save an alpha channel"
    return None


def to_rgb(image: Image.Image, bits: int = 16) -> Image.Image:
    """RGB of an image, opened or in memory: transparent pixels on white, colours in sRGB.

    Args:
      image: not refused by `refusal`. Orientation is not its matter.
      bits: of 16 that are used, the upper ones; JPEG 2000 has 9 to 16.

    Raises:
      ValueError: pixels whose range is not known; for damaged data whatever Pillow raises.
    """
    raw_mode, tags = _raw_mode(image), _tags(image)
    unsure = _alpha_may_be_unused(image, tags)
    if why := refusal(image):
        raise ValueError(why)
    # Damage to the pixels shows here.
    image.load()
    profile = image.info.get("icc_profile")
    if np.max(tags.get(_BITS, 1)) == 16:
        _check_range(image)
    if image.mode.startswith("I"):
        image = _from_16_bits(image, bits, raw_mode, tags)
    elif image.format == "PNG":
        _scale_transparent_colour(image, raw_mode)
    if image.mode == "LAB":
        return image.convert("RGB")
    if not image.has_transparency_data:
        base = (
            image
            if image.mode in ("L", "RGB", "CMYK")
            else image.convert("L" if image.mode == "1" else "RGB")
        )
        return to_srgb(base, profile)
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    shown = to_srgb(image.convert("RGB"), profile)
    least, most = alpha.getextrema()
    if least == 255 or (unsure and most == 0):
        return shown
    shown.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), shown).convert("RGB")


def _tags(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {})


def _raw_mode(image: Image.Image) -> str:
    """Pillow's name for the pixels as stored, such as "L;2"; empty once they are loaded."""
    tiles = getattr(image, "tile", None) or [("", None, 0, "")]
    args = tiles[0][3]
    return str(args[0] if isinstance(args, tuple) and args else args)


def _alpha_may_be_unused(image: Image.Image, tags: Any) -> bool:
    """Whether zeros in the fourth channel may mean that it was never written, as in BMP, and not transparency."""
    return image.format == "BMP" or (image.format == "TIFF" and _EXTRA not in tags)


def _check_range(image: Image.Image) -> None:
    """Refuses 16-bit TIFF that uses the lower 12 bits at most: microscopes and cameras store 12-bit values so.

    Of 16-bit RGB Pillow gives the upper bytes only.
    """
    if image.mode == "CMYK":
        return
    values = np.asarray(image)[..., :3] if image.mode.startswith("RGB") else np.asarray(image)
    limit = _LOWER_BITS if image.mode.startswith("I") else _LOWER_BITS >> 8
    if 0 < values.max() < limit:
        raise ValueError(
            "16-bit pixels use their lower 12 bits only, so their range is not known; scale them"
        )


def _from_16_bits(image: Image.Image, bits: int, raw_mode: str, tags: Any) -> Image.Image:
    """L or LA of grey with up to 16 bits: scaled, not clipped as Pillow's own conversion does."""
    values = np.asarray(image)
    # Pillow leaves 12 bits of TIFF where they are and puts all others at the upper end of 16.
    top = 4095 if raw_mode == "I;12" else (2**bits - 1) << (16 - bits)
    levels = (np.minimum(np.arange(2**16, dtype=np.int64), top) * 255 + top // 2) // top
    if image.format == "TIFF" and tags.get(_PHOTOMETRIC, _WHITE_IS_ZERO) == _WHITE_IS_ZERO:
        levels = 255 - levels
    clear = image.info.get("transparency")
    grey = Image.fromarray(levels.astype(np.uint8)[values.clip(0, 2**16 - 1)])
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _scale_transparent_colour(image: Image.Image, raw_mode: str) -> None:
    """Brings the transparent colour of a PNG to the 8 bits that Pillow scales the pixels to."""
    clear = image.info.get("transparency")
    if image.mode == "L" and isinstance(clear, int):
        top = 2 ** int(raw_mode[2:] or 8) - 1
        image.info["transparency"] = (clear & top) * 255 // top
    elif image.mode == "RGB" and isinstance(clear, tuple):
        image.info["transparency"] = tuple(value & 255 for value in clear)
