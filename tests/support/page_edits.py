"""Carries out a section of docs/extending.md in a copy of the repository.

A section says where each block of code goes, in one of these ways:

    In `FILE`, before the line `LINE`, ...:      the block goes there; "after the line" likewise
    In `FILE`, in place of `TEXT`, ...:          the block replaces the text, which must occur once
    At the end of `FILE`, ...:                   the block is appended
    Save as `FILE`:                              the block is the file

Without "In `FILE`" it is the file of the block before.
"""

import pathlib
import re
import shutil

from tests.support.paths import DOCS, ROOT

_BLOCK = re.compile(r"((?:[^\n]+\n)+)\n```(?:python|markdown)\n(.*?)```", re.DOTALL)
_FILE = re.compile(r"(?:In|At the end of|Save as)\s+`([\w/.]+\.\w+)`")
_PLACE = re.compile(r"(before the line|after the line|in place of)\s+`(.+?)`(?=,|:)")


def copy_repository(folder: pathlib.Path) -> pathlib.Path:
    """The package, the experiments and the docs, in `folder`, to be edited there."""
    for name in ("scaling_dit", "experiments", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def carry_out(heading: str, root: pathlib.Path) -> list[str]:
    """Makes every edit of a section of docs/extending.md; returns the files that it touches."""
    section = (DOCS / "extending.md").read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ")[0]
    touched: list[str] = []
    for text, block in _BLOCK.findall(section):
        named = _FILE.findall(text)
        file = named[-1] if named else touched[-1]
        path = root / file
        place = _PLACE.findall(text)
        if "Save as" in text:
            assert not path.exists(), f"{file} is there already"
            path.write_text(block)
        elif "At the end of" in text:
            path.write_text(path.read_text() + block)
        else:
            ((how, wanted),) = place
            whole = path.read_text()
            found = wanted if how == "in place of" else f"{wanted}\n"
            assert whole.count(found) == 1, f"{file} has {whole.count(found)} times {wanted!r}"
            new = {
                "before the line": block + found,
                "after the line": found + block,
                "in place of": block.strip(),
            }
            path.write_text(whole.replace(found, new[how]))
        touched += [file] if file not in touched else []
    return touched
