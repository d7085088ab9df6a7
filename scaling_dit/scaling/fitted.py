"""The laws that a study's points carry, each with what it rests on, or with the reason why it cannot be fitted."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from scaling_dit.errors import UserError
from scaling_dit.scaling import audit as audit_lib
from scaling_dit.scaling import laws, parity
from scaling_dit.scaling.audit import Audit
from scaling_dit.scaling.study import Study
from scaling_dit.scaling.table import Row

# Bootstrap samples of the intervals of laws.
RESAMPLES = 200


@dataclasses.dataclass(frozen=True)
class Fit:
    """One law of a study, or why there is none.

    Attributes:
      name: what is fitted, in words. formula: the law with its values; "" where it is refused.
      rows: (value's name, value, low, high) of each fitted value; ends are None without an interval.
      points, runs: what it rests on. warnings: of the law. refused: why it cannot be fitted, or "".
      law: the law itself; a `Curve`, `ParametricLaw`, `IsoFlop` or `Envelope`.
      family: of its points, or "" for all.
    """

    name: str
    formula: str
    rows: tuple[tuple[str, float, float | None, float | None], ...]
    points: int
    runs: int
    warnings: tuple[str, ...] = ()
    refused: str = ""
    law: Any = None
    family: str = ""


def endpoints(study: Study) -> list[Row]:
    """The points that stand for runs of their own, with a finite loss; see `table.run_rows`.

    Members that begin from another have none: their costs do not count the base's, so a law would find them too cheap.
    Nor have those of other data than most members, for a law is one of runs that differ in size and length alone.
    """
    same = parity.same_data(study.spec.members)
    staged = {member.name for member in study.spec.members if member.base}
    return [
        row
        for row in study.rows
        if row["endpoint"]
        and row["member"] in same - staged
        and row["loss"] is not None
        and math.isfinite(row["loss"])
    ]


def fits(study: Study) -> list[Fit]:
    """All laws that the study's points may carry, those that cannot be fitted included, with the reason."""
    rows = endpoints(study)
    by_family: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        by_family[row["family"]].append(row)
    found = []
    for family, some in by_family.items():
        found.append(
            _fit(f"{family}: loss over parameters and samples (approach 3)", some, _parametric, family)
        )
        budgets = [row for row in some if row.get("group_budget") and row["step"] == row["steps"]]
        if budgets:
            found.append(_fit(f"{family}: best size at each budget (approach 2)", budgets, _isoflop, family))
        if study.spec.metrics:
            metric = study.columns.own
            scored = [row for row in some if row.get(metric) is not None]
            found.append(
                _fit(f"{family}: {metric} over training FLOPs", scored, _metric_curve(metric), family)
            )
    if rows:
        found.append(
            _fit("all families: frontier of loss over training FLOPs (approach 1)", rows, _envelope, "")
        )
    return found


def _fit(name: str, rows: Sequence[Row], fit: Any, family: str) -> Fit:
    runs = len({_run(row) for row in rows})
    try:
        formula, values, law, warnings = fit(rows)
    except UserError as error:
        return Fit(name, "", (), len(rows), runs, refused=str(error), family=family)
    return Fit(name, formula, tuple(values), len(rows), runs, tuple(warnings), law=law, family=family)


def _run(row: Row) -> str:
    return f"{row['member']}/{row['seed']}"


def _column(rows: Sequence[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def _with_intervals(values: Mapping[str, float], law: Any) -> tuple[list[Any], list[str]]:
    try:
        ends = law.bootstrap(RESAMPLES)
    except UserError as error:
        return [(name, value, None, None) for name, value in values.items()], [f"no intervals: {error}"]
    return [(name, value, *ends.get(name, (None, None))) for name, value in values.items()], []


def _parametric(rows: Sequence[Row]) -> tuple[str, list[Any], Any, list[str]]:
    law = laws.fit_parametric(
        _column(rows, "params"), _column(rows, "samples"), _column(rows, "loss"), [_run(row) for row in rows]
    )
    values = {name: getattr(law, name) for name in ("E", "A", "B", "alpha", "beta")}
    shown, more = _with_intervals(values, law)
    formula = f"loss = {law.E:.4g} + {law.A:.4g} / parameters^{law.alpha:.3g} + {law.B:.4g} / samples^{law.beta:.3g}"
    return formula, shown, law, [*law.warnings, *more]


def _isoflop(rows: Sequence[Row]) -> tuple[str, list[Any], Any, list[str]]:
    # Rounded to whole steps, points of one budget differ by up to 1 %; their label does not.
    nominal = [float(row["group_budget"]) for row in rows]
    law = laws.isoflop(_column(rows, "params"), nominal, _column(rows, "loss"))
    shown: list[Any] = [(name, value, None, None) for name, value in law.law.values.items()]
    more: list[str] = []
    if len(law.budgets) > 3:
        shown, more = _with_intervals(law.law.values, law.law)
    return (
        _power("best parameters", law.law.values, "FLOPs"),
        shown,
        law,
        [*law.warnings, *law.law.warnings, *more],
    )


def _envelope(rows: Sequence[Row]) -> tuple[str, list[Any], Any, list[str]]:
    law = laws.envelope(_column(rows, "train_flops"), _column(rows, "loss"), _column(rows, "params"))
    shown, more = _with_intervals(law.law.values, law.law)
    warnings = [
        *law.law.warnings,
        *more,
        "points of the frontier are chosen for being low, so it lies too low",
    ]
    return _power("loss", law.law.values, "FLOPs"), shown, law, warnings


def _metric_curve(metric: str) -> Any:
    def fit(rows: Sequence[Row]) -> tuple[str, list[Any], Any, list[str]]:
        x, y, runs = _column(rows, "train_flops"), _column(rows, metric), [_run(row) for row in rows]
        if rows and max(y) <= 1:
            law = laws.saturating(x, y, "ceiling", runs)
            e, k, b = (law.values[name] for name in ("e", "k", "b"))
            formula = f"{metric} = {1 - e:.4g} - {k:.4g} FLOPs^-{b:.3g}"
        else:
            law = laws.power_law(x, y, runs)
            formula = _power(metric, law.values, "FLOPs")
        shown, more = _with_intervals(law.values, law)
        return formula, shown, law, [*law.warnings, *more]

    return fit


def _power(left: str, values: Mapping[str, float], right: str) -> str:
    return f"{left} = {values['a']:.4g} {right}^{values['b']:.4g}"


def audits(study: Study) -> dict[str, Audit | str]:
    """Family -> each of its sizes predicted from the others, or why that cannot be done."""
    found: dict[str, Audit | str] = {}
    by_family: dict[str, list[Row]] = collections.defaultdict(list)
    for row in endpoints(study):
        by_family[row["family"]].append(row)
    for family, rows in by_family.items():
        try:
            n, d, y = (_column(rows, name) for name in ("params", "samples", "loss"))
            found[family] = audit_lib.leave_one_size_out(n, d, y, [_run(row) for row in rows])
        except UserError as error:
            found[family] = str(error)
    return found
