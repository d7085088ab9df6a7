"""docs/extending.md, "A metric": a copy of the package, changed as the page says, has the metric."""

import re
import shutil

import pytest

from tests.support import extending

# What a run does with the metric, with true images in place of generated ones, and what it imports for another one.
USE = """
import sys
import numpy as np
from scaling_dit import config
from scaling_dit.data.sources import create_source
from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.registry import choose
from scaling_dit.evaluation.scoring import Scoring, score

names = list(METRICS)
assert names.index("sharpness") == names.index("digits") + 1, names
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


CHANGED = {"scaling_dit/config/metrics.py", "scaling_dit/evaluation/metrics/sharpness.py"}


@pytest.fixture(scope="module")
def copy(smoke_run, tmp_path_factory):
    """In its process the command of the page."""
    away = tmp_path_factory.mktemp("away")
    shutil.copytree(smoke_run, away / "runs/shapes")

    def evaluate(copy):
        assert len(copy.commands) == 1
        return extending.typed(copy.commands, away)

    return extending.carry_out("A metric", tmp_path_factory.mktemp("copy"), evaluate)


def test_its_steps_touch_two_files_and_the_copy_has_the_metric(tmp_path):
    edited = extending.carry_out("A metric", tmp_path, commands=False)
    assert edited.touched == CHANGED
    assert edited.python(USE).split() == ["ok", "6"]


@pytest.mark.slow
def test_it_touches_two_files_and_the_page_of_fields(copy):
    assert copy.touched == CHANGED | {"docs/config.md"}


@pytest.mark.slow
def test_the_page_of_the_copy_lists_it(copy):
    part = (copy.folder / "docs/config.md").read_text().split("\n### `metrics`\n")[1]
    names = re.findall(r"^#### `(\w+)`$", part, re.MULTILINE)
    assert names.index("sharpness") == names.index("digits") + 1
    assert "| `step` | `1` | distance of the neighbours in pixels |" in part.splitlines()


@pytest.mark.slow
def test_the_command_of_the_page_runs(copy):
    assert copy.code == 0 and "Sharpness" in copy.printed, copy.printed
