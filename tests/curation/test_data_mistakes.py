"""Data that are not there, or are something else, given to each verb over whole data sets: one line, no file."""

import os
import sys

import pytest

from tests.support.mistakes import line_of, swept

VERBS = {
    "filter": [],
    "stats": [],
    "caption": ["--captioner=shapes"],
    "prepare": ["--config=shapes:smoke", "--config.codec.name=dct", "--config.source.image_size=16"],
}
SOURCES = (
    "folder:nowhere", "folder:", "folder:empty", "folder:file", "folder:odd", "folder:\x1b[31m",
    "folder:~nobody-of-this-name", "webdataset:nowhere/*.tar", "webdataset:", "webdataset:empty", "webdataset:file",
    "webdataset:empty/{0..9}.tar", "webdataset:pipe.tar", "webdataset:$NOWHERE/*.tar", "parquet:nowhere.parquet",
    "parquet:file", "parquet:http://x/y.parquet", "tfds:nothing", "tfds:", "latents:empty", "shapes", "nothing", "",
    "os:getcwd", "json:Nothing",
)  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with an empty one, a file, a pipe in place of a tar, and one whose metadata is a folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd/metadata.jsonl").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe.tar")
    before = sorted(os.listdir(tmp_path))
    yield
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("source, verb", swept(((source, verb) for source in SOURCES for verb in VERBS), 3))
def test_sources_that_are_none(source, verb, capsys):
    named = f"--config.source.name={source}" if verb == "prepare" else f"--source={source}"
    line_of(capsys, verb, named, *VERBS[verb], "--out=made")


EXPRESSIONS = (
    "width >", "1", "width > 1 >", "__import__('os')", "a" * 5000 + " > 1", "len(width, 1) > 2", "\x1b[31m > 1 +",
)  # fmt: skip


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("verb", ["filter", "prepare"])
def test_filters_that_are_none(verb, expression, capsys):
    named = "--config.source.name=folder:empty" if verb == "prepare" else "--source=folder:empty"
    line_of(capsys, verb, named, *VERBS[verb], f"--filter={expression}", "--out=made")


@pytest.mark.parametrize(
    "flags",
    [
        ["--captioner=nothing"],
        ["--captioner="],
        ["--captioner=transformers:"],
        # Loads torch and transformers.
        pytest.param(["--captioner=transformers:nowhere"], marks=pytest.mark.slow),
        ["--captioner=openai:"],
        ["--captioner=openai:nowhere"],
        ["--captioner=os:getcwd"],
        ["--captioner=shapes", "--option=x"],
        ["--captioner=shapes", "--option=nothing=3"],
        ["--captioner=shapes", "--processes=2", "--process=2"],
        ["--captioner=shapes", "--kept=nowhere"],
    ],
    ids=" ".join,
)
def test_captioners_that_are_none(flags, capsys, tmp_path):
    (tmp_path / "empty/metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n')
    line_of(capsys, "caption", "--source=folder:empty", *flags, "--out=made")
