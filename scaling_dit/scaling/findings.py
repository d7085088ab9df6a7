"""What a study found: answers to its claims in words, fitted laws with what they rest on, and its table by member."""

import collections
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scaling_dit.errors import UserError
from scaling_dit.scaling import audit as audit_lib
from scaling_dit.scaling import claims as claims_lib
from scaling_dit.scaling import laws, table
from scaling_dit.scaling.audit import Audit
from scaling_dit.scaling.claims import SUPPORTED, UNDECIDED, Answer, Claim, RankStability
from scaling_dit.scaling.spec import LOSS, StudySpec
from scaling_dit.scaling.study import Study
from scaling_dit.scaling.table import Row

LEVEL = 0.95
# Bootstrap samples of the intervals of laws.
RESAMPLES = 200
# Members that an order is made of.
RANKED = 40


@dataclasses.dataclass(frozen=True)
class Answered:
    """A claim of a study with what its runs say.

    Attributes:
      claim: as registered. metric: the column it compares.
      answer: None where too few of its runs have finished.
      sentence: the answer in words.
      after: runs that had finished when the claim was registered; 0 for one made beforehand.
    """

    claim: Claim
    metric: str
    answer: Answer | None
    sentence: str
    after: int


def answers(study: Study) -> list[Answered]:
    """The study's claims, answered together: p-values are corrected for all of them."""
    spec = study.spec
    ready, waiting = [], dict[str, str]()
    values: dict[str, list[float]] = {}
    for claim in spec.claims:
        metric = spec.metric_of(claim)
        by_seed = {side: _by_seed(study.rows, side, metric) for side in (claim.a, claim.b)}
        shared = set(by_seed[claim.a]) & set(by_seed[claim.b])
        few = {side: found for side, found in by_seed.items() if len(found) < 2}
        if few or (claim.paired and len(shared) < 2):
            counts = " and ".join(f"{len(found)} of {side}" for side, found in by_seed.items())
            waiting[claim.name] = f"Not answered yet: {counts} have finished, and it needs 2 seeds of each."
            continue
        keys = {}
        for side, found in by_seed.items():
            # A name of its own for each claim, because pairs hold only seeds that both sides have.
            keys[side] = f"{side} ({claim.name})"
            chosen = sorted(shared) if claim.paired else sorted(found)
            values[keys[side]] = [found[seed] for seed in chosen]
        ready.append(dataclasses.replace(claim, a=keys[claim.a], b=keys[claim.b]))
    found = {a.claim.name: a for a in claims_lib.answer(ready, values, LEVEL)} if ready else {}
    return [
        _answered(study, claim, found.get(claim.name), waiting.get(claim.name, "")) for claim in spec.claims
    ]


def _answered(study: Study, claim: Claim, answer: Answer | None, waiting: str) -> Answered:
    metric, after = study.spec.metric_of(claim), study.registered.get(claim.name, 0)
    if answer is None:
        return Answered(claim, metric, None, waiting, after)
    answer = dataclasses.replace(answer, claim=claim)
    said = sentence(answer, metric)
    if stopped := _stopped(study, claim):
        said += f" Left out, for their loss was not finite or kept spiking: {', '.join(stopped)}."
    return Answered(claim, metric, answer, said, after)


def _stopped(study: Study, claim: Claim) -> list[str]:
    """The runs of a claim's members that ended early; without them its answer favours those that ran well."""
    return [
        f"{row['member']} seed {row['seed']}"
        for row in study.measured
        if row["status"] == table.STOPPED and row["member"] in (claim.a, claim.b)
    ]


def sentence(answer: Answer, metric: str) -> str:
    """An answer in words, with all that a reader needs to judge it."""
    claim, (low, high) = answer.claim, answer.interval
    more = "more" if answer.effect >= 0 else "less"
    asked = f", where the claim asks for more than {claim.margin:g}" if claim.margin else ""
    shown = (
        f"{claim.a} has {abs(answer.effect):.3g} {more} {metric} than {claim.b}{asked} "
        f"({LEVEL:.0%} interval of the difference {low:.3g} to {high:.3g}; {answer.seeds[0]} and {answer.seeds[1]} "
        f"training seeds; p {_p(answer.p_holm)} after Holm's correction"
    )
    if answer.verdict == UNDECIDED:
        return f"Undecided: {shown}; a difference of {answer.detectable:.3g} would have been detected)."
    return f"{answer.verdict.capitalize()}: {shown})."


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def headline(study: Study, answered: Sequence[Answered]) -> str:
    """The answer to the study's question in one sentence, made from its tests."""
    done = len({(row["member"], row["seed"]) for row in table.last_points(study.rows)})
    if not done:
        return f"No run of {study.runs} has finished yet."
    first = next((one for one in answered if one.answer is not None), None)
    if first is not None:
        of = sum(one.answer is not None and one.answer.verdict == SUPPORTED for one in answered)
        tail = f" Of {len(answered)} claims {of} are supported." if len(answered) > 1 else ""
        name = first.claim.name
        return f"{name[0].upper()}{name[1:]}: {first.sentence}{tail}"
    metric = study.spec.metrics[0] if study.spec.metrics else LOSS
    ranked = ranking(study, metric)
    if ranked is None:
        return f"{done} of {study.runs} runs have finished; an order of members needs 2 seeds of 2 members."
    low, high = ranked.interval
    return (
        f"{ranked.order[0]} is best by {metric} of {len(ranked.order)} members, above the next with probability "
        f"{ranked.above[0, 1]:.2f}; Kendall's tau of the order over seeds is {ranked.tau:.2f} "
        f"(90 % interval {low:.2f} to {high:.2f})."
    )


# Numbers of seeds, and differences in spreads of a training seed, of the table of power.
POWER_SEEDS = (2, 3, 5, 8, 12)
POWER_DIFFERENCES = (0.5, 1.0, 2.0, 3.0, 4.0)


def spread(study: Study, metric: str) -> float | None:
    """Pooled standard deviation of a metric over the training seeds of a member; None without two seeds of any."""
    squares = freedom = 0.0
    for member in study.spec.members:
        values = list(_by_seed(study.rows, member.name, metric).values())
        if len(values) >= 2:
            squares += statistics.variance(values) * (len(values) - 1)
            freedom += len(values) - 1
    return math.sqrt(squares / freedom) if freedom and squares else None


def power_table(study: Study, metric: str) -> tuple[float, list[tuple[float, list[float]]]] | None:
    """(spread of a training seed, [(difference, power with each of POWER_SEEDS seeds), ...]); None without a spread."""
    found = spread(study, metric)
    if found is None:
        return None
    rows = [
        (share * found, [claims_lib.power(share * found, found, seeds) for seeds in POWER_SEEDS])
        for share in POWER_DIFFERENCES
    ]
    return found, rows


def ranking(study: Study, metric: str) -> RankStability | None:
    """The order of the best RANKED members by a metric; losses are best when low.

    None with fewer than two members of two seeds.
    """
    sign = -1.0 if metric.startswith(LOSS) else 1.0
    values = {}
    for member in study.spec.members:
        found = _by_seed(study.rows, member.name, metric)
        if len(found) >= 2:
            values[member.name] = [sign * value for value in found.values()]
    # Time and memory of the bootstrap grow with the square of members.
    best = sorted(values, key=lambda name: -statistics.fmean(values[name]))[:RANKED]
    return claims_lib.rank_stability({name: values[name] for name in best}) if len(best) >= 2 else None


def _by_seed(rows: Sequence[Row], member: str, metric: str) -> dict[int, float]:
    """Seed -> the metric at the last step of each finished run of a member."""
    return {
        row["seed"]: row[metric]
        for row in table.last_points(rows)
        if row["member"] == member and row.get(metric) is not None and math.isfinite(row[metric])
    }


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


def endpoints(rows: Sequence[Row]) -> list[Row]:
    """The points that stand for runs of their own, with a finite loss; see `table.run_rows`."""
    return [row for row in rows if row["endpoint"] and row["loss"] is not None and math.isfinite(row["loss"])]


def fits(study: Study) -> list[Fit]:
    """All laws that the study's points may carry, those that cannot be fitted included, with the reason."""
    rows = endpoints(study.rows)
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
        for metric in study.spec.metrics[:1]:
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
    for row in endpoints(study.rows):
        by_family[row["family"]].append(row)
    for family, rows in by_family.items():
        try:
            found[family] = audit_lib.leave_one_size_out(
                *(_column(rows, name) for name in ("params", "samples", "loss")), [_run(row) for row in rows]
            )
        except UserError as error:
            found[family] = str(error)
    return found


def by_member(study: Study) -> list[dict[str, Any]]:
    """One row for each member at its last step: costs, and mean, standard deviation and number of seeds of each score.

    Keys: "member", "family", "params", "macs_total", "steps", "samples", "train_flops", "inference_flops", "seeds", and
    for each score "NAME" and "NAME_sd", None without runs (for the deviation, with fewer than two).
    """
    found = []
    last = table.last_points(study.rows)
    for member in study.spec.members:
        rows = [row for row in last if row["member"] == member.name]
        if not rows:
            continue
        costs = ("family", "params", "macs_total", "steps", "samples", "train_flops", "inference_flops")
        one: dict[str, Any] = {"member": member.name} | {name: rows[0][name] for name in costs}
        one["seeds"] = len(rows)
        for name in score_columns(study.spec, rows):
            values = [row[name] for row in rows if row.get(name) is not None]
            one[name] = statistics.fmean(values) if values else None
            one[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        found.append(one)
    return found


def score_columns(spec: StudySpec, rows: Sequence[Row]) -> list[str]:
    """The columns that hold scores: "loss", and each metric's scalars without their ends."""
    names = table.columns_of(rows)
    scalars = [name for name in names if any(name == m or name.startswith(f"{m}_") for m in spec.metrics)]
    return [LOSS, *(name for name in scalars if not name.endswith(("_low", "_high")))]
