"""The page on data sets is what the code has: fields, kinds of damage, caption shares, a source of one's own."""

import importlib
import pathlib
import re
import sys
from fractions import Fraction

import numpy as np
import pytest

from scaling_dit import config
from scaling_dit.cli import main as cli
from scaling_dit.data.captions import CaptionPolicy
from scaling_dit.data.loader import make_loader
from scaling_dit.data.sources import SOURCES, create_source, source_fields
from scaling_dit.errors import UserError
from tests.support.pages import commands, steps
from tests.support.paths import DOCS

PAGE = "data.md"
FORMATS = ("webdataset", "tfds", "parquet")


def rows(heading):
    """The cells of the table under a heading, without the table's own."""
    section = (DOCS / PAGE).read_text().split(f"## {heading}\n", 1)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[1:]]


def test_every_source_is_on_the_page():
    table = (DOCS / PAGE).read_text().split("\n## ")[0]
    names = [name.partition(":")[0] for name in re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)]
    assert names == [*SOURCES, "my_file"]


@pytest.mark.parametrize("name", FORMATS)
def test_the_fields_of_a_source(name):
    told = {field.strip("`"): default.strip("`") for field, default, _ in rows(name)}
    known = source_fields(f"{name}:x")
    of_all = source_fields("folder:x").keys()
    assert told == {field: repr(default) for field, default in known.items() if field not in of_all}


@pytest.mark.parametrize("name", FORMATS)
def test_the_kinds_of_damage(name):
    module = importlib.import_module(f"scaling_dit.data.sources.{name}")
    kinds = re.findall(r"^    (\w+) {2,}\S", module.__doc__, re.MULTILINE)
    told = [kind.strip("`") for source, kind, _ in rows("Kinds of damage") if source == name]
    assert sorted([*told, "unreadable_image", "too_large"]) == sorted(kinds)
    raised = set(re.findall(r'DamagedRecord\(\s*"(\w+)"', pathlib.Path(module.__file__).read_text()))
    assert raised <= set(kinds)


def test_the_fields_of_captions():
    section = (DOCS / PAGE).read_text().split("## Which caption is shown\n")[1]
    told = dict(re.findall(r"^\| `captions\.(\w+)` \| `(\S+)` \|", section, re.MULTILINE))
    assert told == {field: str(value) for field, value in config.defaults().captions.items()}


def test_the_probabilities_of_captions():
    section = (DOCS / PAGE).read_text().split("## Which caption is shown\n")[1].split("\n## ")[0]
    table = [
        line.strip("| ").split(" | ")
        for line in section.split("| policy |")[1].splitlines()[2:]
        if "|" in line
    ]
    assert len(table) == 4
    for _, shares, has, probabilities in table:
        alt, synthetic, long = map(float, shares.split(", "))
        kinds = [kind for number, kind in re.findall(r"(\d) (\w+)", has) for _ in range(int(number))]
        found = CaptionPolicy("mix", alt, synthetic, long).shares(kinds)
        told = {
            kind: float(Fraction(share))
            for kind, share in re.findall(r"(alt|synthetic|long) ([\d./]+)", probabilities)
        }
        expected = [told.get(kind, 0.5) for kind in kinds]
        assert found == pytest.approx(expected), has


@pytest.fixture
def beside_my_source(tmp_path, monkeypatch):
    """A working directory with the page's `my_source.py` and images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for kind, name, text in steps(PAGE):
        if kind == "file":
            # A page.
            assert len([line for line in text.splitlines() if line.strip()]) <= 45
            (tmp_path / name).write_text(text)
        elif kind == "python":
            exec(text, {})
    yield tmp_path
    sys.modules.pop("my_source", None)


def test_a_source_of_ones_own_feeds_the_loader(beside_my_source):
    source = create_source("my_source:ArraySource", path="images.npz")
    assert (len(source), len(source.held_out()), source.image_size) == (36, 4, 16)
    assert source.describe() == "arrays of images.npz: 36 images, train split"
    assert source_fields("my_source:ArraySource") == {"path": ""}

    def tokenize(captions):
        ids = np.array([[int(text.split()[1]), text.startswith("title")] for text in captions], np.int32)
        return ids, ids >= 0

    loader = make_loader(
        source, tokenize, batch=36, seed=0, positions=range(36), captions=CaptionPolicy("mix", 0.0, 0.0, 1.0)
    )
    batch = next(loader)
    loader.close()
    assert (batch["images"][:, 0, 0, 0] == batch["ids"][:, 0]).all()
    assert sorted(batch["ids"][:, 0]) == [number for number in range(40) if number % 10]
    # Long ones only.
    assert not batch["ids"][:, 1].any()
    with pytest.raises(UserError, match="it must name an .npz file"):
        create_source("my_source:ArraySource")


@pytest.mark.slow
@pytest.mark.usefixtures("verbs_on_one_device")
def test_a_source_of_ones_own_trains(beside_my_source):
    (command,) = commands(PAGE)
    tiny = {"steps": 2, "batch": 8, "optim.warmup_steps": 1, "backbone.hidden": 32, "backbone.depth": 1,
            "eval.grid": 4, "eval.loss_images": 8, "sample.steps": 1,
            "log.tensorboard": False}  # fmt: skip
    assert cli.main(command + [f"--config.{key}={value}" for key, value in tiny.items()]) == 0
