"""BrushBench as a prompt set, and the layouts of inpainting, read back by the rules that they are written for."""

import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from scaling_dit.errors import UserError
from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.layouts import write_layout
from scaling_dit.evaluation.metric import Item
from scaling_dit.evaluation.prompt_sets import inpainting, open_prompt_set
from scaling_dit.evaluation.scoring import Scoring, score

SIDE = 16
# Of the images in BrushBench; its tool reads masks of no other size.
PUBLISHED = 512


def rle2mask(runs, shape):
    """The run lengths of BrushNet's evaluation, read as its authors' tools read them (starts from 1)."""
    starts, lengths = (np.asarray(x, dtype=int) for x in (runs[0:][::2], runs[1:][::2]))
    starts -= 1
    mask = np.zeros(shape[0] * shape[1], np.uint8)
    for low, high in zip(starts, starts + lengths, strict=True):
        mask[low:high] = 1
    return mask.reshape(shape)


def written(place, side, ending="png"):
    """A folder with three images and their masks, as BrushBench has them."""
    (place / "images").mkdir(parents=True)
    entries = {}
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
        name = f"images/{number}.{ending}"
        Image.fromarray(pixels).save(place / name)
        mask = np.zeros((side, side), bool)
        mask[2 : 6 + number, 4:9] = True
        entries[f"00{number}"] = dict(inpainting.entry(name, f"a thing {number}", mask))
    (place / "mapping_file.json").write_text(json.dumps(entries))
    return place


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path, SIDE)


def test_run_lengths_are_read_as_they_are_written():
    for seed in range(5):
        mask = np.random.default_rng(seed).random((9, 7)) > 0.6
        runs = inpainting.to_runs(mask)
        np.testing.assert_array_equal(rle2mask(runs, mask.shape), mask)
        np.testing.assert_array_equal(inpainting.from_runs(runs, *mask.shape), mask)
    assert (
        inpainting.to_runs(np.ones((2, 3), bool)) == [1, 6]
        and inpainting.to_runs(np.zeros((2, 3), bool)) == []
    )
    with pytest.raises(ValueError, match="leaves 3x2 pixels"):
        inpainting.from_runs([5, 3], 2, 3)


def test_items_have_image_caption_and_mask(folder):
    found = open_prompt_set(f"brushbench:{folder}")
    assert [item.id for item in found.items] == ["000", "001", "002"] and not found.complete
    item = found.items[1]
    pixels = np.asarray(Image.open(folder / "images/1.png"))
    np.testing.assert_array_equal(item.truth, pixels)
    mask = item.conditions["inpaint"][..., 3] == 255
    assert mask[2:7, 4:9].all() and mask.sum() == 25 and item.prompt == "a thing 1"
    outside = open_prompt_set(f"brushbench_outside:{folder}").items[1]
    np.testing.assert_array_equal(outside.conditions["inpaint"][..., 3] == 0, mask)


def test_the_metric_scores_them_at_the_size_of_the_images(folder):
    metric, items = METRICS["inpaint"](), open_prompt_set(f"brushbench:{folder}").items
    metric.check_items(items, "prompt set brushbench")
    small = np.stack(
        [np.asarray(Image.fromarray(item.truth).resize((8, 8), Image.Resampling.BICUBIC)) for item in items]
    )
    result, _ = score(Scoring("inpaint", metric, items), [small], 0)
    assert result["scalars"]["inpaint_psnr"] == 100.0


def test_what_is_wrong_with_a_set_is_one_line(folder):
    path = folder / "mapping_file.json"
    entries = json.loads(path.read_text())
    for change, message in (
        ({"inpainting_mask": [1]}, "no list of starts and lengths"),
        ({"caption": 3}, "caption"),
        ({"image": "images/none.png"}, "no file 'none.png'"),
        ({"inpainting_mask": [250, 90]}, "leaves 16x16 pixels"),
    ):
        path.write_text(json.dumps({**entries, "001": {**entries["001"], **change}}))
        with pytest.raises(UserError, match=message):
            _ = open_prompt_set(f"brushbench:{folder}").items[1].truth
    path.write_text("[]")
    with pytest.raises(UserError, match="no object with an entry for each image"):
        open_prompt_set(f"brushbench:{folder}")


def test_the_layout_of_brushbench_holds_images_masks_and_results(tmp_path):
    items = open_prompt_set(f"brushbench:{written(tmp_path / 'set', PUBLISHED)}").items
    made = np.random.default_rng(9).integers(0, 256, (3, 1, SIDE, SIDE, 3), np.uint8)
    out = epath.Path(tmp_path / "out")
    write_layout("brushbench", iter(zip(items, made, strict=True)), out)
    entries = json.loads((out / "mapping_file.json").read_text())
    for item, images in zip(items, made, strict=True):
        entry = entries[item.id]
        source = np.asarray(Image.open(out / entry["image"]))
        np.testing.assert_array_equal(source, item.truth)
        np.testing.assert_array_equal(np.asarray(Image.open(out / "inpainted" / entry["image"])), images[0])
        mask = rle2mask(entry["inpainting_mask"], (PUBLISHED, PUBLISHED))
        np.testing.assert_array_equal(mask * 255, item.conditions["inpaint"][..., 3])
        np.testing.assert_array_equal(mask, 1 - rle2mask(entry["outpainting_mask"], (PUBLISHED, PUBLISHED)))
    # What was written can be read as a set again.
    assert [item.prompt for item in open_prompt_set(f"brushbench:{out}").items] == [
        item.prompt for item in items
    ]


def test_the_official_tool_scores_the_results_and_makes_none_of_its_own(tmp_path):
    """evaluate_brushnet.py samples again wherever the result or its masked image is missing."""
    items = open_prompt_set(f"brushbench:{written(tmp_path / 'set', PUBLISHED, 'jpg')}").items
    out = epath.Path(tmp_path / "out")
    write_layout("brushbench", ((item, item.truth[None]) for item in items), out)
    for item, entry in zip(items, json.loads((out / "mapping_file.json").read_text()).values(), strict=True):
        result = str(out / "inpainted" / entry["image"])
        left = np.asarray(Image.open(result.replace(".jpg", "_masked.jpg"))).astype(int)
        hidden = rle2mask(entry["inpainting_mask"], (PUBLISHED, PUBLISHED)).astype(bool)
        # JPEG spreads the edge of a mask over its block of 8 pixels.
        assert np.abs(left[64:] - np.asarray(Image.open(result)).astype(int)[64:]).max() <= 30
        assert np.abs(left[3:5, 5:8]).mean() < 60 < item.truth[hidden].mean()


def test_the_layout_of_brushbench_refuses_images_whose_masks_the_official_tool_would_misread(
    folder, tmp_path
):
    items = open_prompt_set(f"brushbench:{folder}").items
    with pytest.raises(
        UserError, match="prompt '000' has 16x16 pixels; the official tool reads every mask as 512x512"
    ):
        write_layout("brushbench", ((item, item.truth[None]) for item in items), epath.Path(tmp_path / "out"))


def test_the_layout_of_brushbench_has_the_mask_of_the_object_first_whichever_was_sampled_with(tmp_path):
    source = written(tmp_path / "set", PUBLISHED)
    items = open_prompt_set(f"brushbench_outside:{source}").items
    out = epath.Path(tmp_path / "out")
    write_layout("brushbench", ((item, item.truth[None]) for item in items), out)
    given = json.loads((source / "mapping_file.json").read_text())
    for key, entry in json.loads((out / "mapping_file.json").read_text()).items():
        assert {name: entry[name] for name in inpainting.MASKS} == {
            n: given[key][n] for n in inpainting.MASKS
        }


def test_the_layout_of_editbench_names_the_sizes_of_masks(folder, tmp_path):
    items = open_prompt_set(f"brushbench:{folder}").items
    made = np.zeros((3, 2, SIDE, SIDE, 3), np.uint8)
    out = epath.Path(tmp_path / "out")
    write_layout("editbench", iter(zip(items, made, strict=True)), out)
    rows = [json.loads(line) for line in (out / "editbench.jsonl").read_text().splitlines()]
    assert [row["mask_share"] for row in rows] == [20 / 256, 25 / 256, 30 / 256]
    assert {row["mask_size"] for row in rows} == {"small"}
    mask = np.asarray(Image.open(out / "masks/001.png"))
    np.testing.assert_array_equal(mask[..., 0], items[1].conditions["inpaint"][..., 3])
    assert (out / "inpainted/002_1.png").exists() and (out / "references/000.png").exists()


@pytest.mark.parametrize("layout", ["brushbench", "editbench"])
def test_prompts_without_masks_have_no_such_layout(layout, tmp_path):
    pairs = iter([(Item("a", "b"), np.zeros((1, SIDE, SIDE, 3), np.uint8))])
    with pytest.raises(
        UserError, match="prompt 'a' has no image and mask; sample --prompt_set=brushbench:FOLDER"
    ):
        write_layout(layout, pairs, epath.Path(tmp_path))
