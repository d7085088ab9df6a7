"""Captions and questions of scenes of shapes."""

import itertools
import json
import re
from collections import Counter

import pytest

from scaling_dit.data.shapes.scenes import PRESETS, Draws, Object, Scene, ShapesSpec, make_scene, relations
from scaling_dit.data.shapes.source import ShapesSource
from scaling_dit.data.shapes.text import SYNONYMS, Captions, caption, describe, facts, questions

# Left of and above.
TWO = Scene("grid16", (Object("circle", "red", "large", 3, 3), Object("square", "blue", "small", 11, 11)))
THREE = Scene("grid16", (*TWO.objects, Object("cross", "red", "small", 3, 11)))
PLAIN = {variant: word for word, variants in SYNONYMS.items() for variant in variants}


def plainly(text: str) -> str:
    for variant in sorted(PLAIN, key=len, reverse=True):
        text = re.sub(rf"\b{variant}\b", PLAIN[variant], text)
    return text


@pytest.mark.parametrize(
    ("level", "text"),
    [
        (0, "some shapes"),
        (1, "a circle and a square"),
        (2, "a red circle and a blue square"),
        (3, "a large red circle and a small blue square"),
        (4, "a large red circle left of and above a small blue square"),
    ],
)
def test_levels_say_more_and_more(level, text):
    assert caption(TWO, level, 1.0, Draws(), plain=True) == text


def test_one_object_and_three_objects():
    assert caption(Scene("grid16", TWO.objects[:1]), 0, 1.0, Draws(), plain=True) == "a shape"
    assert caption(THREE, 2, 1.0, Draws(), plain=True) == "a red circle, a blue square and a red cross"
    assert caption(THREE, 4, 1.0, Draws(), plain=True) == (
        "a large red circle left of and above a small blue square and above a small red cross, "
        "the blue square right of the red cross"
    )


def test_a_caption_says_the_mentioned_facts_and_nothing_else():
    assert describe(TWO, []) == "some shapes"
    assert describe(TWO, [("color", 1)]) == "a blue shape"
    assert describe(TWO, [("above", 0, 1), ("shape", 1)]) == "a shape above a square"
    assert describe(TWO, facts(TWO, 4), order=[1, 0]) == (
        "a small blue square right of and below a large red circle"
    )
    assert describe(TWO, [("size", 0)], words={"large": "big"}, opening="there is ") == "there is a big shape"


REFERENCE = re.compile(r"(?:a|the) (?:(small|large) )?(\w+) (circle|square|triangle|cross|diamond)")
RELATION = re.compile(r"left of|right of|above|below")


def parsed(text: str) -> tuple[set[tuple[str, ...]], set[tuple[str, str, str]]]:
    """Objects (size, colour, shape) and relations (subject, relation, object) that a dense caption states."""
    objects, stated = set(), set()
    for clause in plainly(text).split(", "):
        found = list(REFERENCE.finditer(clause))
        objects |= {match.groups() for match in found if match.group(1)}
        names = [f"{match.group(2)} {match.group(3)}" for match in found]
        for before, after, name in zip(found, found[1:], names[1:], strict=False):
            words = RELATION.findall(clause[before.end() : after.start()])
            stated |= {(names[0], word, name) for word in words}
    return objects, stated


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("plain", [True, False])
def test_the_densest_caption_has_every_attribute_and_relation(preset, plain):
    spec = ShapesSpec(preset=preset, min_objects=2, max_objects=3)
    pixels = PRESETS[preset].pixels
    for i in range(100):
        scene = make_scene(spec, "train", i)
        objects, stated = parsed(caption(scene, 4, 1.0, Draws(i), plain))
        if len(pixels) > 1:
            assert objects == {(o.size, o.colour, o.shape) for o in scene.objects}
        pairs = Counter(frozenset((a, b)) for a, _, b in stated)
        for a, b in itertools.combinations(scene.objects, 2):
            one, other = f"{a.colour} {a.shape}", f"{b.colour} {b.shape}"
            either_way = {(one, r, other) for r in relations(a, b, pixels)}
            either_way |= {(other, r, one) for r in relations(b, a, pixels)}
            # All are said, each once.
            assert pairs[frozenset((one, other))] == len(relations(a, b, pixels))
            assert {triple for triple in stated if set(triple) >= {one, other}} <= either_way


def test_captions_of_two_objects_are_short():
    spec = ShapesSpec(preset="free32", min_objects=2)
    texts = [caption(make_scene(spec, "train", i), 4, 1.0, Draws(i), plain=False) for i in range(300)]
    assert max(len(text.split()) for text in texts) <= 20


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_mention_probability_is_the_share_of_facts(probability):
    source = ShapesSource(mention_probability=probability, min_objects=2, paraphrases=1)
    said = possible = 0
    for i in range(600):
        scene, text = source.scene(i), source[i]["captions"][0]
        possible += len(facts(scene, 4))
        said += len(re.findall(r"\b(small|large)\b", text)) + len(RELATION.findall(text))
        # Second mentions repeat facts.
        first = re.sub(r"the (\w+ )?\w+", "", text)
        said += len(re.findall(r"\b(red|green|blue|yellow|magenta|cyan|white|black)\b", first))
        said += len(re.findall(r"\b(circle|square|triangle|cross|diamond)\b", first))
    assert said / possible == pytest.approx(probability, abs=0.03 if 0 < probability < 1 else 0)


def test_paraphrases_differ_and_are_reproducible():
    source = ShapesSource(min_objects=2, paraphrases=6)
    texts = list(source[3]["captions"])
    assert texts == list(source[3]["captions"])
    assert len(set(texts)) > 3
    assert texts[0] == caption(source.scene(3), 4, 1.0, Draws(), plain=True)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_wrong_caption_rate(rate):
    source = ShapesSource(wrong_caption_rate=rate, min_objects=2, scenes=1000, paraphrases=2)
    right = [caption(source.scene(i), 4, 1.0, Draws(), plain=True) for i in range(500)]
    wrong = [source[i]["captions"][0] != text for i, text in enumerate(right)]
    assert sum(wrong) / 500 == pytest.approx(rate, abs=0.07 if 0 < rate < 1 else 0)
    every = {caption(source.scene(i), 4, 1.0, Draws(), plain=True) for i in range(1000)}
    # Those of other scenes, not nonsense.
    assert all(source[i]["captions"][0] in every for i in range(500))


def test_held_out_prompts_are_complete_whatever_the_training_captions_are():
    sparse = ShapesSource(caption_level=1, mention_probability=0.3, wrong_caption_rate=0.5)
    dense = ShapesSource().held_out()
    assert [sparse.held_out()[i]["captions"][0] for i in range(30)] == [
        dense[i]["captions"][0] for i in range(30)
    ]
    shallow = ShapesSource(prompt_level=2).held_out()
    assert [shallow.questions(i)[0]["caption"] for i in range(30)] == [
        shallow[i]["captions"][0] for i in range(30)
    ]
    assert not any(re.search("large|small|left", shallow[i]["captions"][0]) for i in range(30))


@pytest.mark.parametrize(
    "preset",
    # On a grid and freely placed: all make their captions alike, and drawing the images takes the time.
    [
        pytest.param(name, marks=[] if name in ("free32", "grid16") else pytest.mark.slow)
        for name in sorted(PRESETS)
    ],
)
def test_texts_has_every_word_of_every_caption(preset):
    source = ShapesSource(preset=preset, max_objects=3, mention_probability=0.7)
    known = set(re.findall(r"\w+|,", " ".join(source.texts())))
    used: set[str] = set()
    for split in (source, source.held_out()):
        used |= {
            word for i in range(300) for text in split[i]["captions"] for word in re.findall(r"\w+|,", text)
        }
    assert used <= known
    # Hardly any word of the table is unused.
    assert len(known - used) <= 2


def test_captions_are_a_lazy_sequence():
    made: list[int] = []

    def make(index: int) -> str:
        made.append(index)
        return str(index)

    texts = Captions(make, 3)
    assert len(texts) == 3 and made == []
    assert texts[1] == "1" and texts[-1] == "2" and texts[:2] == ["0", "1"]
    assert made == [1, 2, 0, 1]
    assert list(texts) == ["0", "1", "2"]
    with pytest.raises(IndexError):
        texts[3]


def test_questions_of_a_scene():
    rows = questions(TWO, "a caption", "key", 4)
    assert Counter(row["element_type"] for row in rows) == {
        "object": 2, "color": 2, "shape": 2, "size": 2, "counting": 1, "spatial": 2,
    }  # fmt: skip
    asked = {row["question"]: row["answer"] for row in rows}
    assert asked["what color is the circle?"] == "red" and asked["what shape is the blue object?"] == "square"
    assert asked["is there a red circle?"] == "yes" and asked["what size is the blue square?"] == "small"
    assert asked["how many shapes are there?"] == "2"
    assert asked["is the red circle left of the blue square?"] == "yes"
    assert rows[0]["about"]["objects"][1] == {"colour": "blue", "shape": "square", "size": "small"}


def test_questions_point_at_one_object():
    same_size = Scene(
        "grid16", (Object("cross", "red", "small", 3, 3), Object("cross", "blue", "small", 11, 3))
    )
    assert [r["question"] for r in questions(same_size, "", "", 4) if r["element_type"] == "color"] == [
        "is one of the crosses red?",
        "is one of the crosses blue?",
    ]
    other_size = Scene(
        "grid16", (Object("cross", "red", "small", 3, 3), Object("cross", "blue", "large", 11, 3))
    )
    assert "what color is the small cross?" in [r["question"] for r in questions(other_size, "", "", 4)]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_question_rows_are_well_formed(preset):
    source = ShapesSource(preset=preset, max_objects=3).held_out()
    for i in range(100):
        rows, record = source.questions(i), source[i]
        assert json.loads(json.dumps(rows)) == rows
        # TIFA's result is keyed by the question.
        assert len({row["question"] for row in rows}) == len(rows)
        assert {row["id"] for row in rows} == {record["key"]}
        caption = record["captions"][0]
        assert all(row["caption"] == caption for row in rows)
        for row in rows:
            assert (
                row["answer"] in row["choices"] and 2 <= len(set(row["choices"])) == len(row["choices"]) <= 4
            )
            assert set(row) == {
                "id", "caption", "question", "choices", "answer", "element_type", "element", "about",
            }  # fmt: skip
        number = len(source.scene(i).objects)
        assert sum(row["element_type"] == "object" for row in rows) == number
        assert sum(row["element_type"] == "spatial" for row in rows) >= number * (number - 1) / 2


def test_questions_ask_only_for_what_the_level_says():
    kinds = [{row["element_type"] for row in questions(TWO, "", "", level)} for level in (1, 2, 3, 4)]
    assert kinds == [
        {"shape", "counting"},
        {"shape", "counting", "object", "color"},
        {"shape", "counting", "object", "color", "size"},
        {"shape", "counting", "object", "color", "size", "spatial"},
    ]
    circles = Scene(
        "grid16", (Object("circle", "red", "small", 3, 3), Object("circle", "blue", "small", 11, 3))
    )
    assert [row["question"] for row in questions(circles, "", "", 1)] == [
        "is there a circle?",
        "how many shapes are there?",
    ]
