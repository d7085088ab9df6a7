"""Text that every encoder takes: the one place where text that cannot be encoded is replaced.

JSON can hold half of a surrogate pair (a title that was cut within an emoji); Parquet, tars and names of files can hold
bytes that are no UTF-8. None of them can be written as UTF-8. In metadata each is replaced by U+FFFD; a caption with
one is a damaged record (`data/sources/fields.py`).
"""

from typing import Any

_REPLACEMENT = "\ufffd"


def is_sound(text: str) -> bool:
    """Whether a text can be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def sound(text: str) -> str:
    """The text with U+FFFD in place of each lone surrogate; a sound text is returned as it is."""
    if is_sound(text):
        return text
    return "".join(_REPLACEMENT if "\ud800" <= letter <= "\udfff" else letter for letter in text)


def sound_value(value: Any) -> Any:
    """A JSON value in which every text is sound, keys included."""
    if isinstance(value, str):
        return sound(value)
    if isinstance(value, dict):
        return {sound_value(key): sound_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [sound_value(item) for item in value]
    return value
