"""The words and the nouns of a caption, for statistics.

A word is a run of letters and digits with single apostrophes or hyphens inside ("don't", "t-shirt"), in lower case.

Nouns are found in one of two ways, which every report names. Results of the two cannot be compared with each other:

    spacy      the tokens that spaCy tags as NOUN (counted by lemma) or PROPN (as written), in lower case
    lexicon    the words of this package's list `nouns.txt`, singular or plural: common, mostly visible things. Words
               are not tagged, so "orange" always counts. Proper nouns are missing, so counts are lower bounds
"""

import functools
import importlib.util
import re
from collections.abc import Iterable
from typing import Any, Protocol

from etils import epath

from scaling_dit.errors import UserError

SPACY_MODEL = "en_core_web_sm"
# \u2019 is the typographic apostrophe.
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_IRREGULAR = {
    "calves": "calf",
    "children": "child",
    "feet": "foot",
    "geese": "goose",
    "halves": "half",
    "hooves": "hoof",
    "knives": "knife",
    "leaves": "leaf",
    "lives": "life",
    "loaves": "loaf",
    "men": "man",
    "mice": "mouse",
    "oxen": "ox",
    "people": "person",
    "scarves": "scarf",
    "shelves": "shelf",
    "teeth": "tooth",
    "thieves": "thief",
    "wives": "wife",
    "wolves": "wolf",
    "women": "woman",
}


class Nouns(Protocol):
    """Finds the nouns of captions. Beam sends it to workers, so it must pickle. `name` identifies it in reports."""

    name: str

    def __call__(self, caption: str) -> list[str]:
        """Every occurrence of a noun, in order, in the form that identifies the noun."""


def words(caption: str) -> list[str]:
    """The words of a caption, in lower case, in order.

    >>> words("A man's T-shirt, 2 sizes too_big")
    ['a', "man's", 't-shirt', '2', 'sizes', 'too', 'big']
    """
    return _WORD.findall(caption.lower())


def plurals(word: str) -> list[str]:
    """The possible spellings of a regular English noun's plural, in lower case.

    >>> plurals("dog"), plurals("box"), plurals("cherry")
    (['dogs'], ['boxes'], ['cherries'])
    """
    if word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        return [word[:-1] + "ies"]
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return [word + "es"]
    return [word + "s", word + "es"] if word.endswith("o") else [word + "s"]


def singulars(word: str) -> list[str]:
    """The words whose regular plural a word may be, in lower case; empty if it is no plural.

    >>> singulars("boxes"), singulars("glass")
    (['boxe', 'box'], [])
    """
    if not word.endswith("s") or word.endswith("ss"):
        return []
    candidates = [word[:-1], *([word[:-2]] if word.endswith("es") else [])]
    candidates += [word[:-3] + "y"] if word.endswith("ies") else []
    return [candidate for candidate in candidates if word in plurals(candidate)]


class LexiconNouns:
    """Finds nouns by a closed list, see the module.

    Args:
      nouns: in the singular and lower case; this package's list by default.
      name: for reports.
    """

    def __init__(self, nouns: Iterable[str] | None = None, name: str = "") -> None:
        self._nouns = _packaged() if nouns is None else frozenset(nouns)
        self.name = name or f"lexicon of {len(self._nouns):,} common nouns (no tagging, no proper nouns)"
        # Word -> its noun, for the words looked up so far.
        self._known: dict[str, str | None] = {}

    def __call__(self, caption: str) -> list[str]:
        return [noun for word in words(caption) if (noun := self._noun(word))]

    def _noun(self, word: str) -> str | None:
        if word not in self._known:
            forms = [word, _IRREGULAR.get(word, word), *singulars(word)]
            self._known[word] = next((form for form in forms if form in self._nouns), None)
        return self._known[word]


class SpacyNouns:
    """Finds nouns with the tagger of an installed spaCy model.

    Raises:
      UserError: spaCy or the model is not installed.
    """

    def __init__(self, model: str = SPACY_MODEL) -> None:
        if not spacy_installed(model):
            raise UserError(
                f"spaCy's model {model} is not installed; pip install spacy, then python -m spacy download {model}"
            )
        self.model = model
        self.name = f"spaCy {model}"

    def __call__(self, caption: str) -> list[str]:
        tagged = _spacy(self.model)(caption)
        return [
            (token.text if token.pos_ == "PROPN" else token.lemma_).lower()
            for token in tagged
            if token.pos_ in ("NOUN", "PROPN")
        ]


def spacy_installed(model: str = SPACY_MODEL) -> bool:
    """Whether spaCy and the model are installed."""
    return all(importlib.util.find_spec(package) is not None for package in ("spacy", model))


def find_nouns(how: str) -> Nouns:
    """The finder that `how` names: "spacy", "lexicon", or "auto", which uses spaCy if its model is installed.

    Raises:
      UserError: `how` is "spacy", and it is not installed.
    """
    if how == "auto":
        how = "spacy" if spacy_installed() else "lexicon"
    return SpacyNouns() if how == "spacy" else LexiconNouns()


@functools.cache
def _packaged() -> frozenset[str]:
    lines = epath.resource_path("scaling_dit").joinpath("curation/nouns.txt").read_text().splitlines()
    return frozenset(noun for line in lines if not line.startswith("#") for noun in line.split())


@functools.cache
def _spacy(model: str) -> Any:
    import spacy

    return spacy.load(model, disable=["parser", "ner"])
