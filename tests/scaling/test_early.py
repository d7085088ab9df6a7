"""How early the order of members shows, by their score, by losses, and by the same members at a lower resolution."""

import dataclasses

import numpy as np
import pytest

from scaling_dit import config as config_lib
from scaling_dit.scaling import early, ladder
from tests.support import simulated_study


@pytest.fixture(scope="module")
def study():
    return simulated_study.study("nowhere", count=10, seeds=3)


def test_the_order_of_members_that_differ_in_size_shows_early(study):
    rows = early.signals(study)
    assert [row.share for row in rows] == [0.25, 0.5, 0.75]
    # Members differ in size alone, and far more than seeds do; the score falls with the loss.
    assert all(row.by_score > 0.9 and row.by_loss > 0.9 for row in rows)
    turned = [
        {**row, "shapes_tifa": -row["shapes_tifa"]} if row["step"] == 250 else row for row in study.rows
    ]
    first = early.signals(simulated_study.with_rows(study, turned))[0]
    assert first.by_score < -0.9 and first.by_loss > 0.9
    assert early.signals(simulated_study.study("nowhere", count=2)) == []


def test_the_loss_at_some_timesteps_may_say_more_than_its_mean(study):
    """Noise in one bin: the others still know the order."""
    rng = np.random.default_rng(0)
    noisy = [{**row, "loss_t0000-0499": rng.normal()} for row in study.rows]
    for row in early.signals(simulated_study.with_rows(study, noisy)):
        assert set(row.by_timestep) == {"loss_t0000-0499", "loss_t0500-0999"}
        assert row.by_timestep["loss_t0500-0999"] == row.by_loss > 0.9
        assert abs(row.by_timestep["loss_t0000-0499"]) < 0.8


def test_a_missing_mean_has_no_correlation(study):
    rows = [
        {**row, "shapes_tifa": None} if (row["member"], row["step"]) == ("uvit-000", 250) else row
        for row in study.rows
    ]
    first, second, _ = early.signals(simulated_study.with_rows(study, rows))
    assert first.by_score is None and first.by_loss > 0.9 and second.by_score > 0.9


def test_members_at_two_resolutions_are_paired(study):
    small = config_lib.load("experiments/shapes.py:smoke", ["--config.backbone.patch=4"])
    members, rows = [], []
    scores = {0: (0.1, 0.5), 1: (0.2, 0.7), 2: (0.4, 0.6)}
    for depth, (low, high) in scores.items():
        changes = {"backbone.depth": depth + 1, "steps": 1000}
        below = ladder.derive(small, changes, f"d{depth}")
        above = ladder.derive(
            small, changes | {"source.preset": "grid32", "backbone.patch": 8}, f"d{depth}-32px"
        )
        members += [below, above]
        for member, score in ((below, low), (above, high)):
            for step in (250, 500, 750, 1000):
                # The order at half of the training is the other way.
                value = -score if member is below and step == 500 else score
                row = {"member": member.name, "seed": 0, "step": step, "steps": 1000, "status": "done"}
                rows.append(row | {"shapes_tifa": value, "loss": 1.0})
    spec = dataclasses.replace(study.spec, members=tuple(members), claims=())
    made = simulated_study.with_rows(dataclasses.replace(study, spec=spec), rows)
    found = early.low_resolution(made)
    assert found.members == (("d0", "d0-32px"), ("d1", "d1-32px"), ("d2", "d2-32px"))
    assert [share for share, _ in found.shares] == [0.25, 0.5, 0.75, 1.0]
    # Of 1, 2, 3 against 1, 3, 2.
    assert [value for _, value in found.shares] == pytest.approx([0.5, -0.5, 0.5, 0.5])
    # As many tokens, of a quarter of the numbers.
    assert 0.8 < found.flops < 1
    # A member that begins from another is no run of its own.
    staged = [members[0], dataclasses.replace(members[1], base="d0"), *members[2:]]
    spec = dataclasses.replace(spec, members=tuple(staged))
    assert early.low_resolution(dataclasses.replace(made, spec=spec)) is None
    assert early.low_resolution(study) is None
