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
    "study": ("scaling_dit.scaling.study", "study"),
    "advise": ("scaling_dit.scaling.advise", "main"),
    "doctor": ("scaling_dit.doctor.report", "main"),
    # What all of them do is done by gcloud.
    **{f"tpu {name}": ("scaling_dit.tpu.outside", "RUN") for name in cli.VERBS["tpu"].verbs()},
    "tpu queue": ("scaling_dit.tpu.queue_worker", "main"),
}
_JOB = ["--topology=v5e:4x4", "--zones=us-west4-a", "--hours=2", "--config=shapes", "--workdir=gs://b/w"]
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
    "study": ["--config=experiments/studies/shapes_core.py:smoke", "--workdir=w"],
    "advise": ["--workdir=w", "--budget=1e18"],
    "doctor": ["--workdir=w"],
    # There is no such job, which every flag is looked at before.
    **{f"tpu {name}": ["--name=first"] for name in cli.VERBS["tpu"].verbs()},
    **{f"tpu {name}": ["--name=first", *_JOB] for name in ("launch", "create")},
    **{f"tpu {name}": ["--zones=us-west4-a"] for name in ("list", "sweep")},
    "tpu queue": ["--queue=q", "status"],
}
FOLDERS = (
    "workdir", "out", "kept", "captions", "from", "prompts_file", "questions", "queue", "members", "logs", "source",
    "setup",
)  # fmt: skip
# Those that lie on other machines, or name more than files.
ELSEWHERE = {
    *((f"tpu {name}", "workdir") for name in ("launch", "create")),
    *((name, "source") for name in ("filter", "stats", "caption")),
}
# What no type takes, of numbers.
BAD_NUMBERS = {
    int: ("two", "", "1.5", "1e30", "nan", "-7", "99999999999999999999", "0x", "1,2"),
    float: ("high", "", "nan", "1,2", "--", "1e"),
}


@pytest.fixture(autouse=True)
def place(tmp_path, tmp_path_factory, monkeypatch):
    """An empty folder to start from, and verbs that do no work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "no-jobs"))
    for verb, (module, name) in WORK.items():

        def work(*args, verb=verb, **kwargs):
            raise AssertionError(f"{verb} took it")

        monkeypatch.setattr(importlib.import_module(module), name, work)
    yield tmp_path
    assert sorted(os.listdir(tmp_path)) == [], "a mistake left files behind"


def verb_of(name):
    first, _, second = name.partition(" ")
    return cli.VERBS[first].verbs()[second] if second else cli.VERBS[first]


def flags_of(verb):
    return [one for one in declared(verb_of(verb)) if one.name != "own_code"]


def refused(capsys, verb, *arguments):
    """The line of a verb that may have two words."""
    return line_of(capsys, *verb.split(), *arguments)


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
    line = refused(capsys, verb, *RIGHT[verb], flag)
    assert flag.partition("=")[0].lstrip("-") in line


def of_paths():
    """Each path of each verb in forms that no folder here has."""
    for verb in WORK:
        for one in flags_of(verb):
            # `study --queue` is no path: it prints what a queue is given.
            if one.name in FOLDERS and one.type is not bool and (verb, one.name) not in ELSEWHERE:
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
    line = refused(capsys, verb, *RIGHT[verb], f"--{flag}={value}")
    assert line.startswith(f"--{flag}: ")


# Flags of which an empty value means something.
MEANT = {("sample", "prompt")}


@pytest.mark.parametrize("verb", WORK)
def test_values_that_are_empty(verb, capsys):
    """As of a shell variable that is not set; a flag that is left out has its default."""
    for one in flags_of(verb):
        assert one.empty == ((verb, one.name) in MEANT), one.name
        if one.type is bool or one.empty:
            continue
        rest = [word for word in RIGHT[verb] if not word.startswith(f"--{one.name}=")]
        for words in ([f"--{one.name}="], [f"--{one.name}", ""]):
            line = refused(capsys, verb, *rest, *words)
            assert f"--{one.name}" in line, line
        if one.type is str and not one.choices and not one.required:
            says = f"{verb}: --{one.name} is given an empty value"
            assert refused(capsys, verb, *rest, f"--{one.name}= ").startswith(says)
            if one.repeat:
                assert "(one of several)" in refused(capsys, verb, *rest, f"--{one.name}=a", f"--{one.name}=")


@pytest.mark.parametrize("verb", WORK)
def test_flags_that_are_missing_unknown_or_too_many(verb, capsys):
    for one in flags_of(verb):
        if one.required:
            rest = [word for word in RIGHT[verb] if not word.startswith(f"--{one.name}=")]
            assert f"{verb} needs --{one.name}" in refused(capsys, verb, *rest)
            empty = refused(capsys, verb, *rest, f"--{one.name}=")
            assert (
                f"flag --{one.name}=: "
                if one.choices or one.type in BAD_NUMBERS
                else f"{verb} needs --{one.name}"
            ) in empty
        mistyped = f"--{one.name}x=1"
        assert f"{verb} has no flag" in refused(capsys, verb, *RIGHT[verb], mistyped)
    if not verb_of(verb).ARGUMENTS:
        assert "takes flags only" in refused(capsys, verb, *RIGHT[verb], "word")
    if not verb_of(verb).OVERRIDES:
        assert "has no flag" in refused(capsys, verb, *RIGHT[verb], "--config.steps=2")


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
            # Regular expressions, which a run that adapts nothing does not look for.
            if key != "adapter.targets" or value not in ("word", "{", "[nan]"):
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
    assert f"config.{key}" in line or line.startswith(("unknown metric ", "unknown condition "))


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


@pytest.mark.parametrize("verb", ["train", "prepare", "count", "plan", "study", "doctor"])
@pytest.mark.parametrize("spec", NO_EXPERIMENTS)
def test_experiments_that_are_none(verb, spec, capsys):
    rest = [word for word in RIGHT[verb] if not word.startswith("--config=")]
    line_of(capsys, verb, *rest, f"--config={spec}")


NO_SLICES = (
    "v9:2x2", "v5e", "4x4", "v5e:4xfour", "v5e:0x4", "v5e:-4x4", "v5e:4x4x4x4", "v5litepod-16", "a b",
    "\x1b[31m", "v5e:" + "9" * 30 + "x4", "v5e:4x4;reboot", "$(id)",
)  # fmt: skip


@pytest.mark.parametrize("verb", ["doctor", "advise", "tpu launch", "tpu create"])
@pytest.mark.parametrize("topology", NO_SLICES)
def test_slices_that_are_none(verb, topology, capsys):
    rest = [word for word in RIGHT[verb] if not word.startswith("--topology=")]
    refused(capsys, verb, *rest, f"--topology={topology}")


NO_JOBS = {
    "name": ("First", "a b", "a;b", "$(id)", "../x", "-x", "1st", "a" * 41, "a_b", "é", "`id`", "a\nb"),
    "zones": ("nowhere", "us-west4", "us-west4-a,us-west4-a", "us-west4-a,", "a b", "$(id)", "us-west4-a;id"),
    "study": ("A", "a b", "$(id)", "a" * 64, "é"),
    "owner": ("A", "a b", "me@example.org", "a" * 64),
    "hours": ("0", "-1", "inf", "1e9"),
    "env": ("NAME", "=x", "a b=c", "MY_TOKEN=x", "1X=2"),
    "secret": ("a b", "1X", "$(id)", "NOT_SET_ANYWHERE"),
    "reservation": ("mine",),
    "setup": ("nowhere.sh", ".", "/dev/null"),
    "workdir": ("runs/x", "http://example.org/x", "ftp://x/y"),
}


@pytest.mark.parametrize("verb", ["tpu launch", "tpu create"])
@pytest.mark.parametrize(
    "flag, value", [(flag, value) for flag, values in NO_JOBS.items() for value in values]
)
def test_jobs_that_cannot_be(verb, flag, value, capsys):
    rest = [word for word in RIGHT[verb] if not word.startswith(f"--{flag}=")]
    refused(capsys, verb, *rest, f"--{flag}={value}")


@pytest.mark.parametrize("verb", [name for name in WORK if name.startswith("tpu ")])
@pytest.mark.parametrize("name", ["none", "../x", "a b", "$(id)", "/etc/passwd", "\x1b[31m", "~", "a" * 300])
def test_jobs_that_nobody_launched(verb, name, capsys):
    if RIGHT[verb] == ["--name=first"]:
        assert "no such job" in refused(capsys, verb, f"--name={name}")


@pytest.mark.parametrize("arguments", [[], ["ad"], ["add"], ["run", "add"], ["run", "--host=2", "--hosts=2"]])
def test_queues_that_are_asked_for_nothing(arguments, capsys):
    line_of(capsys, "tpu", "queue", "--queue=q", *arguments)


@pytest.mark.parametrize(
    "command", [["study"], ["advise", "--budget=1e18"], ["report"], ["sample", "x"], ["evaluate"]]
)
@pytest.mark.parametrize("folder", ["nowhere", "/", "/etc/passwd", "a[b]", "\x1b[31m"])
def test_folders_that_hold_no_run_or_study(command, folder, capsys, monkeypatch):
    # Their work begins by reading the folder.
    monkeypatch.undo()
    line_of(capsys, *command, f"--workdir={folder}")


@pytest.mark.parametrize("budget", ["0", "-1e18", "inf", "1e400"])
def test_budgets_that_buy_nothing(budget, capsys):
    line_of(capsys, "advise", "--workdir=w", f"--budget={budget}")


@pytest.mark.parametrize(
    "arguments", [["trian"], ["--workdir=x"], ["\x1b[31mtrain"], [""], ["train "], ["-x"]]
)
def test_verbs_that_are_none(arguments, capsys):
    assert "no verb" in line_of(capsys, *arguments)


@pytest.mark.parametrize(
    "arguments", [[], ["lunch"], ["--name=first"], ["\x1b[31mlaunch"], [""], ["launch "]]
)
def test_verbs_of_tpu_that_are_none(arguments, capsys):
    line_of(capsys, "tpu", *arguments)
