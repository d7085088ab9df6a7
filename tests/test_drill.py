"""The drill: what it counts as lost, the table it writes, and the drill itself in small."""

import random

import pytest

from tools import drill
from tools.drill import BEGIN, END, Ended, Row


def test_what_counts_as_lost():
    assert Ended(75, "scaling-dit: SIGTERM: saved step 3").fault(0, 75) == ""
    assert Ended(143, "a\nlast words\n").fault(0, 75) == "exit code 143: last words"
    broken = "Traceback (most recent call last):\n  File ...\nValueError: x\n"
    assert Ended(0, broken).fault(0) == "a traceback: ValueError: x"


def test_the_table_counts_tries_losses_and_codes(capsys):
    row = Row("SIGKILL", "train")
    for code, fault in ((137, ""), (137, "the losses differ"), (0, "")):
        row.count(code, fault)
    assert row.line() == "| SIGKILL | train | 3 | 1 | 0 (1), 137 (2) |"
    assert "the losses differ" in capsys.readouterr().err
    lines = drill.table([row, Row("SIGTERM", "train")], seed=5).splitlines()
    assert lines[0] == BEGIN and lines[-1] == END
    assert lines[1].startswith("3 tries, 1 lost (") and "seed 5" in lines[1]


def test_the_table_stands_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    for text in ("new", "newer"):
        drill.write(page, f"{BEGIN}\n{text}\n{END}")
    assert page.read_text() == f"before\n\n{BEGIN}\nnewer\n{END}\n\nafter\n"
    page.write_text("a page without them")
    with pytest.raises(SystemExit, match="has no lines"):
        drill.write(page, "x")


@pytest.mark.parametrize("kind", ["flip", "cut", "empty", "remove"])
def test_harm_changes_a_file(tmp_path, kind):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    drill.harm(path, kind, random.Random(0))
    left = path.read_bytes() if path.exists() else None
    assert left != bytes(range(200))
    if kind == "flip":
        assert len(left) == 200 and sum(a != b for a, b in zip(left, range(200), strict=True)) == 1


@pytest.mark.slow
def test_the_drill_in_small(tmp_path):
    assert drill.main(["--small", f"--page={tmp_path / 'out.md'}"]) == 0
    rows = [
        line.split("|") for line in (tmp_path / "out.md").read_text().splitlines() if line.startswith("| ")
    ]
    assert len(rows) > 15
    assert {row[4].strip() for row in rows[1:]} == {"0"}
