"""What the tests of the documentation read off its pages."""

import re
import shlex

from tests.support.paths import DOCS


def blocks(language: str, page: str = "api.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The arguments of every `scaling-dit` command of a page's `sh` blocks."""
    lines = [line for block in blocks("sh", page) for line in block.splitlines()]
    assert all(line.startswith("scaling-dit ") for line in lines)
    return [shlex.split(line)[1:] for line in lines]


def first_column(page: str, heading: str) -> list[str]:
    """The first cells of the table under a heading, without the table's own."""
    section = (DOCS / page).read_text().split(f"## {heading}\n", 1)[1].split("\n## ")[0]
    return re.findall(r"^\| (.+?) \|", section, re.MULTILINE)[1:]


def steps(page: str) -> list[tuple[str, str, str]]:
    """What a reader does on a page, from top to bottom.

    Each is ("file", its name, text to save), ("python", "", code to run) or ("sh", "", a command).
    """
    found = []
    pattern = r"(?:Save as `(?P<name>[\w.]+)`:\s+)?```(?P<kind>python|sh)\n(?P<text>.*?)```"
    for block in re.finditer(pattern, (DOCS / page).read_text(), re.DOTALL):
        if block["name"]:
            found.append(("file", block["name"], block["text"]))
        elif block["kind"] == "python":
            found.append(("python", "", block["text"]))
        else:
            found += [("sh", "", line) for line in block["text"].splitlines()]
    return found
