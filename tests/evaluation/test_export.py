"""`sample` of a published prompt set, and the same images as an official tool reads them."""

import json

import numpy as np
import pytest
from PIL import Image

from scaling_dit.errors import UserError
from scaling_dit.evaluation.export import sample_prompts
from tests.support.prompt_files import GENEVAL

pytestmark = pytest.mark.usefixtures("on_one_device")


@pytest.fixture
def geneval(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(
        "".join(json.dumps(GENEVAL | {"prompt": prompt}) + "\n" for prompt in ("a bench", "a cow"))
    )
    return f"geneval:{path}"


def test_a_set_is_sampled_into_shards_and_a_layout(smoke_run, tmp_path, geneval, capsys):
    out = tmp_path / "out"
    settings = {"num": 2, "layout": "geneval", "store": "array_record", "changes": {"steps": 2}}
    assert sample_prompts(str(smoke_run), prompt_set=geneval, out=str(out), **settings) == 0
    said = capsys.readouterr().out
    assert "geneval: 2 prompts; 553 are published" in said and "4 images in" in said
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [(row["id"], row["prompt"]) for row in rows] == [
        ("00000-0", "a bench"), ("00000-1", "a bench"), ("00001-0", "a cow"), ("00001-1", "a cow"),
    ]  # fmt: skip
    folder = out / "layout-geneval"
    assert json.loads((folder / "00001/metadata.jsonl").read_text())["prompt"] == "a cow"
    first, second = (np.asarray(Image.open(folder / f"00000/samples/000{k}.png")) for k in (0, 1))
    assert first.shape == (16, 16, 3) and (first != second).any()
    assert f"for the official tool: {folder}" in said


def test_prompts_come_from_one_place(smoke_run, geneval):
    with pytest.raises(UserError, match="give prompts or --prompt_set, not both"):
        sample_prompts(str(smoke_run), ["a red circle"], prompt_set=geneval)
    with pytest.raises(UserError, match="no prompts: give them as arguments"):
        sample_prompts(str(smoke_run))
