"""docs/extending.md, "A metric": a copy of the package, changed as the page says, has the metric."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.support.paths import DOCS

ROOT = DOCS.parent
SECTION = (DOCS / "extending.md").read_text().split("## A metric\n")[1].split("\n## ")[0]
FOLDERS = ("scaling_dit", "docs", "tools")
# What a run does with the metric, with true images in place of generated ones, and what it imports for another one.
USE = """
import sys
import numpy as np
from scaling_dit import config
from scaling_dit.data.sources import create_source
from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.registry import choose
from scaling_dit.evaluation.scoring import Scoring, score

assert list(METRICS)[-1] == "sharpness", list(METRICS)
named = ["--config.eval.metrics=('sharpness',)", "--config.metrics.sharpness.step=2"]
run = config.resolve(config.defaults())
assert "scaling_dit.evaluation.metrics.sharpness" not in sys.modules
run = config.resolve(config.defaults(), named)
(one,) = choose(run, run.eval.metrics)
items = one.metric.items(create_source("shapes"), 6)
images = np.stack([item.truth for item in items])
result, rows = score(Scoring(one.section, one.metric, items), [images], 0)
values = images / 255
assert abs(result["scalars"]["Sharpness"] - np.abs(values[:, :, 2:] - values[:, :, :-2]).mean()) < 1e-12
assert not {"scipy", "sklearn"} & set(sys.modules), "a metric loads what others need"
print("ok", len(rows))
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
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in re.findall(
        r"^Save as `(.+?)`:\n\n```python\n(.*?)```", SECTION, re.DOTALL | re.MULTILINE
    ):
        assert not (folder / path).exists()
        (folder / path).write_text(text)
    for path, diff in re.findall(r"^In `(.+?)`.*?```diff\n(.*?)```", SECTION, re.DOTALL | re.MULTILINE):
        (folder / path).write_text(changed((folder / path).read_text(), diff))
    for command in re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL):
        program, *arguments = command.split()
        assert program == "python"
        subprocess.run([sys.executable, "-B", *arguments], cwd=folder, check=True, capture_output=True)
    return folder


def test_it_touches_three_files(copy):
    touched = {
        str(path.relative_to(copy))
        for name in FOLDERS
        for path in (copy / name).rglob("*")
        if path.is_file()
        and not (
            (ROOT / path.relative_to(copy)).exists()
            and path.read_bytes() == (ROOT / path.relative_to(copy)).read_bytes()
        )
    }
    assert touched == {
        "scaling_dit/config/metrics.py",
        "scaling_dit/evaluation/metrics/sharpness.py",
        "docs/config.md",
    }


def test_the_copy_has_the_metric(copy):
    done = subprocess.run([sys.executable, "-B", "-c", USE], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ok", "6"]


def test_the_page_of_the_copy_lists_it(copy):
    part = (copy / "docs/config.md").read_text().split("\n### `metrics`\n")[1]
    assert re.findall(r"^#### `(\w+)`$", part, re.MULTILINE) == ["shapes_tifa", "digits", "sharpness"]
    assert "| `step` | `1` | distance of the neighbours in pixels |" in part.splitlines()
