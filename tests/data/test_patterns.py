"""The files that a name of a source means: paths as they stand before wildcards, and what is no file at all."""

import os
import socket

import pytest

from scaling_dit import files
from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.sources import create_raw_source, create_source
from scaling_dit.data.sources.patterns import matching
from scaling_dit.errors import UserError
from tests.support.image_sets import picture

NAMES = [
    "laion [2B]",
    "what?",
    "a*b",
    "[0-9]",
    "{raw}",
    "plain 日本 é",
    "#1 100%",
    "~",
    "[!a]",
    "back\\slash",
    "[[",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("relative", [False, True])
def test_a_path_that_exists_is_that_path(tmp_path, monkeypatch, name, relative):
    """As a folder, as two, as a file; a wildcard behind it stays one."""
    for folder in (name, f"{name}/{name}", "aXb", "5"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for file in ("0", "1"):
            (tmp_path / folder / f"{file}{name if file == '0' else ''}.tar").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    root = "" if relative else f"{tmp_path}/"
    for folder in (name, f"{name}/{name}"):
        assert [path.name for path in matching(f"{root}{folder}/*.tar", ".tar")] == sorted(
            [f"0{name}.tar", "1.tar"]
        )
        (found,) = matching(f"{root}{folder}/0{name}.tar", ".tar")
        assert found.resolve() == (tmp_path / folder / f"0{name}.tar").resolve()
        (found,) = matching(f"{root}{folder}/[1-2].tar", ".tar")
        assert found.resolve() == (tmp_path / folder / "1.tar").resolve()


@pytest.mark.parametrize(
    "pattern, hint",
    [
        ("{0..3}.tar", "'::' and braces are not read; wildcards are"),
        ("a.tar::b.tar", "'::' and braces are not read"),
        ("set", r"it is a folder; write .*/set/\*\.tar"),
        ("a.tar.gz", r"the name of this file does not end in \.tar"),
        ("*.tar.gz", r"only files whose names end in \.tar are read"),
        ("*/[", "only files whose names end"),
        ("gone.tar", "a pattern such as"),
        ("x\0.tar", "a pattern such as|null"),
        ("x" * 300 + "*.tar", "a pattern such as|too long"),
        ("**/[a].tar", r"\*\*|a pattern such as"),
    ],
)
def test_a_pattern_that_names_nothing_is_one_line(tmp_path, pattern, hint):
    (tmp_path / "set").mkdir()
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=hint) as error:
        matching(f"{tmp_path}/{pattern}", ".tar")
    assert "\n" not in str(error.value)


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.tar", "wb"):
        pass
    with pytest.raises(UserError, match="caf\ufffd.tar: the name of this file is not UTF-8; rename it"):
        matching(f"{tmp_path}/*.tar", ".tar")


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.getcwd()
        os.chdir(os.path.dirname(path))
        server.bind(os.path.basename(path))
        os.chdir(folder)


SPECIAL = {
    "a pipe": make_pipe,
    "a socket": make_socket,
    "a device": lambda path: os.symlink("/dev/zero", path),
    "a folder": os.mkdir,
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_cannot_be_read_as_a_file(tmp_path, kind):
    """Neither read for ever nor waited for: an image is one damaged record, files of a whole set are refused."""
    make = SPECIAL[kind]
    make(tmp_path / "b.png")
    (tmp_path / "a.png").write_bytes(picture(0))
    lines = [f'{{"file_name": "{name}.png", "text": "x"}}\n' for name in "ab"]
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    _, fault = create_raw_source(f"folder:{tmp_path}").samples(0)
    assert isinstance(fault, DamagedRecord) and fault.kind == "missing_file" and kind in fault.what
    (tmp_path / "metadata.jsonl").unlink()
    make(tmp_path / "metadata.jsonl")
    with pytest.raises(UserError, match=rf"metadata\.jsonl is {kind}"):
        create_source(f"folder:{tmp_path}")
    make(tmp_path / "manifest.json")
    with pytest.raises(UserError, match=rf"manifest\.json is {kind}"):
        create_source(f"latents:{tmp_path}")
    for name in ("webdataset", "parquet"):
        ending = {"webdataset": "tar"}.get(name, name)
        make(tmp_path / f"a.{ending}")
        with pytest.raises(UserError, match=f"is {kind}|no file matches"):
            create_source(f"{name}:{tmp_path}/*.{ending}")


@pytest.mark.parametrize("kind", ["folder:{}", "webdataset:{}/*.tar", "parquet:{}/*.parquet", "latents:{}"])
def test_a_store_whose_package_is_missing_is_one_line(monkeypatch, kind):
    monkeypatch.setattr(files, "_is_installed", lambda package: False)
    with pytest.raises(
        UserError,
        match=r"gs:// needs the package gcsfs, which is not installed; pip install 'scaling-dit\[gcs\]'",
    ):
        create_source(kind.format("gs://bucket/set"))
    with pytest.raises(UserError, match="s3:// needs the package s3fs"):
        create_source(kind.format("s3://bucket/set"))
    with pytest.raises(UserError, match=r"http:// is not read; a path is local or begins with one of gs://"):
        create_source(kind.format("http://host/set"))


def test_the_extra_that_the_line_names_has_the_package():
    import pathlib

    setup = pathlib.Path(__file__).parents[2].joinpath("setup.py").read_text()
    assert '"gcs": ["etils[epath-gcs]", "fsspec", "google-auth"]' in setup
