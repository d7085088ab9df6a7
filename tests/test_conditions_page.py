"""docs/conditions.md as typed, from top to bottom, in one folder."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image

from scaling_dit.backbones import BACKBONES
from scaling_dit.cli import main as cli
from scaling_dit.config import conditions, own_code
from scaling_dit.data.conditions import REGISTRY
from scaling_dit.data.sources import create_source
from tests.support.pages import first_column, steps
from tests.support.paths import DOCS

PAGE = "conditions.md"
SMALL = [
    "--config.steps=2",
    "--config.eval.every=0",
    "--config.optim.warmup_steps=1",
    "--config.checkpoint.every=2",
    "--config.backbone.depth=1",
    "--config.log.tensorboard=false",
]


@pytest.mark.slow
@pytest.mark.usefixtures("verbs_on_one_device", "opened_once")
def test_the_page_runs_as_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    photo = create_source("shapes", preset="grid16")[0]["image"]
    mask = np.zeros(photo.shape[:2], np.uint8)
    mask[4:12, 4:12] = 255
    Image.fromarray(photo).save("photo.png")
    Image.fromarray(mask).save("mask.png")
    # Before the first command that needs it.
    (source,) = [text for kind, name, text in steps(PAGE) if name == "grey.py"]
    (tmp_path / "grey.py").write_text(source)
    names: dict = {}
    for kind, _, text in steps(PAGE):
        if kind == "python":
            exec(text, names)
        elif kind == "sh":
            command = shlex.split(text)[1:]
            # As in a process of its own, in which nothing was named.
            monkeypatch.setattr(own_code, "_TRUSTED", set())
            found = cli.main(command + (SMALL if command[0] == "train" else []))
            assert found == 0, (command, capsys.readouterr().err)
    np.testing.assert_array_equal(names["images"][0][mask == 0], photo[mask == 0])
    assert names["again"].shape == (2, 16, 16, 3)
    (folder,) = (tmp_path / "runs/grey/samples").iterdir()
    row = json.loads((folder / "manifest.jsonl").read_text())
    assert row["condition_guidance"] == 2.0 and list(row["conditions"]) == ["Grey"]


def test_the_tables_have_every_condition_field_and_family():
    shown = [cell.strip("`") for cell in first_column(PAGE, "What each family does")]
    assert [name for cell in shown for name in cell.replace("`", "").split(", ")] == list(BACKBONES)
    text = (DOCS / PAGE).read_text()
    for name in (*REGISTRY.known, *conditions.COMMON):
        assert f"| `{name}` |" in text
