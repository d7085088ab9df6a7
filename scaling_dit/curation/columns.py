"""The columns of a raw sample that a filter expression reads: its metadata, and these columns of its own.

    width, height  of the upright image, in pixels, from its header
    bytes          size of the encoded image
    key            key of the sample
    caption        the first caption; `captions` has all of them, `kinds` the kind of each (alt, synthetic or long)

These names hide metadata of the same name, because a stored width is often the width before resizing.
"""

from typing import Any

from scaling_dit.data import image_header
from scaling_dit.data.sources.image_files import RawSample


def columns(sample: RawSample, max_pixels: int = image_header.MAX_PIXELS) -> dict[str, Any]:
    """Column -> value of one sample, without decoding the image.

    Raises:
      DamagedRecord: unreadable_image or too_large, by the image's header.
    """
    width, height = image_header.shown_size(sample.image, sample.where, sample.key, max_pixels)
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
