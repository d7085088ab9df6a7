"""Values of Arrow as Python has them, one at a time, so that one that cannot be converted costs no other.

Arrow checks neither that a string is UTF-8 nor that a time, date or number of a file has a form in Python; `to_pylist`
of a row fails for all of its columns if one does.
"""

from typing import Any, NamedTuple

from scaling_dit.data.sources.fields import plain


class ImageValue(NamedTuple):
    """A row of an image column."""

    # The encoded file; empty if there is none.
    data: bytes
    # The path that stands beside it; "" if there is none.
    path: str


def value(scalar: Any) -> Any:
    """A scalar of Arrow as a Python value; a string that is not UTF-8 as its bytes, within lists and structs too.

    Raises:
      Exception: nearly any, for a value without a form in Python.
    """
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        pass
    if hasattr(scalar, "as_buffer"):
        return scalar.as_buffer().to_pybytes()
    if hasattr(scalar, "values") and hasattr(scalar.values, "type"):
        # A list.
        return [value(item) for item in scalar.values]
    if hasattr(scalar, "keys"):
        # A struct.
        return {name: value(scalar[name]) for name in scalar.keys()}  # noqa: SIM118
    # Of a dictionary or an extension type.
    return value(scalar.value)


def plain_value(column: Any, row: int) -> Any:
    """A value of a column in JSON's types, its texts sound; None for one that has no such form."""
    try:
        return plain(value(column[row]))
    except MemoryError:
        raise
    except Exception:
        return None


def image_value(scalar: Any) -> ImageValue:
    """What a row of an image column holds: a struct of `bytes` and `path`, or the encoded file itself."""
    if not scalar.is_valid:
        return ImageValue(b"", "")
    if not hasattr(scalar, "keys"):
        return ImageValue(_bytes(scalar), "")
    held = {name: scalar[name] for name in ("bytes", "path") if name in set(scalar.keys())}
    data = _bytes(held["bytes"]) if "bytes" in held else b""
    path = _bytes(held["path"]) if "path" in held else b""
    return ImageValue(data, path.decode("utf-8", "replace"))


def _bytes(scalar: Any) -> bytes:
    """The bytes of a binary scalar, or of a string one, which some writers use for them; else none."""
    if not scalar.is_valid:
        return b""
    if hasattr(scalar, "as_buffer"):
        held: bytes = scalar.as_buffer().to_pybytes()
        return held
    # Of a dictionary or an extension type.
    return _bytes(scalar.value) if hasattr(scalar, "value") and hasattr(scalar.value, "is_valid") else b""
