"""The data that the figures of a study's report show, by the names that their specifications have for them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling_dit.scaling import fitted, table
from scaling_dit.scaling.curves import Curve
from scaling_dit.scaling.findings import Answered
from scaling_dit.scaling.fitted import Fit
from scaling_dit.scaling.spec import LOSS, is_loss
from scaling_dit.scaling.study import Study

Data = dict[str, list[dict[str, Any]]]
# Members in figures that have a row for each.
SHOWN = 40


def ranked(study: Study) -> list[str]:
    """The members of figures with a row for each, the best first: SHOWN of them by the study's score at most."""
    metric = study.columns.own
    means = _means(table.last_points(study.rows), (metric,))
    sign = 1 if study.columns.lower_is_better(metric) else -1
    scored = [one for one in means if one[metric] is not None]
    best = [one["member"] for one in sorted(scored, key=lambda one: sign * one[metric])]
    # Those without a score yet come last.
    return list(dict.fromkeys([*best, *(member.name for member in study.spec.members)]))[:SHOWN]


def scored(study: Study) -> list[str]:
    """The column of each metric that has values, in the order of the metrics."""
    columns = [study.columns.of_metric(metric) for metric in study.spec.metrics]
    return [name for name in columns if any(row.get(name) is not None for row in study.rows)]


def data_of(study: Study, answered: Sequence[Answered], laws: Sequence[Fit]) -> Data:
    """All data that the figures name, numbers rounded to six digits."""
    rows, chosen = study.rows, set(ranked(study))
    metrics = scored(study)
    kept = ("member", "seed", "family", "step", "train_flops", "params", "inference_flops", LOSS, *metrics)
    points = [{name: row.get(name) for name in kept} for row in rows]
    last = table.last_points(rows)
    ends = [{name: row.get(name) for name in kept} for row in last]
    best = [row for row in ends if row["member"] in chosen]
    last = [row for row in last if row["member"] in chosen]
    bins = sorted({name for row in last for name in row if name != LOSS and is_loss(name)})
    by_bin = [
        {
            "member": one["member"],
            "family": one["family"],
            "timesteps": name.removeprefix("loss_t"),
            "loss": value,
        }
        for one in _means(last, bins)
        for name in bins
        if (value := one[name]) is not None
    ]
    kinds = [name for name in study.columns.scores(last) if name not in (LOSS, *metrics)]
    by_type = [
        {"member": one["member"], "type": name, "score": one[name]}
        for one in _means(last, kinds)
        for name in kinds
        if one[name] is not None
    ]
    claims = [
        {
            "claim": one.claim.name, "effect": one.answer.effect, "low": one.answer.interval[0],
            "high": one.answer.interval[1], "verdict": one.answer.verdict, "margin": one.claim.margin,
        }
        for one in answered
        if one.answer is not None
    ]  # fmt: skip
    guided = [
        {name: row[name] for name in ("member", "seed", "guidance", "scalar", "value")}
        for row in study.scores
        if row["member"] in chosen
        and (row["metric"], row["scalar"]) == (study.spec.metrics[0], study.columns.own)
        and row["step"] == study.spec.member(row["member"]).config.steps
    ]
    measured = [
        {name: row[name] for name in ("member", "seed", "goodput", "images_per_second")}
        | {"minutes": row["wall_seconds"] / 60}
        for row in study.measured
        if row["member"] in chosen
    ]
    data = {
        "points": points, "ends": ends, "best": best, "bins": by_bin, "types": by_type, "claims": claims,
        "guided": guided, "measured": measured, "curves": _curves(laws), "frontier": _frontier(laws),
    }  # fmt: skip
    return {name: [_rounded(row) for row in part] for name, part in data.items()}


def _means(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Means over seeds of some columns, for each member."""
    by: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by.setdefault(row["member"], []).append(row)
    found = []
    for member, some in by.items():
        one: dict[str, Any] = {"member": member, "family": some[0]["family"]}
        for name in names:
            values = [row[name] for row in some if row.get(name) is not None]
            one[name] = float(np.mean(values)) if values else None
        found.append(one)
    return found


def _curves(laws: Sequence[Fit]) -> list[dict[str, Any]]:
    """Points along each fitted law of the metric, with the ends of its interval."""
    rows = []
    for fit in laws:
        law = fit.law
        if not isinstance(law, Curve) or not fit.family or "over training FLOPs" not in fit.name:
            continue
        # Half an order of magnitude beyond the points, where a reader sees how fast the interval opens.
        x = np.geomspace(*_range_of(law), 40)
        low, high = law.band(x, fitted.RESAMPLES // 2)
        rows += [
            {"family": fit.family, "train_flops": a, "y": b, "low": c, "high": d}
            for a, b, c, d in zip(x, law(x), low, high, strict=True)
        ]
    return rows


def _range_of(law: Curve) -> tuple[float, float]:
    low, high = law.span
    return low, high * 10**0.5


def _frontier(laws: Sequence[Fit]) -> list[dict[str, Any]]:
    law = next((fit.law for fit in laws if "frontier" in fit.name and fit.law is not None), None)
    if law is None:
        return []
    return [
        {"train_flops": float(c), LOSS: float(y), "fit": float(law.law(c))}
        for c, y in zip(law.flops, law.losses, strict=True)
    ]


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: float(f"{value:.6g}") if isinstance(value, float) and np.isfinite(value) else
        (None if isinstance(value, float) else value)
        for key, value in row.items()
    }  # fmt: skip
