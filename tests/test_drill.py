"""The drill: what it counts as lost, the table it writes, and the drill itself in small."""

import os
import random
import subprocess
import sys

import pytest

from tools import drill, marked
from tools.drill import BEGIN, END, Row, Table
from tools.drill_commands import Command, Ended, changed_environment, files_of


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
    lines = drill.as_text([row, Row("SIGTERM", "train")], seed=5).splitlines()
    assert lines[0] == BEGIN and lines[-1] == END
    assert lines[1].startswith("3 tries, 1 lost (") and "seed 5" in lines[1]


def test_the_table_stands_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    for text in ("new", "newer"):
        marked.write(page, f"{BEGIN}\n{text}\n{END}", BEGIN, END)
    assert page.read_text() == f"before\n\n{BEGIN}\nnewer\n{END}\n\nafter\n"
    page.write_text("a page without them")
    with pytest.raises(SystemExit, match="has no lines"):
        marked.write(page, "x", BEGIN, END)


@pytest.mark.parametrize("kind", ["flip", "cut", "empty", "remove"])
def test_harm_changes_a_file(tmp_path, kind):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    drill.harm(path, kind, random.Random(0))
    left = path.read_bytes() if path.exists() else None
    assert left != bytes(range(200))
    if kind == "flip":
        assert len(left) == 200 and sum(a != b for a, b in zip(left, range(200), strict=True)) == 1


def test_a_drill_goes_on_where_it_was_stopped(tmp_path):
    kept, page = tmp_path / "rows.json", tmp_path / "page.md"
    first = Table(kept, page, 3)
    first.add(first.row("SIGKILL", "train"), 137)
    first.add(first.row("SIGKILL", "train"), 0)
    first.row("SIGTERM", "train")
    again = Table(kept, page, 3)
    assert again.row("SIGKILL", "train") == Row("SIGKILL", "train", 2, 0, {0: 1, 137: 1})
    again.add(again.row("SIGTERM", "train"), 75, "the losses differ")
    text = page.read_text()
    assert "3 tries, 1 lost" in text and text.count("SIGKILL") == 1
    assert [row.tries for row in Table(kept, page, 3).rows] == [2, 1]


def test_files_are_the_same_wherever_they_lie(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "file").write_text(f"made in {tmp_path / name}")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    for name, times in (("a", 1), ("b", 2)):
        (tmp_path / name / "results.jsonl").write_text('{"metric": "x"}\n' * times)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    (tmp_path / "b" / "sub" / "file").write_text("another")
    assert files_of(tmp_path / "a") != files_of(tmp_path / "b")


def test_the_environment_of_a_drill_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("DRILL_A", "1")
    monkeypatch.delenv("DRILL_B", raising=False)
    with changed_environment({"DRILL_A": "2", "DRILL_B": "3"}):
        assert (os.environ["DRILL_A"], os.environ["DRILL_B"]) == ("2", "3")
    assert os.environ["DRILL_A"] == "1" and "DRILL_B" not in os.environ


@pytest.mark.slow
def test_the_drill_in_small(tmp_path):
    assert drill.main(["--small", f"--page={tmp_path / 'out.md'}"]) == 0
    rows = [
        line.split("|") for line in (tmp_path / "out.md").read_text().splitlines() if line.startswith("| ")
    ]
    assert [row[3].strip() for row in rows] == ["tries", "1", "1", "1", "1"]
    assert {row[4].strip() for row in rows[1:]} == {"0"}


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the kernel does not say")
def test_a_handler_is_seen_once_it_is_installed(tmp_path):
    code = (
        "import signal, sys; sys.stdin.read(1); signal.signal(15, lambda *a: None); print(flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1) as process:
        command = Command(process, tmp_path / "errors")
        assert not command.handles_signals()
        process.stdin.write(b"xx")
        process.stdin.flush()
        process.stdout.readline()
        assert command.handles_signals()
        process.stdin.close()
