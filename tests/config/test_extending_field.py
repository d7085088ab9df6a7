"""docs/extending.md, "A config field": a copy of the package, changed as the page says, has the field everywhere."""

import pytest

from tests.support import extending
from tests.support.paths import DOCS

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
    shown._sampler = lambda params, frozen, prompts, seed, conditions: np.zeros((6, 128, 128, 3), np.uint8)
    shown._conditions = shown._adapters = None
    shown._items, shown._metrics, shown._ema = {}, [], None
    shown.write(Writer(), 1, State, {})
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """In its process the command that is refused, in a folder of its own."""
    away = tmp_path_factory.mktemp("away")
    made = extending.carry_out(
        "A config field",
        tmp_path_factory.mktemp("copy"),
        lambda copy: extending.typed([copy.refused[0]], away),
    )
    assert not list(away.iterdir())
    return made


def test_it_touches_two_files_and_the_page_of_fields(copy):
    assert copy.touched == {
        "scaling_dit/config/schema.py",
        "scaling_dit/evaluation/in_training.py",
        "docs/config.md",
    }


def test_its_row_is_on_the_page(copy):
    meaning = (
        "images in a row of the sample grid; 0 = as many as fit a screen. Must be 0 or more, below 2**31"
    )
    row = f"| `eval.columns` | `0` | {meaning} |"
    assert row in (copy.folder / "docs/config.md").read_text().splitlines()
    assert row not in (DOCS / "config.md").read_text().splitlines()


def test_it_is_a_flag_that_is_checked(copy):
    line = copy.refused[1]
    assert (copy.code, copy.printed.strip().splitlines()[-1]) == (2, f"scaling-dit: error: {line}")


@pytest.mark.slow
def test_a_run_uses_it_and_the_command_of_the_page_runs(copy, tmp_path):
    train = extending.typed(copy.commands, tmp_path, *extending.TINY, "--config.backbone.depth=1")
    said = copy.python(f"{USE}\n{train}")
    two, three = (tuple(map(int, line.split()[1:])) for line in said.splitlines() if line.startswith("grid"))
    # 3 rows of 2, then 2 rows of 3.
    assert two[0] > three[0] and two[1] < three[1]
    assert len(copy.commands) == 1 and (tmp_path / "runs/columns/checkpoints/2").is_dir()
