"""Images that exist already: those that cannot be scored are left out in one line each, and the rest is scored."""

import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from scaling_dit.cli import main as cli
from scaling_dit.errors import UserError
from scaling_dit.evaluation.given import GivenImages, image_size
from scaling_dit.evaluation.metric import Item
from scaling_dit.evaluation.run import INCOMPLETE
from scaling_dit.sampling.shards import write_shard
from tests.support.judges import Table, named
from tests.support.prompt_files import write_tifa

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)


def save(folder, count=6):
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(IMAGES[:count]):
        Image.fromarray(image).save(folder / f"coco_{i}.png")


@pytest.fixture
def damaged(tmp_path):
    """A folder of six images: one is missing, one cut, one no image, one of another size."""
    folder = tmp_path / "images"
    save(folder)
    (folder / "coco_0.png").unlink()
    data = (folder / "coco_1.png").read_bytes()
    (folder / "coco_1.png").write_bytes(data[:-30])
    (folder / "coco_2.png").write_bytes(b"not an image")
    Image.new("RGB", (4, 8)).save(folder / "coco_3.png")
    return folder


def test_each_fault_is_one_line_and_the_rest_is_scored(damaged, tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "tifa"
    prompts.mkdir()
    _, questions = write_tifa(prompts, captions=6)
    named(monkeypatch).append(Table({row["question"]: row["answer"] for row in questions}))
    arguments = ["--metrics=tifa,vqa_score", f"--prompt_set=tifa:{prompts}", "--judge=table_judges:first"]
    arguments += ["--config.metrics.vqa_score.judge=openai:http://x", f"--images={damaged}"]
    # An own judge without probabilities for these questions is a mistake of its own, so vqa_score has another one.
    code = cli.main(["evaluate", *arguments, "--config.metrics.vqa_score.judge=transformers:nowhere"])
    said = capsys.readouterr()
    assert code == INCOMPLETE
    assert "vqa_score: skipped: no model in 'nowhere'" in said.err
    assert "images left out: 4" in said.out
    result = json.loads((damaged / "evaluation" / next_folder(damaged) / "result.json").read_text())
    assert result["n"] == 2 and result["tifa_average"] == 1
    assert result["left_out"]["coco_0"] == "there is no such file"
    assert "cannot be decoded" in result["left_out"]["coco_1"] and "decoded" in result["left_out"]["coco_2"]
    assert result["left_out"]["coco_3"] == "it is 4x8 px, most others 8x8"
    rows = [json.loads(line) for line in (damaged / "evaluation/results.jsonl").read_text().splitlines()]
    assert {row["metric"]: row["status"] for row in rows} == {"tifa": "done", "vqa_score": "skipped"}
    assert rows[-1]["prompt_files"]["tifa_v1.0_text_inputs.json"] and rows[-1]["prompts_published"] == 4081


def next_folder(folder):
    (found,) = (path.name for path in (folder / "evaluation").iterdir() if path.name.startswith("tifa-"))
    return found


def test_shards_of_sample_are_read_by_their_manifest(tmp_path):
    rows = [
        {"id": f"a{i}", "prompt": "x", "number": i, "path": f"images-00000.tar/a{i}.png"} for i in range(6)
    ]
    write_shard(epath.Path(tmp_path / "images-00000.tar"), rows, IMAGES)
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = GivenImages(str(tmp_path), [Item(f"a{i}", "x") for i in (4, 2, 9)])
    assert found.sound == [0, 1] and found.faults == {"a9": "there is no such file"}
    np.testing.assert_array_equal(np.concatenate(list(found.read(range(2)))), IMAGES[[4, 2]])


def test_a_folder_without_one_sound_image_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        GivenImages(str(tmp_path / "none"), [Item("a", "x")])
    with pytest.raises(UserError, match="not one image can be scored; a: there is no such file"):
        GivenImages(str(tmp_path), [Item("a", "x")])


def test_flags_that_do_not_fit_are_refused(tmp_path, capsys):
    for arguments, message in (
        ([], "evaluate needs --workdir"),
        (["runs/a", "--workdir=x"], "evaluate takes 'runs/a' with --compare only"),
        ([f"--images={tmp_path}"], "images without a run need --metrics="),
        (
            [f"--images={tmp_path}", "--metrics=digits", "--judge=shapes"],
            "none of the metrics digits has a field",
        ),
        (
            [f"--images={tmp_path}", "--metrics=tifa", "--config.steps=3"],
            "evaluate takes fields of metrics only",
        ),
        ([f"--images={tmp_path}", "--metrics=tifa", "--watch=5"], "leave out --step and --images"),
        ([f"--images={tmp_path}", "--metrics=tifa", "--prompt_set=tifaa:x"], "no prompt set 'tifaa'"),
    ):
        assert cli.main(["evaluate", *arguments]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and message in lines[0], lines


def test_a_variable_in_the_folder_is_expanded(tmp_path, monkeypatch):
    save(tmp_path / "images")
    monkeypatch.setenv("ROOT_OF_IMAGES", str(tmp_path))
    assert image_size("$ROOT_OF_IMAGES/images") == 8
    items = [Item(f"coco_{i}", "x") for i in range(6)]
    assert len(GivenImages("${ROOT_OF_IMAGES}/images", items).sound) == 6
    monkeypatch.delenv("ROOT_OF_IMAGES")
    for read in (image_size, lambda folder: GivenImages(folder, items)):
        with pytest.raises(UserError, match="variable ROOT_OF_IMAGES is not set"):
            read("$ROOT_OF_IMAGES/images")
