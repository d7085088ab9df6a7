"""Carries out a section of docs/extending.md on a copy of the repository, and runs Python and commands there.

The steps of a section have one of these forms:

    Write `FILE`:                     the block is a new file
    In `FILE`, below `LINE`:          the block goes below the line, which must occur once
    In `FILE`:                        the block is a diff, whose old lines must occur once
    ```sh                             commands; those of `python` are steps, those of `scaling-dit` show the result
"""

import dataclasses
import filecmp
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable

from tests.support import xla
from tests.support.paths import DOCS, ROOT

_STEP = re.compile(
    r"^(?:Write `(?P<new>\S+)`|In `(?P<old>\S+?)`(?:, below `(?P<line>.+?)`)?):\n\n```(?P<kind>\w+)\n(?P<text>.*?)```",
    re.M | re.S,
)
# Arguments of `train` that leave one checkpoint, after two steps, and generate no images.
TINY = (
    "--config.steps=2",
    "--config.eval.every=0",
    "--config.eval.metrics=()",
    "--config.log.tensorboard=false",
)
_HERE = "here the code begins"
_COPIED = ("scaling_dit", "experiments", "tools", "docs", "README.md")


@dataclasses.dataclass(frozen=True)
class Copy:
    """The repository as it is after a section was carried out.

    Attributes:
      folder: where it lies.
      section: the text of the section.
      printed: what the code printed that ran in the process of the section's last step, errors last.
      code: the exit code of that process.
    """

    folder: pathlib.Path
    section: str
    printed: str = ""
    code: int = 0

    @property
    def touched(self) -> set[str]:
        """The files that are new, or other than in the repository."""
        files = (path for path in self.folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
        names = {path.relative_to(self.folder) for path in files}
        same = filecmp.cmpfiles(ROOT, self.folder, map(str, names), shallow=False)[0]
        return set(map(str, names)) - set(same)

    @property
    def commands(self) -> list[str]:
        """The `scaling-dit` commands of the section."""
        return [line for line in _commands(self.section) if line.startswith("scaling-dit ")]

    @property
    def refused(self) -> tuple[str, str]:
        """The command that the section says is refused, and the error line that it gives."""
        form = r"`(scaling-dit [^`]+)` is refused:\n\n```text\n(.*?)\n```"
        ((command, line),) = re.findall(form, self.section)
        return command, line

    def python(self, code: str, cwd: pathlib.Path | None = None) -> str:
        """What code prints that imports the copy."""
        return _output(self._start(["-c", code], cwd or self.folder))

    def run(self, command: str, cwd: pathlib.Path, *more: str) -> str:
        """What a `scaling-dit` command of the copy prints, with more arguments."""
        return _output(self.call(command, cwd, *more))

    def call(self, command: str, cwd: pathlib.Path, *more: str) -> subprocess.CompletedProcess[str]:
        """A finished `scaling-dit` command of the copy, which may have failed."""
        program, *arguments = shlex.split(command)
        assert program == "scaling-dit"
        return self._start(["-m", "scaling_dit", *arguments, *more], cwd)

    def _start(self, arguments: list[str], cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(self.folder), "XLA_FLAGS": xla.flags(devices=1)}
        return subprocess.run(
            [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
        )


def typed(commands: list[str], cwd: pathlib.Path, *more: str) -> str:
    """Code that gives `scaling-dit` commands in its own process, each with more arguments; it ends where one fails."""
    lines = ["import os, sys", "from scaling_dit.cli.main import main", f"os.chdir({str(cwd)!r})"]
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "scaling-dit"
        lines += [f"if code := main({[*arguments, *more]!r}):", "    sys.exit(code)"]
    return "\n".join(lines)


def carry_out(
    heading: str, folder: pathlib.Path, then: Callable[[Copy], str] | None = None, *, commands: bool = True
) -> Copy:
    """Copies the repository into a folder and does there what a section says.

    Args:
      heading: of the section.
      folder: for the copy.
      then: gives code that runs in the process of the section's last `python` step: another would load jax again.
      commands: whether commands of `python` are run too, which takes a few seconds each.
    """
    for name in _COPIED:
        if (ROOT / name).is_dir():
            # With what Python compiled, which holds as long as a file has its time and size.
            shutil.copytree(ROOT / name, folder / name)
        else:
            shutil.copy2(ROOT / name, folder)
    section = (DOCS / "extending.md").read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ")[0]
    steps = list(_STEP.finditer(section))
    # No block of code is overlooked.
    assert steps and len(steps) == len(re.findall(r"^```(?!sh\b|text\b)\w+$", section, re.M))
    for step in steps:
        _edit(folder, step)
    copy = Copy(folder, section)
    modules = [shlex.split(command)[1:] for command in _commands(section) if command.startswith("python ")]
    if not commands:
        return copy
    if then is None:
        for arguments in modules:
            _output(copy._start(arguments, folder))
        return copy
    ((option, module),) = modules
    assert option == "-m"
    lines = [
        "import runpy",
        f"runpy.run_module({module!r}, run_name='__main__')",
        f"print({_HERE!r})",
        then(copy),
    ]
    done = copy._start(["-c", "\n".join(lines)], folder)
    assert _HERE in done.stdout, done.stderr
    return dataclasses.replace(
        copy, printed=done.stdout.split(f"{_HERE}\n")[1] + done.stderr, code=done.returncode
    )


def _edit(folder: pathlib.Path, step: re.Match[str]) -> None:
    path, text = folder / (step["new"] or step["old"]), step["text"]
    if step["new"]:
        assert not path.exists()
        path.write_text(text)
        return
    if step["kind"] == "diff":
        assert not step["line"]
        lines = text.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
    else:
        before = f"{step['line']}\n"
        after = before + text
    whole = path.read_text()
    assert f"\n{whole}".count(f"\n{before}") == 1, f"{step['old']} does not have these lines once:\n{before}"
    path.write_text(f"\n{whole}".replace(f"\n{before}", f"\n{after}")[1:])


def _commands(section: str) -> list[str]:
    return [line for block in re.findall(r"```sh\n(.*?)```", section, re.S) for line in block.splitlines()]


def _output(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout
