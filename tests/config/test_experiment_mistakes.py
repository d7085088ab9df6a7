"""Experiment files that exit, return something else, or set values that no config can hold: one line each."""

import json

import numpy as np
import pytest

from scaling_dit import config as config_lib
from scaling_dit.errors import UserError

HEAD = "import math, os, sys\nimport numpy as np\nfrom scaling_dit import config as config_lib\n\n\n"


@pytest.fixture
def load(tmp_path):
    """Loads an experiment of the given lines, of `get_config` after its config unless `whole`."""

    def call(body, spec="", whole=False):
        lines = ["def get_config(arg=''):", "config = config_lib.defaults()", body, "return config"]
        (tmp_path / "mine.py").write_text(HEAD + (body if whole else "\n    ".join(lines)))
        return config_lib.load(f"{tmp_path}/mine.py{spec}")

    return call


@pytest.mark.parametrize(
    "text, message",
    [
        ("sys.exit(3)", "mine.py, line 6: SystemExit: 3"),
        ("raise SystemExit", "mine.py, line 6: SystemExit"),
        ("def get_config(arg=''):\n    sys.exit('no')", "mine.py, line 7: SystemExit: no"),
        ("def get_config(arg=''):\n    return None", "returned NoneType; it must return a ConfigDict"),
        ("def get_config(arg=''):\n    return {'steps': 3}", "returned dict; it must return a ConfigDict"),
        ("def get_config(arg=''):\n    return config_lib", "returned module; it must return a ConfigDict"),
        ("get_config = 3", "has no get_config(arg='') function"),
        ("def get_config(first, second):\n    pass", "mine.py, line 1: TypeError: get_config() missing"),
        ("1 / 0", "mine.py, line 6: ZeroDivisionError: division by zero"),
        ("raise RuntimeError('two\\nlines \\x1b[31m')", "RuntimeError: two lines \\x1b[31m"),
        ("x = (", "mine.py, line 6: '(' was never closed"),
        ("x = '\0'", "mine.py"),
        ("import no_such_module_here", "mine.py, line 6: ModuleNotFoundError"),
        ("def get_config(arg=''):\n    return get_config(arg)", "RecursionError"),
    ],
)
def test_a_file_that_gives_no_config(text, message, load):
    with pytest.raises(UserError) as error:
        load(text, whole=True)
    assert message in str(error.value) and "\x1b" not in str(error.value)


def test_arguments_of_another_kind(load):
    for arguments in ("3", "None", "[1, 2]", "'a'"):
        with pytest.raises(UserError, match="mine.py"):
            load(f"ARGUMENTS = {arguments}\n\n\ndef get_config(arg=''):\n    return 3\n", ":b", whole=True)


@pytest.mark.parametrize(
    "line, message",
    [
        ("config.steps = None", "config.steps is None, but its default 1000 is of type int"),
        ("config.text_mask = None", "config.text_mask is None, but its default True is of type bool"),
        ("config.compile_cache = None", "config.compile_cache is None, but its default '' is of type str"),
        ("config.optim.ema = None", "config.optim.ema is None"),
        ("config.steps = True", "config.steps is True, but its default 1000 is of type int"),
        ("config.steps = 1.5", "config.steps is 1.5|steps"),
        (
            "config.steps = 10**30",
            "config.steps is 1000000000000000000000000000000; it must be an integer of 64",
        ),
        ("config.steps = 2**40", "config.steps is 1099511627776; it must be at least 1, below 2**31"),
        ("config.loader.threads = 10**6", "config.loader.threads is 1000000; it must be from 1 to 1024"),
        ("config.loader.prefetch = 10**9", "config.loader.prefetch is 1000000000; it must be from 1 to 1024"),
        ("config.eval.grid = 10**6", "config.eval.grid is 1000000; it must be from 1 to 1024"),
        ("config.batch = 2**30", "config.batch is 1073741824; it must be from 1 to 2**20"),
        ("config.optim.learning_rate = math.nan", "config.optim.learning_rate is nan; it must be a number"),
        (
            "config.optim.learning_rate = math.inf",
            "config.optim.learning_rate is inf; it must be more than 0",
        ),
        (
            "config.backbone.name = 'pixart'; config.backbone.mlp_ratio = math.nan",
            "config.backbone.mlp_ratio",
        ),
        ("config.backbone.depth = np.zeros(3)", "config.backbone.depth is a ndarray; it must be a number"),
        ("config.backbone.depth = print", "config.backbone.depth is a builtin_function_or_method"),
        ("config.backbone.depth = {1, 2}", "config.backbone.depth is a set"),
        ("config.backbone.name = None", "config.backbone.name is None; it must be a name"),
        ("config.eval.metrics = 'shapes_tifa'", "metrics"),
        ("config.eval.metrics = (3,)", "config.eval.metrics is (3,); it must be a tuple of names"),
        ("config.nothing = 3", "config.nothing: no such field"),
        ("config.optim = 3", "'optim'"),
    ],
)
def test_a_value_that_no_config_can_hold(line, message, load):
    with pytest.raises(UserError) as error:
        load(line)
    assert any(part in str(error.value) for part in message.split("|")), str(error.value)


def test_numbers_of_numpy_are_those_of_python(load):
    values = {"steps": np.int64(7), "optim": {"learning_rate": np.float64(0.5)}, "text_mask": np.bool_(False)}
    config = config_lib.resolve(values | {"backbone": {"patch": np.int32(4)}})
    found = config.steps, config.optim.learning_rate, config.text_mask, config.backbone.patch
    assert found == (7, 0.5, False, 4)
    assert [type(value) for value in found] == [int, float, bool, int]
    assert not any(isinstance(value, np.generic) for value in config_lib.flatten(config).values())
    assert json.loads(config_lib.to_json(config))["steps"] == 7
    # In the defaults, whose fields have a type, ml_collections refuses them.
    with pytest.raises(
        UserError, match="mine.py, line 8: .*'steps'.* cannot be casted to type <class 'int'>"
    ):
        load("config.steps = np.int64(7)")


@pytest.mark.parametrize("config", [None, 3, "x", [], ["--config.steps=2"]])
def test_what_is_no_config(config):
    with pytest.raises(UserError, match="a config must be a ConfigDict, it is "):
        config_lib.resolve(config)
    with pytest.raises(UserError, match="an experiment is named by a text|no experiment|no get_config"):
        config_lib.load(config)


@pytest.mark.parametrize("overrides", [None, 3, "--config.steps=2", [3], {"steps": 2}])
def test_what_are_no_overrides(overrides):
    with pytest.raises(UserError, match="overrides must be a list of texts"):
        config_lib.resolve(config_lib.defaults(), overrides)


def test_a_plain_dict_is_a_config():
    assert config_lib.resolve({"steps": 3, "optim": {"clip_norm": 2.0}}).optim.clip_norm == 2.0
