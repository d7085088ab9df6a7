"""The record of a prepared set: one image as the moments of its latents, with its captions. Formats 1 and 2.

    4 bytes   b"SDL1" or b"SDL2", the last one being the format
    4 bytes   length n of the header, unsigned, little-endian
    n bytes   the header: JSON in UTF-8, keys sorted, no spaces
    then      the moments: bfloat16, little-endian, in the order of `shape`
    the rest  in format 2 those of each condition, by the order of their names, in the order of their shapes

The header's keys are the fields of `Prepared`; format 2 has `conditions` in it: name -> shape [K, h, w, Mo + M].
Nothing in it depends on when or where it was written, so that the same image gives the same bytes. As in safetensors
files, the arrays need no parsing: they are views of the record.
"""

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAGIC = b"SDL1"
# With conditions.
MAGIC_2 = b"SDL2"
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
    # Name of a condition -> bfloat16 [K, h, w, Mo + M]: K variants, the moments of RGB, then the masks in [0, 1].
    conditions: Mapping[str, np.ndarray] = {}


def encode(record: Prepared) -> bytes:
    """The bytes of a record; the same record always gives the same ones.

    Raises:
      ValueError: moments of another type than bfloat16 or without three axes.
    """
    moments = np.ascontiguousarray(record.moments)
    if moments.dtype != DTYPE or moments.ndim != 3:
        raise ValueError(f"moments must be bfloat16 [h, w, M], not {moments.dtype} {moments.shape}")
    fields = {**record._asdict(), "shape": moments.shape}
    del fields["moments"], fields["conditions"]
    payload = [moments.tobytes()]
    for name, condition in sorted(record.conditions.items()):
        if condition.dtype != DTYPE or condition.ndim != 4 or condition.shape[1:3] != moments.shape[:2]:
            found = f"{condition.dtype} {condition.shape}"
            raise ValueError(
                f"condition {name!r} must be bfloat16 [K, {moments.shape[0]}, {moments.shape[1]}, ...], not {found}"
            )
        fields.setdefault("conditions", {})[name] = condition.shape
        payload.append(np.ascontiguousarray(condition).tobytes())
    header = _ENCODER.encode(fields).encode()
    magic = MAGIC_2 if record.conditions else MAGIC
    return b"".join((_HEAD.pack(magic, len(header)), header, *payload))


def decode(data: bytes) -> Prepared:
    """The record that `encode` wrote; its moments and conditions are read-only views of `data`.

    Raises:
      ValueError: not such a record.
    """
    magic = bytes(data[: len(MAGIC)])
    if len(data) < _HEAD.size or magic not in (MAGIC, MAGIC_2):
        raise ValueError(f"it begins with {magic!r}, not {MAGIC!r}")
    size = _HEAD.unpack_from(data)[1]
    end = _HEAD.size + size
    fields = json.loads(data[_HEAD.size : end])
    shape = fields.pop("shape")
    shapes = fields.pop("conditions", {}) if magic == MAGIC_2 else {}
    if not isinstance(shapes, dict):
        raise ValueError(f"its conditions are {shapes!r}, not shapes by name")
    every = [shape, *(shapes[name] for name in sorted(shapes))]
    sizes = [math.prod(one) for one in every]
    if len(data) - end != sum(sizes) * DTYPE.itemsize:
        raise ValueError(f"{len(data) - end} bytes of moments do not make up {every if shapes else shape}")
    arrays = np.split(np.frombuffer(data, DTYPE, offset=end), np.cumsum(sizes)[:-1])
    moments = arrays[0].reshape(shape)
    conditions = {
        name: array.reshape(shapes[name]) for name, array in zip(sorted(shapes), arrays[1:], strict=True)
    }
    try:
        for name in ("captions", "kinds", "crop"):
            fields[name] = tuple(fields[name])
        return Prepared(moments, **fields, conditions=conditions)
    except (KeyError, TypeError) as error:
        raise ValueError(f"its header is that of another format: {error}") from None
