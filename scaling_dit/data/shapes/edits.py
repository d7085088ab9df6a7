"""Edits of scenes by instruction, such as "make the red circle blue": a pure function of (seed, split, index).

| kind | instruction, plainly worded | asks for |
|---|---|---|
| colour | make the red circle blue | an object in another colour |
| resize | make the red circle large | an object in another size |
| move | move the red circle left | on grids one cell, else a third of the canvas |
| add | add a small blue square above the red circle | an object more, placed as the words say |
| remove | remove the red circle | an object less |
| swap | swap the red circle and the blue square | two objects with their places exchanged |

Objects that an edit does not name stay as they are, in every pixel. An edit is of the training split if neither of its
scenes is held out, and of the held-out split if both are, so what a model is asked for there it has never seen, before
or after an edit.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping

from scaling_dit.data.shapes.scenes import (
    MAX_OBJECTS,
    PRESETS,
    STREAMS,
    Draws,
    Object,
    Preset,
    Scene,
    ShapesSpec,
    fits,
    is_held_out,
    propose,
    relations,
)
from scaling_dit.data.shapes.text import RELATIONS, SYNONYMS
from scaling_dit.errors import UserError

# Direction -> columns and rows.
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# Kind -> its wordings, the plain one first. {a}, {b}: "red circle"; {new}: what the edit asks for.
WORDINGS: dict[str, tuple[str, ...]] = {
    "colour": ("make the {a} {new}", "paint the {a} {new}", "change the colour of the {a} to {new}"),
    "resize": ("make the {a} {new}", "change the size of the {a} to {new}"),
    "move": ("move the {a} {new}", "shift the {a} {new}"),
    "add": ("add a {b} {new} the {a}", "put a {b} {new} the {a}"),
    "remove": ("remove the {a}", "delete the {a}", "take the {a} away"),
    "swap": ("swap the {a} and the {b}", "exchange the {a} and the {b}"),
}
KINDS = tuple(WORDINGS)
# Proposals before a spec is called unsatisfiable.
_TRIES = 20_000


@dataclasses.dataclass(frozen=True)
class Edit:
    """One instruction with its scenes.

    Attributes:
      kind: a key of WORDINGS.
      source, target: before and after.
      words: what WORDINGS puts in its braces.
      anchor: of "add", the object beside which the new one stands.
    """

    kind: str
    source: Scene
    target: Scene
    words: Mapping[str, str]
    anchor: Object | None = None

    @property
    def kept(self) -> tuple[Object, ...]:
        """The objects that the edit leaves as they are."""
        return tuple(item for item in self.source.objects if item in self.target.objects)

    @property
    def made(self) -> tuple[Object, ...]:
        """The objects that the target has and the source has not."""
        return tuple(item for item in self.target.objects if item not in self.source.objects)

    @property
    def gone(self) -> tuple[Object, ...]:
        """The objects that the source has and the target has not."""
        return tuple(item for item in self.source.objects if item not in self.target.objects)


def possible(spec: ShapesSpec) -> tuple[str, ...]:
    """The kinds of edits that scenes of a spec allow."""
    preset = PRESETS[spec.preset]
    kinds = ["colour"] if len(spec.colours) != 1 else []
    kinds += ["resize"] if len(spec.sizes or preset.pixels) > 1 else []
    kinds += ["move"]
    kinds += ["add", "remove", "swap"] if spec.max_objects > 1 else []
    return tuple(kind for kind in KINDS if kind in kinds)


def make_edit(spec: ShapesSpec, kinds: tuple[str, ...], split: str, index: int) -> Edit:
    """Edit `index` of a split ("train" or "held_out"); kinds take turns, so every one is equally frequent.

    Raises:
      UserError: no proposal fell into the split.
    """
    kind = kinds[index % len(kinds)]
    draws = Draws("edit", spec.seed, STREAMS[split], kind, int(index))
    for _ in range(_TRIES):
        scene = propose(spec, split, draws)
        if scene is None or is_held_out(spec, scene) != (split == "held_out"):
            continue
        edit = _MAKERS[kind](spec, split, scene, draws)
        if edit is not None and is_held_out(spec, edit.target) == (split == "held_out"):
            return edit
    raise UserError(
        f"source: found no {split} edit of kind {kind!r} with preset {spec.preset!r} and held_out_fraction "
        f"{spec.held_out_fraction}; leave the kind out of source.edits, or allow more objects, colours or sizes"
    )


def instruction(edit: Edit, draws: Draws, plain: bool) -> str:
    """An edit in words: the first wording of its kind, or a random one with random synonyms."""
    wordings = WORDINGS[edit.kind]
    words = dict(edit.words)
    if not plain:
        new = SYNONYMS.get(words.get("new", ""), ())
        if new:
            words["new"] = new[draws.below(len(new))]
        wordings = (wordings[draws.below(len(wordings))],)
    return wordings[0].format(**words)


def _named(item: Object) -> str:
    return f"{item.colour} {item.shape}"


def _changed(scene: Scene, old: Object, **new: str | int) -> Scene:
    """The scene with one object replaced, in its place of the order."""
    made = dataclasses.replace(old, **new)  # type: ignore[arg-type]
    return Scene(scene.preset, tuple(made if item == old else item for item in scene.objects))


def _sound(spec: ShapesSpec, split: str, scene: Scene) -> bool:
    """Whether a scene may be: objects apart and inside, no two alike, none that the split does not allow."""
    preset = PRESETS[scene.preset]
    pairs = [(item.colour, item.shape) for item in scene.objects]
    inside = all(
        preset.pixels[item.size] // 2 <= place < preset.canvas - preset.pixels[item.size] // 2
        for item in scene.objects
        for place in (item.x, item.y)
    )
    return (
        inside
        and len(set(pairs)) == len(pairs)
        and set(pairs) <= set(spec.combinations(split))
        and all(fits(preset, a, b) for a, b in itertools.combinations(scene.objects, 2))
    )


def _one(scene: Scene, draws: Draws) -> Object:
    return scene.objects[draws.below(len(scene.objects))]


def _colour(spec: ShapesSpec, split: str, scene: Scene, draws: Draws) -> Edit | None:
    old = _one(scene, draws)
    pairs = spec.combinations(split)
    taken = [(item.colour, item.shape) for item in scene.objects]
    colours = [colour for colour, shape in pairs if shape == old.shape and (colour, shape) not in taken]
    if not colours:
        return None
    new = colours[draws.below(len(colours))]
    return Edit("colour", scene, _changed(scene, old, colour=new), {"a": _named(old), "new": new})


def _resize(spec: ShapesSpec, split: str, scene: Scene, draws: Draws) -> Edit | None:
    old = _one(scene, draws)
    sizes = [size for size in spec.sizes or PRESETS[scene.preset].pixels if size != old.size]
    new = sizes[draws.below(len(sizes))]
    target = _changed(scene, old, size=new)
    return (
        Edit("resize", scene, target, {"a": _named(old), "new": new}) if _sound(spec, split, target) else None
    )


def _move(spec: ShapesSpec, split: str, scene: Scene, draws: Draws) -> Edit | None:
    old, preset = _one(scene, draws), PRESETS[scene.preset]
    names = tuple(DIRECTIONS)
    new = names[draws.below(len(names))]
    step = preset.cell or preset.canvas // 3
    right, down = DIRECTIONS[new]
    target = _changed(scene, old, x=old.x + right * step, y=old.y + down * step)
    return (
        Edit("move", scene, target, {"a": _named(old), "new": new}) if _sound(spec, split, target) else None
    )


def _add(spec: ShapesSpec, split: str, scene: Scene, draws: Draws) -> Edit | None:
    if len(scene.objects) >= min(spec.max_objects, MAX_OBJECTS):
        return None
    preset = PRESETS[scene.preset]
    anchor, relation = _one(scene, draws), RELATIONS[draws.below(len(RELATIONS))]
    pairs = spec.combinations(split)
    colour, shape = pairs[draws.below(len(pairs))]
    sizes = tuple(spec.sizes or preset.pixels)
    size = sizes[draws.below(len(sizes))]
    x, y = _spot(preset, size, draws)
    new = Object(shape, colour, size, x, y)
    target = Scene(scene.preset, (*scene.objects, new))
    if relation not in relations(new, anchor, preset.pixels) or not _sound(spec, split, target):
        return None
    called = f"{size} {_named(new)}" if len(preset.pixels) > 1 else _named(new)
    return Edit("add", scene, target, {"a": _named(anchor), "b": called, "new": relation}, anchor)


def _remove(spec: ShapesSpec, split: str, scene: Scene, draws: Draws) -> Edit | None:
    if len(scene.objects) < 2:
        return None
    old = _one(scene, draws)
    left = tuple(item for item in scene.objects if item != old)
    return Edit("remove", scene, Scene(scene.preset, left), {"a": _named(old)})


def _swap(spec: ShapesSpec, split: str, scene: Scene, draws: Draws) -> Edit | None:
    if len(scene.objects) < 2:
        return None
    a, b = draws.distinct(scene.objects, 2)
    swapped = {a: dataclasses.replace(a, x=b.x, y=b.y), b: dataclasses.replace(b, x=a.x, y=a.y)}
    target = Scene(scene.preset, tuple(swapped.get(item, item) for item in scene.objects))
    return (
        Edit("swap", scene, target, {"a": _named(a), "b": _named(b)}) if _sound(spec, split, target) else None
    )


def _spot(preset: Preset, size: str, draws: Draws) -> tuple[int, int]:
    """A random place for an object of a size."""
    if preset.cell:
        side, middle = preset.canvas // preset.cell, (preset.cell - 1) // 2
        cell = draws.below(side * side)
        return cell % side * preset.cell + middle, cell // side * preset.cell + middle
    radius = preset.pixels[size] // 2
    free = preset.canvas - 2 * radius
    return radius + draws.below(free), radius + draws.below(free)


_MAKERS: dict[str, Callable[[ShapesSpec, str, Scene, Draws], Edit | None]] = {
    "colour": _colour,
    "resize": _resize,
    "move": _move,
    "add": _add,
    "remove": _remove,
    "swap": _swap,
}
