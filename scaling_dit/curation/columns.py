"""The columns of a raw sample that a filter expression reads: its metadata, and what is known of the sample itself.

    width, height  of the image as it is shown, in pixels, from its header
    bytes          size of the encoded image
    key            names the sample
    caption        the first caption; `captions` all of them, `kinds` what each is (alt, synthetic or long)

These names hide columns of the metadata of the same name: a stored width is often that of an image before resizing.
"""

import io
from typing import Any

from PIL import Image

from scaling_dit.data import images
from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.sources.image_files import RawSample

_ORIENTATION, _SIDEWAYS = 0x0112, range(5, 9)  # Exif: turned by a quarter


def columns(sample: RawSample) -> dict[str, Any]:
    """Column -> value of one sample; the image is not decoded.

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
    """(width, height) in pixels from an image's header, after the turn that a camera recorded.

    Raises:
      DamagedRecord: unreadable_image.
    """
    try:
        with Image.open(io.BytesIO(sample.image), formats=images.FORMATS) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION) in _SIDEWAYS
    except MemoryError:
        raise
    except Exception as error:  # as in images.decode
        raise DamagedRecord(
            "unreadable_image", sample.where, f"no header of a known format in image {sample.key!r}"
        ) from error
    return (height, width) if turned else (width, height)
