"""Layouts of official tools, read back by the rules of their published readers."""

import json
import os
import re

import numpy as np
import pytest
from etils import epath
from PIL import Image

from scaling_dit.errors import UserError
from scaling_dit.evaluation.layouts import LAYOUTS, write_layout
from scaling_dit.evaluation.metric import Item
from tests.support.prompt_files import GENEVAL

SIDE = 8
IMAGES = np.random.default_rng(0).integers(0, 256, (12, SIDE, SIDE, 3), np.uint8)


def write(name, items, folder, num=1):
    pairs = ((item, IMAGES[i * num : (i + 1) * num]) for i, item in enumerate(items))
    write_layout(name, pairs, epath.Path(folder))


def pixels(path):
    return np.asarray(Image.open(path))


def test_tifa_resolves_each_id_from_the_folder_of_the_map(tmp_path):
    items = [Item("coco_301091", "x"), Item("drawbench_52", "y")]
    write("tifa", items, tmp_path)
    path = str(tmp_path / "images.json")
    with open(path) as file:
        paths = json.load(file)
    for i, item in enumerate(items):
        name = paths[str(item.id)]
        if not os.path.isabs(name):
            name = os.path.join(os.path.dirname(path), name)
        np.testing.assert_array_equal(pixels(name), IMAGES[i])


def test_hpsv2_reads_five_digits_and_jpg_by_style(tmp_path):
    items = [Item(f"{style}-{i:05d}", "x", meta={"style": style, "number": i})
             for style in ("anime", "photo") for i in range(2)]  # fmt: skip
    write("hpsv2", items, tmp_path)
    for i, (style, index) in enumerate((style, index) for style in ("anime", "photo") for index in range(2)):
        found = Image.open(os.path.join(tmp_path, style, f"{index:05d}.jpg"))
        assert found.format == "JPEG" and found.size == (SIDE, SIDE)
        assert abs(np.asarray(found).mean() - IMAGES[i].mean()) < 10


def test_image_reward_numbers_the_images_of_a_prompt(tmp_path):
    write("image_reward", [Item("001", "x"), Item("002", "y")], tmp_path, num=3)
    for i, key in enumerate(("001", "002")):
        for k in range(3):
            path = os.path.join(tmp_path, "scaling_dit", f"{key}_{k}.png")
            np.testing.assert_array_equal(pixels(path), IMAGES[3 * i + k])


def test_geneval_walks_folders_of_digits(tmp_path):
    write("geneval", [Item("00000", "x", meta=GENEVAL), Item("00001", "y", meta=GENEVAL)], tmp_path, num=4)
    found = {}
    for subfolder in sorted(os.listdir(tmp_path)):
        folder = os.path.join(tmp_path, subfolder)
        assert os.path.isdir(folder) and subfolder.isdigit()
        with open(os.path.join(folder, "metadata.jsonl")) as file:
            # Read as one object, though it is called .jsonl.
            assert json.load(file) == GENEVAL
        names = sorted(os.listdir(os.path.join(folder, "samples")))
        assert all(re.match(r"\d+\.png", name) for name in names)
        found[subfolder] = [pixels(os.path.join(folder, "samples", name)) for name in names]
    np.testing.assert_array_equal(found["00001"], IMAGES[4:8])


def test_dpg_crops_four_images_of_a_grid(tmp_path):
    write("dpg", [Item("partiprompts7", "x")], tmp_path, num=4)
    (name,) = os.listdir(tmp_path)
    assert name.split(".")[0] == "partiprompts7"
    grid = Image.open(tmp_path / name)
    crops = [(0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE)]
    for (left, top), image in zip(crops, IMAGES, strict=False):
        np.testing.assert_array_equal(np.asarray(grid.crop((left, top, left + SIDE, top + SIDE))), image)
    write("dpg", [Item("one", "x")], tmp_path)
    np.testing.assert_array_equal(pixels(tmp_path / "one.png"), IMAGES[0])


def test_compbench_takes_prompt_and_order_from_the_name(tmp_path):
    prompts = ["a green bench and a red car", "a cube, left of 2 cats"]
    write("compbench", [Item(str(i), prompt) for i, prompt in enumerate(prompts)], tmp_path, num=2)
    folder = tmp_path / "samples"
    names = sorted(os.listdir(folder), key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [name.split("_")[0] for name in names] == [prompts[0]] * 2 + [prompts[1]] * 2
    for name, image in zip(names, IMAGES, strict=False):
        np.testing.assert_array_equal(pixels(folder / name), image)


@pytest.mark.parametrize(
    "name, item, num, message",
    [
        ("tifa", Item("a", "x"), 2, "2 images of a prompt; it takes 1: leave out --num"),
        ("hpsv2", Item("a", "x"), 1, "prompt 'a' has no style, number; sample --prompt_set=hpsv2:PATH"),
        ("geneval", Item("a", "x"), 1, "has no tag, include, prompt; sample --prompt_set=geneval:PATH"),
        ("dpg", Item("a", "x"), 3, "3 images of a prompt; give --num=4, or 1"),
        ("dpg", Item("a.b", "x"), 1, "'a.b' has a dot"),
        ("compbench", Item("a", "x_y"), 1, "the prompt 'x_y' cannot be part of a file's name"),
        ("compbnch", Item("a", "x"), 1, "did you mean 'compbench'?"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(tmp_path, name, item, num, message):
    with pytest.raises(UserError) as error:
        write(name, [item], tmp_path, num)
    assert message in str(error.value)


def test_every_layout_is_tested_here_or_with_the_sets_of_inpainting():
    here = {"tifa", "hpsv2", "image_reward", "geneval", "dpg", "compbench"}
    assert set(LAYOUTS) == here | {"brushbench", "editbench"}
