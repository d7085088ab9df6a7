"""A user's own source: every mistake in one line that names the class and what the contract wants."""

import sys
import types

import numpy as np
import pytest

from scaling_dit.data.loader import make_loader
from scaling_dit.data.sources import SOURCES, create_source, source_fields
from scaling_dit.errors import UserError
from tests.support.own_sources import Counted


@pytest.fixture
def made(monkeypatch):
    """Makes a source of the class with some members replaced; one that is None is missing."""

    def make(**members):
        kept = {name: value for name, value in vars(Counted).items() if not name.startswith("__dict")}
        kept |= members
        wrong = type("Wrong", (), {name: value for name, value in kept.items() if value is not None})
        module = types.ModuleType("wrong_source")
        module.Wrong = wrong
        monkeypatch.setitem(sys.modules, "wrong_source", module)
        return create_source("wrong_source:Wrong")

    return make


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and "Wrong" in text
    return text


def first_batch(source):
    def tokenize(captions):
        return np.zeros((len(captions), 1), np.int32), np.ones((len(captions), 1), bool)

    loader = make_loader(source, tokenize, batch=8, seed=0, positions=range(8), threads=0, prefetch=0)
    return next(loader)


def test_a_right_one_is_taken(made):
    assert len(first_batch(made())["images"]) == 8


@pytest.mark.parametrize(
    "members, message",
    [
        (
            {"__len__": None},
            "source 'wrong_source:Wrong' has no __len__; a source needs __len__() -> the number",
        ),
        ({"__getitem__": None}, "has no __getitem__; a source needs __getitem__(index) -> a record"),
        ({"describe": None}, "has no describe; a source needs describe() -> one line"),
        ({"held_out": None}, "has no held_out; a source needs held_out() -> the evaluation split"),
        (
            {"__getitem__": lambda self: 1},
            "a source needs __getitem__(index) -> a record, its own takes too many",
        ),
        (
            {"describe": lambda self, level: ""},
            "needs describe() -> one line, its own takes missing a required",
        ),
        ({"image_size": None}, "image_size failed: AttributeError"),
        ({"image_size": "16"}, "image_size must be an integer of at least 1, it is '16'"),
        ({"image_size": 0}, "image_size must be an integer of at least 1, it is 0"),
        ({"__len__": lambda self: None}, "__len__ must return an integer of at least 0, it returned None"),
        ({"__len__": lambda self: 1 / 0}, "__len__ failed: ZeroDivisionError: division by zero"),
        ({"describe": lambda self: None}, "describe must return a text, it returned a None"),
    ],
)
def test_a_class_or_source_that_is_none(made, members, message):
    with pytest.raises(UserError) as error:
        made(**members)
    assert message in one_line(error)


def test_no_class_and_no_size_at_all(monkeypatch):
    members = {name: value for name, value in vars(Counted).items() if name not in ("image_size", "__init__")}
    module = types.ModuleType("wrong_source")
    module.Wrong = type("Wrong", (), members)
    module.function = lambda: None
    monkeypatch.setitem(sys.modules, "wrong_source", module)
    with pytest.raises(UserError, match="'wrong_source:Wrong' has no image_size, the height and width"):
        create_source("wrong_source:Wrong")
    with pytest.raises(UserError, match="source 'wrong_source:function' must be a class, it is a function"):
        create_source("wrong_source:function")


def changed(**entries):
    """A `__getitem__` whose record 3 has other entries; None takes one out."""

    def getitem(self, index):
        record = Counted.__getitem__(self, index)
        record |= entries if index == 3 else {}
        return {name: value for name, value in record.items() if value is not None}

    return getitem


def fails(self, index):
    return {}[index] if index == 3 else Counted.__getitem__(self, index)


@pytest.mark.parametrize(
    "getitem, message",
    [
        (lambda self, index: None, "must be a mapping with image, captions and key, it is a None"),
        (fails, "source Wrong failed on record 3 of 8: KeyError: 3"),
        (changed(key=None), "record 3 has no 'key'; it has 'image', 'captions'"),
        (changed(captions=None), "record 3 has no 'captions'; it has 'image', 'key'"),
        (
            changed(captions="one text"),
            "record 3 must have captions, a list of at least one text, not 'one text'",
        ),
        (changed(captions=[]), "record 3 must have captions, a list of at least one text, not []"),
        (changed(image=None), "record 3 must have one of 'image' and 'latents'"),
        (changed(latents=np.zeros(3)), "must have one of 'image' and 'latents', it has both"),
        (changed(image=[[0]]), "record 3 has as image a list, it must be a NumPy array"),
        (
            changed(image=np.zeros((4, 3, 3), np.uint8)),
            "record 3 ('3') has an image of 4x3x3 uint8; the source promises 4x4x3 uint8",
        ),
        (
            changed(image=np.zeros((4, 4, 3))),
            "has an image of 4x4x3 float64; the source promises 4x4x3 uint8",
        ),
    ],
)
def test_a_record_that_is_none(made, getitem, message):
    source = made(__getitem__=getitem)
    with pytest.raises(UserError) as error:
        first_batch(source)
    assert message in one_line(error)


def test_a_caption_that_is_no_text(made):
    with pytest.raises(UserError, match="record '3' has as caption a int, it must be a text"):
        first_batch(made(__getitem__=changed(captions=[7])))


def test_a_disk_that_fails_is_no_mistake_of_the_user(made):
    def getitem(self, index):
        raise ConnectionError("the network is down")

    with pytest.raises(ConnectionError):
        first_batch(made(__getitem__=getitem))


def test_records_read_together_are_checked_too(made):
    def together(self, indices):
        return [changed(key=None)(self, index) for index in indices]

    for wrong, message in (
        (together, "record 3 has no 'key'"),
        (lambda self, indices: [], "as many records"),
    ):
        with pytest.raises(UserError) as error:
            first_batch(made(__getitems__=wrong))
        assert message in one_line(error)


def test_every_built_in_source_passes_the_check():
    for name, row in SOURCES.items():
        assert "image_size" in source_fields(f"{name}:x" if row.form else name) or name in (
            "shapes",
            "shapes_edits",
        )
