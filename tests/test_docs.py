"""The examples of the docs run as they stand."""

import pathlib
import re

import numpy as np
import pytest

import scaling_dit
from scaling_dit import cli

DOCS = pathlib.Path(__file__).parent.parent / "docs"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / "api.md").read_text(), re.DOTALL)


@pytest.fixture
def beside_my_file(tmp_path, monkeypatch):
    """A working directory with the page's `my_file.py`."""
    (source,) = [block for block in blocks("python") if "class MyBackbone" in block]
    assert len([line for line in source.splitlines() if line.strip()]) <= 45
    (tmp_path / "my_file.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_backbone_of_a_users_own_trains_and_draws_from_python(beside_my_file, capsys):
    (example,) = [block for block in blocks("python") if "scaling_dit.train(run" in block]
    names: dict = {}
    exec(example, names)
    assert names["pictures"].shape == (1, 16, 16, 3) and names["pictures"].dtype == np.uint8
    assert int(names["state"].step) == names["run"].steps
    kernel = names["state"].params["backbone"]["Conv_0"]["kernel"]
    assert kernel.shape == (3, 3, 3, 16)
    params = int(capsys.readouterr().out.split()[0])
    assert params == sum(x.size for x in __import__("jax").tree.leaves(names["state"].params["backbone"]))


def test_the_commands_for_it_run(beside_my_file, capsys):
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    train, count = commands
    small = ["--config.steps=2", "--config.batch=8", "--config.eval.every=0", "--config.optim.warmup_steps=1"]
    assert cli.main(train.split()[1:] + small) == 0
    assert cli.main(count.split()[1:]) == 0
    assert "parameters" in capsys.readouterr().out.lower()


def test_the_papers_example_counts_what_the_paper_prints(capsys):
    (example,) = [block for block in blocks("python") if "h2048-d42-n16" in block]
    exec(example, {})
    assert capsys.readouterr().out.startswith("2,344,200,356 parameters, 781.9 G")


def test_the_listing_of_the_api_is_the_api():
    listed = re.findall(r"^scaling_dit\.(\w+)", blocks("python")[0], re.MULTILINE)
    assert sorted(listed) == sorted(name for name in scaling_dit.__all__ if not name.startswith("_"))


@pytest.mark.parametrize("page", ["README.md", "docs/api.md", "CONTRIBUTING.md"])
def test_every_link_into_the_repository_leads_somewhere(page):
    path = DOCS.parent / page
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing
    assert links or page != "README.md"
