"""The layers of the package, and that the contract of pyproject.toml finds an import that breaks them."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.support.paths import ROOT


def lint_imports(folder):
    """(exit code, what is printed) of `lint-imports` on the package of a folder."""
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter import cli; cli.lint_imports_command()", "--no-cache"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_package_keeps_its_contracts():
    code, text = lint_imports(ROOT)
    assert code == 0 and "0 broken" in text, text


def copy_of(folder):
    """A folder that now has the package, `tpu/` where it installs, and their contracts."""
    ignore = shutil.ignore_patterns("__pycache__", "*.txt")
    shutil.copytree(ROOT / "scaling_dit", folder / "scaling_dit", ignore=ignore)
    shutil.copytree(ROOT / "tpu", folder / "scaling_dit" / "tpu", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_tpu_keeps_the_contracts_where_it_installs(tmp_path):
    code, text = lint_imports(copy_of(tmp_path))
    assert code == 0 and "0 broken" in text, text


# What breaks a contract: the file, what stands in it, the contract and what is said of it.
BREAKING = {
    "what is on top": (
        "cli/tpu.py",
        "def late():\n    from scaling_dit.tpu import verbs",
        "layers",
        "scaling_dit.cli is not allowed to import scaling_dit.tpu",
    ),
    "upward": (
        "nn/layers.py",
        "from scaling_dit.training import loop",
        "layers",
        "scaling_dit.nn is not allowed to import scaling_dit.training",
    ),
    "upward in a function": (
        "config/__init__.py",
        "def late():\n    import scaling_dit.evaluation",
        "layers",
        "scaling_dit.config is not allowed to import scaling_dit.evaluation",
    ),
    "upward from the ground": (
        "errors.py",
        "from scaling_dit import trees",
        "layers",
        "scaling_dit.errors is not allowed to import scaling_dit.trees",
    ),
    "a new folder": ("another/__init__.py", "", "layers", "another"),
    "a cycle": (
        "data/sources/__init__.py",
        "def late():\n    from scaling_dit.data import loader",
        "no cycles",
        "- .sources -> .loader (1 import)",
    ),
    "orbax": (
        "training/loop.py",
        "import orbax.checkpoint",
        "only checkpoints/store.py knows Orbax",
        "scaling_dit.training.loop -> orbax",
    ),
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """(exit code, what is printed) for a copy in which all contracts are broken: reading the imports takes the time."""
    folder = copy_of(tmp_path_factory.mktemp("broken"))
    for file, line, _, _ in BREAKING.values():
        path = folder / "scaling_dit" / file
        path.parent.mkdir(exist_ok=True)
        path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    return lint_imports(folder)


@pytest.mark.parametrize("what", BREAKING)
def test_an_import_that_breaks_a_contract_is_reported(broken, what):
    code, text = broken
    _, _, contract, reported = BREAKING[what]
    assert code == 1 and f"{contract} BROKEN" in text, text
    assert reported in text.split("Broken contracts")[1], text


def test_a_test_file_imports_from_no_other_test_file():
    between = re.compile(
        r"^\s*(from tests(\.\w+)*\.test_|from tests(\.\w+)* import test_|import tests.*\btest_)", re.M
    )
    paths = sorted((ROOT / "tests").rglob("*.py"))
    assert not [str(path.relative_to(ROOT)) for path in paths if between.search(path.read_text())]
    assert between.search("    from tests.training.test_optim import run\n")
