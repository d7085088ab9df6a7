"""Information density of captions: how many of them name the elements of TIFA questions (arXiv 2412.12391, 6.3).

A TIFA question file names the elements of its captions, each a phrase with a type ("red": color, "two dogs": counting).
A caption contains a phrase if it has the phrase's words in sequence. Words are runs of letters and digits, in lower
case; the last word may be singular or regular plural. The density of a type is the share of captions that contain at
least one phrase of the type.
"""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from scaling_dit.curation.words import plurals, singulars
from scaling_dit.errors import UserError
from scaling_dit.files import parse_json

_TOKEN = re.compile(r"[^\W_]+")
Phrase = tuple[str, ...]


class Elements:
    """The element phrases of a TIFA question file, indexed for search.

    Args:
      phrases: (phrase, element type); one phrase may have several types.
    """

    def __init__(self, phrases: Iterable[tuple[str, str]]) -> None:
        types: dict[Phrase, set[str]] = defaultdict(set)
        # The number of distinct phrases by type.
        self.phrases: Counter[str] = Counter()
        for text, kind in sorted(set(phrases)):
            tokens = tuple(_TOKEN.findall(text.lower()))
            if tokens:
                self.phrases[kind] += 1
                for last in {tokens[-1], *plurals(tokens[-1]), *singulars(tokens[-1])}:
                    types[*tokens[:-1], last].add(kind)
        self._types: dict[Phrase, set[str]] = dict(types)
        self._lengths = sorted({len(phrase) for phrase in types})

    def in_caption(self, caption: str) -> set[str]:
        """The element types with a phrase in the caption."""
        tokens = _TOKEN.findall(caption.lower())
        starts = itertools.product(range(len(tokens)), self._lengths)
        runs = (self._types.get(tuple(tokens[i : i + n]), ()) for i, n in starts)
        return set(itertools.chain.from_iterable(runs))


def read_elements(path: epath.PathLike) -> Elements:
    """The elements of a TIFA v1.0 question file: a list of rows with `element` and `element_type`.

    Raises:
      UserError: the file is missing or has another form.
    """
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"no question file {path}")
    try:
        rows = parse_json(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: a TIFA question file is a list of rows with element and element_type")
    for number, row in enumerate(rows):
        if not (isinstance(row, dict) and {"element", "element_type"} <= row.keys()):
            raise UserError(
                f"{path}: row {number} has no element and element_type, as TIFA question files have"
            )
    return Elements((str(row["element"]), str(row["element_type"])) for row in rows)


def table(found: Mapping[str, Mapping[str, float]], kinds: Sequence[str]) -> str:
    """Densities as a text table, from element type -> caption kind -> share."""
    lines = [f"{'contains':<16}" + "".join(f"{kind:>12}" for kind in kinds)]
    for element, shares in sorted(found.items()):
        lines.append(f"{element:<16}" + "".join(f"{shares[kind]:>12.1%}" for kind in kinds))
    return "\n".join(lines)


def as_shares(counts: Mapping[Any, int], captions: Mapping[str, int], elements: Elements) -> dict[str, Any]:
    """Element type -> caption kind -> share of captions, from counts by (element type, kind)."""
    return {
        element: {kind: counts.get((element, kind), 0) / total for kind, total in captions.items() if total}
        for element in sorted(elements.phrases)
    }
