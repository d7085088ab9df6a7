"""The columns of a raw sample that a filter expression reads: its metadata, and these columns of its own.

    width, height  of the upright image, in pixels, from its header
    bytes          size of the encoded image
    key            key of the sample
    caption        the first caption; `captions` has all of them, `kinds` the kind of each (alt, synthetic or long)

These names hide metadata of the same name, because a stored width is often the width before resizing.
"""

import io
from typing import Any

from PIL import Image

from scaling_dit.data import images
from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.sources.image_files import RawSample

# Exif tag of the orientation, and its values for images turned by 90 degrees.
_ORIENTATION, _SIDEWAYS = 0x0112, range(5, 9)


def columns(sample: RawSample) -> dict[str, Any]:
    """Column -> value of one sample, without decoding the image.

    Raises:
      DamagedRecord: unreadable_image, if the image's header cannot be read.
    """
    width, height = shown_size(sample)
    own = {
        "key": sample.key,
        "width": width,
        "height": height,
        "bytes": len(sample.image),
        "caption": sample.captions[0],
        "captions": list(sample.captions),
        "kinds": list(sample.kinds),
    }
    return sample.metadata | own


def shown_size(sample: RawSample) -> tuple[int, int]:
    """(width, height) in pixels from an image's header, after the rotation that a camera recorded.

    Raises:
      DamagedRecord: unreadable_image.
    """
    try:
        with Image.open(io.BytesIO(sample.image), formats=images.FORMATS) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION) in _SIDEWAYS
    except MemoryError:
        raise
    # As in images.decode, any other error means damage.
    except Exception as error:
        raise DamagedRecord(
            "unreadable_image", sample.where, f"no header of a known format in image {sample.key!r}"
        ) from error
    return (height, width) if turned else (width, height)
