"""A metric is about the first scalar of its results, whatever that is called."""

import dataclasses
import json
import re

import pytest

from scaling_dit.errors import UserError
from scaling_dit.evaluation.bases import Base
from scaling_dit.scaling import early, figure_data, figures, findings, fitted, report, table, tables, tuned
from scaling_dit.scaling import study as study_lib
from scaling_dit.scaling.claims import SUPPORTED, Claim
from scaling_dit.scaling.columns import Columns
from scaling_dit.scaling.folder import StudyFolder
from scaling_dit.scaling.spec import StudySpec
from tests.support import simulated_study

A, B = "uvit-008", "uvit-000"


class Blur(Base):
    """How blurred images are."""

    LOWER_IS_BETTER = True


OWN = f"{__name__}:Blur"
# Metric, its first scalar, the scalar after that.
METRICS = (
    ("digits", "digit_accuracy", "digit_accuracy_7"),
    ("soft_tifa", "soft_tifa_am", "soft_tifa_gm"),
    (OWN, "top.1/a", "rest"),
    ("shapes_tifa", "shapes_tifa", "shapes_tifa_spatial"),
)


few_resamples = simulated_study.few_resamples(fitted, 30)


@pytest.fixture(scope="module")
def simulated():
    return simulated_study.study("nowhere", count=10, seeds=3, claims=())


def with_metric(made, metric, first, second, claims=()):
    """The study with scores of another metric in place of those of `shapes_tifa`."""
    names = {"shapes_tifa_spatial": second}
    names |= {f"shapes_tifa{end}": f"{first}{end}" for end in ("", "_low", "_high")}

    def renamed(row):
        return {names.get(key, key): value for key, value in row.items() if key != "shapes_tifa_color"}

    scores = [row | {"metric": metric, "scalar": scalar} for row in made.scores for scalar in (first, second)]
    spec = dataclasses.replace(made.spec, metrics=(metric,), claims=claims)
    return dataclasses.replace(made, spec=spec, rows=[renamed(row) for row in made.rows], scores=scores)


@pytest.mark.parametrize("metric, first, second", METRICS)
def test_a_study_is_answered_by_the_first_scalar(simulated, metric, first, second):
    claims = (Claim("a", A, B), Claim("b", A, B, metric=metric), Claim("c", A, B, metric=first))
    made = with_metric(simulated, metric, first, second, (*claims, Claim("d", A, B, metric=second)))
    answered = findings.answers(made)
    assert [one.metric for one in answered] == [first, first, first, second]
    assert all(one.answer is not None and one.answer.verdict == SUPPORTED for one in answered)
    assert f"more {first} than {B}" in answered[0].sentence
    assert made.columns.own == first and made.columns.scores() == ["loss", first, second]
    assert made.columns.lower_is_better(first) == (metric == OWN)


@pytest.mark.parametrize("metric, first, second", METRICS[1:3])
def test_order_figures_and_laws_are_of_the_first_scalar(simulated, metric, first, second):
    made = with_metric(simulated, metric, first, second)
    ranked = findings.ranking(made, made.columns.own)
    best, worst = ("uvit-008", "pixart-009"), ("uvit-000", "pixart-001")
    assert ranked.order[0] in (worst if metric == OWN else best)
    assert f"{ranked.order[0]} is best by {first} of 10 members" in findings.headline(made, [])
    assert findings.by_member(made)[0][f"{first}_sd"] is not None
    assert early.signals(made)[-1].by_score > 0.9
    laws = fitted.fits(made)
    assert f"uvit: {first} over training FLOPs" in [fit.name for fit in laws]
    data = figure_data.data_of(made, [], laws)
    assert all(row[first] is not None for row in data["ends"])
    assert {row["type"] for row in data["types"]} == {second}
    assert {row["scalar"] for row in data["guided"]} == {first}
    named = {one.name: one for one in figures.figures(made, data)}
    assert f"{first.replace('/', '_')}-step" in named
    assert figure_data.ranked(made)[0] == ranked.order[0]
    assert f"By {first}. Kendall" in report._order(made)


def test_names_that_reach_into_objects_are_drawn(simulated):
    """Vega takes a dot for a field of a field, and then draws nothing."""
    convert = figures.converter()
    marks = []
    for first in ("plain", "top.1/a[b]'c"):
        made = with_metric(simulated, OWN, first, "rest")
        data = figure_data.data_of(made, [], [])
        shown = next(one for one in figures.figures(made, data) if one.name == "members")
        svg = convert.vegalite_to_svg(figures.printed(shown, data))
        marks.append(
            len(
                set(
                    re.findall(
                        r'<path aria-label="[^"]*" role="graphics-symbol"[^>]*transform="([^"]*)"', svg
                    )
                )
            )
        )
    assert marks[0] == marks[1] > 10


def test_a_study_at_a_tuned_rate_is_about_the_first_scalar(simulated):
    config = simulated.spec.members[0].config.copy_and_resolve_references()
    config.unlock()
    config.optim.learning_rate = 2 * config.optim.learning_rate
    twin = dataclasses.replace(simulated.spec.members[2], config=config)
    members = (*simulated.spec.members[:2], twin, *simulated.spec.members[3:])
    spec = dataclasses.replace(simulated.spec, members=members)
    made = with_metric(dataclasses.replace(simulated, spec=spec), *METRICS[0])
    places, _ = tuned.places(made, made.columns.own)
    assert [one.member for one in places if one.sweep] == ["uvit-000"]


def test_a_score_that_no_run_has_is_not_a_run_that_has_not_finished(simulated):
    claims = (Claim("a", A, B, metric="shapes_tifa_spatail"), Claim("b", A, B, metric="loss_t0000-0249"))
    made = dataclasses.replace(simulated, spec=dataclasses.replace(simulated.spec, claims=claims))
    there = "there are loss, loss_t0000-0499, loss_t0500-0999, shapes_tifa, shapes_tifa_color, shapes_tifa_spatial"
    for one, asked in zip(findings.answers(made), claims, strict=True):
        assert one.answer is None
        assert one.sentence == f"Not answered: no run has a score {asked.metric!r}; {there}."
    assert ">no such score</td>" in tables.claims_html(findings.answers(made), {})
    # Before the first point nobody knows.
    (one, _) = findings.answers(simulated_study.with_rows(made, []))
    assert not one.lacks and one.sentence.startswith(
        f"Not answered yet: 0 of {A} and 0 of {B} have finished, "
    )
    # Runs that have finished without a number have finished all the same.
    rows = [row | {"shapes_tifa": float("nan")} if row["member"] == B else row for row in simulated.rows]
    plain = dataclasses.replace(simulated.spec, claims=(Claim("a", A, B),))
    (one,) = findings.answers(dataclasses.replace(simulated, spec=plain, rows=rows))
    assert f"3 of {A} and 0 of {B} have finished with a finite shapes_tifa, and" in one.sentence


def test_a_metric_that_cannot_have_a_scalar_is_refused_when_the_study_is_made():
    members = simulated_study.members(2)

    def made(metrics, metric):
        return StudySpec(
            "?", members, metrics=metrics, claims=(Claim("c", "uvit-000", "pixart-001", metric=metric),)
        )

    for metrics, metric in (
        (("digits",), "digit_accuracy"),
        (("digits",), "digits"),
        (("soft_tifa",), "soft_tifa_am_color"),
        ((OWN,), "anything"),
        (("fid",), "loss_t0000-0199"),
    ):
        assert made(metrics, metric).claims[0].metric == metric
    for metrics, metric in (
        (("digits",), "fid"),
        (("fid",), "loss_total"),
        (("fid",), "lossy"),
        (("fid",), "digits"),
    ):
        with pytest.raises(UserError, match=f"no metric '{metric}'; the study measures loss, "):
            made(metrics, metric)


def test_a_late_claim_about_a_score_that_runs_lack_is_refused(simulated, tmp_path, capsys):
    made = dataclasses.replace(simulated, folder=StudyFolder(tmp_path))
    simulated_study.write(made)
    wrong = Claim("late", A, B, metric="shapes_tifa_spatail")
    more = dataclasses.replace(made.spec, claims=(wrong,))
    with pytest.raises(
        UserError, match=r"claim 'late': no run .* 'shapes_tifa_spatail'; did you mean 'shapes_tifa_spatial'"
    ):
        study_lib.register(more, made.folder, lambda: 0)
    right = dataclasses.replace(wrong, metric="shapes_tifa_spatial")
    more = dataclasses.replace(made.spec, claims=(right,))
    assert study_lib.register(more, made.folder, lambda: 30) == {"late": 30}


def test_a_study_says_once_that_no_run_has_a_score(simulated, tmp_path, monkeypatch, capsys):
    claims = (Claim("a", A, B, metric="shapes_tifa_spatail"), Claim("b", A, B))
    spec = dataclasses.replace(simulated.spec, claims=claims)
    monkeypatch.setattr(table, "status_of", lambda *_: table.RUNNING)
    runner = study_lib._Runner(spec, StudyFolder(tmp_path))
    monkeypatch.setattr(runner, "_tables", lambda *_: ([], [], []))
    runner.study({})
    assert "no run has" not in capsys.readouterr().err
    monkeypatch.setattr(runner, "_tables", lambda *_: (simulated.rows[:1], [], simulated.scores[:1]))
    runner.study({})
    runner.study({})
    err = capsys.readouterr().err
    assert err.count("no run has a score") == 1
    assert "claim 'a': no run has a score 'shapes_tifa_spatail'; did you mean 'shapes_tifa_spatial'?" in err


@pytest.fixture
def row_of(tmp_path, monkeypatch):
    """What gives the rows of the table and of the scores of one run with made results of some metrics."""
    (member,) = simulated_study.members(1, steps=4)

    def read(**results):
        spec = StudySpec("?", (member,), metrics=tuple(results), points=1)
        folder = StudyFolder(tmp_path)
        run = folder.run(member.name, 0)
        run.config.parent.mkdir(parents=True, exist_ok=True)
        run.config.write_text("{}")
        paths = {}
        for number, (metric, result) in enumerate(results.items()):
            paths[metric, 0, None] = tmp_path / f"{number}.json"
            paths[metric, 0, None].write_text(json.dumps({"n": 5} | result))
        monkeypatch.setattr(table, "results", lambda *_: paths)
        monkeypatch.setattr(table, "status_of", lambda *_: table.DONE)
        monkeypatch.setattr(table, "read_metrics", lambda _: [{"step": 4, "validation/loss": 0.5}])
        (row,) = table.run_rows(spec, folder, member, 0)
        return spec, row, table.run_scores(spec, folder, member, 0)

    return read


def test_the_interval_is_that_of_the_first_scalar(row_of):
    sharp = {"scalars": {"sharpness": 0.5, "area": 2.0}, "interval": [0.4, 0.6]}
    tifa = {"scalars": {"shapes_tifa": 0.7, "shapes_tifa_color": 0.8}, "interval": [0.6, 0.8]}
    tifa |= {"interval_by_type": {"color": [0.7, 0.9]}}
    spec, row, scores = row_of(**{OWN: sharp, "shapes_tifa": tifa})
    last = list(row)[list(row).index("loss") + 1 :]
    tifas = [f"shapes_tifa{kind}{end}" for kind in ("", "_color") for end in ("", "_low", "_high")]
    assert last == ["sharpness", "sharpness_low", "sharpness_high", "area", *tifas]
    assert (row["sharpness_low"], row["sharpness_high"], row["shapes_tifa_color_low"]) == (0.4, 0.6, 0.7)
    assert [(one["scalar"], one["low"]) for one in scores] == [
        ("sharpness", 0.4), ("area", None), ("shapes_tifa", 0.6), ("shapes_tifa_color", 0.7),
    ]  # fmt: skip
    columns = Columns(spec, [row], scores)
    assert columns.scores() == ["loss", "sharpness", "area", "shapes_tifa", "shapes_tifa_color"]
    assert columns.own == "sharpness" and columns.of_metric("shapes_tifa") == "shapes_tifa"
    assert columns.lower_is_better("area") and not columns.lower_is_better("shapes_tifa")


def test_a_scalar_that_ends_as_an_interval_does_is_a_score(row_of):
    spec, row, scores = row_of(**{OWN: {"scalars": {"pass_low": 0.5}, "interval": [0.4, 0.6]}})
    assert row["pass_low"] == 0.5 and row["pass_low_low"] == 0.4
    assert Columns(spec, [row], scores).scores() == ["loss", "pass_low"]


@pytest.mark.parametrize(
    "names, message",
    [
        (("loss",), "has a scalar 'loss', which is another column"),
        (("seeds",), "has a scalar 'seeds', which is another column"),
        (("group_x",), "has a scalar 'group_x', which is another column"),
        (("x", "x_low"), "has a scalar 'x_low', which is another column"),
        (("x", "x_sd"), "has a scalar 'x_sd', which is another column"),
        (("fid",), "metrics '.*' and 'fid' have a scalar 'fid' each"),
    ],
)
def test_one_column_stands_for_one_scalar(row_of, names, message):
    with pytest.raises(UserError, match=message):
        row_of(**{OWN: {"scalars": dict.fromkeys(names, 0.5)}, "fid": {"scalars": {"fid": 9.0}}})
