"""Conditions in host batches: keyed by (seed, step, position) and their own name, and nothing else changes by them."""

import types

import ml_dtypes
import numpy as np
import pytest

from scaling_dit.data import loader
from scaling_dit.data.conditions.edit import Edit
from scaling_dit.data.conditions.inpaint import Inpaint
from scaling_dit.data.loader import KeyedGenerator, make_loader
from scaling_dit.data.shapes.edit_source import ShapesEditsSource
from scaling_dit.data.shapes.source import ShapesSource
from scaling_dit.errors import UserError
from scaling_dit.evaluation.validation import held_out_conditions


def tokenize(captions):
    ids = np.array([[len(caption), ord(caption[0])] for caption in captions], np.int32)
    return ids, np.ones(ids.shape, bool)


def load(source, steps=2, *, positions=range(6), seed=3, **options):
    iterator = make_loader(source, tokenize, batch=6, seed=seed, positions=list(positions), **options)
    found = [next(iterator) for _ in range(steps)]
    iterator.close()
    return found


def test_conditions_depend_on_seed_step_and_position_alone():
    source = ShapesSource(preset="grid8")
    plain = load(source, conditions={"inpaint": Inpaint()})
    for options in ({"threads": 0}, {"threads": 3, "prefetch": 1}):
        for one, other in zip(plain, load(source, conditions={"inpaint": Inpaint()}, **options), strict=True):
            np.testing.assert_array_equal(one["conditions"]["inpaint"], other["conditions"]["inpaint"])
    # Of some positions, in another order, from a later step on.
    some = load(source, 1, positions=(4, 1), start_step=1, conditions={"inpaint": Inpaint()})[0]
    np.testing.assert_array_equal(some["conditions"]["inpaint"], plain[1]["conditions"]["inpaint"][[4, 1]])
    first, second = (batch["conditions"]["inpaint"][..., 3] for batch in plain)
    assert first.shape == (6, 8, 8) and (first != second).any() and len({m.tobytes() for m in first}) > 3
    other_seed = load(source, 1, seed=4, conditions={"inpaint": Inpaint()})[0]["conditions"]["inpaint"][
        ..., 3
    ]
    assert (other_seed != first).any()


def test_images_and_captions_are_the_same_with_conditions_and_without():
    source = ShapesSource(preset="grid8")
    for bare, with_them in zip(load(source), load(source, conditions={"inpaint": Inpaint()}), strict=True):
        assert "conditions" not in bare
        for key in ("images", "ids", "mask"):
            np.testing.assert_array_equal(bare[key], with_them[key])


def test_a_condition_is_the_same_beside_others_and_two_of_a_kind_differ():
    source = ShapesSource(preset="grid8")
    alone = load(source, 1, conditions={"inpaint": Inpaint()})[0]["conditions"]
    both = load(source, 1, conditions={"second": Inpaint(), "inpaint": Inpaint()})[0]["conditions"]
    np.testing.assert_array_equal(alone["inpaint"], both["inpaint"])
    assert (both["second"] != both["inpaint"]).any()


def test_pairs_carry_their_condition():
    source = ShapesEditsSource(preset="grid8")
    batch = load(source, 1, conditions={"edit": Edit()})[0]
    assert batch["conditions"]["edit"].shape == (6, 8, 8, 3)
    for image, before in zip(batch["images"], batch["conditions"]["edit"], strict=True):
        # At most two of four cells differ.
        cells = (image != before).any(-1).reshape(2, 4, 2, 4).any((1, 3))
        assert 1 <= cells.sum() <= 2
    with pytest.raises(UserError, match="carries no condition 'edit'"):
        load(ShapesSource(preset="grid8"), 1, conditions={"edit": Edit()}, threads=0)


class Latents:
    """Three records of a prepared set with four variants of a condition."""

    image_size = 16

    def __len__(self):
        return 3

    def __getitem__(self, index, /):
        variants = np.stack([np.full((2, 2, 5), 10 * index + k) for k in range(4)])
        return {
            "latents": np.full((2, 2, 4), index).astype(ml_dtypes.bfloat16),
            "captions": ["a"],
            "key": str(index),
            "conditions": {"inpaint": variants.astype(ml_dtypes.bfloat16)},
        }

    def describe(self):
        return "latents"

    def held_out(self):
        return self


def test_prepared_records_give_one_of_their_variants_each_as_often():
    batches = load(Latents(), 60, conditions={"inpaint": Inpaint()})
    seen = np.zeros(4)
    for batch in batches:
        held = batch["conditions"]["inpaint"]
        assert held.dtype == ml_dtypes.bfloat16 and held.shape == (6, 2, 2, 5)
        numbers = held[:, 0, 0, 0].astype(int)
        np.testing.assert_array_equal(numbers // 10, batch["latents"][:, 0, 0, 0].astype(int))
        np.add.at(seen, numbers % 10, 1)
    assert seen.sum() == 360 and seen.min() > 60
    again = load(Latents(), 1, conditions={"inpaint": Inpaint()})[0]["conditions"]["inpaint"]
    np.testing.assert_array_equal(again, batches[0]["conditions"]["inpaint"])
    with pytest.raises(UserError, match="prepared set without condition 'edges'"):
        load(Latents(), 1, conditions={"edges": Inpaint()}, threads=0)


def test_streams_of_one_place_are_independent_of_each_other():
    keyed = KeyedGenerator(7)
    captions = keyed.at(2, 3).random(4)
    assert (keyed.at(2, 3, 9).random(4) != captions).all()
    np.testing.assert_array_equal(keyed.at(2, 3).random(4), captions)


def test_conditions_of_held_out_records_have_streams_of_their_own():
    """As in training: two masks of an image do not coincide, and one does not depend on the others."""
    source = ShapesSource(preset="grid8")
    records = [source[i] for i in range(4)]

    def made(*names):
        chosen = [types.SimpleNamespace(name=name, condition=Inpaint()) for name in names]
        return held_out_conditions(types.SimpleNamespace(conditions=chosen), records)

    both = made("second", "inpaint")
    assert (both["second"] != both["inpaint"]).any()
    np.testing.assert_array_equal(both["inpaint"], made("inpaint")["inpaint"])


def test_no_name_gets_the_stream_of_an_order(monkeypatch):
    """Captions have 0, `TinyShuffle` 1, buckets 2 and 3."""
    digest = types.SimpleNamespace(digest=lambda: b"\x02" + bytes(7))
    monkeypatch.setattr(loader.hashlib, "blake2b", lambda *_, **__: digest)
    assert loader.stream_of.__wrapped__("any") == 4
