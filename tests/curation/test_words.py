"""Words, nouns and information density against definitions written a second time."""

import json
import re
import sys
import types

import numpy as np
import pytest

from scaling_dit.curation import density, words
from scaling_dit.errors import UserError


def test_words_are_runs_of_letters_with_apostrophes_and_hyphens_inside():
    assert words.words("A man's T-shirt -- 2x 'big', snow_man ÉTÉ!") == [
        "a", "man's", "t-shirt", "2x", "big", "snow", "man", "été",
    ]  # fmt: skip


PLURALS = {
    "dogs": "dog",
    "boxes": "box",
    "horses": "horse",
    "cherries": "cherry",
    "benches": "bench",
    "buses": "bus",
    "glasses": "glasses",
    "women": "woman",
    "children": "child",
    "leaves": "leaf",
    "knives": "knife",
    "potatoes": "potato",
    "photos": "photo",
    "boys": "boy",
    "dress": "dress",
    "dishes": "dish",
    "puppies": "puppy",
    "cookies": "cookie",
    "shoes": "shoe",
}


@pytest.mark.parametrize(("plural", "singular"), PLURALS.items())
def test_the_lexicon_knows_plurals(plural, singular):
    nouns = words.LexiconNouns()
    assert nouns(f"the {plural} quickly") == [singular] and nouns(singular) == [singular]


def test_the_lexicon_counts_each_occurrence_and_nothing_else():
    nouns = words.find_nouns("lexicon")
    assert nouns("Two DOGS chase a dog with a ball, whereas nobody is ideally running") == [
        "dog",
        "dog",
        "ball",
    ]
    assert nouns("") == [] and re.match(r"lexicon of 1,\d\d\d common nouns", nouns.name)
    assert words.LexiconNouns(["circle"], "toy")("circles and squares") == ["circle"]


def test_every_word_of_the_packaged_list_is_its_own_noun():
    nouns = words.LexiconNouns()
    listed = words._packaged()
    assert all(nouns(noun) == [noun] for noun in listed) and len(listed) > 1500
    assert not any(plural in listed for plural in words._IRREGULAR)


def test_spacy_is_used_where_it_is_installed(monkeypatch):
    assert not words.spacy_installed("no_such_model")
    with pytest.raises(UserError, match="no_such_model is not installed"):
        words.SpacyNouns("no_such_model")

    def load(model, disable):
        token = types.SimpleNamespace
        tagged = [token(text="Paris", lemma_="Paris", pos_="PROPN"), token(text="cats", lemma_="cat", pos_="NOUN"),
                  token(text="run", lemma_="run", pos_="VERB")]  # fmt: skip
        return lambda caption: tagged

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))
    monkeypatch.setattr(words, "spacy_installed", lambda model=words.SPACY_MODEL: True)
    nouns = words.find_nouns("auto")
    assert nouns("Paris cats run") == ["paris", "cat"] and nouns.name == "spaCy en_core_web_sm"
    monkeypatch.setattr(words, "spacy_installed", lambda model=words.SPACY_MODEL: False)
    assert isinstance(words.find_nouns("auto"), words.LexiconNouns)


PHRASES = [
    ("red", "color"),
    ("dog", "animal"),
    ("two dogs", "counting"),
    ("ice cream", "food"),
    ("T-shirt", "object"),
    ("berry", "food"),
    ("left of", "spatial"),
    ("orange", "color"),
    ("orange", "food"),
    ("buses", "object"),
]


def brute_force(phrase, caption):
    """Whether a caption contains a phrase, by one regular expression over text with single spaces."""

    def plain(text):
        return re.sub(r"[\W_]+", " ", text.lower()).strip()

    *first, last = plain(phrase).split()
    forms = {last, last + "s"}
    if last.endswith("y"):
        forms = {last, last[:-1] + "ies"}
    if last.endswith("s"):
        forms = {last, last + "es", last[:-1]}
        forms |= {last[:-2]} if last.endswith("es") else set()
    pattern = " ".join([*map(re.escape, first), f"(?:{'|'.join(map(re.escape, forms))})"])
    return re.search(rf"\b{pattern}\b", plain(caption)) is not None


def test_density_is_what_a_search_for_each_phrase_finds():
    rng = np.random.default_rng(0)
    vocabulary = ["red", "Redder", "dog", "dogs", "two", "ice", "cream", "creams", "t-shirt", "T shirts", "berries",
                  "strawberry", "left", "of", "orange", "oranges", "bus", "buses", "dogged", "ice-cream"]  # fmt: skip
    elements = density.Elements(PHRASES)
    kinds = {kind for _, kind in PHRASES}
    met = set()
    for _ in range(2000):
        caption = ", ".join(rng.choice(vocabulary, size=rng.integers(0, 6)))
        caption = caption.replace(", ", " ") if rng.random() < 0.7 else caption
        expected = {kind for phrase, kind in PHRASES if brute_force(phrase, caption)}
        assert elements.in_caption(caption) == expected, caption
        met |= expected
    assert met == kinds and elements.phrases == {"color": 2, "animal": 1, "counting": 1, "food": 3, "object": 2,
                                                 "spatial": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no question file"),
        ("{", "is no JSON"),
        ("{}", "is a list of rows"),
        ("[]", "is a list of rows"),
        ('[{"element": "red", "element_type": "color"}, {"element": "x"}]', "row 1 has no element"),
    ],
)
def test_a_wrong_question_file_is_reported(tmp_path, text, message):
    path = tmp_path / "questions.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        density.read_elements(path)


def test_a_question_file_is_read(tmp_path):
    rows = [
        {"id": "1", "caption": "c", "question": "q?", "element": e, "element_type": k} for e, k in PHRASES * 2
    ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    assert density.read_elements(tmp_path / "q.json").phrases == density.Elements(PHRASES).phrases
