"""Captions and questions of a scene of shapes.

A fact is a tuple: ("shape", i), ("color", i), ("size", i), or (relation, i, j) with i < j. Captions mention some of
a scene's facts; questions ask for them. Questions follow TIFA v1.0's JSON (arXiv 2303.11897), in its spelling.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, overload

from scaling_dit.data.shapes.scenes import INVERSE, PALETTE, PRESETS, Draws, Object, Scene, relations

Fact = tuple[str, int] | tuple[str, int, int]

RELATIONS = tuple(INVERSE)
# Caption level of a kind of fact.
LEVEL = {"shape": 1, "color": 2, "size": 3} | dict.fromkeys(RELATIONS, 4)
SYNONYMS = {
    "large": ("large", "big"),
    "small": ("small", "little"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
OPENINGS = ("", "there is ", "a picture of ", "an image with ")


class Captions(Sequence[str]):
    """`length` captions of one record, each made when it is asked for: training reads one of them per step."""

    def __init__(self, make: Callable[[int], str], length: int) -> None:
        self._make = make
        self._length = length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return self._make(int(index) % self._length)


def facts(scene: Scene, level: int) -> list[Fact]:
    """All that captions of a level (0 to 4) can say; sizes only where the preset has more than one."""
    pixels = PRESETS[scene.preset].pixels
    kinds = [k for k in ("shape", "color", "size") if LEVEL[k] <= level and (k != "size" or len(pixels) > 1)]
    found: list[Fact] = [(kind, i) for i in range(len(scene.objects)) for kind in kinds]
    if level >= LEVEL["above"]:
        for i, j in itertools.combinations(range(len(scene.objects)), 2):
            found += [(name, i, j) for name in relations(scene.objects[i], scene.objects[j], pixels)]
    return found


def describe(
    scene: Scene,
    mentioned: Collection[Fact],
    order: Iterable[int] | None = None,
    words: Mapping[str, str] | None = None,
    opening: str = "",
) -> str:
    """One caption that says the mentioned facts and nothing else.

    An object without a mentioned fact is left out; one whose shape is not mentioned is "a shape". A second mention
    is "the red circle", which is unique where colours and shapes are mentioned.
    order: indices of all objects, as they shall be named; words: a synonym for sizes and relations.
    """
    wording = words or {}
    ranks = list(order) if order is not None else list(range(len(scene.objects)))
    said = set(mentioned)
    named: set[int] = set()

    def name(i: int) -> str:
        item = scene.objects[i]
        parts = ["the"] if i in named else ["a"]
        if ("size", i) in said and i not in named:
            parts.append(wording.get(item.size, item.size))
        if ("color", i) in said:
            parts.append(item.colour)
        parts.append(item.shape if ("shape", i) in said else "shape")
        named.add(i)
        return " ".join(parts)

    def links(i: int, j: int) -> list[str]:
        held = [r if i < j else INVERSE[r] for r in RELATIONS if (r, min(i, j), max(i, j)) in said]
        return [wording.get(relation, relation) for relation in held]

    clauses = []
    linked = False
    for rank, i in enumerate(ranks):
        targets = [(j, held) for j in ranks[rank + 1 :] if (held := links(i, j))]
        if targets:
            linked = True
            subject = name(i)
            clauses.append(subject + " " + " and ".join(" and ".join(h) + " " + name(j) for j, h in targets))
        elif i not in named and any(fact[1] == i and len(fact) == 2 for fact in said):
            clauses.append(name(i))
    if not clauses:
        clauses = ["a shape" if len(ranks) == 1 else "some shapes"]
    # "and" would join the last object to a relation.
    if linked or len(clauses) == 1:
        return opening + ", ".join(clauses)
    return opening + ", ".join(clauses[:-1]) + " and " + clauses[-1]


def caption(scene: Scene, level: int, mention_probability: float, draws: Draws, plain: bool) -> str:
    """A random caption: each fact of the level is mentioned with the given probability.

    plain: objects in the scene's order and the first of all synonyms, else a paraphrase.
    """
    mentioned = [fact for fact in facts(scene, level) if draws.chance(mention_probability)]
    if plain:
        return describe(scene, mentioned)
    order = draws.distinct(tuple(range(len(scene.objects))), len(scene.objects))
    words = {word: variants[draws.below(len(variants))] for word, variants in SYNONYMS.items()}
    return describe(scene, mentioned, order, words, OPENINGS[draws.below(len(OPENINGS))])


def _choices(answer: str, present: Iterable[str], known: Sequence[str]) -> list[str]:
    """The answer among up to four sorted choices: first what else the scene shows, then the next known ones."""
    start = known.index(answer)
    picked = dict.fromkeys([answer, *present, *known[start:], *known[:start]])
    return sorted(list(picked)[:4])


def _attribute(scene: Scene, i: int, kind: str) -> tuple[str, list[str], str, str]:
    """Question, choices, answer and element that ask for the colour or shape of object i.

    Asked openly if the rest of the object's description names it alone, else with yes or no.
    """
    item = scene.objects[i]
    others = [other for k, other in enumerate(scene.objects) if k != i]
    if kind == "color":
        value, noun, known = item.colour, item.shape, list(PALETTE)
        rivals, present = [o for o in others if o.shape == noun], [o.colour for o in others]
        ask, closed = (
            "what color is the {}?",
            f"is one of the {noun}{'es' if noun[-1] == 's' else 's'} {value}?",
        )
    else:
        value, noun, known = item.shape, item.colour, list(PRESETS[scene.preset].shapes)
        rivals, present = [o for o in others if o.colour == noun], [o.shape for o in others]
        ask, closed = "what shape is the {} object?", f"is one of the {noun} objects a {value}?"
    if not rivals:
        return ask.format(noun), _choices(value, present, known), value, value
    if all(o.size != item.size for o in rivals):
        return ask.format(f"{item.size} {noun}"), _choices(value, present, known), value, value
    return closed, ["yes", "no"], "yes", value


def _reference(item: Object) -> str:
    return f"{item.colour} {item.shape}"


def questions(scene: Scene, text: str, key: str, level: int) -> list[dict[str, Any]]:
    """TIFA rows for what a caption of a level (1 to 4) says when it mentions everything.

    Rows have TIFA's keys id, caption, question, choices, answer, element_type, element, and `about`, which lets a
    program answer without reading English: the preset, the objects asked for, and the query, a fact as a list,
    ["object", i] or ["count"]. element_type is one of counting, object, color, shape, size, spatial.
    """
    asked = [{"colour": o.colour, "shape": o.shape, "size": o.size} for o in scene.objects]
    rows: list[dict[str, Any]] = []

    def add(kind: str, query: Sequence[str | int], asking: tuple[str, list[str], str, str]) -> None:
        question, choices, answer, element = asking
        about = {"preset": scene.preset, "objects": asked, "query": list(query)}
        row = {"id": key, "caption": text, "question": question, "choices": choices, "answer": answer}
        rows.append(row | {"element_type": kind, "element": element, "about": about})

    mentioned = facts(scene, level)
    for i, item in enumerate(scene.objects):
        if level >= LEVEL["color"]:
            name = _reference(item)
            add("object", ("object", i), (f"is there a {name}?", ["yes", "no"], "yes", name))
            add("color", ("color", i), _attribute(scene, i, "color"))
            add("shape", ("shape", i), _attribute(scene, i, "shape"))
        elif level >= LEVEL["shape"] and item.shape not in [o.shape for o in scene.objects[:i]]:
            add("shape", ("shape", i), (f"is there a {item.shape}?", ["yes", "no"], "yes", item.shape))
        if ("size", i) in mentioned:
            sizes = list(PRESETS[scene.preset].pixels)
            add("size", ("size", i), (f"what size is the {_reference(item)}?", sizes, item.size, item.size))
    number = str(len(scene.objects))
    add("counting", ("count",), ("how many shapes are there?", ["1", "2", "3", "4"], number, number))
    for fact in mentioned:
        if len(fact) == 3:
            relation, i, j = fact
            first, second = _reference(scene.objects[i]), _reference(scene.objects[j])
            asking = (f"is the {first} {relation} the {second}?", ["yes", "no"], "yes", relation)
            add("spatial", fact, asking)
    return rows
