"""The oracle: right on true images, hard on wrong and cluttered ones."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from scaling_dit.data.shapes import oracle
from scaling_dit.data.shapes.scenes import PALETTE, PRESETS, Object, Scene, fits, relations, render
from scaling_dit.data.shapes.source import ShapesSource
from scaling_dit.data.shapes.text import questions
from scaling_dit.errors import UserError
from scaling_dit.evaluation import tifa

ALL = sorted(PRESETS)
# On a grid and freely placed; what takes longer on larger images is looked at by a slow test.
SMALL = ("free32", "grid16")
SCENES = 40


@functools.cache
def scenes_of(preset: str) -> tuple[list[np.ndarray], list[list[dict[str, Any]]]]:
    """The true images of the first held-out scenes, and the questions on each: read only."""
    source = ShapesSource(preset=preset, max_objects=3).held_out()
    images = [source[i]["image"] for i in source.distinct(SCENES)]
    for image in images:
        image.setflags(write=False)
    return images, [source.questions(i) for i in source.distinct(SCENES)]


def average(preset: str, change: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> float:
    """TIFA of the first held-out scenes of a preset after something was done to their true images."""
    true, rows = scenes_of(preset)
    rng = np.random.default_rng(0)
    images = [change(image, rng) for image in true]
    scored = [
        tifa.caption_row(image, asked, oracle.answer) for image, asked in zip(images, rows, strict=True)
    ]
    return float(tifa.summary(scored, oracle.VQA_MODEL, 0)["tifa_average"])


def noisy(image: np.ndarray, rng: np.random.Generator, sd: float) -> np.ndarray:
    return np.clip(np.rint(image + rng.normal(0, sd, image.shape)), 0, 255).astype(np.uint8)


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    soft = ndimage.gaussian_filter(image.astype(np.float32), (sigma, sigma, 0), mode="nearest")
    return np.rint(soft).astype(np.uint8)


def ringing(image: np.ndarray) -> np.ndarray:
    """Sharpened from a blurred copy: overshoot at every edge, as codecs and guidance make it."""
    soft = ndimage.gaussian_filter(image.astype(np.float32), (1, 1, 0), mode="nearest")
    return np.clip(np.rint(image + 0.4 * (image - soft)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("preset", ALL)
def test_true_images_score_one_also_when_damaged_a_little(preset):
    assert average(preset, lambda image, rng: image) == 1.0
    assert average(preset, lambda image, rng: noisy(image, rng, 10)) == 1.0
    assert average(preset, lambda image, rng: blurred(image, 0.5)) == 1.0
    assert average(preset, lambda image, rng: ringing(image)) == 1.0
    # Faded.
    assert average(preset, lambda image, rng: (0.7 * image + 0.3 * 128).astype(np.uint8)) == 1.0


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=[] if name in SMALL else pytest.mark.slow) for name in ALL]
)
def test_blank_and_noise_images_score_nothing(preset):
    for value in (0, 128, 255):
        assert average(preset, lambda image, rng, value=value: np.full_like(image, value)) < 0.05
    assert average(preset, lambda image, rng: rng.integers(0, 256, image.shape).astype(np.uint8)) < 0.05
    for sd in (20, 35, 50, 90):
        assert average(preset, lambda image, rng, sd=sd: noisy(np.full_like(image, 128), rng, sd)) < 0.05
        assert (
            average(
                preset, lambda image, rng, sd=sd: blurred(noisy(np.full_like(image, 128), rng, 2 * sd), 0.7)
            )
            < 0.05
        )


@pytest.mark.parametrize("preset", ALL)
def test_reads_back_the_scene_graph(preset):
    source = ShapesSource(preset=preset, max_objects=3)
    for i in range(SCENES):
        seen = oracle.read(source[i]["image"], preset)
        assert Scene(preset, seen.objects).canonical() == source.scene(i).canonical()
        assert seen.pieces == len(seen.objects) and seen.unexplained == 0.0


# One edit of a true image. What must fail follows from the two scene graphs alone.


def expected_failures(
    rows: Sequence[dict[str, Any]], wanted: Sequence[Object], edited: Sequence[Object | None], extra: int
) -> set[str]:
    """Questions that are no longer true when object i has become edited[i] (None: removed), with `extra` added."""
    pixels = PRESETS[rows[0]["about"]["preset"]].pixels

    def there(i: int) -> bool:
        now = edited[i]
        return now is not None and (now.colour, now.shape) == (wanted[i].colour, wanted[i].shape)

    def true(kind: str, i: int = 0, j: int = 0) -> bool:
        now, other = edited[i], edited[j]
        if kind == "count":
            return sum(item is not None for item in edited) + extra == len(wanted)
        if now is None:
            return False
        if kind in ("color", "shape", "size"):
            field = "colour" if kind == "color" else kind
            return getattr(now, field) == getattr(wanted[i], field)
        if kind == "object":
            return there(i)
        return there(i) and there(j) and other is not None and kind in relations(now, other, pixels)

    return {row["question"] for row in rows if not true(*row["about"]["query"])}


def failures(image: np.ndarray, rows: Sequence[dict[str, Any]]) -> set[str]:
    answers = oracle.answer(image, rows)
    return {row["question"] for row, given in zip(rows, answers, strict=True) if given != row["answer"]}


@st.composite
def scenes(draw: st.DrawFn) -> tuple[ShapesSource, int]:
    preset = draw(st.sampled_from(ALL))
    # Many near misses.
    few = {"shapes": ("circle", "square", "cross"), "colours": ("red", "blue")}
    source = ShapesSource(preset=preset, max_objects=3, **draw(st.sampled_from([{}, few])))
    return source.held_out(), draw(st.integers(0, 10_000))


def stands(preset: str, item: Object, others: Sequence[Object]) -> bool:
    return all(fits(PRESETS[preset], item, other) for other in others)


def place(draw: st.DrawFn, preset: str, item: Object, others: Sequence[Object]) -> Object:
    """The object at another spot where it keeps its distance."""
    shape = PRESETS[preset]
    if shape.cell:
        spots = range((shape.cell - 1) // 2, shape.canvas, shape.cell)
    else:
        radius = shape.pixels[item.size] // 2
        spots = range(radius, shape.canvas - radius)
    moved = [dataclasses.replace(item, x=x, y=y) for x, y in itertools.product(spots, spots)]
    free = [other for other in moved if stands(preset, other, others)]
    assume(free)
    return draw(st.sampled_from(free))


def check(
    source: ShapesSource, index: int, edited: Sequence[Object | None], added: Sequence[Object] = ()
) -> set[str]:
    scene, rows = source.scene(index), source.questions(index)
    shown = tuple(item for item in edited if item is not None) + tuple(added)
    expected = expected_failures(rows, scene.objects, edited, len(added))
    assert failures(render(Scene(scene.preset, shown)), rows) == expected
    return expected


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_changing_an_attribute_fails_the_questions_about_it(data):
    source, index = data.draw(scenes())
    scene, preset = source.scene(index), PRESETS[source.preset]
    i = data.draw(st.integers(0, len(scene.objects) - 1))
    known = {"colour": PALETTE, "shape": preset.shapes, "size": preset.pixels}
    field = data.draw(st.sampled_from([f for f, values in known.items() if len(values) > 1]))
    old = scene.objects[i]
    new = data.draw(st.sampled_from([value for value in known[field] if value != getattr(old, field)]))
    item = dataclasses.replace(old, **{field: new})
    others = [other for k, other in enumerate(scene.objects) if k != i]
    radius = preset.pixels[item.size] // 2
    assume(radius <= min(item.x, item.y) and max(item.x, item.y) + radius < preset.canvas)
    assume(stands(source.preset, item, others))
    edited = [item if k == i else other for k, other in enumerate(scene.objects)]
    # Something failed.
    assert check(source, index, edited)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_moving_an_object_fails_relations_that_no_longer_hold(data):
    source, index = data.draw(scenes())
    objects = source.scene(index).objects
    i = data.draw(st.integers(0, len(objects) - 1))
    moved = place(data.draw, source.preset, objects[i], [o for k, o in enumerate(objects) if k != i])
    check(source, index, [moved if k == i else other for k, other in enumerate(objects)])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_removing_an_object_fails_all_questions_about_it_and_the_count(data):
    source, index = data.draw(scenes())
    objects = source.scene(index).objects
    i = data.draw(st.integers(0, len(objects) - 1))
    expected = check(source, index, [None if k == i else other for k, other in enumerate(objects)])
    assert "how many shapes are there?" in expected and len(expected) >= 4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_adding_an_object_fails_the_count_alone(data):
    source, index = data.draw(scenes())
    objects, preset = source.scene(index).objects, PRESETS[source.preset]
    colour, shape, size = (
        data.draw(st.sampled_from(list(v))) for v in (PALETTE, preset.shapes, preset.pixels)
    )
    added = place(data.draw, source.preset, Object(shape, colour, size, 0, 0), objects)
    assert check(source, index, objects, [added]) == {"how many shapes are there?"}


def rows_of(*objects: Object) -> list[dict[str, Any]]:
    return questions(Scene("grid32", objects), "", "key", 4)


RED = Object("circle", "red", "small", 3, 3)
BLUE = Object("square", "blue", "large", 19, 3)


def test_two_surplus_objects_are_clutter():
    rows = rows_of(RED, BLUE)
    more = [Object("cross", "green", "large", 3, 19), Object("cross", "cyan", "large", 19, 19)]
    assert len(failures(render(Scene("grid32", (RED, BLUE, more[0]))), rows)) == 1
    assert len(failures(render(Scene("grid32", (RED, BLUE, *more))), rows)) == len(rows)


def test_unexplained_foreground_is_clutter():
    image = render(Scene("grid32", (RED, BLUE)))
    # No shape, and more than there is of the objects.
    image[20:23, 2:30] = (0, 255, 0)
    assert len(failures(image, rows_of(RED, BLUE))) == len(rows_of(RED, BLUE))
    assert oracle.read(image, "grid32").unexplained > oracle.MAX_UNEXPLAINED


def test_specks_are_ignored_and_larger_pieces_counted():
    rows = rows_of(RED, BLUE)
    image = render(Scene("grid32", (RED, BLUE)))
    image[28, 28] = 0
    assert failures(image, rows) == set()
    image[28, 25:29] = 0
    assert failures(image, rows) == {"how many shapes are there?"}


def test_one_seen_object_serves_one_asked_object():
    other = dataclasses.replace(RED, colour="green", x=19, y=19)
    failed = failures(render(Scene("grid32", (RED,))), rows_of(RED, other))
    assert {"is there a green circle?", "what size is the green circle?"} <= failed
    assert "is there a red circle?" not in failed


def test_swapped_colours_are_a_binding_error():
    """All colours and all shapes are there, yet in other pairs: no object is right."""
    swapped = (dataclasses.replace(RED, colour="blue"), dataclasses.replace(BLUE, colour="red"))
    failed = failures(render(Scene("grid32", swapped)), rows_of(RED, BLUE))
    assert failed == {
        "is there a red circle?",
        "is there a blue square?",
        "what color is the circle?",
        "what color is the square?",
        "is the red circle left of the blue square?",
    }


def test_answers_say_what_is_seen():
    rows = rows_of(RED)
    spoken = dict(
        zip(
            [row["element_type"] for row in rows],
            oracle.answer(
                render(Scene("grid32", (dataclasses.replace(RED, colour="green", size="large"),))), rows
            ),
            strict=True,
        )
    )
    assert spoken == {"object": "no", "color": "green", "shape": "circle", "size": "large", "counting": "1"}
    blank = oracle.answer(np.full((32, 32, 3), 128, np.uint8), rows)
    assert blank == ["no", "none", "none", "none", "none"]


def test_a_size_needs_the_right_colour_or_shape():
    other = Object("square", "blue", "small", 3, 3)
    # All but the count.
    assert len(failures(render(Scene("grid32", (other,))), rows_of(RED))) == 4


def test_the_oracle_does_not_look_at_the_answers():
    rows = rows_of(RED, BLUE)
    blind = [{**row, "answer": "?"} for row in rows]
    image = render(Scene("grid32", (RED, BLUE)))
    assert oracle.answer(image, blind) == [row["answer"] for row in rows]


def test_misuse_is_told_in_one_line():
    rows = rows_of(RED)
    with pytest.raises(UserError, match=r"\[32, 32, 3\], got \[16, 16, 3\]"):
        oracle.answer(np.zeros((16, 16, 3), np.uint8), rows)
    plain = [{key: value for key, value in row.items() if key != "about"} for row in rows]
    with pytest.raises(UserError, match="'is there a red circle.' of 'key' has no 'about'"):
        oracle.answer(np.zeros((32, 32, 3), np.uint8), plain)
    assert oracle.answer(np.zeros((32, 32, 3), np.uint8), []) == []
