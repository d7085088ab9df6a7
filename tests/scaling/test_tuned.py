"""Whether claims and the order of members survive tuned learning rates, on studies whose rows are made."""

import dataclasses

import pytest

from scaling_dit.scaling import findings, ladder, report, tables, tuned
from scaling_dit.scaling.claims import Claim
from tests.support import simulated_study

# Member -> (learning rate, loss, score): A beats B at the study's rate, and B beats A with each at its best rate.
MADE = {
    "a": (1e-3, 0.10, 0.70),
    "a-high": (2e-3, 0.12, 0.60),
    "b": (1e-3, 0.20, 0.50),
    "b-low": (5e-4, 0.15, 0.95),
    "b-lower": (2.5e-4, 0.16, 0.80),
    "c": (1e-3, 0.11, 0.60),
}
CLAIMS = (
    Claim("a beats b", "a", "b"),
    Claim("a beats c", "a", "c"),
    Claim("c beats b", "c", "b"),
    Claim("a low rate helps b", "b-low", "b"),
    Claim("b loses less with a low rate than c", "b", "c", metric="loss"),
)


@pytest.fixture(scope="module")
def study():
    return made(MADE, CLAIMS)


def made(wanted, claims):
    plain = simulated_study.study("nowhere", count=2, seeds=3, claims=())
    bases = dict(zip("ab", plain.spec.members, strict=True))
    # Another family would be another config; this is the same with another depth.
    bases["c"] = ladder.derive(bases["a"].config, {"backbone.depth": 3}, "c")
    members, rows, measured = [], [], []
    for name, (rate, loss, score) in wanted.items():
        members.append(ladder.derive(bases[name[0]].config, {"optim.learning_rate": rate}, name))
        for seed in range(3):
            row = next(row for row in plain.rows if row["step"] == row["steps"] and row["seed"] == seed)
            off = 0.001 * (seed - 1)
            rows.append(row | {"member": name, "loss": loss + off, "shapes_tifa": score + off})
            measured.append(plain.measured[seed] | {"member": name})
    spec = dataclasses.replace(plain.spec, members=tuple(members), claims=claims)
    return dataclasses.replace(plain, spec=spec, rows=rows, measured=measured, scores=[], registered={})


def test_members_that_differ_in_rate_alone_are_a_sweep(study):
    one, other = tuned.sweeps(study)
    assert (one.base, list(one.rates), one.best) == ("a", ["a", "a-high"], "a")
    assert list(other.rates.items()) == [("b-lower", 2.5e-4), ("b-low", 5e-4), ("b", 1e-3)]
    assert other.best == "b-low" and not other.at_edge and one.at_edge


def test_a_claim_is_answered_again_with_both_sides_at_their_best_rate(study):
    words = tuned.survival(study, findings.answers(study))
    assert words["a beats b"] == "no: refuted between a and b-low (-0.25 shapes_tifa)"
    assert words["a beats c"] == "yes: these rates are the best of those tried; rates of c were not tried"
    assert (
        words["c beats b"] == "no: refuted between c and b-low (-0.35 shapes_tifa); rates of c were not tried"
    )
    assert words["a low rate helps b"] == "about the rate itself"
    chosen_by = "b loses less with a low rate than c"
    assert words[chosen_by].startswith("yes: supported") and "rates were chosen by" in words[chosen_by]


def test_members_without_rates_and_unfinished_ones_are_told_apart(study):
    only_c = {name: MADE[name] for name in ("a", "a-high", "b", "c")}
    found = made(only_c, (Claim("b beats c", "b", "c"), Claim("a beats b", "a", "b")))
    words = tuned.survival(found, findings.answers(found))
    assert words["b beats c"] == "not known: no rates of these members were tried"
    early = dataclasses.replace(found, rows=[row for row in found.rows if row["member"] != "b"])
    assert tuned.survival(early, findings.answers(early))["a beats b"] == "not known yet"
    # Nor are repetitions of one rate, and one rate alone.
    twice = made({"a": MADE["a"], "a-again": MADE["a"], "b": MADE["b"]}, ())
    assert tuned.sweeps(twice) == []
    alone = made({name: MADE[name] for name in ("a", "b", "c")}, ())
    assert (
        tuned.sweeps(alone) == [] and tuned.survival(alone, []) == {} and tuned.places(alone, "loss") is None
    )


def test_a_stage_and_a_run_from_nothing_are_no_sweep():
    made_of = made({name: MADE[name] for name in ("a", "b", "a-high", "b-low")}, ())
    a, b, high, low = made_of.spec.members
    members = (a, b, dataclasses.replace(high, base="b"), dataclasses.replace(low, base="a"))
    staged = dataclasses.replace(made_of, spec=dataclasses.replace(made_of.spec, members=members))
    assert tuned.sweeps(staged) == []
    members = (a, high, *(dataclasses.replace(one, base="a") for one in (b, low)))
    both = dataclasses.replace(made_of, spec=dataclasses.replace(made_of.spec, members=members))
    assert [one.base for one in tuned.sweeps(both)] == ["a", "b"]


def test_the_order_at_tuned_rates(study):
    places, tau = tuned.places(study, "shapes_tifa")
    assert [(one.member, one.own, one.tuned) for one in places] == [("a", 1, 2), ("c", 2, 3), ("b", 3, 1)]
    assert tau == pytest.approx(-1 / 3)
    by_loss, _ = tuned.places(study, "loss")
    assert [one.member for one in by_loss] == ["a", "c", "b"]
    html = tables.places_html(places)
    assert "<td>0.00025, 0.0005, 0.001</td><td>0.0005</td>" in html and "(at the end of those tried)" in html


def test_the_report_has_the_column_only_where_rates_were_tried(study):
    answered = findings.answers(study)
    assert "holds at the tuned rate?" in tables.claims_html(answered, tuned.survival(study, answered))
    plain = tables.claims_html(answered, {})
    assert "tuned" not in plain
    # Narrow screens show no heads, so each cell names its own.
    assert (
        plain.count('<td data-head="answer" class=') == plain.count('data-head="registered"') == len(answered)
    )
    claims = {one["name"]: one["at_tuned_rate"] for one in report.facts(study)["claims"]}
    assert claims["a beats b"].startswith("no: refuted")
