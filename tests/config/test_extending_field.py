"""docs/extending.md, "A config field": a copy of the package, changed as the page says, has the field everywhere."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECTION = (ROOT / "docs/extending.md").read_text().split("## A config field\n")[1].split("\n## ")[0]
# What a run does with the field: 6 images in rows of 2 and 3, without training anything.
USE = """
import numpy as np
from scaling_dit import config
from scaling_dit.evaluation.in_training import InTraining

class Writer:
    def scalars(self, step, values): pass
    def images(self, step, images): print("grid", *images["samples"].shape[:2])
    def flush(self): pass

class State:
    params, emas = {}, {}

for columns in (2, 3):
    shown = InTraining.__new__(InTraining)
    shown._config = config.load("experiments/shapes.py:smoke", [f"--config.eval.columns={columns}"])
    shown._captions = [""] * 6
    shown._loss = lambda params, frozen: {}
    shown._sampler = lambda params, frozen, prompts, seed: np.zeros((len(prompts), 128, 128, 3), np.uint8)
    shown._items, shown._metrics, shown._ema = {}, [], None
    shown.write(Writer(), 1, State, {})
"""


def changed(text: str, diff: str) -> str:
    """A file with one of the page's diffs applied."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    assert text.count(before) == 1, f"the page changes lines that are not there:\n{before}"
    return text.replace(before, after)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    for name in ("scaling_dit", "experiments", "tools", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path, diff in re.findall(r"^In `(.+?)`.*?```diff\n(.*?)```", SECTION, re.DOTALL | re.MULTILINE):
        (folder / path).write_text(changed((folder / path).read_text(), diff))
    for command in re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL):
        program, *arguments = command.split()
        assert program == "python"
        subprocess.run([sys.executable, *arguments], cwd=folder, check=True, capture_output=True)
    return folder


def test_it_touches_three_files(copy):
    touched = {
        str(path.relative_to(copy))
        for name in ("scaling_dit", "experiments", "tools", "docs")
        for path in (copy / name).rglob("*")
        if path.is_file()
        and path.suffix != ".pyc"
        and path.read_bytes() != (ROOT / path.relative_to(copy)).read_bytes()
    }
    assert touched == {
        "scaling_dit/config/schema.py",
        "scaling_dit/evaluation/in_training.py",
        "docs/config.md",
    }


def test_its_row_is_on_the_page(copy):
    meaning = "images in a row of the sample grid; 0 = as many as fit a screen. Must be 0 or more"
    row = f"| `eval.columns` | `0` | {meaning} |"
    assert row in (copy / "docs/config.md").read_text().splitlines()
    assert row not in (ROOT / "docs/config.md").read_text().splitlines()


def test_it_is_a_flag_that_is_checked(copy):
    command = "train --config=experiments/shapes.py:smoke --workdir=run --config.eval.columns=-1"
    done = subprocess.run(
        [sys.executable, "-m", "scaling_dit", *command.split()], cwd=copy, capture_output=True, text=True
    )
    (line,) = re.findall(r"```text\n(.*?)\n```", SECTION)
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (2, f"scaling-dit: error: {line}")
    assert not (copy / "run").exists()


def test_a_run_uses_it(copy):
    done = subprocess.run([sys.executable, "-c", USE], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two, three = (
        tuple(map(int, line.split()[1:])) for line in done.stdout.splitlines() if line.startswith("grid")
    )
    # 3 rows of 2, then 2 rows of 3.
    assert two[0] > three[0] and two[1] < three[1]
