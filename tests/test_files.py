"""Paths that a user wrote, and JSON files of this program."""

import inspect
import os
import pathlib

import pytest
from etils import epath

from scaling_dit.checkpoints.workdir import Workdir
from scaling_dit.config.experiment_files import read_experiment
from scaling_dit.data.sources import create_source
from scaling_dit.encoders.subwords import SubwordTokenizer
from scaling_dit.errors import UserError
from scaling_dit.files import expand, parse_json, read_json
from scaling_dit.weights import places
from tests.conftest import SLOW_WORDS
from tests.support import attention_checks, mistakes
from tests.support.paths import SUPPORT


def test_no_helper_makes_tests_slow_but_those_that_collecting_knows():
    """A file without these words is not read for the slow suite (tests/conftest.py)."""
    marking = [
        path.name for path in SUPPORT.rglob("*.py") for _ in range(path.read_text().count("mark.slow"))
    ]
    assert sorted(marking) == ["attention_checks.py", "mistakes.py"]
    assert "mark.slow" in inspect.getsource(mistakes.swept)
    assert [mark for case in attention_checks.on_meshes.args[1] for mark in getattr(case, "marks", ())]
    assert {"swept", "on_meshes"} < set(SLOW_WORDS)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, an empty folder to start from, and two variables."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RUNS", "/data/runs")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path / "home"


def test_a_path_is_expanded_as_a_shell_does(home):
    assert expand("~") == str(home)
    assert expand("~/runs/a") == f"{home}/runs/a"
    assert expand(pathlib.Path("~/a")) == f"{home}/a"
    assert expand("$RUNS/a") == expand("${RUNS}/a") == "/data/runs/a"
    assert expand("gs://bucket$RUNS") == "gs://bucket/data/runs"
    # Neither a home folder nor a variable.
    for text in (
        "a~b",
        "./~x",
        "runs/~",
        "a$",
        "a$5",
        "5$",
        "a$(b)",
        "lr[1e-3]",
        "a\\b",
        "a#b?c%d e",
        "日本",
        "-x",
    ):
        assert expand(text) == text


def test_a_path_that_exists_with_its_dollar_signs_is_that_path(home):
    for name in ("$RUNS", "$NOWHERE", "a${EMPTY}"):
        pathlib.Path(name).mkdir()
        assert expand(name) == name


@pytest.mark.parametrize(
    "path, message",
    [
        ("$NOWHERE/x", "the environment variable NOWHERE is not set"),
        ("x/${NOWHERE}", "the environment variable NOWHERE is not set"),
        ("$EMPTY/x", "the environment variable EMPTY is not set"),
        ("~nobody-of-this-name/x", "there is no home folder of '~nobody-of-this-name'; write ./~nobody"),
        ("a\0b", "is no path: it holds a NUL character"),
        ("http://example.org/x", "http:// is not read; a path is local or begins with one of gs://"),
        ("s4://x/y", "s4:// is not read"),
        ("file:///x", "file:// is not read"),
        ("", "'' is no path"),
        (None, "None is no path"),
        (3, "3 is no path"),
        (b"x", "b'x' is no path"),
    ],
)
def test_a_path_that_is_none(path, message, home):
    with pytest.raises(UserError) as error:
        expand(path)
    assert message in str(error.value)


def test_every_way_in_expands_paths(home):
    """Besides the flags of all verbs, which tests/cli/test_mistakes.py goes through."""
    assert Workdir("~/run").config == epath.Path(home) / "run/config.json"
    for call in (
        lambda: read_experiment("~/mine.py"),
        lambda: create_source("folder:~/images"),
        lambda: create_source("webdataset:~/*.tar"),
        lambda: create_source("parquet:~/a.parquet"),
        lambda: create_source("latents:~/set"),
        lambda: SubwordTokenizer.read({"tokenizer_files": "~/words"}),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert str(home) in str(error.value)
    (home / "weights").mkdir()
    found = places.locate("~/weights", part="vae", field="codec.weights")
    assert os.fspath(found) == f"{home}/weights"
    assert list(pathlib.Path().iterdir()) == []


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"\xed\xa0\xbd", DEEP, b'{"a":' * 50_000, b"nul"])
def test_text_that_is_no_json(text):
    with pytest.raises(ValueError, match="nested too deeply|Expecting|codec can't decode"):
        parse_json(text)


def test_json_is_read_with_its_mark_and_up_to_a_depth(tmp_path):
    path = epath.Path(tmp_path) / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1]}')
    assert read_json(path, dict, "put it back") == {"a": [1]}
    path.write_bytes(b"[" * 60 + b"]" * 60)
    read_json(path, list, "")
    for content, kind, message in (
        (b"[" * 70 + b"]" * 70, list, "a.json is damaged: its JSON is nested more than 64 deep; put it back"),
        (b"[1]", dict, "a.json is damaged: a list, and must be a JSON object; put it back"),
        (b"{}", list, "a.json is damaged: an object, and must be a JSON list; put it back"),
        (b"null", dict, "a.json is damaged: null, and must be"),
        (b"\xff", dict, "a.json is damaged: not UTF-8; put it back"),
        (DEEP, dict, "a.json is damaged: no JSON (nested too deeply); put it back"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            read_json(path, kind, "put it back")
        assert message in str(error.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(
        UserError, match=r"a\.json is a folder, and must be a file with a JSON object; put it back"
    ):
        read_json(path, dict, "put it back")
