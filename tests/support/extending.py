"""Carries out a section of docs/extending.md on a copy of the package, and runs commands there."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

from tests.support.paths import DOCS, ROOT

_STEP = re.compile(
    r"^(?:Write `(?P<new>\S+)`|In `(?P<old>\S+)`, below `(?P<line>.+?)`):\n\n```\w+\n(?P<text>.*?)```",
    re.M | re.S,
)


def section(heading: str) -> str:
    """The text of a section."""
    return (DOCS / "extending.md").read_text().split(f"## {heading}\n", 1)[1].split("\n## ")[0]


def apply(heading: str, folder: pathlib.Path) -> list[str]:
    """Copies the package into a folder, does there what a section says, and returns the files that it touched."""
    for name in ("scaling_dit", "experiments"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    touched = []
    for step in _STEP.finditer(section(heading)):
        path = folder / (step["new"] or step["old"])
        touched.append(step["new"] or step["old"])
        if step["new"]:
            assert not path.exists()
            path.write_text(step["text"])
        else:
            before, line, after = path.read_text().partition(f"{step['line']}\n")
            assert line, f"{path} has no line {step['line']}"
            path.write_text(before + line + step["text"] + after)
    return touched


def commands(heading: str) -> list[list[str]]:
    """The arguments of the `scaling-dit` commands of a section."""
    blocks = re.findall(r"```sh\n(.*?)```", section(heading), re.S)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]


def run(folder: pathlib.Path, *arguments: str) -> str:
    """What Python with the copy on its path prints; fails with what it wrote to stderr."""
    environment = os.environ | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
