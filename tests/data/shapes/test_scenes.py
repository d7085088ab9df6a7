"""Scenes of shapes: determinism, splits, images, and the source built on them."""

import dataclasses
import itertools
import time

import numpy as np
import pytest

from scaling_dit.data.shapes.scenes import (
    BACKGROUND,
    PALETTE,
    PRESETS,
    UNLIMITED,
    Draws,
    Object,
    Scene,
    ShapesSpec,
    distinct_held_out_scenes,
    fits,
    glyph,
    is_held_out,
    make_scene,
    relations,
    render,
)
from scaling_dit.data.shapes.source import ShapesSource
from scaling_dit.data.sources import create_source, source_fields
from scaling_dit.errors import UserError

ALL = sorted(PRESETS)


def test_the_generator_knows_enough():
    assert len(PALETTE) >= 6
    assert all(len(preset.shapes) >= 4 for preset in PRESETS.values())
    assert all(len(preset.pixels) == 2 for name, preset in PRESETS.items() if name != "grid8")


@pytest.mark.parametrize("preset", ALL)
def test_a_scene_depends_on_seed_split_and_index_only(preset):
    spec = ShapesSpec(preset=preset, max_objects=3)
    scenes = [make_scene(spec, "train", i) for i in range(50)]
    assert [make_scene(spec, "train", i) for i in reversed(range(50))] == scenes[::-1]
    assert [make_scene(dataclasses.replace(spec, seed=1), "train", i) for i in range(50)] != scenes
    assert [make_scene(spec, "held_out", i) for i in range(50)] != scenes
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3}


@pytest.mark.parametrize("preset", ALL)
def test_objects_named_as_one_reads_are_the_same_scenes(preset):
    plain = ShapesSpec(preset=preset, max_objects=3)
    reading = dataclasses.replace(plain, naming="reading")
    turned = 0
    for index in range(60):
        one, other = (make_scene(spec, "train", index) for spec in (plain, reading))
        assert one.canonical() == other.canonical()
        places = [(item.x, item.y) for item in other.objects]
        assert places == sorted(places)
        turned += one != other
    assert turned > 10
    source = ShapesSource(preset=preset, naming="reading", min_objects=2, paraphrases=1)
    texts = [source[index]["captions"][0] for index in range(40)]
    # The first is left of the second, or stands above it.
    assert not any("right of" in text for text in texts)
    assert sum("left of" in text for text in texts) > 10


def test_scenes_are_the_same_on_every_machine():
    """Written down once: a change of the generator changes every published figure."""
    scene = make_scene(ShapesSpec(), "train", 0)
    assert scene == Scene("grid16", (Object("triangle", "yellow", "small", 3, 3),))
    # 13 px turn yellow.
    assert render(scene).sum() == 16 * 16 * 3 * 128 + 13 * (2 * 255 - 3 * 128)
    far = make_scene(ShapesSpec(seed=3, max_objects=3), "held_out", UNLIMITED - 1)
    assert far.canonical() == "grid16:triangle,yellow,large,3,11"


@pytest.mark.parametrize("preset", ALL)
def test_objects_of_a_scene_keep_apart_and_have_unique_names(preset):
    spec = ShapesSpec(preset=preset, min_objects=3, max_objects=3)
    for i in range(200):
        scene = make_scene(spec, "train", i)
        assert len({(o.colour, o.shape) for o in scene.objects}) == 3
        assert all(fits(PRESETS[preset], a, b) for a, b in itertools.combinations(scene.objects, 2))
        assert all(
            relations(a, b, PRESETS[preset].pixels) for a, b in itertools.combinations(scene.objects, 2)
        )
        areas = [glyph(o.shape, PRESETS[preset].pixels[o.size]).sum() for o in scene.objects]
        # Nothing overlaps or is cut off.
        assert (render(scene) != BACKGROUND).any(axis=-1).sum() == sum(areas)


@pytest.mark.parametrize("preset", ALL)
def test_shapes_and_sizes_can_be_told_apart(preset):
    """The best overlap of two different templates under any small shift leaves room for damage."""
    spec = PRESETS[preset]
    side = max(spec.pixels.values()) + 4
    shapes = list(itertools.product(spec.shapes, spec.pixels.values()))

    def place(shape: str, n: int, dx: int, dy: int) -> np.ndarray:
        canvas = np.zeros((side, side), bool)
        top, left = (side - n) // 2 + dy, (side - n) // 2 + dx
        canvas[top : top + n, left : left + n] = glyph(shape, n)
        return canvas

    for (a, n), (b, m) in itertools.combinations(shapes, 2):
        for dx, dy in itertools.product((-1, 0, 1), repeat=2):
            one, other = place(a, n, 0, 0), place(b, m, dx, dy)
            assert (one & other).sum() <= 0.9 * (one | other).sum(), (a, n, b, m)


def test_glyphs_fill_their_box():
    for shape, side in itertools.product(PRESETS["free64"].shapes, (3, 5, 7, 11, 17)):
        mask = glyph(shape, side)
        assert mask[0].any() and mask[-1].any() and mask[:, 0].any() and mask[:, -1].any()
    with pytest.raises(ValueError, match="hexagon"):
        glyph("hexagon", 5)


def test_an_image_shows_exactly_its_scene():
    image = render(Scene("grid16", (Object("cross", "yellow", "small", 11, 3),)))
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    assert (image[3, 9:14] == PALETTE["yellow"]).all() and (image[1:6, 11] == PALETTE["yellow"]).all()
    assert (image != BACKGROUND).any(axis=-1).sum() == 9
    with pytest.raises(ValueError, match="does not fit"):
        render(Scene("grid16", (Object("cross", "yellow", "large", 2, 3),)))


def test_relations_need_a_clear_separation():
    # Small 7 px, large 11 px: more than 6.75 px apart.
    pixels = PRESETS["free32"].pixels

    def seen(dx: int, dy: int) -> tuple[str, ...]:
        here, there = (
            Object("circle", "red", "small", 16, 16),
            Object("cross", "red", "large", 16 + dx, 16 + dy),
        )
        return relations(there, here, pixels)

    assert seen(6, 6) == ()
    assert seen(7, 0) == ("right of",) and seen(-7, 6) == ("left of",)
    assert seen(0, -7) == ("above",) and seen(9, 7) == ("right of", "below")


@pytest.mark.parametrize("preset", ["grid8", "grid16", "free32"])
def test_no_test_scene_ever_occurs_in_training(preset):
    spec = ShapesSpec(preset=preset, shapes=("circle", "square"), colours=("red", "green"))
    train = {make_scene(spec, "train", i).canonical() for i in range(1500)}
    test = {make_scene(dataclasses.replace(spec, seed=7), "held_out", i).canonical() for i in range(300)}
    assert train.isdisjoint(test)


def test_the_held_out_share_is_as_asked():
    every = [make_scene(ShapesSpec(held_out_fraction=0.0), "train", i) for i in range(3000)]
    for fraction in (0.05, 0.2, 0.5):
        share = np.mean([is_held_out(ShapesSpec(held_out_fraction=fraction), scene) for scene in every])
        assert share == pytest.approx(fraction, abs=0.03)


def test_held_out_combinations_are_in_the_held_out_split_only():
    names = ("red square", "blue circle")
    spec = ShapesSpec(held_out_combinations=names, held_out_fraction=0.0)

    def holds(scene: Scene) -> bool:
        return any(f"{o.colour} {o.shape}" in names for o in scene.objects)

    assert not any(holds(make_scene(spec, "train", i)) for i in range(1000))
    assert all(holds(make_scene(spec, "held_out", i)) for i in range(30))


def test_distinct_held_out_scenes():
    spec = ShapesSpec(preset="grid8", colours=("red", "green", "blue", "yellow", "magenta", "cyan"))
    found = distinct_held_out_scenes(spec, 500)
    assert len({make_scene(spec, "held_out", i).canonical() for i in found}) == 500
    assert found[:100] == distinct_held_out_scenes(spec, 100)
    tiny = ShapesSpec(preset="grid8", shapes=("circle",), colours=("red", "blue"))
    with pytest.raises(UserError, match="20 held-out scenes wanted, but .* gave [0-9]"):
        distinct_held_out_scenes(tiny, 20)


def test_the_order_of_objects_makes_no_other_image():
    scene = make_scene(ShapesSpec(preset="free64", min_objects=3, max_objects=3), "train", 5)
    turned = Scene(scene.preset, scene.objects[::-1])
    assert turned.canonical() == scene.canonical() and (render(turned) == render(scene)).all()


def test_draws_are_uniform_and_keyed():
    draws = Draws("a", 1)
    counts = np.bincount([draws.below(7) for _ in range(14_000)], minlength=7)
    # 4.8 standard deviations.
    assert abs(counts - 2000).max() < 200
    assert [Draws("a", 1).below(2**32) for _ in range(2)] == [Draws("a", 1).below(2**32)] * 2
    assert Draws("a", 1).below(2**32) != Draws("a", 2).below(2**32) != Draws("b", 1).below(2**32)
    assert not any(draws.chance(0.0) for _ in range(1000)) and all(draws.chance(1.0) for _ in range(1000))
    assert sorted(draws.distinct((1, 2, 3), 3)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "grid17"}, "did you mean 'grid16'"),
        ({"shapes": ("circle", "hexagon")}, "source.shapes.*'hexagon'.*triangle"),
        ({"preset": "grid8", "shapes": ("diamond",)}, "'grid8' has no 'diamond'"),
        ({"colours": ("mauve",)}, "source.colours"),
        ({"preset": "grid8", "sizes": ("large",)}, "source.sizes"),
        ({"held_out_combinations": ("square red",)}, "held_out_combinations.*'red square'"),
        ({"min_objects": 2, "max_objects": 1}, "max_objects"),
        ({"max_objects": 4}, "max_objects"),
        ({"mention_probability": 1.5}, "mention_probability"),
        ({"naming": "readin"}, "source.naming is 'readin'; did you mean 'reading'"),
        ({"wrong_caption_rate": -0.1}, "wrong_caption_rate"),
        ({"caption_level": 5}, "caption_level"),
        ({"scenes": -1}, "scenes"),
        ({"shapes": ("circle",), "colours": ("red",)}, "fewer combinations"),
        ({"prompt_level": 0}, "prompt_level"),
        ({"paraphrases": 0}, "paraphrases"),
        ({"scenes": 1, "wrong_caption_rate": 0.5}, "no other scene"),
    ],
)
def test_wrong_fields_are_told_in_one_line(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        ShapesSource(**fields)
    assert "\n" not in str(caught.value)


def test_empty_splits_are_told():
    with pytest.raises(UserError, match="held_out_fraction"):
        ShapesSource(held_out_fraction=0.0).held_out()
    spec = ShapesSpec(preset="grid8", shapes=("circle",), colours=("red", "blue"), held_out_fraction=1.0)
    with pytest.raises(UserError, match="found no train scene"):
        make_scene(spec, "train", 0)


def test_the_source_is_a_source():
    source = create_source("shapes", preset="grid32", scenes=40, paraphrases=3)
    assert "split" not in source_fields("shapes") and source_fields("shapes")["preset"] == "grid16"
    assert len(source) == 40 and source.image_size == 32
    record = source[np.int64(7)]
    assert record["image"].shape == (32, 32, 3) and record["image"].dtype == np.uint8
    assert len(record["captions"]) == 3 and all(isinstance(text, str) for text in record["captions"])
    assert record["key"] == source[7]["key"] != source[8]["key"]
    assert (record["image"] == render(source.scene(7))).all()
    # IndexError past the end.
    assert sum(1 for _ in source) == 40
    with pytest.raises(IndexError):
        source[-1]
    test = source.held_out()
    assert len(test) == UNLIMITED and test.held_out() == test and test.split == "held_out"
    assert (
        "grid32" in source.describe() and "40 scenes" in source.describe() and "held_out" in test.describe()
    )
    assert all(
        is_held_out(test, test.scene(i)) and not is_held_out(source, source.scene(i)) for i in range(40)
    )
    assert test.distinct(20) == source.distinct(20)


def test_records_are_fast_enough_to_feed_training():
    source = ShapesSource(max_objects=3)
    # Fill the caches.
    source[0]["captions"][1]

    def seconds() -> float:
        start = time.perf_counter()
        for i in range(200):
            source[i]["captions"][1]
        return time.perf_counter() - start

    # About 50e-6 on one free core.
    assert min(seconds() for _ in range(5)) / 200 < 400e-6


def test_a_combination_that_cannot_occur_cannot_be_held_out():
    with pytest.raises(
        UserError,
        match=r"held_out_combinations: 'red cross' is no colour and shape of this source; did you mean",
    ):
        ShapesSpec(shapes=("circle",), colours=("red", "blue"), held_out_combinations=("red cross",))
