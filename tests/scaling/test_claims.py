"""Claims against scipy's tests, closed forms, and simulated studies of which the truth is known."""

import numpy as np
import pytest
from scipy import stats

from scaling_dit.errors import UserError
from scaling_dit.evaluation.differences import holm
from scaling_dit.scaling.claims import Claim, answer, rank_stability, variance_components

DEEPER = Claim("deeper beats wider", "deep", "wide")


def test_welch_and_paired_tests_are_scipys():
    rng = np.random.default_rng(0)
    deep, wide = rng.normal(0.6, 0.02, 4), rng.normal(0.5, 0.05, 3)
    (found,) = answer([DEEPER], {"deep": deep, "wide": wide})
    theirs = stats.ttest_ind(deep, wide, equal_var=False)
    assert found.p == found.p_holm == pytest.approx(theirs.pvalue)
    assert found.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert found.effect == pytest.approx(deep.mean() - wide.mean()) and found.seeds == (4, 3)
    shared = rng.normal(0, 0.3, 4)
    (paired,) = answer([Claim("p", "deep", "other", paired=True)], {"deep": deep + shared, "other": shared})
    theirs = stats.ttest_rel(deep + shared, shared)
    assert paired.p == pytest.approx(theirs.pvalue) and paired.verdict == "supported"


@pytest.mark.parametrize(
    "deep, wide, margin, verdict",
    [
        ([0.60, 0.61, 0.62], [0.50, 0.51, 0.52], 0.0, "supported"),
        ([0.50, 0.51, 0.52], [0.60, 0.61, 0.62], 0.0, "refuted"),
        ([0.60, 0.61, 0.62], [0.50, 0.51, 0.52], 0.2, "refuted"),
        ([0.50, 0.60, 0.70], [0.45, 0.55, 0.65], 0.0, "undecided"),
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], 0.0, "undecided"),
    ],
)
def test_verdicts(deep, wide, margin, verdict):
    (found,) = answer([Claim("c", "deep", "wide", margin)], {"deep": deep, "wide": wide})
    assert found.verdict == verdict


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    values = {"deep": [0.60, 0.61, 0.62], "wide": [0.56, 0.57, 0.585]}
    assert answer([DEEPER], values)[0].verdict == "supported"
    many = answer([DEEPER, *[Claim(str(i), "wide", "wide") for i in range(40)]], values)
    assert many[0].verdict == "undecided" and many[0].p == answer([DEEPER], values)[0].p


def false_claims(studies, seeds, claims=6, seed=1):
    """How many studies over members that are all alike claim a difference."""
    rng = np.random.default_rng(seed)
    made = [Claim(str(i), f"a{i}", f"b{i}") for i in range(claims)]
    count = 0
    for _ in range(studies):
        values = {name: rng.normal(0.5, 0.01, seeds) for i in range(claims) for name in (f"a{i}", f"b{i}")}
        count += any(found.verdict != "undecided" for found in answer(made, values))
    return count


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_at_most_five_percent_of_studies_without_an_effect_claim_one(seeds, capsys):
    """200 A/A studies of 6 claims each."""
    count = false_claims(200, seeds)
    with capsys.disabled():
        print(f"\n{count} false claims in 200 A/A studies with {seeds} seeds")
    assert count <= 10


def test_the_detectable_difference_is_detected_as_often_as_it_says():
    rng = np.random.default_rng(2)
    spread, seeds = 0.01, 5
    typical = np.median(
        [
            answer([DEEPER], {"deep": rng.normal(0, spread, seeds), "wide": rng.normal(0, spread, seeds)})[
                0
            ].detectable
            for _ in range(200)
        ]
    )
    power = np.mean(
        [
            answer(
                [DEEPER], {"deep": rng.normal(typical, spread, seeds), "wide": rng.normal(0, spread, seeds)}
            )[0].verdict
            == "supported"
            for _ in range(400)
        ]
    )
    assert 0.7 < power < 0.9


def test_variance_components_of_a_known_mixture():
    rng = np.random.default_rng(3)
    table = rng.normal(0, 3.0, (400, 1)) + rng.normal(0, 1.0, (400, 8))
    found = variance_components(table)
    assert found.training == pytest.approx(9.0, rel=0.15)
    assert found.generation == pytest.approx(1.0, rel=0.05)
    inside = 0
    for _ in range(300):
        few = rng.normal(0, 3.0, (4, 1)) + rng.normal(0, 1.0, (4, 3))
        low, high = variance_components(few).training_interval
        inside += low <= 9.0 <= high
    assert 0.84 < inside / 300 < 0.96


def test_an_order_is_as_stable_as_its_gaps_are_wide():
    clear = rank_stability({"a": [3.0, 3.1], "b": [1.0, 1.1], "c": [2.0, 2.1]})
    assert clear.order == ("a", "c", "b") and clear.tau == 1.0 and clear.interval == (1.0, 1.0)
    assert clear.above[0, 2] == 1.0 and clear.above[2, 0] == 0.0 and clear.above[1, 1] == 0.5
    rng = np.random.default_rng(4)
    alike = rank_stability({name: rng.normal(0, 1, 6) for name in "abcd"})
    assert alike.tau < 0.9 and alike.interval[0] < 0.5


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: answer([DEEPER], {"deep": [1, 2]}), "names member 'wide'"),
        (lambda: answer([DEEPER], {"deep": [1, 2], "wide": [1]}), "'wide' has 1 training seed"),
        (lambda: answer([DEEPER], {"deep": [1, 2], "wide": [1, float("inf")]}), "not finite"),
        (
            lambda: answer([Claim("x", "deep", "wide", paired=True)], {"deep": [1, 2], "wide": [1, 2, 3]}),
            "pairs runs, but deep has 2 seeds and wide 3",
        ),
        (lambda: variance_components([[1.0, 2.0]]), r"got shape \(1, 2\)"),
        (lambda: rank_stability({"a": [1, 2]}), "1 member"),
        (lambda: rank_stability({"a": [1, 2], "b": [1]}), "'b' has 1 training seed"),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()
