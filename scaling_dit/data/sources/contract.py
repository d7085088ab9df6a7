"""The contract of a source, and the checks that every source passes, a user's own too.

A source gives random access to records; it is read from several threads at once. Its fields are plain config values,
each with a default. `held_out()` gives the evaluation split, which shares no record with the training split; both are
sources. Splits are called `train` and `held_out` everywhere.

A source may also offer

    texts() -> Iterable[str]              every caption of the split without reading an image: the word list of a
                                          tokenizer is then built from all of them
    bucket_texts() -> Iterable[str]       the same of all buckets, where texts() gives those of the square one alone
    __getitems__(indices) -> list[Record] all rows of a batch in one read
    damage: Damage                        what was damaged so far (`data/damage.py`)
    buckets(sizes) -> list[Bucket]        its records by the aspect ratio of their images (`data/buckets.py`)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np

from scaling_dit.components import check_class_methods
from scaling_dit.errors import UserError


class Record(TypedDict):
    """One example."""

    # uint8 [image_size, image_size, 3], RGB.
    image: NotRequired[np.ndarray]
    # In place of an image: the moments of its latents, bfloat16 [h, w, M].
    latents: NotRequired[np.ndarray]
    # At least one; may be lazy.
    captions: Sequence[str]
    # Of the captions, in their order: alt | synthetic | long; left out = all alt.
    kinds: NotRequired[Sequence[str]]
    # Name of a condition -> its image with masks, uint8 [image_size, image_size, 3 + M]: what paired data give. Of a
    # prepared set its moments with reduced masks, bfloat16 [K, h, w, Mo + M]: K of the kind.
    conditions: NotRequired[Mapping[str, np.ndarray]]
    # Of each object in the image a mask, bool [image_size, image_size]; may be lazy.
    objects: NotRequired[Sequence[np.ndarray]]
    # Names the example within its source.
    key: str


class Source(Protocol):
    """Random access to the records of one split; see the module's docstring."""

    @property
    def image_size(self) -> int:
        """Height and width of every image, in pixels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...

    def describe(self) -> str:
        """One line for logs: what it is, how many examples, which split."""

    def held_out(self) -> "Source":
        """The evaluation split, disjoint from this one."""


# After the last text.
_END = object()
# Method -> how many arguments it is called with, `self` among them, and how it reads.
_METHODS = {
    "__len__": (1, "__len__() -> the number of records"),
    "__getitem__": (2, "__getitem__(index) -> a record"),
    "describe": (1, "describe() -> one line"),
    "held_out": (1, "held_out() -> the evaluation split"),
}


def check_class(candidate: Any, where: str) -> None:
    """Makes sure that a class has the members of a source.

    Raises:
      UserError: a member that is missing or cannot be called as the contract says; `where` names the class.
    """
    if not isinstance(candidate, type):
        raise UserError(f"source {where} must be a class, it is a {type(candidate).__name__}")
    fields = getattr(candidate, "__dataclass_fields__", {})
    if (
        not hasattr(candidate, "image_size")
        and "image_size" not in fields
        and not _sets_image_size(candidate)
    ):
        raise UserError(f"source {where} has no image_size, the height and width of its images in pixels")
    check_class_methods(candidate, where, "source", _METHODS)


def _sets_image_size(candidate: type) -> bool:
    """Whether the constructor may set `image_size` on the instance: no dataclass, with an `__init__` of its own."""
    return not hasattr(candidate, "__dataclass_fields__") and "__init__" in vars(candidate)


def check_source(source: Any, name: str) -> None:
    """Makes sure that a source has a usable size and length, before any record is read.

    Raises:
      UserError: `image_size` or the length is no positive integer, or `describe` returns no text.
    """
    size = _value(source, name, "image_size", lambda: source.image_size)
    if not _is_integer(size) or size < 1:
        raise UserError(f"source {name!r}: image_size must be an integer of at least 1, it is {size!r}")
    length = _value(source, name, "__len__", lambda: source.__len__())
    if not _is_integer(length) or length < 0:
        raise UserError(
            f"source {name!r}: __len__ must return an integer of at least 0, it returned {length!r}"
        )
    described = _value(source, name, "describe", source.describe)
    if not isinstance(described, str):
        raise UserError(f"source {name!r}: describe must return a text, it returned a {_kind(described)}")


def read(source: Source, index: int) -> Record:
    """`source[index]`, checked.

    Raises:
      UserError: the source raises one, or fails otherwise; or a record that is not as the contract says.
    """
    record = _called(source, f"failed on record {index} of {len(source)}", lambda: source[index])
    check_record(record, index, source)
    return record


def read_many(source: Any, indices: Sequence[int]) -> Sequence[Record]:
    """`source.__getitems__(indices)`, checked; raises as `read`."""
    records: Sequence[Record] = _called(
        source, f"failed on records {_short(list(indices[:4]))}", lambda: source.__getitems__(indices)
    )
    if not isinstance(records, Sequence) or len(records) != len(indices):
        raise UserError(
            f"{_name(source)}: __getitems__ of {len(indices)} indices must return as many records"
        )
    for index, record in zip(indices, records, strict=True):
        check_record(record, index, source)
    return records


def held_out(source: Source) -> Source:
    """`source.held_out()`, checked.

    Raises:
      UserError: the source raises one, or fails otherwise; or what it returns is no source with records.
    """
    split = _called(source, "failed in held_out()", source.held_out)
    missing = [method for method in _METHODS if not callable(getattr(split, method, None))]
    if missing:
        raise UserError(
            f"{_name(source)}: held_out() must return the evaluation split, a source; it returned {_short(split)}, "
            f"which has no {missing[0]}"
        )
    check_source(split, f"{type(source).__name__}.held_out()")
    if not len(split):
        raise UserError(
            f"{_name(source)}: held_out() has no records, and evaluation needs some: {split.describe()}"
        )
    return split


def texts(source: Source, *, buckets: bool = False) -> Iterator[str] | None:
    """`source.texts()`, each checked; None for a source without it.

    Args:
      source: of the run.
      buckets: give those of all its buckets, by `bucket_texts()` where the source has it.

    Raises:
      UserError: the source raises one, or fails otherwise; or what it gives is no text.
    """
    found = getattr(source, "bucket_texts", None) if buckets else None
    found = found or getattr(source, "texts", None)
    return None if found is None else _texts(source, found)


def _texts(source: Source, found: Callable[[], Iterable[str]]) -> Iterator[str]:
    given = _called(source, "failed in texts()", lambda: iter(found()))
    while True:
        text = _called(source, "failed in texts()", lambda: next(given, _END))
        if text is _END:
            return
        if not isinstance(text, str):
            raise UserError(f"{_name(source)}: texts() must give texts, it gave {_short(text)}")
        yield text


def _called(source: Any, what: str, call: Callable[[], Any]) -> Any:
    """What a call of a source gives; what it raises, in one line."""
    try:
        return call()
    except (UserError, OSError, MemoryError):
        # Of a disk or a network: no mistake of the source's author, and worth another start.
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{_name(source)} {what}: {type(error).__name__}: {error}") from error


def check_record(record: Any, index: int, source: Source) -> None:
    """Makes sure that a record is as the contract says.

    Raises:
      UserError: names the source, the record and the entry.
    """

    def wrong(what: str) -> UserError:
        return UserError(f"{_name(source)}: record {index} {what}")

    if not isinstance(record, Mapping):
        raise wrong(f"must be a mapping with image, captions and key, it is a {_kind(record)}")
    shown = [entry for entry in ("image", "latents") if entry in record]
    for entry in ("captions", "key"):
        if entry not in record:
            raise wrong(f"has no {entry!r}; it has {', '.join(map(repr, record)) or 'nothing'}")
    if len(shown) != 1:
        raise wrong("must have one of 'image' and 'latents'" + (", it has both" if shown else ""))
    array = record[shown[0]]
    if not isinstance(array, np.ndarray):
        raise wrong(f"has as {shown[0]} a {_kind(array)}, it must be a NumPy array")
    height, width = getattr(source, "bucket_size", None) or (source.image_size, source.image_size)
    if shown == ["image"] and (array.shape != (height, width, 3) or array.dtype != np.uint8):
        raise wrong(
            f"({record['key']!r}) has an image of {'x'.join(map(str, array.shape))} {array.dtype}; "
            f"the source promises {height}x{width}x3 uint8"
        )
    given = record.get("conditions", {})
    if not isinstance(given, Mapping):
        raise wrong(f"has as conditions a {_kind(given)}, it must be a mapping from names to arrays")
    captions = record["captions"]
    if isinstance(captions, str) or not hasattr(captions, "__getitem__") or not len(captions):
        raise wrong(f"must have captions, a list of at least one text, not {_short(captions)}")


def _value(source: Any, name: str, member: str, get: Callable[[], Any]) -> Any:
    try:
        return get()
    except (UserError, OSError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"source {name!r}: {member} failed: {type(error).__name__}: {error}") from error


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _name(source: Any) -> str:
    return f"source {type(source).__name__}"


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, str | list | tuple) or value is None else f"a {_kind(value)}"
