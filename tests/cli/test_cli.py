"""The command line: help, exit codes, one line per mistake, and what reaches the functions behind the verbs."""

import json
import os
import subprocess
import sys
import time
import types

import pytest

from scaling_dit import config as config_lib
from scaling_dit.cli import main as cli
from scaling_dit.errors import UserError
from tests.support.paths import ROOT


def real(*arguments, cwd=ROOT):
    """The command in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "scaling_dit", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env,
        timeout=60,
    )


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # main() adds the working directory


def error(capsys, *arguments):
    """The one line of a mistake."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("scaling-dit: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("scaling-dit: error: ").rstrip()


def behind(monkeypatch, module, name="main"):
    """Replaces the function behind a verb; returns the list of the calls it gets."""
    calls = []

    def record(*args, **kwargs):
        calls.append((args, kwargs))
        return 75

    fake = types.ModuleType(module)
    setattr(fake, name, record)
    monkeypatch.setitem(sys.modules, module, fake)
    parent, _, child = module.rpartition(".")
    monkeypatch.setattr(sys.modules[parent], child, fake, raising=False)
    return calls


# Help, in processes of their own since the time counts


@pytest.mark.parametrize("verb", [None, *cli.VERBS])
def test_help_answers_in_time(verb):
    start = time.perf_counter()
    result = real(*([verb] if verb else []), "--help")
    seconds = time.perf_counter() - start
    assert result.returncode == 0
    assert result.stderr == ""
    assert "example: scaling-dit" in result.stdout
    assert seconds < 3


def test_help_imports_no_heavy_library():
    show = "import sys; from scaling_dit import cli; [cli.main([verb, '--help']) for verb in cli.VERBS]"
    command = [sys.executable, "-c", f"{show}; print(sorted(sys.modules))"]
    modules = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for heavy in ("jax", "flax", "tensorflow", "torch", "numpy", "ml_collections"):
        assert f"'{heavy}'" not in modules


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_shows_every_flag_and_an_example(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    values = cli.flags.FlagValues()
    cli.VERBS[verb].define(values)
    assert all(f"  --{flag} " in text for flag in values)
    assert all(values[flag].help for flag in values)
    assert cli.VERBS[verb].summary in text
    assert f"example: scaling-dit {verb} " in text
    assert ("--config.KEY=VALUE" in text) == cli.VERBS[verb].overrides


@pytest.mark.parametrize("verb", cli.VERBS)
def test_examples_parse(verb):
    arguments = [word.strip("'") for word in cli.VERBS[verb].example.split()[2:]]
    rest, _ = cli._split_overrides(arguments)
    cli._parse(verb, cli.VERBS[verb], rest)


def test_no_arguments_show_the_verbs(capsys):
    assert cli.main([]) == 2
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in cli.VERBS)


def test_version(capsys):
    from scaling_dit import __version__

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"scaling-dit {__version__}\n"


# Mistakes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], "no verb 'trian'; did you mean 'train'? See scaling-dit --help"),
        (["train", "--confg=shapes"], "train has no flag --confg; did you mean 'config'?"),
        (["train", "--workdir=x"], "x holds no run, so train needs --config; for example: scaling-dit train"),
        (["train", "--config=shapes"], "train needs --workdir"),
        (["train", "shapes"], "train takes flags only, not 'shapes'; see scaling-dit train --help"),
        (["train", "--config"], "train: "),
        (["train", "--config=nowhere.py", "--workdir=x"], "no file nowhere.py"),
        (["train", "--config=nowhere", "--workdir=x"], "no experiment 'nowhere'"),
        (["sample"], "sample needs --workdir"),
        (["sample", "--workdir=x"], "no prompts: give captions as arguments"),
        (["sample", "--workdir=x", "--steps=0", "a"], "0 is not an integer in the range [1, 999]"),
        (["sample", "--workdir=x", "--seed=one", "a"], "sample: flag --seed=one"),
        (
            ["sample", "--workdir=x", "--guidance_interval=a,b", "c"],
            "=a,b: give two timesteps, such as 200,800",
        ),
        (["evaluate", "--items=0", "--workdir=x"], "--items=0"),
        (["evaluate", "--config.steps=3"], "evaluate has no flag --config.steps"),
        (["count"], "count needs either --config or --backbone"),
        (["count", "--backbone=uvit", "--latents=8,8"], "--latents=8,8: must be height,width,channels"),
    ],
)
def test_one_line_for_a_mistake(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in error(capsys, *arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["train", "--config=shapes", "--workdir=w", "--config.optim.lerning_rate=1"],
            "'optim.learning_rate'",
        ),
        (["train", "--config=shape", "--workdir=w"], "did you mean 'shapes'?"),
    ],
)
def test_mistakes_of_real_commands(arguments, message):
    result = real(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("scaling-dit: error: ")
    assert message in result.stderr
    assert not (ROOT / "w").exists()


def test_a_fault_keeps_its_traceback(monkeypatch):
    verb = cli.Verb("", "", lambda values: None, lambda *_: 1 // 0)
    monkeypatch.setitem(cli.VERBS, "train", verb)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_interrupt(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "train", cli.Verb("", "", lambda values: None, interrupt))
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "scaling-dit: interrupted\n"


def test_the_working_directory_is_on_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["--version"])
    assert sys.path[0] == str(tmp_path)


# What the verbs call


def test_a_pipe_that_nobody_reads_ends_it_without_a_word():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "scaling_dit", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writing)
    assert (done.returncode, done.stderr) == (cli.INTERRUPTED, "")


def test_train_gets_the_config_and_returns_the_exit_code(monkeypatch):
    calls = behind(monkeypatch, "scaling_dit.train")
    started = time.time()
    loads = []
    loaded = types.SimpleNamespace(processes={"heartbeat": 100, "start_up": 300})
    monkeypatch.setattr(config_lib, "load", lambda *args: loads.append(args) or loaded)
    arguments = [
        "--config=shapes:smoke",
        "--config.steps=5",
        "--config.mesh.data",
        "-1",
        "--noconfig.text_mask",
    ]
    assert (
        cli.main(["train", *arguments, "--workdir", "runs/x", "--config.log.tensorboard", "--config.b", "c"])
        == 75
    )
    (((config, workdir, began), kwargs),) = calls
    assert (config, workdir, kwargs) == (loaded, "runs/x", {})
    assert started <= began <= time.time()  # for goodput
    overrides = [
        "config.steps=5",
        "config.mesh.data=-1",
        "noconfig.text_mask",
        "config.log.tensorboard",
        "config.b=c",
    ]
    assert loads == [("shapes:smoke", [f"--{override}" for override in overrides])]


def test_sample_gathers_prompts_and_flags(monkeypatch, tmp_path):
    calls = behind(monkeypatch, "scaling_dit.sampling.sampler")
    (tmp_path / "more.txt").write_text("c\n")
    file = tmp_path / "more.txt"
    flags = ["--guidance=2", "--step=100", "--ema=none", "--num=3", "--batch=8", "--steps=7"]
    flags += ["--seed=4", "--sampler=dpmpp_2m", "--guidance_rescale=0.7", "--guidance_interval=200,800"]
    assert (
        cli.main(["sample", "b", "--workdir=w", "--prompt=a", f"--prompts_file={file}", *flags, "b2"]) == 75
    )
    ((args, kwargs),) = calls
    assert args == ("w", [("00000", "a"), ("00001", "b"), ("00002", "b2"), ("00003", "c")], None)
    assert kwargs == {
        "guidance": 2.0,
        "guidance_rescale": 0.7,
        "guidance_interval": (200.0, 800.0),
        "step": 100,
        "ema": "none",
        "num": 3,
        "batch": 8,
        "sampler": "dpmpp_2m",
        "steps": 7,
        "seed": 4,
    }


def test_a_caption_may_start_with_a_dash_after_the_separator(monkeypatch):
    calls = behind(monkeypatch, "scaling_dit.sampling.sampler")
    cli.main(["sample", "--workdir=w", "--", "--help", "-x"])
    assert [caption for _, caption in calls[0][0][1]] == ["--help", "-x"]


def test_evaluate_takes_what_is_given(monkeypatch):
    calls = behind(monkeypatch, "scaling_dit.evaluation.run")
    assert (
        cli.main(
            ["evaluate", "--workdir=w", "--metrics=shapes_tifa,other", "--json", "--out=o", "--ema=0.99"]
        )
        == 75
    )
    ((args, kwargs),) = calls
    assert args == ("w", "o")
    assert kwargs == {
        "metrics": ["shapes_tifa", "other"], "items": 500, "as_json": True,
        "seed": 0, "step": None, "ema": "0.99", "sampler": None, "steps": None, "guidance": None,
        "guidance_rescale": None, "guidance_interval": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "verb", ["generate", "evaluation.run", "scaling.count_table", "train", "monitor.report"]
)
def test_the_functions_behind_the_verbs_take_the_flags(verb):
    """The calls above are made of fakes, so the real signatures are compared with them."""
    import importlib
    import inspect

    main = importlib.import_module(f"scaling_dit.{verb}").main
    names = ("seed", "step", "ema", "sampler", "steps", "guidance", "guidance_rescale", "guidance_interval")
    trained = dict.fromkeys(names)
    arguments = {
        "generate": (("w", [], "o"), trained | {"num": 1, "batch": None}),
        "evaluation.run": (("w", "o"), trained | {"metrics": None, "items": 1, "as_json": False}),
        "scaling.count_table": ((None, None, []), {"latents": None, "text": None, "as_json": False}),
        "train": (("config", "w", 0.0), {}),
        "monitor.report": (("w",), {"as_json": False}),
    }
    args, kwargs = arguments[verb]
    inspect.signature(main).bind(*args, **kwargs)


def test_count_prints_json(capsys):
    small = ["--config.backbone.hidden=32", "--config.backbone.depth=2", "--config.backbone.heads=2"]
    assert cli.main(["count", "--backbone=uvit", *small, "--latents=8,8,3", "--text=5,16", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["latents"], figures["text"]) == ([8, 8, 3], [5, 16])
    assert figures["params"] > 0


def test_remat_true_is_full_rematerialisation(capsys):
    small = ["--config.backbone.hidden=32", "--config.backbone.depth=2", "--config.backbone.heads=2"]
    kept = {}
    for remat in ("none", "true", "full"):
        override = f"--config.backbone.remat={remat}"
        command = ["count", "--backbone=uvit", *small, override, "--latents=8,8,3", "--text=5,16", "--json"]
        assert cli.main(command) == 0
        kept[remat] = json.loads(capsys.readouterr().out)["activation_bytes"]
    assert kept["true"] == kept["full"] < kept["none"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--config=shapes:smoke", "--config.text_encoder.dtype=foo"],
            "text_encoder.dtype='foo' is not a floating type; known: ",
        ),
        (["--config=shapes:smoke", "--config.backbone.remat=some"], "unknown remat policy 'some'"),
        (["--config=mine.py"], "mine.py, line 3: ZeroDivisionError: division by zero"),
    ],
)
def test_mistakes_in_what_a_run_is_built_of(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def half(x):\n    return 1\nRATE = 1 / 0\n")
    assert message in error(capsys, "train", *arguments, "--workdir=w")
    assert not (tmp_path / "w").exists()


def test_user_errors_of_a_verb_are_one_line(monkeypatch, capsys):
    def fail(*_):
        raise UserError("a folder\n is missing")

    monkeypatch.setitem(cli.VERBS, "train", cli.Verb("", "", lambda values: None, fail))
    assert error(capsys, "train") == "a folder is missing"
