"""A sweep of mistakes over all verbs, generated from what the verbs and the config declare.

Each gives one line, exit code 2, no traceback, and soon. No command may get as far as its work: the functions behind
the verbs are replaced by one that fails the test.
"""

import importlib
import os
import sys

import pytest

from scaling_dit.cli import main as cli
from scaling_dit.cli.options import declared
from scaling_dit.config import schema
from tests.support.mistakes import line_of, swept

# Where the work of each verb begins.
WORK = {
    "train": ("scaling_dit.training.loop", "main"),
    "sample": ("scaling_dit.evaluation.export", "sample_prompts"),
    "evaluate": ("scaling_dit.evaluation.run", "main"),
    "prepare": ("scaling_dit.curation.job", "main"),
    "filter": ("scaling_dit.curation.filter_pipeline", "main"),
    "stats": ("scaling_dit.curation.stats_pipeline", "main"),
    "caption": ("scaling_dit.curation.captioning.runner", "main"),
    "report": ("scaling_dit.training.report", "main"),
    "count": ("scaling_dit.costs.count_table", "main"),
    "plan": ("scaling_dit.planning.report", "main"),
    "import": ("scaling_dit.interop.importing", "main"),
    "export": ("scaling_dit.interop.exporting", "main"),
}
# A right command of each verb, as far as its flags go.
RIGHT = {
    "train": ["--config=shapes:smoke", "--workdir=w"],
    "sample": ["--workdir=w", "a red circle"],
    "evaluate": ["--workdir=w"],
    "prepare": ["--config=shapes:smoke", "--out=o"],
    "filter": ["--source=folder:d", "--out=o"],
    "stats": ["--source=folder:d", "--out=o"],
    "caption": ["--source=folder:d", "--captioner=shapes", "--out=o"],
    "report": ["--workdir=w"],
    "count": ["--config=shapes:smoke"],
    "plan": ["--config=shapes:smoke", "--topology=local"],
    "import": ["--from=f", "--config=shapes:smoke", "--workdir=w"],
    "export": ["--workdir=w", "--out=o", "--to=safetensors"],
}
FOLDERS = ("workdir", "out", "kept", "captions", "from", "prompts_file", "questions")
# What no type takes, of numbers.
BAD_NUMBERS = {
    int: ("two", "", "1.5", "1e30", "nan", "-7", "99999999999999999999", "0x", "1,2"),
    float: ("high", "", "nan", "1,2", "--", "1e"),
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder to start from, and verbs that do no work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("NOWHERE", raising=False)
    for verb, (module, name) in WORK.items():

        def work(*args, verb=verb, **kwargs):
            raise AssertionError(f"{verb} took it")

        monkeypatch.setattr(importlib.import_module(module), name, work)
    yield tmp_path
    assert sorted(os.listdir(tmp_path)) == [], "a mistake left files behind"


def flags_of(verb):
    return [one for one in declared(cli.VERBS[verb]) if one.name != "own_code"]


def of_flags():
    """Each flag of each verb with values that its type or its range excludes."""
    for verb in WORK:
        for one in flags_of(verb):
            values = ()
            if one.choices:
                values = ("nothing", "", one.choices[0].upper() + "x")
            elif one.type is bool:
                values = ("maybe", "2")
            elif one.type in BAD_NUMBERS and not one.several:
                allowed = one.rule.fits if one.rule else lambda value: True
                values = [text for text in BAD_NUMBERS[one.type] if not (text == "-7" and allowed(-7))]
            elif one.type in BAD_NUMBERS:
                values = ("a", "1,b", ",", "1;2")
            for value in values:
                yield verb, f"--{one.name}={value}"


@pytest.mark.parametrize("verb, flag", swept(of_flags(), 2))
def test_values_that_a_flag_does_not_take(verb, flag, capsys):
    line = line_of(capsys, verb, *RIGHT[verb], flag)
    assert flag.partition("=")[0].lstrip("-") in line


def of_paths():
    """Each path of each verb in forms that no folder here has."""
    for verb in WORK:
        for one in flags_of(verb):
            if one.name in FOLDERS:
                assert one.path, one.name
                for value in (
                    "~nobody-of-this-name/x",
                    "$NOWHERE/x",
                    "a/${NOWHERE}",
                    "http://example.org/x",
                    "ftp://x",
                    "s4://x/y",
                ):
                    yield verb, one.name, value


@pytest.mark.parametrize("verb, flag, value", swept(of_paths()))
def test_paths_that_name_nothing(verb, flag, value, capsys):
    line = line_of(capsys, verb, *RIGHT[verb], f"--{flag}={value}")
    assert line.startswith(f"--{flag}: ")


@pytest.mark.parametrize("verb", WORK)
def test_flags_that_are_missing_unknown_or_too_many(verb, capsys):
    for one in flags_of(verb):
        if one.required:
            rest = [word for word in RIGHT[verb] if not word.startswith(f"--{one.name}=")]
            assert f"{verb} needs --{one.name}" in line_of(capsys, verb, *rest)
            empty = line_of(capsys, verb, *rest, f"--{one.name}=")
            assert (f"flag --{one.name}=: " if one.choices else f"{verb} needs --{one.name}") in empty
        mistyped = f"--{one.name}x=1"
        assert f"{verb} has no flag" in line_of(capsys, verb, *RIGHT[verb], mistyped)
    if not cli.VERBS[verb].ARGUMENTS:
        assert "takes flags only" in line_of(capsys, verb, *RIGHT[verb], "word")
    if not cli.VERBS[verb].OVERRIDES:
        assert "has no flag" in line_of(capsys, verb, *RIGHT[verb], "--config.steps=2")


def of_fields():
    """Each field of a run with values of another type, and with those that its range excludes."""
    others = {
        bool: ("maybe", "3", "None"),
        int: ("many", "1.5", "1e30", "nan", "(1,)", "9" * 30, "None"),
        float: ("high", "nan", "(1.0,)", "None"),
        tuple: ("3", "word", "{", "None", "[nan]"),
    }
    for key, field in schema.FIELDS.items():
        for value in others.get(type(field.default), ()):
            yield key, value
        if field.choices:
            yield from ((key, value) for value in ("nothing", "", "no_module_of_this_name:Part"))
        if field.check is not None and isinstance(field.default, int | float):
            yield from ((key, value) for value in ("-3", "inf", str(2**62)) if not _fits(field, value))


def _fits(field, text):
    if isinstance(field.default, float):
        return field.check.fits(float(text))
    return text != "inf" and field.check.fits(int(text))


@pytest.mark.parametrize("key, value", swept(of_fields(), 4))
def test_values_that_a_field_does_not_take(key, value, capsys):
    line = line_of(capsys, "train", *RIGHT["train"], f"--config.{key}={value}")
    assert f"config.{key}" in line or line.startswith("unknown metric ")


@pytest.mark.parametrize("key", swept([*schema.FIELDS, *(f"{name}.name" for name in schema.COMPONENTS)]))
def test_fields_that_do_not_exist(key, capsys):
    assert "no such field" in line_of(capsys, "train", *RIGHT["train"], f"--config.{key}x=1")


NO_COMPONENTS = (
    "nothing", "", "no_module_of_this_name:Part", "json:Nothing", "json", ":", "a b:C", "json:", "os:path", "sys:argv",
    "../x:Y", "json:dumps:loads", "tests.support.mistakes:LONGEST", "\x1b[31m:x", "x" * 5000,
)  # fmt: skip


@pytest.mark.parametrize(
    "section, name", swept(((section, name) for section in schema.COMPONENTS for name in NO_COMPONENTS), 2)
)
def test_components_that_are_none(section, name, capsys):
    line_of(capsys, "train", *RIGHT["train"], f"--config.{section}.name={name}")


NO_EXPERIMENTS = (
    "nowhere", "nowhere.py", "a b", "shapes:nothing", "~nobody-of-this-name/x.py", "$NOWHERE/x.py", "/", ".py",
    "\x1b[2J.py",
)  # fmt: skip


@pytest.mark.parametrize("verb", ["train", "prepare", "count", "plan"])
@pytest.mark.parametrize("spec", NO_EXPERIMENTS)
def test_experiments_that_are_none(verb, spec, capsys):
    rest = [word for word in RIGHT[verb] if not word.startswith("--config=")]
    line_of(capsys, verb, *rest, f"--config={spec}")


@pytest.mark.parametrize(
    "arguments", [["trian"], ["--workdir=x"], ["\x1b[31mtrain"], [""], ["train "], ["-x"]]
)
def test_verbs_that_are_none(arguments, capsys):
    assert "no verb" in line_of(capsys, *arguments)
