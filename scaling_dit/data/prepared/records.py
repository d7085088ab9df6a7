"""The record of a prepared set: one image as the moments of its latents, with its captions. Format 1.

    4 bytes   b"SDL1", the last one being the version
    4 bytes   length n of the header, unsigned, little-endian
    n bytes   the header: JSON in UTF-8, keys sorted, no spaces
    the rest  the moments: bfloat16, little-endian, in the order of `shape`

The header's keys are the fields of `Prepared`. Nothing in it depends on when or where it was written, so that the same
image gives the same bytes. As in safetensors files, the array needs no parsing: it is a view of the record.
"""

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAGIC = b"SDL1"
DTYPE = np.dtype(ml_dtypes.bfloat16)
_HEAD = struct.Struct("<4sI")
_ENCODER = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))


class Prepared(NamedTuple):
    """One image of a prepared set."""

    # bfloat16 [h, w, M], what its codec's `moments` gave.
    moments: np.ndarray
    # Names the image within its raw source.
    key: str
    # At least one.
    captions: tuple[str, ...]
    # Of each caption: "alt", "synthetic", ...
    kinds: tuple[str, ...]
    # px, of the raw image, upright.
    width: int
    height: int
    # Left, top, right, bottom of the part shown, in raw pixels.
    crop: tuple[float, float, float, float]
    # Those of its metadata that were kept, such as scores.
    columns: Mapping[str, Any]


def encode(record: Prepared) -> bytes:
    """The bytes of a record; the same record always gives the same ones.

    Raises:
      ValueError: moments of another type than bfloat16 or without three axes.
    """
    moments = np.ascontiguousarray(record.moments)
    if moments.dtype != DTYPE or moments.ndim != 3:
        raise ValueError(f"moments must be bfloat16 [h, w, M], not {moments.dtype} {moments.shape}")
    fields = {**record._asdict(), "shape": moments.shape}
    del fields["moments"]
    header = _ENCODER.encode(fields).encode()
    return b"".join((_HEAD.pack(MAGIC, len(header)), header, moments.tobytes()))


def decode(data: bytes) -> Prepared:
    """The record that `encode` wrote; its moments are a read-only view of `data`.

    Raises:
      ValueError: not such a record.
    """
    if len(data) < _HEAD.size or data[: len(MAGIC)] != MAGIC:
        raise ValueError(f"it begins with {bytes(data[: len(MAGIC)])!r}, not {MAGIC!r}")
    size = _HEAD.unpack_from(data)[1]
    end = _HEAD.size + size
    fields = json.loads(data[_HEAD.size : end])
    shape = fields.pop("shape")
    if len(data) - end != math.prod(shape) * DTYPE.itemsize:
        raise ValueError(f"{len(data) - end} bytes of moments do not make up {shape}")
    moments = np.frombuffer(data, DTYPE, offset=end).reshape(shape)
    try:
        for name in ("captions", "kinds", "crop"):
            fields[name] = tuple(fields[name])
        return Prepared(moments, **fields)
    except (KeyError, TypeError) as error:
        raise ValueError(f"its header is that of another format: {error}") from None
