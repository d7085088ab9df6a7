"""Statistics of a set of images and captions: table 3 and figure 18 of arXiv 2404.02883.

Table 3, once for the alt-texts alone and once with all captions:

    images              the images with at least one caption
    mean aesthetic      over the images that have this column
    image-noun pairs    the distinct nouns in all captions of an image, summed over images
    unique nouns        the distinct nouns of the whole set
    nouns per image     pairs / images

Figure 18, for each kind of caption: how many captions have n words, and how many have n nouns, counting every
occurrence. The last class holds all captions with `LAST_CLASS` or more.

All counts are whole numbers under a key, so the counts of parts of a set can be summed in any order.
"""

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from scaling_dit.curation import density
from scaling_dit.curation.words import Nouns, words
from scaling_dit.errors import printable

# The end of figure 18's axes.
LAST_CLASS = 60
# Rows of table 3.
ALT, ALL = "alt", "with synthetic"
Key = tuple[str | int, ...]
# Aesthetic scores are summed in millionths.
_MICRO = 1_000_000


class Counting:
    """Counts images one by one.

    Args:
      nouns: finds the nouns of a caption.
      aesthetic: the column of the aesthetic score.
      elements: phrases for the information density; None leaves it out.

    Attributes:
      counts: under ("images",), ("scored",), ("aesthetic",), ("captions", kind), ("words" | "nouns", kind, class),
        ("total words" | "total nouns", kind), ("contains", element type, kind), ("damaged", kind).
      nouns_met: images under (row of table 3, noun).
    """

    def __init__(self, nouns: Nouns, aesthetic: str, elements: density.Elements | None = None) -> None:
        self.counts: Counter[Key] = Counter()
        self.nouns_met: Counter[tuple[str, str]] = Counter()
        self._nouns, self._aesthetic, self._elements = nouns, aesthetic, elements

    def add(self, captions: Sequence[tuple[str, str]], metadata: Mapping[str, Any]) -> None:
        """Counts one image.

        Args:
          captions: (text, kind) of each; "alt" is the kind of alt-texts.
          metadata: columns of the image.
        """
        self.counts["images",] += 1
        score = metadata.get(self._aesthetic)
        # score == score is false for NaN.
        if isinstance(score, int | float) and score == score:
            self.counts["scored",] += 1
            self.counts["aesthetic",] += round(score * _MICRO)
        distinct: dict[str, set[str]] = {ALT: set(), ALL: set()}
        for text, kind in captions:
            nouns = self._nouns(text)
            distinct[ALL].update(nouns)
            if kind == ALT:
                distinct[ALT].update(nouns)
            self._add_caption(text, kind, len(nouns))
        for row, found in distinct.items():
            self.nouns_met.update((row, noun) for noun in found)

    def add_damaged(self, kind: str) -> None:
        """Counts a sample that cannot be read."""
        self.counts["damaged", kind] += 1

    def _add_caption(self, text: str, kind: str, nouns: int) -> None:
        self.counts["captions", kind] += 1
        for what, number in (("words", len(words(text))), ("nouns", nouns)):
            self.counts[what, kind, min(number, LAST_CLASS)] += 1
            self.counts[f"total {what}", kind] += number
        if self._elements:
            self.counts.update(("contains", element, kind) for element in self._elements.in_caption(text))


def result(
    counts: Mapping[Key, int],
    pairs: Mapping[str, int],
    unique: Mapping[str, int],
    *,
    nouns_by: str,
    aesthetic: str,
    elements: density.Elements | None = None,
) -> dict[str, Any]:
    """The statistics of a whole set, ready for JSON.

    Args:
      counts: sums of `Counting.counts`.
      pairs: row of table 3 -> sum of `nouns_met` over its nouns.
      unique: row of table 3 -> number of its nouns.
      nouns_by: name of the finder of nouns.
      aesthetic: the column of the aesthetic score.
      elements: the phrases whose density was counted.
    """
    images, scored = counts.get(("images",), 0), counts.get(("scored",), 0)
    captions = {str(key[1]): n for key, n in sorted(counts.items(), key=str) if key[0] == "captions"}
    rows = [ALT, ALL] if set(captions) - {ALT} else [ALT]
    found: dict[str, Any] = {
        "images": images,
        "captions": captions,
        "aesthetic": {
            "column": aesthetic,
            "images": scored,
            "mean": counts[("aesthetic",)] / _MICRO / scored if scored else None,
        },
        "table": {
            row: {
                "image_noun_pairs": pairs.get(row, 0),
                "unique_nouns": unique.get(row, 0),
                "nouns_per_image": pairs.get(row, 0) / images if images else None,
            }
            for row in rows
        },
        "per_caption": {kind: _lengths(counts, kind, total) for kind, total in captions.items()},
        "nouns_by": nouns_by,
        "damaged": {str(key[1]): n for key, n in sorted(counts.items(), key=str) if key[0] == "damaged"},
    }
    if elements:
        contained = {key[1:]: n for key, n in counts.items() if key[0] == "contains"}
        found["density"] = density.as_shares(contained, captions, elements)
    return found


def _lengths(counts: Mapping[Key, int], kind: str, captions: int) -> dict[str, Any]:
    """Figure 18 for one kind of caption."""
    classes = range(LAST_CLASS + 1)
    return {
        what: {
            "mean": counts.get((f"total {what}", kind), 0) / captions,
            "histogram": [counts.get((what, kind, n), 0) for n in classes],
        }
        for what in ("words", "nouns")
    }


def table(found: Mapping[str, Any]) -> str:
    """A `result` as a text table."""
    score, scored = found["aesthetic"]["mean"], found["aesthetic"]["images"]
    shown = "none" if score is None else f"{score:.2f}"
    lines = [
        f"{'captions':<16}{'images':>12}{'aesthetic':>11}{'image-noun':>14}{'unique':>11}{'nouns/image':>13}"
    ]
    for row, values in found["table"].items():
        per_image = values["nouns_per_image"] or 0.0
        pairs, unique = values["image_noun_pairs"], values["unique_nouns"]
        lines.append(f"{row:<16}{found['images']:>12,}{shown:>11}{pairs:>14,}{unique:>11,}{per_image:>13.2f}")
    lines += ["", f"{'kind':<16}{'captions':>12}{'words':>11}{'nouns':>11}"]
    for kind, lengths in found["per_caption"].items():
        means = f"{lengths['words']['mean']:>11.2f}{lengths['nouns']['mean']:>11.2f}"
        lines.append(f"{kind:<16}{found['captions'][kind]:>12,}{means}")
    if "density" in found:
        lines += ["", density.table(found["density"], list(found["captions"]))]
    lines += [
        "",
        f"nouns by {found['nouns_by']}; aesthetic: column {found['aesthetic']['column']!r} of {scored:,} images",
    ]
    if found["damaged"]:
        by_kind = ", ".join(f"{kind} {n:,}" for kind, n in found["damaged"].items())
        lines.append(f"damaged samples left out: {by_kind}")
    return printable("\n".join(lines), keep="\n")


def write(folder: epath.Path, found: Mapping[str, Any]) -> list[str]:
    """Writes `stats.json` and, if matplotlib is installed, the histograms as `captions.png`; returns the names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stats.json").write_text(json.dumps(found, indent=1) + "\n")
    png = plot(found)
    if png is None:
        return ["stats.json"]
    (folder / "captions.png").write_bytes(png)
    return ["stats.json", "captions.png"]


def plot(found: Mapping[str, Any]) -> bytes | None:
    """Figure 18 as a PNG: shares of captions by words and by nouns; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("words", "nouns"), strict=True):
        for kind, lengths in found["per_caption"].items():
            shares = [n / found["captions"][kind] for n in lengths[what]["histogram"]]
            axes.step(
                range(LAST_CLASS + 1), shares, where="mid", label=f"{kind}, mean {lengths[what]['mean']:.1f}"
            )
        axes.set(
            xlabel=f"{what} per caption ({LAST_CLASS}: and more)",
            ylabel="share of captions",
            xlim=(0, LAST_CLASS),
        )
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
