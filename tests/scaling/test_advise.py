"""Advice is the optimum of the study's law, with its interval, and no further than the audit supports."""

import dataclasses
import json

import pytest

from scaling_dit.errors import UserError
from scaling_dit.parallel import topologies
from scaling_dit.planning.compile import Memory
from scaling_dit.scaling import advise, ladder, laws
from scaling_dit.scaling import study as study_lib
from scaling_dit.scaling.table import last_points
from tests.support import simulated_study

few_resamples = simulated_study.few_resamples(advise, 20)


@pytest.fixture(scope="module")
def study():
    return simulated_study.study("nowhere", count=10, seeds=3)


@pytest.fixture(scope="module")
def largest(study):
    return max(row["train_flops"] for row in last_points(study.rows))


@pytest.fixture(scope="module")
def found(study, largest):
    return advise.advise(study, largest)


def test_the_advice_is_the_optimum_of_the_law_that_made_the_study(found, largest):
    truth = laws.ParametricLaw(**simulated_study.LAW, points=0, error=0)
    params, samples = truth.optimum(largest, 6.0 * simulated_study.MACS_PER_PARAM)
    assert {one.family for one in found} == {"uvit", "pixart"} and found[0].loss <= found[1].loss
    for one in found:
        assert one.params == pytest.approx(float(params), rel=0.3)
        assert one.params_interval[0] <= params <= one.params_interval[1]
        assert one.loss == pytest.approx(float(truth(params, samples)), rel=0.03)
        assert one.params * one.samples * 6 * simulated_study.MACS_PER_PARAM == pytest.approx(largest)
        assert (one.points, one.runs, one.sizes) == (60, 15, 5) and one.beyond == pytest.approx(1.0)


def test_beyond_the_audit_there_is_no_advice(study, largest):
    ratio = simulated_study.SIZES[-1] / simulated_study.SIZES[-2]
    assert advise.advise(study, largest * ratio * 0.99)
    with pytest.raises(UserError, match=r"its audit supports .*: without the largest size, the law"):
        advise.advise(study, largest * ratio * 1.01)
    with pytest.raises(UserError, match="no run has finished"):
        advise.advise(simulated_study.with_rows(study, []), 1e12)
    with pytest.raises(UserError, match="a budget is a number of FLOPs above 0"):
        advise.advise(study, 0)


@pytest.mark.slow
def test_the_advised_member_has_about_the_advised_size(study, found):
    asked = dataclasses.replace(found[0], params=6e4, family="uvit", config_steps=77)
    member = advise.member_of(asked, study)
    assert member.config.steps == 77 and member.config.backbone.name == "uvit"
    assert ladder.cost(member.config).params == pytest.approx(6e4, rel=0.3)


def test_what_is_printed(study, largest, found, monkeypatch, capsys):
    plan = type("Plan", (), {})()
    plan.topology, plan.chips, plan.mesh = "v5p:2x2x1", 4, {"fsdp": 4}
    plan.memory = Memory(arguments=2**30, temporaries=2**30, peak=2**31, limit=2**36, fits=True)
    plan.roofline = type("Roofline", (), {"chip_hours_limit": 8.0, "price": 4.2, "bound": "HBM"})()
    plan.to_dict = lambda: {"chips": 4}
    monkeypatch.setattr(study_lib, "open_study", lambda workdir: study)
    monkeypatch.setattr(advise, "advise", lambda study, flops: found)
    monkeypatch.setattr(advise, "member_of", lambda advice, study: study.spec.members[0])
    monkeypatch.setattr(advise, "plan_of", lambda member, topology, price: plan)
    topology = topologies.parse("v5p:2x2x1")
    assert advise.main("here", largest, topology) == 0
    out = capsys.readouterr().out
    assert out.startswith("best: ") and "60 points of 15 runs in 5 sizes" in out and "90 % interval" in out
    assert "at best 2 hours, 8 chip-hours, $34, bound by HBM" in out and "nothing measured" in out
    assert advise.main("here", largest, topology, as_json=True) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["advice"]) == 2 and document["plan"] == {"chips": 4}
