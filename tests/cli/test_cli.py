"""The command line: help, exit codes, one line per mistake, and what reaches the functions behind the verbs."""

import dataclasses
import gc
import importlib
import inspect
import json
import os
import shlex
import subprocess
import sys
import time
import types

import pytest

from scaling_dit import __main__ as program
from scaling_dit import config as config_lib
from scaling_dit.cli import exit_codes
from scaling_dit.cli import main as cli
from scaling_dit.cli.options import declared
from scaling_dit.cli.verb import Verb
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


def test_a_program_seldom_collects_everything_while_it_starts(monkeypatch):
    before = gc.get_threshold()
    monkeypatch.setattr(program.signals, "install", lambda: None)
    # A signal that an earlier test got would end this process.
    monkeypatch.setattr(program.signals, "first", lambda: None)
    monkeypatch.setattr(cli, "main", lambda: 0)
    try:
        with pytest.raises(SystemExit, match="0"):
            program.run()
        # The young are collected as before.
        assert gc.get_threshold() == (*before[:2], 100)
    finally:
        gc.set_threshold(*before)


@pytest.fixture(autouse=True)
def path(monkeypatch):
    # main() adds the working directory.
    monkeypatch.setattr(sys, "path", list(sys.path))


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
    calls, real_one = [], getattr(importlib.import_module(module), name)

    def record(*args, **kwargs):
        # The real function must take what it is given.
        inspect.signature(real_one).bind(*args, **kwargs)
        calls.append((args, kwargs))
        return 75

    monkeypatch.setattr(f"{module}.{name}", record)
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
    show = "from scaling_dit.cli import main as cli; [cli.main([verb, '--help']) for verb in cli.VERBS]"
    command = [sys.executable, "-c", f"import sys; {show}; print(sorted(sys.modules))"]
    modules = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for heavy in ("jax", "flax", "tensorflow", "torch", "numpy", "ml_collections", "scaling_dit.training"):
        assert f"'{heavy}'" not in modules


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_shows_every_flag_and_an_example(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    spec = cli.VERBS[verb]
    assert all(f"  --{one.name} " in text and one.help in text for one in declared(spec))
    assert spec.summary() in text
    assert f"example: scaling-dit {verb} " in text
    assert ("--config.KEY=VALUE" in text) == spec.OVERRIDES


@pytest.mark.parametrize("verb", cli.VERBS)
def test_examples_parse(verb):
    program, name, *arguments = shlex.split(cli.VERBS[verb].EXAMPLE)
    assert (program, name) == (exit_codes.PROGRAM, verb)
    cli.VERBS[verb].parse(arguments)


def test_help_says_what_is_required_allowed_and_the_default(capsys):
    cli.main(["filter", "--help"])
    lines = {
        line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")
    }
    assert lines["--source"].endswith("(required)")
    assert lines["--duplicates"].endswith("(one of none, exact, near; default exact)")
    assert lines["--distance"].endswith("(default 3)") and "(" not in lines["--json"]


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
        (["sample", "--workdir=x"], "no prompts: give them as arguments"),
        (
            ["sample", "--workdir=x", "--steps=0", "a"],
            "sample: flag --steps=0: it must be from 1 to 999; see scaling-dit sample --help",
        ),
        (
            ["sample", "--workdir=x", "--seed=one", "a"],
            "--seed=one: it must be from 0 to 2**32 - 1, or several separated by commas",
        ),
        (["sample", "--workdir=x", "--guidance=nan", "a"], "--guidance=nan: it must be 0 or more"),
        (["plan", "--config=shapes"], "plan needs --topology; for example: scaling-dit plan"),
        (["export", "--workdir=x", "--out=y"], "export needs --to"),
        (["import", "--from=x", "--workdir=y"], "import needs --config"),
        (
            ["sample", "--workdir=x", "--guidance_interval=a,b", "c"],
            "=a,b: it must be two timesteps (low, high) from 0 to 1000",
        ),
        (["evaluate", "--items=0", "--workdir=x"], "--items=0"),
        (
            ["evaluate", "--workdir=x", "--config.steps=3"],
            "--config.steps=3: evaluate takes fields of metrics only",
        ),
        (["count"], "count needs either --config or --backbone"),
        (
            ["count", "--backbone=uvit", "--latents=8,8"],
            "--latents=8,8: it must be height,width,channels in whole",
        ),
        (["count", "--backbone=uvit", "--config.steps=3"], "only --config.backbone.KEY=VALUE can be set"),
    ],
)
def test_one_line_for_a_mistake(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in error(capsys, *arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param(
            ["train", "--config=shapes", "--workdir=w", "--config.optim.lerning_rate=1"],
            "'optim.learning_rate'",
            marks=pytest.mark.slow,
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


def doing(monkeypatch, work):
    """Puts a verb `work` into the table that calls the function."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Work(Verb):
        """Works."""

        EXAMPLE = "scaling-dit work"

        def run(self):
            return work()

    monkeypatch.setitem(cli.VERBS, "work", Work)


def test_a_fault_keeps_its_traceback(monkeypatch):
    doing(monkeypatch, lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["work"])


def test_interrupt(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    doing(monkeypatch, interrupt)
    assert cli.main(["work"]) == 130
    assert capsys.readouterr().err == "scaling-dit: interrupted\n"


def test_user_errors_of_a_verb_are_one_line(monkeypatch, capsys):
    def fail():
        raise UserError("a folder\n is missing")

    doing(monkeypatch, fail)
    assert error(capsys, "work") == "a folder is missing"


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
    assert (done.returncode, done.stderr) == (exit_codes.INTERRUPTED, "")


def test_train_gets_the_config_and_returns_the_exit_code(monkeypatch):
    calls = behind(monkeypatch, "scaling_dit.training.loop")
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
    assert (config, workdir, kwargs) == (loaded, "runs/x", {"strict": False, "start": None})
    # For goodput.
    assert started <= began <= time.time()
    overrides = [
        "config.steps=5",
        "config.mesh.data=-1",
        "noconfig.text_mask",
        "config.log.tensorboard",
        "config.b=c",
    ]
    assert loads == [("shapes:smoke", tuple(f"--{override}" for override in overrides))]


def test_a_process_of_several_is_started_again_with_the_same_command(monkeypatch):
    started = []
    monkeypatch.setattr(
        "scaling_dit.parallel.processes.run_supervised", lambda *args: started.append(args) or 0
    )
    command = ["train", "--config=shapes:smoke", "--workdir=w", "--config.steps", "3"]
    command += ["--coordinator=localhost:8000", "--processes=2", "--process=1"]
    assert cli.main(command) == 0
    ((_, membership, settings, arguments),) = started
    assert list(arguments) == command
    assert (membership.coordinator, membership.processes, membership.process) == ("localhost:8000", 2, 1)
    assert settings().to_dict() == config_lib.defaults().processes.to_dict()


@pytest.mark.usefixtures("on_one_device")
def test_a_config_is_resolved_once_a_command(monkeypatch, tmp_path, smoke_run):
    resolved = []
    module = sys.modules["scaling_dit.config.resolve"]
    real_one = module.complete
    monkeypatch.setattr(module, "complete", lambda config: resolved.append(config) or real_one(config))
    behind(monkeypatch, "scaling_dit.planning.report")
    behind(monkeypatch, "scaling_dit.curation.job")
    behind(monkeypatch, "scaling_dit.training.loop")
    for command in (
        ["plan", "--config=shapes:smoke", "--topology=v5p:2x2x1", "--slices=2"],
        ["prepare", "--config=shapes:smoke", f"--out={tmp_path}"],
        ["train", "--config=shapes:smoke", f"--workdir={tmp_path}"],
        ["train", f"--workdir={smoke_run}", "--config.log.every=2"],
    ):
        assert cli.main(command) == 75
        assert len(resolved) == 1, command
        resolved.clear()
    assert cli.main(["count", "--config=shapes:smoke"]) == 0
    assert cli.main(["sample", f"--workdir={smoke_run}", f"--out={tmp_path}", "a red circle"]) == 0
    assert len(resolved) == 2


def test_sample_gathers_prompts_and_flags(monkeypatch, tmp_path):
    calls = behind(monkeypatch, "scaling_dit.evaluation.export", "sample_prompts")
    (tmp_path / "more.txt").write_text("c\n")
    file = tmp_path / "more.txt"
    flags = ["--guidance=2,7.5", "--step=100", "--ema=none", "--num=3", "--batch=8", "--steps=7"]
    flags += [
        "--seed=4,5",
        "--store=tar",
        "--sampler=dpmpp_2m",
        "--guidance_rescale=0.7",
        "--guidance_interval=200,800",
    ]
    assert (
        cli.main(["sample", "b", "--workdir=w", "--prompt=a", f"--prompts_file={file}", *flags, "b2"]) == 75
    )
    ((args, kwargs),) = calls
    assert args == ("w", ["a", "b", "b2"], str(file), None, None)
    changes = {"sampler": "dpmpp_2m", "steps": 7, "guidance_rescale": 0.7}
    changes |= {"guidance_interval": (200.0, 800.0), "batch": 8}
    assert kwargs == {
        "step": 100, "ema": "none", "num": 3, "seed": (4, 5), "changes": changes, "guidance": (2.0, 7.5),
        "store": "tar", "layout": None, "own_code": False, "condition": (), "image": None,
    }  # fmt: skip


def test_a_prompt_may_start_with_a_dash_after_the_separator(monkeypatch):
    calls = behind(monkeypatch, "scaling_dit.evaluation.export", "sample_prompts")
    cli.main(["sample", "--workdir=w", "--", "--help", "-x"])
    assert calls[0][0][1] == ["--help", "-x"]


def test_evaluate_takes_what_is_given(monkeypatch):
    calls = behind(monkeypatch, "scaling_dit.evaluation.run")
    command = [
        "evaluate",
        "--workdir=w",
        "--metrics=shapes_tifa, other",
        "--json",
        "--out=o",
        "--ema=0.99",
        "--steps=3",
        "--judge=shapes",
        "--judge_option=a=1",
        "--judge_option=b=2",
        "--watch=5",
        "--config.metrics.shapes_tifa.batch=2",
    ]
    assert cli.main(command) == 75
    ((args, kwargs),) = calls
    assert args == ("w", "o")
    assert kwargs == {
        "metrics": ("shapes_tifa", "other"), "items": None, "as_json": True, "seed": (0,), "step": None, "ema": "0.99",
        "changes": {"steps": 3}, "guidance": (), "store": "", "images": "", "watch": 5.0, "reference": "",
        "own_code": False,
        "shared": {"judge": "shapes", "judge_options": ("a=1", "b=2")},
        "overrides": ("--config.metrics.shapes_tifa.batch=2",),
    }  # fmt: skip


def test_count_prints_json(capsys):
    small = ["--config.backbone.hidden=32", "--config.backbone.depth=2", "--config.backbone.heads=2"]
    assert cli.main(["count", "--backbone=uvit", *small, "--latents=8,8,3", "--text=5,16", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["latents"], figures["text"]) == ([8, 8, 3], [5, 16])
    assert figures["params"] > 0


def test_remat_true_is_full_rematerialisation(capsys):
    small = ["--config.backbone.hidden=32", "--config.backbone.depth=1", "--config.backbone.heads=2"]
    kept = {}
    # One block, for each remat is traced with its gradients.
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
