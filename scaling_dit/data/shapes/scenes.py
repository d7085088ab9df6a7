"""Compositional scenes: coloured, sized, placed shapes and their images, a pure function of (seed, split, index).

Masks are binary and colours exact, so that an image shows without doubt what its scene holds. Colours are the
corners of the RGB cube on mid grey: all are equally far from the background, and any fading keeps the hue.
Objects of one scene differ in (colour, shape), so "the red circle" is always one object.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar, overload

import numpy as np

from scaling_dit.errors import UserError, nearest

BACKGROUND = (128, 128, 128)
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Length of a source without a limit on its scenes.
UNLIMITED = 2**24
MAX_OBJECTS = 3
# Split -> its word in seeds and keys. Another word would make other scenes than those that runs were trained on.
STREAMS = {"train": "train", "held_out": "test"}
NAMINGS = ("random", "reading")
# Proposals before a spec is called unsatisfiable.
_TRIES = 10_000

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Object:
    """One shape; `x`, `y` are the column and row of its centre pixel, `size` a key of the preset's `pixels`."""

    shape: str
    colour: str
    size: str
    x: int
    y: int


@dataclasses.dataclass(frozen=True)
class Scene:
    """The objects of an image, in the order in which plain captions name it."""

    preset: str
    objects: tuple[Object, ...]

    def canonical(self) -> str:
        """A text that is equal for equal images: the objects in sorted order."""
        items = sorted(f"{o.shape},{o.colour},{o.size},{o.x},{o.y}" for o in self.objects)
        return f"{self.preset}:" + ";".join(items)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A canvas: where objects may stand and how large they are, all in pixels."""

    # Height and width.
    canvas: int
    # Side of a grid cell that holds at most one object; 0 = free placement.
    cell: int
    # Free placement: least background between the boxes of two objects.
    gap: int
    # Name of a size -> side of the box that a shape fills, odd.
    pixels: Mapping[str, int]
    # The shapes that differ at these sizes.
    shapes: tuple[str, ...] = SHAPES


@dataclasses.dataclass(frozen=True)
class ShapesSpec:
    """Which scenes there are and how they are split and captioned; every field is a plain config value.

    Raises:
      UserError: a field names something the preset does not have, or leaves no scene to make.
    """

    seed: int = 0
    preset: str = "grid16"
    # () = all that differ at the sizes of the preset; the same for the next two.
    shapes: tuple[str, ...] = ()
    colours: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    min_objects: int = 1
    max_objects: int = 2
    # Distinct training indices, 0 = unlimited (2**24).
    scenes: int = 0
    # 0 "a shape", 1 shapes, 2 + colours, 3 + sizes, 4 + relations.
    caption_level: int = 4
    # Order in which plain captions name objects: random, or reading (left to right, in a column top to bottom).
    naming: str = "random"
    # Of each fact of that level, independently.
    mention_probability: float = 1.0
    # Share of training records captioned as another scene.
    wrong_caption_rate: float = 0.0
    # Such as "red square": never in training.
    held_out_combinations: tuple[str, ...] = ()
    # Share of all scenes that is never in training.
    held_out_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(f"source.preset: unknown preset {self.preset!r}; {nearest(self.preset, PRESETS)}")
        preset = PRESETS[self.preset]
        known = {"shapes": preset.shapes, "colours": tuple(PALETTE), "sizes": tuple(preset.pixels)}
        for field, names in known.items():
            for name in getattr(self, field):
                if name not in names:
                    hint = f"known: {', '.join(names)}"
                    raise UserError(f"source.{field}: preset {self.preset!r} has no {name!r}; {hint}")
        everything = {
            f"{colour} {shape}"
            for colour in self.colours or PALETTE
            for shape in self.shapes or preset.shapes
        }
        for name in self.held_out_combinations:
            if name not in everything:
                hint = nearest(name, everything)
                raise UserError(
                    f"source.held_out_combinations: {name!r} is no colour and shape of this source; {hint}"
                )
        if not 1 <= self.min_objects <= self.max_objects <= MAX_OBJECTS:
            given = f"{self.min_objects} and {self.max_objects}"
            raise UserError(
                f"source.min_objects and max_objects: 1 <= min <= max <= {MAX_OBJECTS}, got {given}"
            )
        for field in ("mention_probability", "wrong_caption_rate", "held_out_fraction"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise UserError(f"source.{field}: must lie in [0, 1], got {getattr(self, field)}")
        if self.naming not in NAMINGS:
            raise UserError(f"source.naming is {self.naming!r}; {nearest(self.naming, NAMINGS)}")
        if not 0 <= self.caption_level <= 4:
            raise UserError(f"source.caption_level: must be 0 to 4, got {self.caption_level}")
        if self.scenes < 0:
            raise UserError(f"source.scenes: must be positive, or 0 for no limit, got {self.scenes}")
        if len(self.combinations("train")) < self.max_objects:
            raise UserError(
                "source: fewer combinations of colour and shape are left for training than max_objects; "
                "allow more shapes or colours, or hold out fewer combinations"
            )

    def combinations(self, split: str) -> tuple[tuple[str, str], ...]:
        """The (colour, shape) pairs that may occur in a split."""
        return self._combinations[split]

    @functools.cached_property
    def _combinations(self) -> dict[str, tuple[tuple[str, str], ...]]:
        shapes = self.shapes or PRESETS[self.preset].shapes
        every = tuple(itertools.product(self.colours or tuple(PALETTE), shapes))
        kept = tuple(pair for pair in every if " ".join(pair) not in self.held_out_combinations)
        return {"train": kept, "held_out": every}


class Draws:
    """A stream of bounded integers, keyed by what it is for.

    The bits are BLAKE2b digests of the key, so a stream is the same on every machine and with every numpy
    version (NEP 19 promises neither for `Generator` methods), at a twentieth of the cost of seeding one.
    """

    def __init__(self, *key: int | str) -> None:
        self._key = repr(key)
        self._block = 0
        self._pool = 0
        # The pool is uniform in [0, bound).
        self._bound = 1

    def below(self, n: int) -> int:
        """A uniform integer in [0, n), for n up to 2**32 (bias under 2**-32)."""
        if self._bound < 2**64:
            digest = hashlib.blake2b(f"{self._key}/{self._block}".encode()).digest()
            self._pool, self._bound = int.from_bytes(digest, "little"), 2**512
            self._block += 1
        self._pool, value = divmod(self._pool, n)
        self._bound //= n
        return value

    def chance(self, probability: float) -> bool:
        """True with the given probability; 0 and 1 are exact."""
        return self.below(2**32) < probability * 2**32

    def distinct(self, items: tuple[_T, ...], count: int) -> list[_T]:
        """`count` different items in random order."""
        chosen: list[int] = []
        while len(chosen) < count:
            index = self.below(len(items))
            if index not in chosen:
                chosen.append(index)
        return [items[index] for index in chosen]


def relations(a: Object, b: Object, pixels: Mapping[str, int]) -> tuple[str, ...]:
    """Where `a` stands as seen from `b`: a subset of "left of", "right of", "above", "below".

    Clear separation, as in GenEval's position rule: along an axis the centres must be farther apart than three
    quarters of the mean side of the two boxes. On grids this is "another column" and "another row".
    """
    margin = 0.375 * (pixels[a.size] + pixels[b.size])
    held = []
    if abs(b.x - a.x) > margin:
        held.append("left of" if a.x < b.x else "right of")
    if abs(b.y - a.y) > margin:
        held.append("above" if a.y < b.y else "below")
    return tuple(held)


@functools.cache
def glyph(shape: str, side: int) -> np.ndarray:
    """Binary mask [side, side] of a shape that touches all four sides of its box; `side` is odd."""
    radius = side // 2
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    if shape == "square":
        return np.ones((side, side), bool)
    if shape == "circle":
        # A disc of 3 px would be the cross: the smallest circle is a ring.
        return abs(x) + abs(y) > 0 if side == 3 else x**2 + y**2 <= (radius + 0.25) ** 2
    if shape == "triangle":
        return abs(x) <= (y + radius) * radius // (side - 1)
    if shape == "cross":
        # Half the width of an arm: 1 px wide up to 8 px, then 3 px, ...
        arm = (side // 3 - 1) // 2
        return np.asarray((abs(x) <= arm) | (abs(y) <= arm))
    if shape == "diamond":
        return abs(x) + abs(y) <= radius
    raise ValueError(f"unknown shape {shape!r}")


@functools.cache
def _stamp(shape: str, side: int, colour: str) -> tuple[np.ndarray, np.ndarray]:
    mask = np.repeat(glyph(shape, side)[..., None], 3, axis=-1)
    return mask, np.full((side, side, 3), PALETTE[colour], np.uint8)


@functools.cache
def _background(canvas: int) -> np.ndarray:
    return np.full((canvas, canvas, 3), BACKGROUND, np.uint8)


def render(scene: Scene) -> np.ndarray:
    """The image of a scene, uint8 [canvas, canvas, 3]; raises ValueError if an object leaves the canvas."""
    preset = PRESETS[scene.preset]
    image = _background(preset.canvas).copy()
    for item in scene.objects:
        side = preset.pixels[item.size]
        mask, paint = _stamp(item.shape, side, item.colour)
        top, left = item.y - side // 2, item.x - side // 2
        if min(top, left) < 0 or max(top, left) + side > preset.canvas:
            raise ValueError(f"{item} does not fit into {preset.canvas}x{preset.canvas} px")
        np.copyto(image[top : top + side, left : left + side], paint, where=mask)
    return image


class ObjectMasks(Sequence[np.ndarray]):
    """Which pixels each object of a scene covers: bool [canvas, canvas] each, made when it is asked for."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene

    def __len__(self) -> int:
        return len(self._scene.objects)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        item, preset = self._scene.objects[index], PRESETS[self._scene.preset]
        side = preset.pixels[item.size]
        top, left = item.y - side // 2, item.x - side // 2
        mask = np.zeros((preset.canvas, preset.canvas), bool)
        mask[top : top + side, left : left + side] = glyph(item.shape, side)
        return mask


def fits(preset: Preset, a: Object, b: Object) -> bool:
    """Whether two objects keep their distance: other grid cells, or boxes `gap` px apart."""
    if preset.cell:
        return (a.x // preset.cell, a.y // preset.cell) != (b.x // preset.cell, b.y // preset.cell)
    apart = (preset.pixels[a.size] + preset.pixels[b.size]) // 2 + preset.gap
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= apart


def propose(spec: ShapesSpec, split: str, draws: Draws) -> Scene | None:
    """A random scene, of whichever split, or None where free placement found no room for all its objects."""
    preset = PRESETS[spec.preset]
    count = spec.min_objects + draws.below(spec.max_objects - spec.min_objects + 1)
    pairs = draws.distinct(spec.combinations(split), count)
    sizes = spec.sizes or tuple(preset.pixels)
    names = [sizes[draws.below(len(sizes))] for _ in pairs]
    if preset.cell:
        side = preset.canvas // preset.cell
        cells = draws.distinct(tuple(range(side * side)), count)
        middle = (preset.cell - 1) // 2
        spots = [(c % side * preset.cell + middle, c // side * preset.cell + middle) for c in cells]
    else:
        radii = [preset.pixels[name] // 2 for name in names]
        spots = [
            (r + draws.below(preset.canvas - 2 * r), r + draws.below(preset.canvas - 2 * r)) for r in radii
        ]
    objects = tuple(
        Object(shape, colour, size, x, y)
        for (colour, shape), size, (x, y) in zip(pairs, names, spots, strict=True)
    )
    if not all(fits(preset, a, b) for a, b in itertools.combinations(objects, 2)):
        return None
    if spec.naming == "reading":
        objects = tuple(sorted(objects, key=lambda item: (item.x, item.y)))
    return Scene(spec.preset, objects)


def is_held_out(spec: ShapesSpec, scene: Scene) -> bool:
    """Whether a scene belongs to the held-out split.

    By a hash of the image, not of the index: a scene of the held-out split never occurs in training, however few
    scenes a preset has.
    """
    if any(f"{item.colour} {item.shape}" in spec.held_out_combinations for item in scene.objects):
        return True
    digest = hashlib.blake2b(scene.canonical().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < spec.held_out_fraction * 2**64


def make_scene(spec: ShapesSpec, split: str, index: int) -> Scene:
    """Scene `index` of a split ("train" or "held_out"): the first proposal of its stream that belongs there.

    Raises:
      UserError: the split is empty, or so small that no proposal fell into it.
    """
    draws = Draws("scene", spec.seed, STREAMS[split], int(index))
    for _ in range(_TRIES):
        scene = propose(spec, split, draws)
        if scene is not None and is_held_out(spec, scene) == (split == "held_out"):
            return scene
    raise UserError(
        f"source: found no {split} scene with preset {spec.preset!r}, held_out_fraction {spec.held_out_fraction} "
        f"and {len(spec.held_out_combinations)} held-out combinations; hold out a fraction between 0 and 1"
    )


def distinct_held_out_scenes(spec: ShapesSpec, count: int) -> list[int]:
    """The first `count` indices of the held-out split whose images all differ.

    Raises:
      UserError: the held-out split has too few scenes.
    """
    return distinct_held_out(
        spec,
        count,
        "scenes",
        lambda index: make_scene(spec, "held_out", index).canonical(),
        20 * count + 2000,
    )


def distinct_held_out(
    spec: ShapesSpec, count: int, what: str, content: Callable[[int], Hashable], tries: int
) -> list[int]:
    """The first `count` of `tries` indices of the held-out split with different content.

    Args:
      what: the records hold, for the error line.
      content: index -> what is compared.

    Raises:
      UserError: there are fewer.
    """
    seen: set[Hashable] = set()
    found: list[int] = []
    for index in range(tries):
        if len(found) == count:
            return found
        one = content(index)
        if one not in seen:
            seen.add(one)
            found.append(index)
    raise UserError(
        f"{count} held-out {what} wanted, but preset {spec.preset!r} with held_out_fraction "
        f"{spec.held_out_fraction} gave {len(found)}; ask for fewer, or raise source.held_out_fraction"
    )


# grid8 has one size (two would not differ in 4-px cells) and no diamond (at 3 px it is the cross).
PRESETS: dict[str, Preset] = {
    "grid8": Preset(canvas=8, cell=4, gap=1, pixels={"small": 3}, shapes=SHAPES[:4]),
    "grid16": Preset(canvas=16, cell=8, gap=1, pixels={"small": 5, "large": 7}),
    # The same scenes at two resolutions, for runs that continue at the higher one.
    "grid24": Preset(canvas=24, cell=12, gap=1, pixels={"small": 7, "large": 11}),
    "grid48": Preset(canvas=48, cell=24, gap=1, pixels={"small": 15, "large": 21}),
    "grid32": Preset(canvas=32, cell=8, gap=1, pixels={"small": 5, "large": 7}),
    "free32": Preset(canvas=32, cell=0, gap=2, pixels={"small": 7, "large": 11}),
    "free64": Preset(canvas=64, cell=0, gap=3, pixels={"small": 11, "large": 17}),
}
