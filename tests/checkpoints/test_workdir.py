"""The folder of a run: it is a path, names every file that a run leaves, and is the only place that names them."""

import ast
import os
import pathlib

import pytest
from etils import epath

import scaling_dit
from scaling_dit.checkpoints.workdir import Workdir, read_config, read_metrics
from scaling_dit.errors import UserError

PACKAGE = pathlib.Path(scaling_dit.__file__).parent
# Models and tokenizers of other code have files of these names as well.
ELSEWHERE = {"config.json", "tokenizer.json"}
# Folders that are no run's: a study's, one of images from elsewhere, and what official tools read.
OTHERS = {
    "scaling/folder.py": {"compile_cache", "tensorboard"},
    "evaluation/request.py": {"evaluation"},
    "evaluation/layouts.py": {"samples"},
}


def names() -> set[str]:
    return {path.name for name, path in vars(Workdir("run")).items() if name != "folder"}


@pytest.mark.parametrize("folder", ["runs/one", "/tmp/one", "gs://bucket/one"])
def test_it_stands_for_a_path(folder):
    run = Workdir(folder)
    assert os.fspath(run) == str(run) == folder
    assert epath.Path(run) == epath.Path(folder) == run.folder
    assert os.fspath(Workdir(run).metrics) == f"{folder}/metrics"
    assert repr(run) == f"Workdir({folder!r})"


def test_a_run_leaves_nothing_that_it_does_not_name(smoke_run):
    left = {path.name for path in smoke_run.iterdir()}
    assert {"config.json", "tokenizer.json", "checkpoints", "metrics", "goodput"} <= left <= names()
    assert read_config(Workdir(smoke_run)) == read_config(smoke_run)
    assert read_metrics(smoke_run)[-1]["step"] == read_config(smoke_run).steps


def test_a_folder_without_a_config_holds_no_run(tmp_path):
    with pytest.raises(UserError, match=r"no run in .*: config.json is missing"):
        read_config(tmp_path)
    assert read_metrics(tmp_path) == []


def joined(tree: ast.AST) -> set[str]:
    """The constant names that a module joins to a path with `/`."""
    return {
        node.right.value
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Div)
        and isinstance(node.right, ast.Constant)
    }


def test_no_other_module_names_a_file_of_a_run():
    here = pathlib.Path("checkpoints/workdir.py")
    found = {
        path.relative_to(PACKAGE): joined(ast.parse(path.read_text())) & names()
        for path in PACKAGE.rglob("*.py")
    }
    assert found.pop(here) == names()
    more = {path.as_posix(): files - ELSEWHERE for path, files in found.items()}
    assert {path: files for path, files in more.items() if files} == OTHERS
