"""Answers questions about shapes from pixels alone: the exact VQA model of the built-in data.

An image is read into objects; the objects that a caption asks for are matched one to one with those that are seen,
and the questions of the caption are answered together under that matching. Clutter earns nothing: recall-style
scoring would reward images full of stray shapes. The dependency of questions follows DSG (arXiv 2310.18235).
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from scaling_dit.data.shapes.scenes import BACKGROUND, PALETTE, PRESETS, Object, glyph, relations
from scaling_dit.errors import UserError

# Raise the number when answers can change: scores compare only within one.
VQA_MODEL = "shapes-oracle-1"
# RGB distance that makes a pixel foreground: 0.4 of the distance of every palette colour to the background.
FAR = 88.0
# Of a piece of foreground and the best template, to be an object.
MIN_IOU = 0.6
# Pixels that a template may stand off the middle of a piece's box.
SHIFT = 1
# Pieces below this share of the smallest shape's area are too small to be counted.
SPECK = 1 / 3
# Share of foreground outside recognised objects above which an image is clutter.
MAX_UNEXPLAINED = 0.3
# Pieces beyond the objects asked for that cost no more than the counting question.
MAX_EXTRA = 1


@dataclasses.dataclass(frozen=True)
class Reading:
    """The objects found in one image."""

    objects: tuple[Object, ...]
    # Objects and other pieces of foreground, without specks.
    pieces: int
    # Share of the foreground outside the templates of the objects.
    unexplained: float


@dataclasses.dataclass(frozen=True)
class _Templates:
    # float32 [templates, side * side].
    masks: np.ndarray
    # float32 [templates].
    areas: np.ndarray
    # Shape, size, shift right, shift down.
    entries: tuple[tuple[str, str, int, int], ...]
    side: int


@functools.cache
def _templates(preset: str) -> _Templates:
    """Every shape and size of a preset at every small shift, the unshifted ones first."""
    pixels, shapes = PRESETS[preset].pixels, PRESETS[preset].shapes
    side = max(pixels.values()) + 2 * (SHIFT + 1)
    moves = sorted(
        itertools.product(range(-SHIFT, SHIFT + 1), repeat=2), key=lambda move: abs(move[0]) + abs(move[1])
    )
    masks, entries = [], []
    for (right, down), shape, size in itertools.product(moves, shapes, pixels):
        n = pixels[size]
        top, left = (side - n) // 2 + down, (side - n) // 2 + right
        mask = np.zeros((side, side), np.float32)
        mask[top : top + n, left : left + n] = glyph(shape, n)
        masks.append(mask.ravel())
        entries.append((shape, size, right, down))
    stacked = np.stack(masks)
    return _Templates(stacked, stacked.sum(axis=1), tuple(entries), side)


def read(image: np.ndarray, preset: str) -> Reading:
    """Reads an image into objects.

    Foreground is every pixel far from the background colour. Each connected piece takes shape, size and place of the
    template with the greatest intersection over union, and the palette colour nearest to its mean under the template.

    Args:
      image: uint8 [canvas, canvas, 3] of the preset.

    Raises:
      UserError: the image has another size than the preset's canvas.
    """
    canvas = PRESETS[preset].canvas
    if image.shape != (canvas, canvas, 3):
        raise UserError(f"preset {preset!r} has images [{canvas}, {canvas}, 3], got {list(image.shape)}")
    pixels = image.astype(np.float32)
    far = np.linalg.norm(pixels - np.asarray(BACKGROUND, np.float32), axis=-1) > FAR
    labels, _ = ndimage.label(far)
    bank = _templates(preset)
    # So that every window lies inside.
    border = bank.side
    padded = np.pad(labels, border)
    smallest = bank.areas.min()
    objects: list[Object] = []
    pieces, explained = 0, 0.0
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        y, x = (rows.start + rows.stop - 1) // 2, (columns.start + columns.stop - 1) // 2
        top, left = y + border - bank.side // 2, x + border - bank.side // 2
        window = (padded[top : top + bank.side, left : left + bank.side] == label).ravel()
        area = np.count_nonzero(labels[rows, columns] == label)
        shared = bank.masks @ window.astype(np.float32)
        overlap = shared / (bank.areas + area - shared)
        best = int(overlap.argmax())
        if overlap[best] >= MIN_IOU:
            shape, size, right, down = bank.entries[best]
            core = np.flatnonzero(window & (bank.masks[best] > 0))
            ys, xs = core // bank.side + top - border, core % bank.side + left - border
            colour = _nearest_colour(pixels[ys, xs].mean(axis=0))
            objects.append(Object(shape, colour, size, x + right, y + down))
            explained += float(shared[best])
        if overlap[best] >= MIN_IOU or area >= SPECK * smallest:
            pieces += 1
    total = np.count_nonzero(far)
    return Reading(tuple(objects), pieces, 1.0 - explained / total if total else 0.0)


def _nearest_colour(rgb: np.ndarray) -> str:
    names = list(PALETTE)
    distance = np.linalg.norm(np.asarray([PALETTE[name] for name in names], np.float32) - rgb, axis=-1)
    return names[int(distance.argmin())]


def answer(image: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Answers all questions of one caption about one image.

    An object is there if its match has its colour and shape; a colour or shape is the match's; a size counts only with
    the right colour or shape; a relation needs both objects there; the number counts all pieces seen. Of all
    matchings the one is taken under which most questions are answered as the caption wants. With more than
    `MAX_EXTRA` surplus pieces, or more than `MAX_UNEXPLAINED` of the foreground unaccounted for, nothing is credited.

    Args:
      image: uint8 [H, W, 3].
      rows: the TIFA rows of one caption, as `data.shapes.text.questions` makes them (with `about`).

    Returns:
      One of each row's choices, or "no" or "none" where the object asked about is not seen.

    Raises:
      UserError: a row without `about`, or an image of the wrong size.
    """
    for row in rows:
        if "about" not in row:
            hint = "the oracle answers only questions that scaling_dit wrote for its shapes"
            raise UserError(f"question {row.get('question')!r} of {row.get('id')!r} has no 'about'; {hint}")
    if not rows:
        return []
    preset, wanted = rows[0]["about"]["preset"], rows[0]["about"]["objects"]
    queries = [row["about"]["query"] for row in rows]
    seen = read(image, preset)
    if seen.pieces > len(wanted) + MAX_EXTRA or seen.unexplained > MAX_UNEXPLAINED:
        return [_blank(row["choices"]) for row in rows]
    candidates: list[Object | None] = [*seen.objects, *[None] * (len(wanted) - len(seen.objects))]
    pixels = PRESETS[preset].pixels
    best: tuple[int, list[str]] = (-1, [])
    for match in itertools.permutations(candidates, len(wanted)):
        right = [_holds(query, wanted, match, seen.pieces, pixels) for query in queries]
        if sum(right) > best[0]:
            spoken = [
                _speak(query, row["choices"], wanted, match, seen.pieces, good)
                for query, row, good in zip(queries, rows, right, strict=True)
            ]
            best = (sum(right), spoken)
    return best[1]


def _there(wanted: Mapping[str, str], match: Object | None) -> bool:
    return match is not None and match.colour == wanted["colour"] and match.shape == wanted["shape"]


def _holds(
    query: Sequence[Any],
    wanted: Sequence[Mapping[str, str]],
    match: Sequence[Object | None],
    pieces: int,
    pixels: Mapping[str, int],
) -> bool:
    """Whether the image is as the query wants it."""
    kind, *places = query
    if kind == "count":
        return pieces == len(wanted)
    asked, found = wanted[places[0]], match[places[0]]
    if found is None:
        return False
    if kind == "object":
        return _there(asked, found)
    if kind == "color":
        return found.colour == asked["colour"]
    if kind == "shape":
        return found.shape == asked["shape"]
    if kind == "size":
        known = found.colour == asked["colour"] or found.shape == asked["shape"]
        return known and found.size == asked["size"]
    other = match[places[1]]
    both = _there(asked, found) and _there(wanted[places[1]], other)
    return both and other is not None and kind in relations(found, other, pixels)


def _speak(
    query: Sequence[Any],
    choices: Sequence[str],
    wanted: Sequence[Mapping[str, str]],
    match: Sequence[Object | None],
    pieces: int,
    right: bool,
) -> str:
    """The answer in words: the value seen, if the choices have it."""
    kind, *places = query
    if "yes" in choices:
        return "yes" if right else "no"
    if kind == "count":
        return str(pieces) if str(pieces) in choices else "none"
    found = match[places[0]]
    if found is None:
        return "none"
    field = {"color": "colour"}.get(kind, kind)
    value: str = getattr(found, field)
    # A size that fits an object of another colour and shape is not that object's size.
    return value if value in choices and (right or value != wanted[places[0]][field]) else "none"


def _blank(choices: Sequence[str]) -> str:
    return "no" if "no" in choices else "none"
