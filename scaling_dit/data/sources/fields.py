"""Fields of records: where captions stand, and values as JSON has them.

A null among captions is no caption, as a field that is null: it is left out, and the captions beside it are used. So is
a NaN, which pandas writes in its place.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from scaling_dit.data.captions import KINDS
from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.text import is_sound, sound
from scaling_dit.errors import nearest


class CaptionFields(NamedTuple):
    """Which fields of a record hold captions, by kind; each a string or a list of strings."""

    alt: tuple[str, ...]
    synthetic: tuple[str, ...]
    long: tuple[str, ...]

    def names(self) -> tuple[str, ...]:
        """Every field, alt-text first."""
        return tuple(name for kind in KINDS for name in getattr(self, kind))

    def read(self, record: Any, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The captions of a record (a mapping) and their kinds; blank ones are left out.

        Raises:
          DamagedRecord: missing_caption (none of the fields is there), bad_text (not text), or empty_caption.
        """
        captions, kinds, found = [], [], False
        for kind in KINDS:
            for name in getattr(self, kind):
                value = lookup(record, name)
                if is_null(value):
                    continue
                found = True
                for text in texts_of(value, name, where):
                    if text.strip():
                        captions.append(text)
                        kinds.append(kind)
        if not found:
            names = self.names()
            hint = nearest(names[0], [str(name) for name in record]) if record else "it has no fields"
            why = "is null" if any(name in record for name in names) else f"is not there; {hint}"
            raise DamagedRecord("missing_caption", where, f"field {' or '.join(map(repr, names))} {why}")
        if not captions:
            raise DamagedRecord("empty_caption", where, "every caption is empty")
        return tuple(captions), tuple(kinds)


def lookup(record: Any, name: str) -> Any:
    """A field of nested mappings: "image/filename" is that key, or `filename` of `image`; None if it is not there.

    A list of mappings gives the list of their values, without those that are not there.
    """
    if isinstance(record, list | tuple):
        found = [value for value in (lookup(item, name) for item in record) if value is not None]
        return found if found or not record else None
    if not hasattr(record, "get"):
        return None
    if name in record:
        return record[name]
    head, _, rest = name.partition("/")
    return lookup(record[head], rest) if rest and head in record else None


def is_null(value: Any) -> bool:
    """Whether a value stands for none: None, or NaN."""
    return value is None or (isinstance(value, float | np.floating) and bool(np.isnan(value)))


def texts_of(value: Any, name: str, where: str) -> Sequence[str]:
    """A caption field as strings: text or UTF-8 bytes, alone or in a list or array, whose nulls are left out.

    Raises:
      DamagedRecord: bad_text.
    """
    values = [value] if isinstance(value, str | bytes) else value
    if not isinstance(values, list | tuple | np.ndarray):
        raise DamagedRecord("bad_text", where, f"{name!r} is {type(value).__name__}, not text")
    texts = []
    for text in values:
        if is_null(text):
            continue
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise DamagedRecord("bad_text", where, f"{name!r} is not UTF-8: {error}") from None
        if not isinstance(text, str):
            raise DamagedRecord("bad_text", where, f"{name!r} holds {type(text).__name__}, not text")
        if not is_sound(text):
            raise DamagedRecord("bad_text", where, f"{name!r} is not text: it holds half of a surrogate pair")
        texts.append(text)
    return texts


def plain(value: Any) -> Any:
    """The value in JSON's types: bytes as text, numbers of numpy as Python's; what has no such form is left out.

    Every text is sound, see `data/text.py`.
    """
    if isinstance(value, dict):
        held = {sound(str(key)): plain(item) for key, item in value.items()}
        return {key: item for key, item in held.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str):
        return sound(value)
    return value if isinstance(value, bool | int | float) else None
