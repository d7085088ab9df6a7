"""A workdir whose name holds what shells, URLs and patterns give a meaning: every verb reads it."""

import json
import shutil

import pytest

from scaling_dit.cli import main as cli

# All in one, because each folder costs a start of every verb.
NAME = "lr#1 e?3%20&x=y;z 日本 é '\" -x ~y $ {a,b} *"


@pytest.mark.slow
@pytest.mark.usefixtures("verbs_on_one_device")
def test_every_verb_reads_it(smoke_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = NAME
    folder = tmp_path / f"runs of {name}"
    shutil.copytree(smoke_run, folder)
    for command in (
        ["report", str(folder), "--json"],
        ["sample", f"--workdir={folder}", "--steps=1", f"--out={folder}/out {name}", "a red circle"],
        ["evaluate", f"--workdir={folder}", "--steps=1", "--items=2"],
        ["export", f"--workdir={folder}", f"--out={tmp_path}/export {name}", "--to=safetensors"],
        [
            "import",
            f"--from={tmp_path}/export {name}",
            "--config=shapes:smoke",
            f"--workdir={tmp_path}/again {name}",
        ],
        ["train", f"--workdir={folder}"],
    ):
        assert cli.main(command) == 0, (command, capsys.readouterr().err)
    assert json.loads(capsys.readouterr().out.split("\n}\n")[0] + "\n}")["checkpoints"] == [2, 4]
    assert (folder / f"out {name}" / "00000.png").exists()
    assert (tmp_path / f"again {name}" / "config.json").exists()
