"""docs/extending.md, "A verb": a copy of the package, changed as the page says, has the verb."""

import pytest

from scaling_dit import config
from tests.support import extending


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return extending.carry_out("A verb", tmp_path_factory.mktemp("copy"))


@pytest.fixture
def beside(tmp_path):
    """A folder with a run's config in runs/shapes."""
    (tmp_path / "runs/shapes").mkdir(parents=True)
    text = config.to_json(config.load("experiments/shapes.py:smoke"))
    (tmp_path / "runs/shapes/config.json").write_text(text)
    return tmp_path


def test_it_touches_three_files(copy):
    assert copy.touched == {"scaling_dit/cli/show.py", "scaling_dit/cli/main.py", "README.md"}


def test_the_command_of_the_page_runs(copy, beside):
    (command,) = copy.commands
    resolved = config.dump(config.load("experiments/shapes.py:smoke")).splitlines()
    shown = copy.run(command, beside).splitlines()
    assert shown == [line for line in resolved if line.startswith("optim.")][:3]


def test_a_mistake_is_answered_as_the_page_says(copy, beside):
    command, line = copy.refused
    done = copy.call(command, beside)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"scaling-dit: error: {line}\n")


def test_it_is_in_the_help(copy, beside):
    whole, own = copy.run("scaling-dit --help", beside), copy.run("scaling-dit show --help", beside)
    assert "  show      Prints the config of a run, one field a line.\n" in whole
    assert "--most     fields to print at most (default 1000)\n" in own
