"""The sections of metrics: fields, defaults, overrides, and what is refused."""

import subprocess
import sys

import pytest

from scaling_dit import config as config_lib
from scaling_dit.errors import UserError

SHAPES = "experiments/shapes.py:smoke"


def load(*overrides):
    return config_lib.load(SHAPES, [f"--config.{override}" for override in overrides])


def test_each_named_metric_has_its_fields():
    run = load("metrics.shapes_tifa.prompts=8", "metrics.shapes_tifa.baseline=false")
    assert run.metrics.to_dict() == {
        "shapes_tifa": {
            "every": 0, "prompts": 8, "batch": 64, "prompt_set": "", "prompt_transform": "none", "baseline": False,
        }
    }  # fmt: skip
    again = config_lib.resolve(config_lib.from_json(config_lib.to_json(run)))
    assert config_lib.flatten(again) == config_lib.flatten(run)


def test_overrides_choose_metrics_and_set_their_fields():
    assert load("eval.metrics=()").metrics.to_dict() == {}
    run = load("eval.metrics=('digits','shapes_tifa')", "metrics.digits.batch=3")
    assert list(run.metrics) == ["digits", "shapes_tifa"] and run.metrics.digits.batch == 3
    given = load("metrics.shapes_tifa.prompts=8")
    kept = config_lib.resolve(given, ["--config.eval.metrics=('digits','shapes_tifa')"])
    assert kept.metrics.shapes_tifa.prompts == 8
    assert "shapes_tifa" not in config_lib.resolve(given, ["--config.eval.metrics=('digits',)"]).metrics


def test_an_experiment_sets_fields():
    config = config_lib.defaults()
    config.eval.metrics = ("shapes_tifa",)
    config.metrics.shapes_tifa = {"every": 1000}
    assert config_lib.resolve(config).metrics.shapes_tifa.every == 1000


def test_a_run_may_be_resumed_with_other_metrics():
    config_lib.check_same_run(load(), load("eval.metrics=()"))
    config_lib.check_same_run(load(), load("metrics.shapes_tifa.prompts=5"))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["eval.metrics=('tiffa',)"], "unknown metric 'tiffa'; did you mean 'tifa'? (or a class of"),
        (["eval.metrics=(1,)"], "config.eval.metrics is (1,); it must be a tuple of names of metrics"),
        (["eval.metrics=('os.path:join',)"], "metric 'os.path:join' is no class but function"),
        (["eval.metrics=('shapes_tifa','x:shapes_tifa')"], "names two metrics 'shapes_tifa'; leave one out"),
        (["metrics.shapes_tifa.evry=8"], "did you mean 'metrics.shapes_tifa.every'?"),
        (["metrics.shapes_tifa.batch=0"], "config.metrics.shapes_tifa.batch is 0; it must be from 1 to 2**20"),
        (["metrics.shapes_tifa.prompts=-1"], "config.metrics.shapes_tifa.prompts is -1; it must be 0 or more"),
        (
            ["metrics.shapes_tifa.every=6"],
            "config.metrics.shapes_tifa.every is 6; it must be a multiple of config.eval.every, which is 4",
        ),
        (["metrics.shapes_tifa.baseline=4"], "config.metrics.shapes_tifa.baseline is True and must stay true or false"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(overrides, message):
    with pytest.raises(UserError) as error:
        load(*overrides)
    assert message in str(error.value)


def test_fields_of_a_metric_that_is_not_named_are_refused():
    config = config_lib.defaults()
    config.metrics.digits = {"batch": 2}
    with pytest.raises(
        UserError, match=r"config.metrics.digits: config.eval.metrics names no metric 'digits'"
    ):
        config_lib.resolve(config)


def test_a_metric_is_imported_only_when_it_is_named():
    code = (
        "import sys\n"
        "from scaling_dit import config\n"
        "from scaling_dit.evaluation import METRICS\n"
        "config.resolve(config.defaults())\n"
        "assert list(METRICS) and 'digits' in METRICS and 'tiffa' not in METRICS and METRICS.get('tiffa') is None\n"
        "heavy = {'scipy', 'sklearn', 'scaling_dit.evaluation.metrics.digits'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "METRICS['digits']\n"
        "assert 'scaling_dit.evaluation.metrics.digits' in sys.modules and 'sklearn' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_metrics_may_be_left_out_of_a_loaded_config():
    """What a user of the Python API does: the section that loading made holds defaults only."""
    loaded = config_lib.load("experiments/shapes.py:smoke").copy_and_resolve_references()
    loaded.unlock()
    loaded.eval.metrics = ()
    assert config_lib.resolve(loaded).metrics.to_dict() == {}
    loaded = config_lib.load(
        "shapes:smoke", ["--config.metrics.shapes_tifa.prompts=3"]
    ).copy_and_resolve_references()
    loaded.unlock()
    loaded.eval.metrics = ()
    with pytest.raises(UserError, match="config.metrics.shapes_tifa: config.eval.metrics names no metric"):
        config_lib.resolve(loaded)
