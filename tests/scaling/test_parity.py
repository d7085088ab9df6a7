"""Losses compare, and laws hold, over members of the same data alone."""

import dataclasses

import pytest

from scaling_dit import config as config_lib
from scaling_dit.errors import UserError
from scaling_dit.scaling import findings, fitted, ladder, parity, report
from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.spec import StudySpec
from tests.support import simulated_study


@pytest.fixture(scope="module")
def base():
    return config_lib.load("experiments/shapes.py:smoke")


def changed(base, changes, name="other"):
    return ladder.derive(base, changes, name)


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"source.preset": "grid32", "backbone.patch": 16}, "config.source.preset is 'grid16' and 'grid32'"),
        ({"source.prompt_level": 2}, "config.source.prompt_level is 4 and 2"),
        ({"source.seed": 7}, "config.source.seed is 0 and 7"),
        ({"codec": {"name": "dct"}, "backbone.patch": 4}, "config.codec.name is 'pixels' and 'dct'"),
    ],
)
def test_a_claim_about_losses_on_other_data_is_refused(base, changes, line):
    members = ladder.Member("a", base), changed(base, changes)
    claims = (Claim("c", "a", "other", metric="loss"),)
    with pytest.raises(UserError, match=f"claim 'c' compares the losses of a and other.*{line}") as error:
        StudySpec("?", members, claims=claims)
    assert "give it a metric of images" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="compares the losses"):
        StudySpec("?", members, claims=(Claim("c", "a", "other", metric="loss_t0000-0199"),))
    # Scores of images compare, whatever was trained on.
    StudySpec("?", members, claims=(Claim("c", "a", "other"),))


@pytest.mark.parametrize(
    "changes",
    [
        {"source.scenes": 300},
        {"source.mention_probability": 0.4},
        {"source.wrong_caption_rate": 0.3},
        {"source.paraphrases": 1},
        {"diffusion.prediction": "eps"},
        {"optim.learning_rate": 1e-4},
        {"backbone.hidden": 64},
        {"conditioning.names": ("inpaint",)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_training_alone_leaves_losses_comparable(base, changes):
    other = changed(base, changes)
    assert parity.difference(*map(parity.measured_on, (base, other.config))) == ""
    StudySpec("?", (ladder.Member("a", base), other), claims=(Claim("c", "a", "other", metric="loss"),))


def of_other_data(study, name, changes):
    """The simulated study, with one member's data replaced."""
    members = [
        dataclasses.replace(one, config=changed(one.config, changes).config) if one.name == name else one
        for one in study.spec.members
    ]
    return dataclasses.replace(study, spec=dataclasses.replace(study.spec, members=tuple(members)))


def test_laws_rest_on_the_members_of_the_same_data_and_the_report_names_the_others():
    study = simulated_study.study("nowhere", count=6, seeds=2)
    assert len(fitted.endpoints(study)) == 6 * 2 * 4
    assert "other data" not in report._endpoint_note(study)
    few = of_other_data(study, "uvit-004", {"source.scenes": 300})
    used = {row["member"] for row in fitted.endpoints(few)}
    assert used == {member.name for member in study.spec.members} - {"uvit-004"}
    assert "trained on other data than most: uvit-004." in report._endpoint_note(few)


def test_an_order_by_loss_has_the_members_whose_losses_compare():
    study = simulated_study.study("nowhere", count=6, seeds=2)
    assert len(findings.ranking(study, "loss").order) == 6
    few = of_other_data(study, "uvit-004", {"source.scenes": 300})
    assert len(findings.ranking(few, "loss").order) == 6
    other = of_other_data(study, "uvit-004", {"source.preset": "grid32"})
    assert "uvit-004" not in findings.ranking(other, "loss").order
    assert len(findings.ranking(other, "shapes_tifa").order) == 6
