"""docs/extending.md, "A verb": a copy of the package, changed as the page says, has the verb."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from scaling_dit import config
from tests.support import extending, page_edits

SECTION = extending.section("A verb")


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory):
    """(the copy, the files touched)."""
    folder = page_edits.copy_repository(tmp_path_factory.mktemp("copy"))
    return folder, page_edits.carry_out("A verb", folder)


@pytest.fixture
def run(carried_out, tmp_path):
    """Runs a command of the copy beside a run's config in runs/shapes."""
    (tmp_path / "runs/shapes").mkdir(parents=True)
    text = config.to_json(config.load("experiments/shapes.py:smoke"))
    (tmp_path / "runs/shapes/config.json").write_text(text)

    def call(command):
        program, *arguments = shlex.split(command)
        assert program == "scaling-dit"
        env = os.environ | {"PYTHONPATH": str(carried_out[0])}
        command = [sys.executable, "-m", "scaling_dit", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    return call


def test_it_touches_three_files(carried_out):
    assert carried_out[1] == ["scaling_dit/cli/show.py", "scaling_dit/cli/main.py", "README.md"]


def test_the_command_of_the_page_runs(run):
    (command,) = re.findall(r"```sh\n(.*)\n```", SECTION)
    done = run(command)
    assert done.returncode == 0, done.stderr
    resolved = config.dump(config.load("experiments/shapes.py:smoke")).splitlines()
    assert done.stdout.splitlines() == [line for line in resolved if line.startswith("optim.")][:3]


def test_a_mistake_is_answered_as_the_page_says(run):
    (command,) = re.findall(r"`(scaling-dit [^`]+?)` is answered by", SECTION)
    (line,) = re.findall(r"```text\n(.*?)\n```", SECTION)
    done = run(command)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"scaling-dit: error: {line}\n")


def test_it_is_in_the_help(run):
    assert "  show      Prints the config of a run, one field a line.\n" in run("scaling-dit --help").stdout
    assert "--most     fields to print at most (default 1000)\n" in run("scaling-dit show --help").stdout
