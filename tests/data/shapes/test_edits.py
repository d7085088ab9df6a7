"""Edits of scenes: the words say what differs, splits share no scene, and the oracle's marks are exact."""

import collections
import dataclasses

import numpy as np
import pytest

from scaling_dit.data.shapes import edit_oracle
from scaling_dit.data.shapes.edit_source import ShapesEditsSource
from scaling_dit.data.shapes.edits import KINDS, possible
from scaling_dit.data.shapes.scenes import PALETTE, PRESETS, Object, Scene, ShapesSpec, relations, render
from scaling_dit.data.sources import create_source, source_fields
from scaling_dit.errors import UserError


def edits_of(preset, count, split="train", **fields):
    source = ShapesEditsSource(preset=preset, **fields)
    source = source.held_out() if split == "held_out" else source
    return [source.edit(i) for i in range(count)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_target_scores_1_and_the_source_0_with_all_kept(preset, split):
    kinds = collections.Counter()
    for edit in edits_of(preset, 36, split):
        done, undone = (edit_oracle.score(render(scene), edit) for scene in (edit.target, edit.source))
        assert (done.success, done.kept, done.product) == (1, 1, 1), edit
        assert (undone.success, undone.kept, undone.product) == (0, 1, 0), edit
        kinds[edit.kind] += 1
    # grid8 has one size.
    assert set(kinds) == set(KINDS) - ({"resize"} if preset == "grid8" else set())
    assert max(kinds.values()) - min(kinds.values()) <= 1


def test_an_edit_changes_what_its_words_say_and_nothing_else():
    for edit in edits_of("free32", 60):
        gone, made = edit.gone, edit.made
        named = {f"{o.colour} {o.shape}" for o in gone}
        if edit.kind == "colour":
            assert dataclasses.replace(gone[0], colour=edit.words["new"]) == made[0]
        elif edit.kind == "resize":
            assert dataclasses.replace(gone[0], size=edit.words["new"]) == made[0]
        elif edit.kind == "move":
            moved = np.array([made[0].x - gone[0].x, made[0].y - gone[0].y])
            signs = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[edit.words["new"]]
            assert tuple(np.sign(moved)) == signs and np.abs(moved).max() == 10
        elif edit.kind == "add":
            assert not gone and edit.words["new"] in relations(made[0], edit.anchor, PRESETS["free32"].pixels)
            assert edit.words["b"] == f"{made[0].size} {made[0].colour} {made[0].shape}"
            named = {f"{edit.anchor.colour} {edit.anchor.shape}"}
        elif edit.kind == "remove":
            assert not made and len(gone) == 1
        else:
            assert {(o.x, o.y) for o in gone} == {(o.x, o.y) for o in made} and len(gone) == 2
            named = {edit.words["b"]} | {edit.words["a"]}
        assert edit.words["a"] in named
        before, after = render(edit.source), render(edit.target)
        covered = np.zeros(before.shape[:2], bool)
        for o in (*gone, *made):
            half = PRESETS["free32"].pixels[o.size] // 2
            covered[o.y - half : o.y + half + 1, o.x - half : o.x + half + 1] = True
        np.testing.assert_array_equal(before[~covered], after[~covered])


def test_no_scene_of_the_held_out_split_occurs_in_training():
    fields = {"colours": ("red", "blue", "green"), "shapes": ("circle", "square"), "max_objects": 2}
    train = {s.canonical() for e in edits_of("grid8", 600, **fields) for s in (e.source, e.target)}
    held = {s.canonical() for e in edits_of("grid8", 200, "held_out", **fields) for s in (e.source, e.target)}
    assert len(train) > 100 and len(held) > 30 and not train & held


def test_a_held_out_combination_is_neither_before_nor_after_an_edit_of_training():
    for edit in edits_of("grid16", 200, held_out_combinations=("red square", "blue circle")):
        for item in (*edit.source.objects, *edit.target.objects):
            assert f"{item.colour} {item.shape}" not in ("red square", "blue circle")


def test_a_record_is_a_pair_and_its_words_are_in_the_texts():
    source = create_source("shapes_edits", preset="grid16", paraphrases=3, seed=4)
    words = {word for text in source.texts() for word in text.split()}
    said = set()
    for i in range(60):
        record, edit = source[i], source.edit(i)
        np.testing.assert_array_equal(record["image"], render(edit.target))
        np.testing.assert_array_equal(record["conditions"]["edit"], render(edit.source))
        said |= {word for caption in record["captions"] for word in caption.split()}
        assert all(value in record["captions"][0] for value in edit.words.values())
    assert said <= words and len({source[i]["key"] for i in range(60)}) == 60
    again = create_source("shapes_edits", preset="grid16", paraphrases=3, seed=4)[17]
    np.testing.assert_array_equal(again["image"], source[17]["image"])
    assert list(again["captions"]) == list(source[17]["captions"])


def _edit(kind):
    return next(edit for edit in edits_of("grid16", 60) if edit.kind == kind and len(edit.kept) == 1)


def test_marks_of_images_that_are_half_right():
    edit = _edit("colour")
    (made,), (kept,) = edit.made, edit.kept

    def marks(*objects):
        found = edit_oracle.score(render(Scene("grid16", objects)), edit)
        return found.success, found.kept

    other = next(c for c in PALETTE if c not in (made.colour, kept.colour, edit.gone[0].colour))
    assert marks(made) == (1, 0)
    assert marks(made, dataclasses.replace(kept, colour=other)) == (1, 0)
    assert marks(dataclasses.replace(made, colour=other), kept) == (0, 1)
    # In the other row the object is another one.
    assert marks(dataclasses.replace(made, y=(made.y + 8) % 16), kept)[0] == 0
    # Grey: nothing is there.
    assert marks() == (0, 0)
    free = [(x, y) for x in (3, 11) for y in (3, 11) if (x, y) not in [(o.x, o.y) for o in (made, kept)]]
    stray = Object("cross", other, kept.size, *free[0])
    # Two pieces, as many as source and target have at most, and a third one.
    assert marks(made, kept) == (1, 1)
    assert marks(made, kept, stray) == (1, 0.5)


def test_clutter_earns_nothing_and_one_of_another_size_is_refused():
    edit = _edit("remove")
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    assert edit_oracle.score(noise, edit) == edit_oracle.Marks(0.0, 0.0)
    assert edit_oracle.score(np.full((16, 16, 3), 128, np.uint8), edit).product == 0
    with pytest.raises(UserError, match=r"images \[16, 16, 3\]"):
        edit_oracle.score(noise[:8], edit)


def test_fields_are_those_that_are_read_and_mistakes_take_one_line():
    assert not {"caption_level", "mention_probability", "wrong_caption_rate", "split"} & set(
        source_fields("shapes_edits")
    )
    assert possible(ShapesSpec(max_objects=1)) == ("colour", "resize", "move")
    for fields, message in (
        ({"edits": ("recolour",)}, "no edit 'recolour'; did you mean 'colour'"),
        ({"edits": ("swap",), "max_objects": 1}, "allow no 'swap'; they allow colour, resize, move"),
        ({"edits": ("resize",), "preset": "grid8"}, "allow no 'resize'"),
        ({"paraphrases": 0}, "paraphrases: must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            create_source("shapes_edits", **fields)
    assert len(ShapesEditsSource(scenes=5)) == 5
    with pytest.raises(IndexError):
        ShapesEditsSource(scenes=5).edit(5)
    with pytest.raises(UserError, match="nothing is held out"):
        ShapesEditsSource(held_out_fraction=0.0).held_out()
    pairs = {"colours": ("red", "blue"), "shapes": ("circle", "square")}
    few = ShapesEditsSource(preset="grid8", max_objects=1, held_out_fraction=0.5, **pairs)
    with pytest.raises(UserError, match="60 held-out edits wanted"):
        few.distinct(60)
