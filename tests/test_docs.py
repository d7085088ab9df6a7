"""The examples of the docs run as they stand, what they list is what the code has, and the site builds."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import scaling_dit
from scaling_dit import config
from scaling_dit.checkpoints.workdir import read_metrics
from scaling_dit.cli import exit_codes
from scaling_dit.cli import main as cli
from scaling_dit.cli.options import declared
from scaling_dit.config import own_code
from scaling_dit.config.experiment_files import installed_names
from scaling_dit.config.schema import FREE_FIELDS, FREE_SECTIONS
from scaling_dit.data.sources import folder
from scaling_dit.errors import StorageError
from scaling_dit.evaluation import run as evaluation
from scaling_dit.monitor import goodput
from scaling_dit.planning import report as plan_report
from scaling_dit.scaling.spec import STUDY
from scaling_dit.training import loop
from tests.support import xla
from tests.support.pages import blocks, commands, first_column, steps
from tests.support.paths import DOCS, ROOT

pytestmark = pytest.mark.usefixtures("verbs_on_one_device")

PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
# A run that is not the page's subject makes no grid, has no validation and no curves in TensorBoard.
QUIET = ["--config.eval.every=0", "--config.log.tensorboard=false"]


def quieten(monkeypatch):
    """Runs of the test that Python begins are QUIET too."""
    load = config.load
    monkeypatch.setattr(config, "load", lambda spec, overrides=(): load(spec, [*overrides, *QUIET]))


@pytest.mark.slow
def test_the_page_of_an_own_backbone_runs_as_typed_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    """In one folder; the runs are only shorter than on the page, and evaluate nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    small = ["--config.steps=2", "--config.batch=8", "--config.optim.warmup_steps=1", *QUIET]
    quieten(monkeypatch)
    names: dict = {}
    for kind, name, text in steps("own_backbone.md"):
        if kind == "file":
            assert len([line for line in text.splitlines() if line.strip()]) <= 45
            (tmp_path / name).write_text(text)
        elif kind == "python":
            exec(text, names)
        else:
            command = shlex.split(text)[1:]
            # As in a process of its own, in which nothing was named.
            monkeypatch.setattr(own_code, "_TRUSTED", set())
            assert cli.main(command + (small if command[0] == "train" else [])) == 0, capsys.readouterr().err
    assert names["images"].shape == (1, 16, 16, 3) and names["images"].dtype == np.uint8
    assert int(names["state"].step) == names["run"].steps
    kernel = names["state"].params["backbone"]["Conv_0"]["kernel"]
    assert kernel.shape == (3, 3, 3, 16)
    params = sum(x.size for x in jax.tree.leaves(names["state"].params["backbone"]))
    assert f"\n{params} " in capsys.readouterr().out
    written = load_file("exports/mine/model.safetensors")
    assert written["blocks.2.conv.weight"].shape == (64, 64, 3, 3)
    kernel = scaling_dit.load("runs/again").params["backbone"]["Conv_3"]["kernel"]
    np.testing.assert_array_equal(kernel, written["blocks.2.conv.weight"].transpose(2, 3, 1, 0))


@pytest.mark.slow
def test_a_folder_of_ones_own_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (lines,) = blocks("json", "own_images.md")
    rows = [json.loads(line) for line in lines.splitlines()]
    for number in range(12):
        rows.append({"file_name": f"images/{number}.png", "text": f"number {number}"})
    (tmp_path / "data/mine/images").mkdir(parents=True)
    for number, row in enumerate(rows):
        Image.new("RGB", (40, 30), (20 * number, 0, 90)).save(tmp_path / "data/mine" / row["file_name"])
    (tmp_path / "data/mine/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (command,) = commands("own_images.md")
    tiny = {"steps": 2, "batch": 8, "optim.warmup_steps": 1, "backbone.hidden": 32, "backbone.depth": 1,
            "backbone.patch": 8}  # fmt: skip
    assert cli.main(command + [f"--config.{key}={value}" for key, value in tiny.items()] + QUIET) == 0
    assert int(scaling_dit.load("runs/mine").step) == 2
    (example,) = blocks("python", "own_images.md")
    exec(example, {})
    (tmp_path / "data/mine/images/3.png").unlink()
    exec(example, {})
    none, counts, fault = capsys.readouterr().out.splitlines()[-3:]
    assert (none, counts) == ("{}", "{'missing_file': 1}") and "metadata.jsonl line 6" in fault


def test_the_kinds_of_damage_are_those_of_the_source():
    kinds = re.findall(r"^    (\w+) {2,}\S", folder.__doc__ or "", re.MULTILINE)
    assert len(kinds) == 11
    assert [cell.strip("`") for cell in first_column("own_images.md", "Damaged files")] == kinds


@pytest.mark.slow
@pytest.mark.usefixtures("opened_once")
def test_first_run_drawing_and_weights_one_after_the_other(tmp_path, monkeypatch, smoke_run, capsys):
    """Every command a reader meets on these pages, in the order of the pages, beside what the first one leaves.

    Runs that change something have one block and make no images.
    """
    monkeypatch.chdir(tmp_path)
    shutil.copytree(smoke_run, tmp_path / "runs/first")
    for page in ("first_run", "resume_and_determinism", "sampling_and_guidance", "evaluation", "weights"):
        for command in commands(f"{page}.md"):
            more = QUIET if command[0] == "train" else []
            if more and not {"--workdir=runs/first", "--workdir=runs/imported"} & {*command}:
                more = [*more, "--config.backbone.depth=1"]
            command = ["--items=4" if word == "--items=20" else word for word in command]
            assert cli.main([*command, *more]) == 0, (page, command, capsys.readouterr().err)
    assert "TIFA" in capsys.readouterr().out
    made = json.loads((tmp_path / "runs/imported/config.json").read_text())
    assert made["steps"] == 4 and (tmp_path / "runs/imported/checkpoints/4").is_dir()


def readme_commands() -> list[list[str]]:
    """The arguments of every `scaling-dit` command of the README, wherever the program is said to lie."""
    lines = [line for block in blocks("sh", "../README.md") for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line and pathlib.Path(line[0]).name == exit_codes.PROGRAM]


def test_the_commands_of_the_readme_are_understood():
    assert {verb for verb, *_ in readme_commands()} == set(cli.VERBS)
    for verb, *arguments in readme_commands():
        command = cli.VERBS[verb].parse(arguments)
        if verb == "study":
            # Reading its members counts them, which tests/test_studies.py does.
            assert command.config in installed_names(STUDY)
        elif spec := getattr(command, "config", None):
            config.load(spec, command.overrides)


# Verbs that need nothing of the commands before them.
ALONE = ("count", "plan")


@pytest.mark.slow
@pytest.mark.usefixtures("opened_once")
def test_the_commands_of_the_readme_run(tmp_path, monkeypatch, smoke_run, smoke_study, capsys):
    """In miniature, beside what `make demo` and `make study` would have left; digits has a test of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(smoke_run, tmp_path / "runs/demo")
    shutil.copytree(smoke_study, tmp_path / "runs/shapes_core")
    small = {
        "--config=shapes": "--config=shapes:smoke",
        "--config=shapes_core": "--config=shapes_core:smoke",
        "--items=500": "--items=4",
    }
    for command in readme_commands():
        # The miniature study has too few sizes for advice.
        if command[0] not in (*ALONE, "advise") and not any("digits" in word for word in command):
            more = QUIET if command[0] == "train" else []
            assert cli.main([small.get(word, word) for word in command] + more) == 0, capsys.readouterr().err
    assert (tmp_path / "runs/imported/config.json").exists() and (tmp_path / "exports/demo").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in readme_commands() if c[0] in ALONE], ids=" ".join)
def test_the_counts_and_plans_of_the_readme_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # The kernels, which take minutes to compile, are the subject of tests/planning.
    quick = ["--quick"] if command[0] == "plan" else []
    # `plan` starts a process: libtpu ends one whose XLA_FLAGS hold flags of the CPU compiler.
    with mock.patch.dict(os.environ, xla.plain_environment(), clear=True):
        assert cli.main([*command, *quick]) == 0
    told = capsys.readouterr().out
    wanted = {"plan": ": fits", "uvit": "2,344,200,356", "sdxl": "1,321,930,244"}
    assert next(text for word, text in wanted.items() if word in " ".join(command)) in told


@pytest.mark.slow
@pytest.mark.parametrize(
    "page, first",
    [
        ("api.md", "scaling_dit.train(run"),
        ("weights.md", "to_state_dict("),
    ],
)
def test_the_python_of_a_page_runs(page, first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quieten(monkeypatch)
    (example,) = [block for block in blocks("python", page) if first in block]
    names: dict = {}
    exec(example, names)
    if page == "api.md":
        assert names["images"].shape == (1, 16, 16, 3)
    else:
        jax.tree.map(np.testing.assert_array_equal, names["again"], scaling_dit.interop.load_state_dict(
            names["backbone"], names["state_dict"]))  # fmt: skip
        assert "pos_embed" in names["state_dict"]


def test_every_tag_of_a_run_is_explained_and_no_other(smoke_run):
    """All that a run writes is in the tables; what only other runs write is named here."""
    rows = [json.loads(line) for path in sorted((smoke_run / "metrics").glob("segment-*.jsonl"))
            for line in path.read_text().splitlines()]  # fmt: skip
    written = {name for row in read_metrics(smoke_run) for name in row} - {"step"}
    written |= {name for row in rows for name in row.get("images", ())} | {"parameter_overview"}
    assert any("parameter_overview" in row for row in rows) and any("hparams" in row for row in rows)
    text = (DOCS / "tensorboard.md").read_text()
    explained = set(
        re.findall(r"`((?:train|speed|validation|evaluation|data)/[\w-]+|samples|parameter_overview)`", text)
    )
    bins = {name for name in written if name.startswith("validation/loss_t")}
    assert "validation/loss_t0000-0199" in bins and len(bins) == 5
    elsewhere = {"evaluation/digit_accuracy", "data/damaged_KIND"}
    # Of chips with a known peak, and of several processes.
    elsewhere |= {
        f"speed/{name}" for name in ("mfu", "model_tflops_per_chip", "slowest_process", "slowest_host_wait")
    }
    assert written - bins == explained - bins - elsewhere - (TIFA - written)


TIFA = {
    f"evaluation/shapes_tifa_{kind}" for kind in ("color", "counting", "object", "shape", "size", "spatial")
}


def test_the_parts_of_goodput_are_explained():
    listed = first_column("resume_and_determinism.md", "Where the time went")
    assert listed == [part.replace("_", " ") for part in goodput.PARTS]


def test_exit_codes_are_those_of_the_program():
    codes = {int(code) for code in first_column("errors_and_exit_codes.md", "Exit codes")}
    assert codes == {
        loop.DONE,
        loop.NONFINITE,
        loop.SPIKE,
        loop.PREEMPTED,
        evaluation.INCOMPLETE,
        plan_report.FITS_NOT,
        exit_codes.USER_ERROR,
        exit_codes.INTERRUPTED,
        StorageError.exit_code,
    }


def test_the_flags_of_plan_are_those_of_the_program():
    listed = re.findall(r"--(\w+)", " ".join(first_column("plan.md", "Flags")))
    assert listed == [flag.name for flag in declared(cli.VERBS["plan"]) if flag.name != "config"]


def test_the_error_lines_are_in_the_code():
    """The parts of each line, between names and numbers that are filled in, are texts of the program."""
    package = pathlib.Path(scaling_dit.__file__).parent
    paths = [*package.rglob("*.py"), *(ROOT / "tpu").rglob("*.py")]
    code = " ".join(path.read_text() for path in sorted(paths))
    # Texts that run over lines.
    code = re.sub(r'"\s+f?"', "", code)
    lines = [line for cell in first_column("errors_and_exit_codes.md", "Frequent lines")
             for line in re.findall(r"`(.+?)`", cell)]  # fmt: skip
    assert len(lines) > 10
    for line in lines:
        for part in re.split(r" ?\.\.\. ?|config\.json|an integer|'clu'", line):
            assert part.strip() in code, line


def test_the_sections_that_may_change_are_listed():
    section = (DOCS / "resume_and_determinism.md").read_text().split("## What may change on resume\n")[1]
    listed = re.findall(r"`([\w.]+)`", section.split("\n\n")[0])
    assert sorted(listed) == sorted((*FREE_SECTIONS, *FREE_FIELDS))


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    for page in PAGES:
        html = (tmp_path / "site" / page).with_suffix(".html").read_text()
        assert 'src="http' not in html and 'stylesheet" href="http' not in html, page


@pytest.mark.slow
def test_the_papers_example_counts_what_the_paper_prints(capsys):
    (example,) = [block for block in blocks("python") if "h2048-d42-n16" in block]
    exec(example, {})
    assert capsys.readouterr().out.startswith("2,344,200,356 parameters, 781.9 G")


def test_the_listing_of_the_api_is_the_api():
    listed = re.findall(r"^scaling_dit\.(\w+)", blocks("python")[0], re.MULTILINE)
    assert sorted(listed) == sorted(name for name in scaling_dit.__all__ if not name.startswith("_"))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{page}" for page in PAGES)])
def test_every_link_into_the_repository_leads_somewhere(page):
    path = DOCS.parent / page
    # Code is no link: METRICS["digits"](batch=2).
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)#:]+)\)", prose)
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing
    assert links or page != "README.md"
