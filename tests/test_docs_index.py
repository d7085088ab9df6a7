"""What docs/index.md says of the package: layers, the way of a command to the jitted step, the working directory."""

import functools
import pathlib
import re
import sys
import tomllib
import types

import jax
import pytest

import scaling_dit
from scaling_dit.backbones.uvit import UViT
from scaling_dit.checkpoints.workdir import Workdir
from scaling_dit.cli import main as cli
from scaling_dit.training import loop, program
from scaling_dit.training.program import StepProgram
from tests.support.paths import DOCS, ROOT

PACKAGE = pathlib.Path(scaling_dit.__file__).parent


def listed(heading: str) -> list[str]:
    """The code words that begin the rows of the table under a heading."""
    section = (DOCS / "index.md").read_text().split(f"### {heading}\n", 1)[1].split("\n##")[0]
    return re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE)


def files_on_the_stack() -> list[str]:
    """The package's files that lead to the caller, outermost first, each once."""
    frame: types.FrameType | None = sys._getframe(1)
    found: list[str] = []
    while frame is not None:
        path = pathlib.Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            found.append(path.relative_to(PACKAGE).as_posix())
        frame = frame.f_back
    return list(dict.fromkeys(reversed(found)))


class Arrived(BaseException):
    """Ends a command where the test wants to look."""


@pytest.fixture
def stacks(monkeypatch):
    """Filled by a command that trains U-ViT, which ends there: the files at the backbone, and where it is jitted."""
    found: dict[str, list[str]] = {}
    build, call = StepProgram.build, UViT.__call__

    def building(config, model, mesh):
        found["jitted"] = files_on_the_stack()
        return build(config, model, mesh)

    def calling(self, *arguments, train=False, **keywords):
        if train:
            found["backbone"] = [*files_on_the_stack(), "backbones/uvit.py"]
            raise Arrived
        return call(self, *arguments, train=train, **keywords)

    # Of one device, as `smoke_run`, whose initial state is compiled already.
    monkeypatch.setattr(loop, "train", functools.partial(loop.train, devices=jax.devices()[:1]))
    # No program of another test takes this one's place.
    monkeypatch.setattr(program, "_last", [])
    monkeypatch.setattr(StepProgram, "build", building)
    monkeypatch.setattr(UViT, "__call__", calling)
    return found


def test_the_way_from_a_command_to_the_jitted_step_is_the_one_listed(stacks, tmp_path):
    way = listed("From a command to the jitted step")
    with pytest.raises(Arrived):
        cli.main(
            ["train", "--config=shapes:smoke", f"--workdir={tmp_path}", "--config.log.tensorboard=false"]
        )
    assert len(way) <= 10 and len(set(way)) == len(way)
    assert set(stacks["jitted"]) | set(stacks["backbone"]) == set(way)
    for stack in stacks.values():
        assert stack == [file for file in way if file in stack], "not in the order of the calls"


def test_the_layers_are_those_of_the_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = [one for one in contracts if one["name"] == "layers"]
    # One in brackets stands at the root of the repository and installs here.
    layers = [layer for layer in contract["layers"] if not layer.startswith("(")]
    folders = [f"{layer}/" for layer in layers if (PACKAGE / layer).is_dir()]
    assert listed("Layers") == folders and len(folders) > 15
    page = (DOCS / "index.md").read_text()
    loose = set(layers) - {folder.rstrip("/") for folder in folders} - {"__main__", "_version"}
    assert loose and all((PACKAGE / f"{file}.py").exists() and f"`{file}.py`" in page for file in loose)


def test_every_name_of_a_working_directory_is_listed():
    run = Workdir("run")
    paths = {path.name for name, path in vars(run).items() if name != "folder"}
    assert {name.rstrip("/") for name in listed("The working directory")} == paths
    assert all(path.parent == run.folder for name, path in vars(run).items() if name != "folder")
