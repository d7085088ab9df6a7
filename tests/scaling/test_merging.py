"""Several studies as one: each run is taken once, and shown where it lies."""

import dataclasses

import pytest
from etils import epath

from scaling_dit.errors import UserError
from scaling_dit.scaling import machine, merging, report
from scaling_dit.scaling import study as study_lib
from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.folder import StudyFolder
from tests.support import simulated_study


def test_studies_merge_into_one(tmp_path):
    for name, claims in (("a", None), ("b", (Claim("other", "uvit-000", "pixart-001"),))):
        simulated_study.write(simulated_study.study(tmp_path / name, count=4, seeds=2, claims=claims))
    merged = merging.merge([tmp_path / "a", tmp_path / "b"])
    # The same runs are in both, and counted once, as they are in the first.
    assert len(merged.rows) == 4 * 2 * 4 and len(merged.spec.members) == 4 and merged.runs == 8
    assert [str(folder) for folder in merged.folders] == [str(tmp_path / "a")]
    assert set(merged.registered) == {"the larger is better", "other"}


def test_what_does_not_compare_is_refused(tmp_path):
    simulated_study.write(simulated_study.study(tmp_path / "a", count=2, seeds=2))
    simulated_study.write(simulated_study.study(tmp_path / "points", count=2, seeds=2, points=2))
    with pytest.raises(UserError, match="differ in points, so their runs do not compare"):
        merging.merge([tmp_path / "a", tmp_path / "points"])
    # A verdict must not depend on the order of the folders.
    claim = dataclasses.replace(study_lib.open_study(tmp_path / "a").spec.claims[0], margin=0.1)
    simulated_study.write(simulated_study.study(tmp_path / "claim", count=2, seeds=2, claims=(claim,)))
    with pytest.raises(UserError, match="claim 'the larger is better' of .*claim is another than in .*a"):
        merging.merge([tmp_path / "a", tmp_path / "claim"])


def test_every_run_is_shown_where_it_lies(tmp_path, monkeypatch):
    """Of two folders: one has two members with two seeds, the other more members and a third seed of all."""
    simulated_study.write(simulated_study.study(tmp_path / "a", count=2, seeds=2, claims=()))
    more = simulated_study.study(tmp_path / "b", count=4, seeds=3, claims=())
    spec = dataclasses.replace(more.spec, seeds=(1, 2))
    tables = ([row for row in part if row["seed"]] for part in (more.rows, more.measured, more.scores))
    simulated_study.write(study_lib.Study(spec, more.folder, *tables, {}))
    monkeypatch.setattr(machine, "cores", lambda: [0] * 7)
    machine.note(StudyFolder(tmp_path / "b"))
    merged = merging.merge([tmp_path / "a", tmp_path / "b"])
    homes = {
        (member.name, seed): merged.run(member.name, seed).folder.parents[2].name
        for member in merged.spec.members
        for seed in merged.seeds(member.name)
    }
    # Seed 0 of the other two was not asked for.
    assert homes == {
        **{(name, seed): "a" for name in ("uvit-000", "pixart-001") for seed in (0, 1)},
        **{(name, 2): "b" for name in ("uvit-000", "pixart-001")},
        **{(name, seed): "b" for name in ("uvit-002", "pixart-003") for seed in (1, 2)},
    }
    assert merged.runs == len(homes) == 10
    page = report.write(merged, epath.Path(tmp_path) / "page", prints=False).read_text()
    assert "(7 cores" in page
    for (name, seed), home in homes.items():
        assert f"scaling-dit train --workdir={tmp_path / home}/runs/{name}/seed{seed}\n" in page.replace(
            "</pre>", "\n"
        )
    assert page.count("scaling-dit train --workdir=") == 10
    assert page.count("scaling-dit study --workdir=") >= 2
