"""Colour profiles: an image in the colours of its ICC profile to sRGB, the colours that all others are in.

A profile that is damaged, or made for another kind of pixels, says nothing about the colours and is ignored.
"""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

# Colour space of a profile -> mode of the images it is made for.
_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}
# Profiles of sRGB differ from each other by a rounding. Up to so many levels the pixels stay as they are.
_SAME = 3


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image of mode L, RGB or CMYK as RGB, by its profile if it has one."""
    transform, mode = _transform(profile) if profile else (None, "")
    if transform is not None:
        if mode == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if mode == "L" and image.mode == "RGB" and _is_grey(image):
            image = image.getchannel("R")
        if image.mode == mode:
            return transform.apply(image)
    return image.convert("RGB")


@functools.lru_cache(32)
def _transform(profile: bytes) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """The transform to sRGB and the mode it is for; None if there is nothing to do."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES[opened.profile.xcolor_space.strip()]
        made = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    # Damaged profiles make the library raise nearly anything.
    except Exception:
        return None, ""
    return (None if mode != "CMYK" and _changes_nothing(made, mode) else made), mode


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform leaves a lattice of all colours as it is."""
    if mode == "L":
        colours = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    else:
        levels = np.linspace(0, 255, 18).round().astype(np.uint8)
        lattice = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
        colours = Image.fromarray(lattice.reshape(len(levels), -1, 3))
    plain, seen = (np.asarray(i, np.int16) for i in (colours.convert("RGB"), transform.apply(colours)))
    return bool(np.abs(plain - seen).max() <= _SAME)


def _is_grey(image: Image.Image) -> bool:
    red, green, blue = (channel.tobytes() for channel in image.split())
    return red == green == blue
