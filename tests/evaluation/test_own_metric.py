"""docs/own_metric.md as typed: metrics in a user's file, from Python, in training and in `evaluate`."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from scaling_dit.checkpoints.workdir import read_metrics
from scaling_dit.cli import main as cli
from scaling_dit.data.sources import create_source
from scaling_dit.errors import UserError
from scaling_dit.evaluation import METRICS, run
from scaling_dit.evaluation.metric import METHODS
from scaling_dit.evaluation.scoring import Scoring, score
from tests.support.pages import blocks, commands, first_column

pytestmark = pytest.mark.usefixtures("on_one_device")

PAGE = "own_metric.md"


@pytest.fixture
def beside_my_metric(tmp_path, monkeypatch):
    """A working directory with the page's files."""
    for name, mark in (("my_metric", "class Brightness"), ("my_statistics", "class Contrast")):
        (source,) = [block for block in blocks("python", PAGE) if mark in block]
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_example_from_python(beside_my_metric, capsys):
    (example,) = [block for block in blocks("python", PAGE) if "METRICS[" in block]
    names: dict = {}
    exec(example, names)
    inside = names["images"][:, 2:-2, 2:-2]
    assert names["result"]["scalars"]["Brightness"] == pytest.approx(inside.mean() / 255)
    assert len(json.loads(re.search(r"\[[^\[]*\]$", capsys.readouterr().out.strip())[0])) == 10


def test_the_statistics(beside_my_metric):
    metric = METRICS["my_statistics:Contrast"]()
    items = metric.items(create_source("shapes"), 40)
    truths = np.stack([item.truth for item in items])
    flat = (truths.astype(float) * 0.5).round().astype(np.uint8)
    scoring = Scoring("Contrast", metric, items, batch=4)
    assert score(scoring, [truths], 0)[0]["scalars"] == {"contrast": 1.0}
    result, rows = score(scoring, [flat], 0)
    assert result["scalars"]["contrast"] == pytest.approx(flat.std() / truths.std(), rel=1e-12)
    assert result["n"] == len(rows) == 40 and result["true"] == pytest.approx(truths.std() / 255)


def test_evaluate_takes_it_for_a_run_trained_without_it(beside_my_metric, smoke_run, capsys):
    out = beside_my_metric / "out"
    command = [
        "evaluate",
        f"--workdir={smoke_run}",
        "--metrics=my_metric:Brightness",
        "--items=5",
        f"--out={out}",
    ]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "my_metric:Brightness of" in said and "95 % interval" in said
    result = json.loads((out / "Brightness" / "result.json").read_text())
    assert result["metric"] == "my_metric:Brightness" and result["fields"]["margin"] == 0
    rows = [json.loads(line) for line in (out / "Brightness" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and 0 < rows[0]["score"] < 1 and rows[0]["id"] == "held-out-000000"
    # It asks no questions.
    assert not (out / "Brightness" / "questions.json").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("verbs_on_one_device")
def test_the_commands(beside_my_metric, capsys):
    for command in commands(PAGE):
        assert cli.main(command) == 0, capsys.readouterr().err
    assert "Brightness" in capsys.readouterr().out
    (row,) = [row for row in read_metrics("runs/bright") if "evaluation/Brightness" in row]
    assert 0 < row["evaluation/Brightness"] < 1 and "evaluation/shapes_tifa" not in row
    saved = json.loads((beside_my_metric / "runs/bright/config.json").read_text())
    # Its own field beside those that every metric has.
    assert (
        saved["metrics"]["Brightness"].items() >= {"every": 0, "prompts": 0, "batch": 64, "margin": 4}.items()
    )
    assert list(saved["metrics"]) == ["Brightness"]
    (result,) = (beside_my_metric / "runs/bright/evaluation").glob("*-n20/Brightness-*/result.json")
    assert json.loads(result.read_text())["fields"]["margin"] == 4


def test_the_methods_are_those_of_the_contract():
    listed = [re.match(r"`(\w+)\(", cell)[1] for cell in first_column(PAGE, "What a metric must keep to")]
    assert listed == list(METHODS)


@pytest.mark.parametrize(
    "name, line",
    [
        ("my_broken:Nothing", "metric 'Nothing': update must return (state, rows), got NoneType"),
        (
            "my_broken:number",
            "metric 'my_broken:number': my_broken has no class 'number'; known: Needs, Nothing, PerImage, Plain",
        ),
        ("my_broken:Plain", "metric 'my_broken:Plain' is no metric: it has no method items, init, update"),
        (
            "my_broken:Nothin",
            "metric 'my_broken:Nothin': my_broken has no class 'Nothin'; did you mean 'Nothing'?",
        ),
        ("my_broken:Needs", "metric 'my_broken:Needs': field 'weights' needs a default"),
    ],
)
def test_what_is_no_metric_is_refused_in_one_line(beside_my_metric, smoke_run, tmp_path, name, line):
    (beside_my_metric / "my_broken.py").write_text(
        "from scaling_dit.evaluation.bases import PerImage\n"
        "class Nothing(PerImage):\n    def update(self, state, batch): pass\n"
        "class Needs(PerImage):\n    def __init__(self, weights): pass\n"
        "class Plain: pass\n"
        "number = 5\n"
    )
    with pytest.raises(UserError) as error:
        run.main(str(smoke_run), str(tmp_path / "out"), metrics=[name], items=2)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


NO_SCORE = """
import numpy as np
from scaling_dit.evaluation.bases import PerImage
from scaling_dit.evaluation.metric import Item

class NoScore(PerImage):
    def items(self, source, count):
        return [Item("a", "x"), Item("b", "y")]

    def rows(self, batch):
        return [{"score": np.nan} for _ in batch.images]

class NoItems(NoScore):
    def items(self, source, count):
        return ["x", "y"]
"""


def test_no_nan_is_written_and_no_traceback_printed(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_no_score.py").write_text(NO_SCORE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{name}.png")
    command = ["evaluate", "--images=images", "--out=out"]
    assert cli.main([*command, "--metrics=my_no_score:NoScore"]) == run.INCOMPLETE
    line = "metric 'NoScore': scalar 'NoScore' is nan, which is no score; every number must be finite"
    assert f"my_no_score:NoScore: skipped: {line}\n" in capsys.readouterr().err
    (row,) = [json.loads(text) for text in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert row["status"] == "skipped" and row["reason"] == line and "scalars" not in row
    assert cli.main([*command, "--metrics=my_no_score:NoItems"]) == 2
    assert capsys.readouterr().err == (
        "scaling-dit: error: metric 'NoItems': items must return Items, got str\n"
    )
