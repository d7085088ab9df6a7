"""The folder of a study is not that of a run."""

import pytest

from scaling_dit.cli import main as cli
from scaling_dit.errors import UserError
from scaling_dit.scaling import study as study_lib
from scaling_dit.scaling.folder import StudyFolder
from scaling_dit.scaling.spec import StudySpec
from tests.support import simulated_study


def test_a_folder_holds_a_run_or_a_study(tmp_path, capsys):
    spec = StudySpec("Is a better?", simulated_study.members(1), (0,))
    run, study = tmp_path / "run", tmp_path / "study"
    (run / "checkpoints").mkdir(parents=True)
    study_lib.register(spec, StudyFolder(study), lambda: 0)
    for name in ("config.json", None):
        if name:
            (run / name).write_text("{}")
        else:
            (run / "config.json").unlink()
        with pytest.raises(UserError, match="run holds a run, not a study; give another --workdir"):
            study_lib.register(spec, StudyFolder(run), lambda: 0)
    assert not (run / "study.json").exists()
    shapes = "--config=shapes:smoke"
    for command in (
        ["train", shapes],
        ["train", shapes, f"--from={run}"],
        ["import", shapes, "--from=nowhere"],
    ):
        assert cli.main([*command, f"--workdir={study}"]) == 2
        line = "study holds a study (study.json), not a run; give another --workdir"
        assert line in capsys.readouterr().err
    assert sorted(path.name for path in study.iterdir()) == ["study.json"]
    # Where an earlier version has left both, each goes on.
    (study / "config.json").write_text("{}")
    study_lib.register(spec, StudyFolder(study), lambda: 0)
